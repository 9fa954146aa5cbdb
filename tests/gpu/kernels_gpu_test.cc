// The composite operations on a CUDA device, in every type, against the same ones in fp64 on the
// CPU, whose own truth is autograd (kernels_test).
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "meshloom/model/attention_kernel.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/ops.h"

namespace meshloom::model {
namespace {

// Largest difference over the largest element expected (at least 1, the size of the inputs): sums
// of some hundred products in another order, rounded to the type once or a few times.
constexpr double kTolerance64 = 1e-12;
constexpr double kTolerance32 = 3e-5;
constexpr double kTolerance16 = 4e-2;

const at::Device kDevice(at::kCUDA, 0);

double tolerance(at::ScalarType type) {
  if (type == at::kDouble) return kTolerance64;
  return type == at::kFloat ? kTolerance32 : kTolerance16;
}

/// Brings inputs to where an operation runs: the device in the type, or the CPU in fp64.
class Place {
 public:
  Place(at::Device device, at::ScalarType type) : device_(device), type_(type) {}

  /// A floating-point input, rounded to the type under test in both places.
  [[nodiscard]] at::Tensor real(const at::Tensor& x) const { return x.to(device_, type_); }
  [[nodiscard]] at::Tensor index(const at::Tensor& x) const { return x.to(device_); }
  /// The type of statistics.
  [[nodiscard]] at::ScalarType stat() const {
    return type_ == at::kDouble ? at::kDouble : at::kFloat;
  }
  [[nodiscard]] at::ScalarType type() const { return type_; }
  [[nodiscard]] at::Tensor statistic(const at::Tensor& x) const { return x.to(device_, stat()); }
  [[nodiscard]] at::TensorOptions stat_options() const {
    return at::TensorOptions().device(device_).dtype(stat());
  }

 private:
  at::Device device_;
  at::ScalarType type_;
};

using Results = std::vector<at::Tensor>;
/// Draws inputs rounded to a type, and runs an operation on them in a place.
using Operation = std::function<std::function<Results(const Place&)>(at::ScalarType type)>;

at::Tensor draw(at::IntArrayRef sizes, at::ScalarType type) { return at::randn(sizes).to(type); }

void expect_same(const char* what, const Operation& operation) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto run = operation(type);
    const Results given = run(Place(kDevice, type));
    const Results expected = run(Place(at::kCPU, at::kDouble));
    ASSERT_EQ(given.size(), expected.size());
    for (std::size_t i = 0; i < given.size(); ++i) {
      const std::string name =
          std::string(what) + ", result " + std::to_string(i) + ", " + c10::toString(type);
      EXPECT_TRUE(given[i].is_cuda()) << name;
      ASSERT_EQ(given[i].sizes(), expected[i].sizes()) << name;
      if (expected[i].numel() == 0) continue;
      const at::Tensor a = given[i].to(at::kCPU, at::kDouble);
      const at::Tensor b = expected[i].to(at::kDouble);
      const double scale = std::max(1.0, b.abs().max().item<double>());
      EXPECT_LE((a - b).abs().max().item<double>() / scale, tolerance(type)) << name;
    }
  }
}

TEST(KernelsOnGpu, MatrixProducts) {
  expect_same("matmul", [](at::ScalarType type) {
    const at::Tensor x = draw({37, 48}, type);
    const at::Tensor w = draw({24, 48}, type);
    const at::Tensor bias = draw({24}, type);
    const at::Tensor dy = draw({37, 24}, type);
    return [=](const Place& place) -> Results {
      const at::Tensor px = place.real(x);
      const at::Tensor pw = place.real(w);
      const at::Tensor pdy = place.real(dy);
      at::Tensor grad = at::zeros({24, 48}, place.stat_options());
      ops::matmul_tn_add_(grad, pdy, px);
      return {ops::matmul_nt(px, pw, place.real(bias)), ops::matmul_nn(pdy, pw), grad,
              ops::column_sum(pdy)};
    };
  });
}

