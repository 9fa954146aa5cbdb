#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"

/// The fused operations of the decoder, forward and backward written out. Inputs are fp32, fp64 or
/// bf16; "stat" below means fp64 for fp64 inputs and fp32 otherwise, and is the type of statistics,
/// of routing weights and of gradients of small parameters. On the CPU fp32 and fp64 run vectorised
/// kernels whose results do not depend on the number of threads; every other device and type runs
/// a composite of ATen operators with the same results up to rounding. Rows (dimension 0) may have
/// any stride, the last dimension must be contiguous; sizes of zero are legal everywhere.
/// All functions are thread safe and throw InvalidArgument, naming the operation, on shapes or
/// types that do not fit together.
namespace meshloom::model::ops {

// ---- Which kernels run -------------------------------------------------------------------------

/// Caps the CPU kernels of this process: "composite" (ATen operators only), "baseline", "avx2",
/// "avx512"; empty or anything above what the machine has takes the best there is. Meant to be
/// called once, with Environment::cpu, before training; tests call it to compare the levels.
/// @throws InvalidArgument  another name.
MESHLOOM_API void set_cpu_level(std::string_view level);
/// The level in use.
[[nodiscard]] MESHLOOM_API std::string cpu_level();
/// All levels that this machine can run, lowest first, "composite" included.
[[nodiscard]] MESHLOOM_API std::vector<std::string> cpu_levels();

// ---- Matrix products ---------------------------------------------------------------------------

/// y = x w^T (+ bias). @param x [T, in] @param w [out, in] @param bias [out] or undefined.
[[nodiscard]] MESHLOOM_API at::Tensor matmul_nt(const at::Tensor& x, const at::Tensor& w,
                                                const at::Tensor& bias = {});
/// dx = dy w. @param dy [T, out] @param w [out, in].
[[nodiscard]] MESHLOOM_API at::Tensor matmul_nn(const at::Tensor& dy, const at::Tensor& w);
/// The same into rows that are there: y [T, out], dx [T, in].
MESHLOOM_API void matmul_nt_out(at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                                const at::Tensor& bias = {});
MESHLOOM_API void matmul_nn_out(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w);
/// y += x w^T: an output projection added to the residual stream, or a partial sum.
MESHLOOM_API void matmul_nt_add_(at::Tensor& y, const at::Tensor& x, const at::Tensor& w);
/// dx += dy w.
MESHLOOM_API void matmul_nn_add_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w);
/// grad += dy^T x. @param grad [out, in], type of dy or stat @param dy [T, out] @param x [T, in].
MESHLOOM_API void matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy, const at::Tensor& x);

/// The same over rows sorted by expert: rows[e] rows use w[e]. @param w [E, out, in] @param rows
/// sums to T.
[[nodiscard]] MESHLOOM_API at::Tensor grouped_matmul_nt(const at::Tensor& x, const at::Tensor& w,
                                                        std::span<const std::int64_t> rows);
[[nodiscard]] MESHLOOM_API at::Tensor grouped_matmul_nn(const at::Tensor& dy, const at::Tensor& w,
                                                        std::span<const std::int64_t> rows);
/// grad[e] += dy[rows of e]^T x[rows of e]. @param grad [E, out, in].
MESHLOOM_API void grouped_matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy,
                                         const at::Tensor& x, std::span<const std::int64_t> rows);

/// Sum over rows, the gradient of a bias. @param x [T, N] @returns [N], stat.
[[nodiscard]] MESHLOOM_API at::Tensor column_sum(const at::Tensor& x);

// ---- Normalisation -----------------------------------------------------------------------------

struct NormOutput {
  at::Tensor y;     ///< [T, H], type of x
  at::Tensor rstd;  ///< [T], stat: 1 / sqrt(mean(x^2) + eps)
};

/// y = w * (x * rstd). @param x [T, H] @param weight [H].
[[nodiscard]] MESHLOOM_API NormOutput rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                               double eps);
/// x += residual, then the norm of the sum.
[[nodiscard]] MESHLOOM_API NormOutput add_rms_norm_(at::Tensor& x, const at::Tensor& residual,
                                                    const at::Tensor& weight, double eps);
/// dx += gradient of the norm: dx is the gradient that reaches x by the residual path (zeros if
/// there is none). @param dy, x, dx [T, H] @returns gradient of weight, [H], stat.
MESHLOOM_API at::Tensor rms_norm_backward_(at::Tensor& dx, const at::Tensor& dy,
                                           const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& rstd);

// ---- Rotary embedding, q/k norm ----------------------------------------------------------------

