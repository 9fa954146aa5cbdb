#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "meshloom/plan/memory_forecast.h"
#include "meshloom/plan/step_plan.h"
#include "plan/internal/memory_ledger.h"

namespace meshloom::plan::detail {

/// One micro-batch in one chunk of a rank.
struct MemoryFlow {
  std::int64_t all = 0;  ///< tokens of the unit's share that this rank has a part in
  std::int64_t own = 0;  ///< of these, its rows of the residual stream
  int degree = 1;        ///< of the unit
  Exchange exchange = Exchange::kLocal;
  bool saves = true;
  bool defers = false;
  std::vector<Held> saved{};     ///< as the activation store has it
  std::vector<Held> deferred{};  ///< what recorded weight gradients of one layer keep
};

/// The layers of `model` on sizes alone: each function holds and lets go what the one of the same
/// name in src/model and src/parallel allocates, in the same order.
class LayerMemory {
 public:
  LayerMemory(const MemorySetting& setting, int tp_rank, MemoryLedger& ledger);

  /// Stream and what the next norm adds to it.
  struct Stream {
    Held stream;
    Held pending;
  };

  [[nodiscard]] Held embedding(const MemoryFlow& flow);
  void embedding_backward(const MemoryFlow& flow);
  void forward(MemoryFlow& flow, std::int64_t layer, Stream& h);
  /// dh becomes the gradient of the layer's input.
  void backward(MemoryFlow& flow, std::int64_t layer, Held& dh);
  /// @param touch  called where the head's gradient begins to accumulate
  void head(MemoryFlow& flow, Stream& h, const std::function<void()>& touch);
  [[nodiscard]] Held head_backward(MemoryFlow& flow);
  /// The rotation's tables, of a micro-batch.
  [[nodiscard]] Held tables(const MemoryFlow& flow);
  /// Rows of the stream, held for `part`.
  [[nodiscard]] Held stream_rows(const MemoryFlow& flow, MemoryPart part);

 private:
  [[nodiscard]] Held hold(MemoryPart part, std::int64_t bytes) { return ledger_.hold(part, bytes); }
  [[nodiscard]] Held work(std::int64_t bytes) { return hold(MemoryPart::kWorkspace, bytes); }
  static void save(MemoryFlow& flow, MemoryPart part, const Held& held);
  [[nodiscard]] static Held restore(MemoryFlow& flow);
  /// Packed panels of a product of `depth` terms for each of `columns` columns.
  void product(std::int64_t depth, std::int64_t columns);
  /// dy^T x of `rows` rows, now or later; x has `columns` columns.
  void gradient(MemoryFlow& flow, const Held& dy, const Held& x, std::int64_t rows,
                std::int64_t columns);

  [[nodiscard]] Held gather(const MemoryFlow& flow);
  [[nodiscard]] Held scatter(const MemoryFlow& flow, Held partial);
  [[nodiscard]] Held column(const MemoryFlow& flow, std::int64_t width);
  [[nodiscard]] Held row(const MemoryFlow& flow, std::int64_t width);
  [[nodiscard]] Held column_backward(MemoryFlow& flow, std::int64_t width, const Held& dy,
                                     const Held& x);
  [[nodiscard]] Held normalize(const MemoryFlow& flow);
  [[nodiscard]] Held swiglu(std::int64_t rows, std::int64_t inner);
  void swiglu_backward(std::int64_t rows, std::int64_t inner);

  void exchange_forward(const MemoryFlow& flow);
  void exchange_backward(const MemoryFlow& flow);
  [[nodiscard]] Stream attend(const MemoryFlow& flow);
  [[nodiscard]] Held attend_backward(const MemoryFlow& flow);

  [[nodiscard]] Held forward_kept(MemoryFlow& flow, std::int64_t layer, Stream& h);
  void backward_kept(MemoryFlow& flow, std::int64_t layer, Held& dh);
  [[nodiscard]] Held attention(MemoryFlow& flow);
  [[nodiscard]] Held attention_backward(MemoryFlow& flow, const Held& dy, const Held& x);
  [[nodiscard]] Held latent_attention(MemoryFlow& flow);
  [[nodiscard]] Held latent_attention_backward(MemoryFlow& flow, const Held& dy, const Held& x);
  [[nodiscard]] Held dense(MemoryFlow& flow, std::int64_t inner);
  [[nodiscard]] Held dense_backward(MemoryFlow& flow, std::int64_t inner, const Held& dy,
                                    const Held& x);
  [[nodiscard]] Held experts(MemoryFlow& flow);
  [[nodiscard]] Held experts_backward(MemoryFlow& flow, const Held& dy, const Held& x);

  /// Transfer buffers grow to their largest use and stay.
  struct Buffer {
    std::int64_t bytes = 0;
    Held held;
  };
  void need(Buffer& buffer, std::int64_t bytes);

  MemoryLedger& ledger_;
  const ModelSizes& model_;
  int tp_;
  int ep_;
  bool selective_;
  bool full_;
  std::int64_t b_;  ///< bytes of an activation
  std::int64_t s_;  ///< of a statistic
  // This tensor rank's part.
  std::int64_t heads_;
  std::int64_t key_value_heads_;
  std::int64_t inner_;
  std::int64_t shared_inner_;
  std::int64_t vocabulary_;
  Buffer keys_;
  Buffer gradients_;
};

}  // namespace meshloom::plan::detail