TEST(KernelsOnGpu, GroupedMatrixProducts) {
  expect_same("grouped matmul", [](at::ScalarType type) {
    const at::Tensor x = draw({37, 16}, type);
    const at::Tensor w = draw({3, 24, 16}, type);
    const at::Tensor dy = draw({37, 24}, type);
    return [=](const Place& place) -> Results {
      const std::vector<std::int64_t> rows = {20, 0, 17};
      at::Tensor grad = at::zeros({3, 24, 16}, place.stat_options());
      ops::grouped_matmul_tn_add_(grad, place.real(dy), place.real(x), rows);
      return {ops::grouped_matmul_nt(place.real(x), place.real(w), rows),
              ops::grouped_matmul_nn(place.real(dy), place.real(w), rows), grad};
    };
  });
}

TEST(KernelsOnGpu, NormForwardAndBackward) {
  expect_same("rms_norm", [](at::ScalarType type) {
    const at::Tensor x = draw({41, 96}, type);
    const at::Tensor weight = draw({96}, type);
    const at::Tensor dy = draw({41, 96}, type);
    return [=](const Place& place) -> Results {
      const at::Tensor px = place.real(x);
      const ops::NormOutput out = ops::rms_norm(px, place.real(weight), 1e-6);
      at::Tensor dx = at::zeros_like(px);
      const at::Tensor dweight =
          ops::rms_norm_backward_(dx, place.real(dy), px, place.real(weight), out.rstd);
      return {out.y, out.rstd, dx, dweight};
    };
  });
}

TEST(KernelsOnGpu, RotaryEmbeddingAndHeadNorm) {
  expect_same("qk_norm_rope", [](at::ScalarType type) {
    const ops::QkvLayout layout{.heads = 4, .kv_heads = 2, .head_dim = 16};
    const at::Tensor qkv = draw({33, layout.width()}, type);
    const at::Tensor q_weight = draw({16}, type);
    const at::Tensor k_weight = draw({16}, type);
    const at::Tensor dq = draw({33, 4, 16}, type);
    const at::Tensor dkv = draw({33, 2, 16}, type);
    return [=](const Place& place) -> Results {
      const at::Tensor frequencies = at::full({8}, 0.0, at::kDouble);
      frequencies.copy_(at::arange(8, at::kDouble).neg().div(2.0).exp());
      const ops::RopeTables tables = ops::rope_tables(place.index(at::arange(33, at::kLong)),
                                                      place.statistic(frequencies), 1.0);
      const at::Tensor input = place.real(qkv);
      const ops::QkOutput out = ops::qk_norm_rope(input, layout, place.real(q_weight),
                                                  place.real(k_weight), 1e-6, tables);
      const ops::QkNormGradients back =
          ops::qk_norm_rope_backward(place.real(dq), place.real(dkv), place.real(dkv), input,
                                     place.real(q_weight), place.real(k_weight), 1e-6, tables);
      at::Tensor rotated = input.clone();
      ops::rope_(rotated, layout, tables);
      return {out.q,
              out.k,
              back.dqkv,
              back.q_weight,
              back.k_weight,
              rotated,
              ops::rope_backward(place.real(dq), place.real(dkv), place.real(dkv), tables,
                                 place.type())};
    };
  });
}

TEST(KernelsOnGpu, SwigluForwardAndBackward) {
  expect_same("swiglu", [](at::ScalarType type) {
    const at::Tensor gate_up = draw({29, 64}, type);
    const at::Tensor dy = draw({29, 32}, type);
    const at::Tensor weights = at::rand({29});
    return [=](const Place& place) -> Results {
      const at::Tensor y = ops::swiglu(place.real(gate_up));
      at::Tensor grad = place.real(gate_up).clone();
      at::Tensor again = place.real(dy).clone();
      const at::Tensor dweights = ops::swiglu_backward_(again, grad, place.statistic(weights));
      return {y, grad, again, dweights};
    };
  });
}