/// Rows of a fused projection: q heads, then k heads, then v heads; (Hq + 2 Hkv) * D numbers.
struct QkvLayout {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  [[nodiscard]] std::int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

/// cos and sin of a batch's positions, [T, R / 2] each, stat: R <= D numbers of a head rotate, in
/// Hugging Face's convention (number i with number i + R / 2).
struct RopeTables {
  at::Tensor cos;
  at::Tensor sin;
};

/// @param positions  int64 [T] @param inverse_frequencies [R / 2], stat: angles are their products
/// in this type, as transformers has it @param scaling  factor on cos and sin (yarn's).
[[nodiscard]] MESHLOOM_API RopeTables rope_tables(const at::Tensor& positions,
                                                  const at::Tensor& inverse_frequencies,
                                                  double scaling);

/// Rotates the q and k heads of qkv [T, layout.width()] in place.
MESHLOOM_API void rope_(at::Tensor& qkv, const QkvLayout& layout, const RopeTables& tables);
/// The way back: dqkv [T, layout.width()] from dq [T, Hq, D], dk and dv [T, Hkv, D], which may be
/// of type stat. @param dtype  of the result.
[[nodiscard]] MESHLOOM_API at::Tensor rope_backward(const at::Tensor& dq, const at::Tensor& dk,
                                                    const at::Tensor& dv, const RopeTables& tables,
                                                    at::ScalarType dtype);

/// Rotates every head of x [T, H, R] in place by tables of R / 2: number i with number i + R / 2,
/// or neighbours (2i, 2i + 1) where `interleaved`. `back` turns the other way round, which takes a
/// gradient home. @param x  any row and head stride.
MESHLOOM_API void rotate_(at::Tensor& x, const RopeTables& tables, bool interleaved,
                          bool back = false);

struct QkOutput {
  at::Tensor q;  ///< [T, Hq, D]
  at::Tensor k;  ///< [T, Hkv, D]
};

/// RMS norm of every q and k head (weights [D]), then the rotation; qkv is not modified, v is read
/// from it.
[[nodiscard]] MESHLOOM_API QkOutput qk_norm_rope(const at::Tensor& qkv, const QkvLayout& layout,
                                                 const at::Tensor& q_weight,
                                                 const at::Tensor& k_weight, double eps,
                                                 const RopeTables& tables);
struct QkNormGradients {
  at::Tensor dqkv;      ///< [T, layout.width()], type of qkv
  at::Tensor q_weight;  ///< [D], stat
  at::Tensor k_weight;
};
/// @param qkv  the input of qk_norm_rope.
[[nodiscard]] MESHLOOM_API QkNormGradients qk_norm_rope_backward(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const at::Tensor& qkv,
    const at::Tensor& q_weight, const at::Tensor& k_weight, double eps, const RopeTables& tables);

// ---- SwiGLU ------------------------------------------------------------------------------------

/// silu(gate) * up. @param gate_up [T, 2 I], gate first @returns [T, I].
[[nodiscard]] MESHLOOM_API at::Tensor swiglu(const at::Tensor& gate_up);

/// In place: gate_up becomes its own gradient, and dy becomes swiglu(gate_up), which the weight
/// gradient of the projection after it wants. Saves two of the largest buffers of a layer.
/// @param dy [T, I]: the gradient of swiglu's result @param gate_up [T, 2 I]
/// @param weights  [T] in stat, or undefined: rows were scaled by them after the projection. dy is
///   then the gradient before the scaling, and both results come out scaled.
/// @returns gradient of weights, [T]; undefined without them.
MESHLOOM_API at::Tensor swiglu_backward_(at::Tensor& dy, at::Tensor& gate_up,
                                         const at::Tensor& weights = {});

// ---- Router ------------------------------------------------------------------------------------

struct RouterOptions {
  std::int64_t top_k = 1;
  bool normalize = true;  ///< chosen weights sum to `scale`
  RouterScore score = RouterScore::kSoftmax;
  double scale = 1.0;  ///< of the weights
  /// Experts come in `groups` of neighbours. With more than one, a token chooses among those of the
  /// `top_groups` groups whose two best experts have the largest sum.
  std::int64_t groups = 1;
  std::int64_t top_groups = 1;
};

struct RouterOutput {
  at::Tensor probabilities;  ///< [T, E], stat: the scores, whose rows sum to one with softmax only
  at::Tensor weights;        ///< [T, k], stat
  at::Tensor experts;  ///< int64 [T, k], by falling probability + bias, ties to the lower index
  at::Tensor lse;      ///< [T], stat: logsumexp of the logits
  double z_sum = 0.0;  ///< sum of lse^2
};

/// @param logits [T, E]
/// @param bias   [E] or undefined: added to the probabilities for the choice alone; weights are
///   those of the probabilities themselves, and no gradient flows into it
/// @throws InvalidArgument  groups that do not divide the experts, or hold fewer than two each;
///   fewer experts in the chosen groups than top_k.
[[nodiscard]] MESHLOOM_API RouterOutput route(const at::Tensor& logits,
                                              const RouterOptions& options,
                                              const at::Tensor& bias = {});

/// The probabilities, each row divided by its sum where scores are sigmoid: what balance losses are
/// made of. @returns [T, E], stat.
[[nodiscard]] MESHLOOM_API at::Tensor normalized_probabilities(const RouterOutput& forward,
                                                               const RouterOptions& options);

/// @param dweights  [T, k] @param forward  what route returned
/// @param dprobabilities  further gradient of the normalised probabilities: undefined, [1, E], or
///   [G, E] with group_rows [G]: row g is that of each of the next group_rows[g] tokens (a document
///   slice)
/// @param z_weight  gradient of the loss by z_sum; 0 for none
/// @returns dlogits [T, E], in `dtype`.
/// @throws NotSupported  a z-loss with sigmoid scores.
[[nodiscard]] MESHLOOM_API at::Tensor route_backward(const at::Tensor& dweights,
                                                     const RouterOutput& forward,
                                                     const RouterOptions& options,
                                                     const at::Tensor& dprobabilities,
                                                     std::span<const std::int64_t> group_rows,
                                                     double z_weight, at::ScalarType dtype);

// ---- Moving rows to experts and back -----------------------------------------------------------

struct ExpertOrder {
  std::vector<std::int64_t> rows;  ///< rows of each expert
  at::Tensor source;  ///< int64 [T * k]: t * k + j of each row, sorted by expert, stable
};
/// @param experts  int64 [T, k], each in [0, expert_count).
[[nodiscard]] MESHLOOM_API ExpertOrder sort_by_expert(const at::Tensor& experts,
                                                      std::int64_t expert_count);

/// Row r is x[source[r] / k]. @param x [T, H] @param source  int64 [R].
[[nodiscard]] MESHLOOM_API at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& source,
                                                  std::int64_t k);
