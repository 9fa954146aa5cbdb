#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/model/batch.h"
#include "meshloom/parallel/exchange_buffers.h"
#include "meshloom/parallel/span.h"
#include "meshloom/plan/exchange_route.h"

/// What the exchanges of a unit share: who holds which rows, and one transfer in flight.
namespace meshloom::parallel::detail {

/// What each reused buffer holds; an exchange that uses two at once gives them two names. Names
/// that end in A are followed by a B, one in flight while the other is worked on.
enum Buffer : std::size_t {
  // Whole keys and values: [rows, 2, Hkv, D] each.
  kHeldA,
  kHeldB,
  kDirect,
  kRelayed,
  kWide,
  kGradientA,
  kGradientB,
  kGradientOn,
  kGradientHome,
  kPartial,
  kReturned,
  // Heads against tokens.
  kHeadsSent,
  kHeadsReceived,
  kHeadsSorted,
  kWireSent,
  kWireReceived,
  kWireSorted,
  kWireWide,
  kSumsSent,
  kSumsReceived,
  kSumsSorted,
  kAccumulator,
  kAccumulatorSums,
  kResultCast,
  kResultSorted,
  kResultReceived,
  kResultSums,
  kResultSumsReceived,
  kGradientsSorted,
  kGradientsReceived,
  kBuffers
};
static_assert(kBuffers <= ExchangeBuffers::kCount);

/// This rank's position in the unit. @throws InvalidArgument  it is not in it.
[[nodiscard]] int member_index(const comm::Communicator& hdp, const std::vector<int>& ranks,
                               const char* where);

/// Tokens of each document of the batch, whole.
[[nodiscard]] std::vector<std::int64_t> document_lengths(const model::SequenceBatch& batch);

/// The batch's own rows, in order.
[[nodiscard]] std::vector<plan::TokenRun> own_runs(const model::SequenceBatch& batch);

/// Own queries against key rows that are `keys` laid one after another; pairs in which no query
/// sees a key are left out.
[[nodiscard]] std::vector<model::AttentionBlock> blocks_against(
    const model::SequenceBatch& batch, std::span<const plan::TokenRun> keys, std::int64_t window);

/// Dtype of log-sum-exp and of accumulated gradients.
[[nodiscard]] at::ScalarType statistics_type(const at::Tensor& x);

/// Dtype of keys and values on their way.
[[nodiscard]] at::ScalarType wire_type(const at::Tensor& k, const ExchangeOptions& options);

/// Some rows of a tensor. Few spans are copied one by one, many by index.
class RowMap {
 public:
  RowMap() = default;
  RowMap(std::vector<plan::RowSpan> spans, const at::Device& device);

  [[nodiscard]] std::int64_t rows() const { return rows_; }
  /// Whether these are all of `rows` rows in their order.
  [[nodiscard]] bool is_all(std::int64_t rows) const;
  /// to[i] = from[row i of the map]; dtypes may differ.
  void gather(at::Tensor to, const at::Tensor& from) const;
  /// to[row i of the map] += from[i]
  void add(at::Tensor to, const at::Tensor& from) const;

 private:
  std::vector<plan::RowSpan> spans_;
  std::int64_t rows_ = 0;
  at::Tensor index_;  ///< int64 [rows]; undefined where spans are few
};

/// Query heads [q_begin, q_begin + q) that all read K/V heads [kv_begin, kv_begin + kv) in groups
/// of one size.
struct HeadRun {
  std::int64_t q_begin = 0;
  std::int64_t q = 0;
  std::int64_t kv_begin = 0;
  std::int64_t kv = 0;
};

/// Query heads [q_begin, q_end), `group` of which read one K/V head, cut into runs: at most a part
/// of a group, whole groups and another part. Heads of the runs count from the first of both.
[[nodiscard]] std::vector<HeadRun> head_runs(std::int64_t q_begin, std::int64_t q_end,
                                             std::int64_t group);

/// The block kernels, run by run. Nothing to attend to is legal.
void attend_(at::Tensor& out, at::Tensor& lse, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& v, std::span<const model::AttentionBlock> blocks,
             const model::AttentionOptions& options, std::span<const HeadRun> runs);
void attend_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                      const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& lse, const at::Tensor& delta,
                      std::span<const model::AttentionBlock> blocks,
                      const model::AttentionOptions& options, std::span<const HeadRun> runs);

/// The messages of one grouped call, collected and then in flight. Empty ones are left out.
class Parcel {
 public:
  void send(int peer, const at::Tensor& tensor);
  void receive(int peer, const at::Tensor& tensor);
  /// Starts the call, if there is anything to move.
  void post(comm::Communicator& hdp);
  /// Waits and tells the span sink how long the transfer took and how much of it was exposed.
  void finish(const SpanSink& spans);

 private:
  struct Message {
    int peer;
    at::Tensor tensor;
  };
  std::vector<Message> sends_;
  std::vector<Message> receives_;
  bool posted_ = false;
  comm::Work work_;
  std::chrono::steady_clock::time_point posted_at_;
};

}  // namespace meshloom::parallel::detail