TEST(KernelsOnGpu, RouterAndRowsToExpertsAndBack) {
  expect_same("route", [](at::ScalarType type) {
    // Scores far apart in every type: ties are another test's.
    const at::Tensor logits =
        (at::rand({57, 8}).argsort(false, 1, false).to(at::kDouble) - 3.5).to(type);
    const at::Tensor dweights = at::randn({57, 2});
    const at::Tensor x = draw({57, 24}, type);
    return [=](const Place& place) -> Results {
      const ops::RouterOptions options{
          .top_k = 2, .normalize = true, .score = RouterScore::kSoftmax};
      const ops::RouterOutput out = ops::route(place.real(logits), options);
      const at::Tensor dlogits =
          ops::route_backward(place.statistic(dweights), out, options, {}, {}, 0.1, place.type());
      const ops::ExpertOrder order = ops::sort_by_expert(out.experts, 8);
      const at::Tensor rows = ops::gather_rows(place.real(x), order.source, 2);
      const at::Tensor counts = at::full({1}, static_cast<double>(order.rows[3]));
      return {out.probabilities,
              out.weights,
              out.experts,
              out.lse,
              dlogits,
              order.source,
              place.statistic(counts),
              rows,
              ops::gather_rows_backward(rows, order.source, 57, 2),
              ops::combine_rows(rows, order.source, out.weights)};
    };
  });
}

TEST(KernelsOnGpu, EmbeddingAndFusedCrossEntropy) {
  expect_same("cross entropy", [](at::ScalarType type) {
    const at::Tensor hidden = draw({70, 32}, type);
    const at::Tensor weight = draw({101, 32}, type) * 0.2;
    at::Tensor labels = at::randint(101, {70}, at::kLong);
    labels.slice(0, 10, 20).fill_(kIgnoreLabel);
    const at::Tensor ids = at::randint(101, {70}, at::kLong);
    return [=](const Place& place) -> Results {
      at::Tensor grad = at::zeros({101, 32}, place.stat_options());
      const ops::CrossEntropyOutput out = ops::linear_cross_entropy(
          place.real(hidden), place.real(weight), place.index(labels), 1.0 / 60.0,
          [&](const at::Tensor& dlogits, const at::Tensor& rows) {
            ops::matmul_tn_add_(grad, dlogits, rows);
          });
      EXPECT_EQ(out.tokens, 60);
      at::Tensor embedded = at::zeros({101, 32}, place.stat_options());
      ops::embedding_backward_(embedded, place.index(ids), place.real(hidden));
      return {place.statistic(at::full({1}, out.loss_sum / 60.0)), out.dhidden, grad,
              ops::embedding(place.real(weight), place.index(ids)), embedded};
    };
  });
}

TEST(KernelsOnGpu, AttentionInBlocksMergesToTheWhole) {
  for (const std::int64_t window : {0, 7}) {
    expect_same("attention", [&](at::ScalarType type) {
      const at::Tensor q = draw({40, 4, 16}, type);
      const at::Tensor k = draw({40, 2, 16}, type);
      const at::Tensor v = draw({40, 2, 16}, type);
      const at::Tensor dout = draw({40, 4, 16}, type);
      return [=](const Place& place) -> Results {
        const AttentionOptions options{0.25, window};
        // Documents of 25 and 15 tokens; the first one's keys in two pieces.
        const std::vector<AttentionBlock> blocks = {
            {0, 25, 0, 0, 10, 0}, {0, 25, 0, 10, 15, 10}, {25, 15, 0, 25, 15, 0}};
        at::Tensor out = at::zeros({40, 4, 16}, place.stat_options());
        at::Tensor lse =
            at::full({4, 40}, -std::numeric_limits<double>::infinity(), place.stat_options());
        attention_forward_(out, lse, place.real(q), place.real(k), place.real(v), blocks, options);
        at::Tensor dq = at::zeros({40, 4, 16}, place.stat_options());
        at::Tensor dk = at::zeros({40, 2, 16}, place.stat_options());
        at::Tensor dv = at::zeros({40, 2, 16}, place.stat_options());
        const at::Tensor delta = attention_delta(place.real(dout), out.to(place.type()));
        attention_backward_(dq, dk, dv, place.real(dout), place.real(q), place.real(k),
                            place.real(v), lse, delta, blocks, options);
        return {out, lse, dq, dk, dv};
      };
    });
  }
}

}  // namespace
}  // namespace meshloom::model