/// dx[t] = sum of the rows of t, in order of j; pairs that are not in `source` count as zero, none
/// may be there twice. @param drows [R, H] @returns [tokens, H].
[[nodiscard]] MESHLOOM_API at::Tensor gather_rows_backward(const at::Tensor& drows,
                                                           const at::Tensor& source,
                                                           std::int64_t tokens, std::int64_t k);
/// out[t] = sum over j of weights[t, j] * y[row of (t, j)], in order of j.
/// @param y [R, H] @param weights [T, k] (y's type or stat) @returns [T, H].
[[nodiscard]] MESHLOOM_API at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& source,
                                                   const at::Tensor& weights);

// ---- Embedding ---------------------------------------------------------------------------------

/// weight[ids[t]]. @param weight [V, H] @param ids  int64 [T] @returns [T, H].
[[nodiscard]] MESHLOOM_API at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids);
/// grad[ids[t]] += dy[t], in order of t. @param grad [V, H].
MESHLOOM_API void embedding_backward_(at::Tensor& grad, const at::Tensor& ids,
                                      const at::Tensor& dy);

// ---- Linear + cross-entropy --------------------------------------------------------------------

/// Takes one chunk of (dlogits [n, V], hidden rows [n, H]) and adds dlogits^T hidden to the weight
/// gradient. Both tensors are only valid during the call unless the callee keeps a reference.
using LogitGradientSink =
    std::function<void(const at::Tensor& dlogits, const at::Tensor& hidden_rows)>;

struct CrossEntropyOutput {
  double loss_sum = 0.0;    ///< unweighted sum of token losses
  std::int64_t tokens = 0;  ///< rows with a label
  at::Tensor dhidden;       ///< [T, H], scaled by loss_weight; rows without a label are zero
};

/// Cross-entropy of hidden weight^T against labels, with its gradients, in chunks of rows: full
/// logits are never there at once. Rows with label kIgnoreLabel are left out of everything.
/// @param hidden [T, H] @param weight [V, H] @param labels int64 [T]
/// @param loss_weight  of one loss token; scales the gradients, not loss_sum
/// @throws InvalidArgument  a label outside [0, V).
[[nodiscard]] MESHLOOM_API CrossEntropyOutput
linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                     double loss_weight, const LogitGradientSink& weight_gradient);
/// The loss alone (dhidden undefined).
[[nodiscard]] MESHLOOM_API CrossEntropyOutput linear_cross_entropy_loss(const at::Tensor& hidden,
                                                                        const at::Tensor& weight,
                                                                        const at::Tensor& labels);

}  // namespace meshloom::model::ops
