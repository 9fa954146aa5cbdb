#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/model/batch.h"
#include "meshloom/parallel/span.h"

/// What the exchanges of a unit share: who holds which rows, and one transfer in flight.
namespace meshloom::parallel::detail {

/// This rank's position in the unit. @throws InvalidArgument  it is not in it.
[[nodiscard]] int member_index(const comm::Communicator& hdp, const std::vector<int>& ranks,
                               const char* where);

/// Rows that member `member` of `degree` holds of the batch's documents.
[[nodiscard]] std::int64_t member_rows(const model::SequenceBatch& batch, int degree, int member);

/// Own queries against the keys of `member`, in document order; pairs in which no query sees a key
/// are left out.
[[nodiscard]] std::vector<model::AttentionBlock> blocks_against(const model::SequenceBatch& batch,
                                                                int degree, int member,
                                                                std::int64_t window);

/// Keys and values of some rows in one buffer that travels as one message: all keys, then all
/// values. Heads of the two may differ in size.
struct KeyValues {
  at::Tensor both;  ///< [elements]
  at::Tensor k;     ///< [rows, Hkv, D], a view
  at::Tensor v;     ///< [rows, Hkv, Dv], a view
};
[[nodiscard]] std::int64_t key_value_elements(std::int64_t rows, const at::Tensor& k,
                                              const at::Tensor& v);
/// @param buffer  [key_value_elements(rows, k, v)] @param k, v  with heads of the same sizes
[[nodiscard]] KeyValues key_values_in(at::Tensor buffer, std::int64_t rows, const at::Tensor& k,
                                      const at::Tensor& v);

/// Dtype of log-sum-exp and of accumulated gradients.
[[nodiscard]] at::ScalarType statistics_type(const at::Tensor& x);

/// One grouped call in flight.
struct Flight {
  comm::Work work;
  std::chrono::steady_clock::time_point posted;
};

[[nodiscard]] Flight post(comm::Communicator& hdp, std::span<const comm::Transfer> sends,
                          std::span<const comm::Transfer> receives);

/// Waits and tells the span sink how long the transfer took and how much of it was exposed.
void finish(Flight& flight, const SpanSink& spans);

}  // namespace meshloom::parallel::detail
