#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"

namespace meshloom::comm::detail {

enum class Operation : std::uint8_t {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kBroadcast,
  kBarrier,
  kSendReceive,
};

struct Message {
  int peer = 0;
  at::Tensor tensor;
};

/// One validated call of one rank.
struct Request {
  Operation operation = Operation::kBarrier;
  ReduceOp reduce = ReduceOp::kSum;
  int root = 0;
  at::Tensor input;                     // read; undefined for barrier and send_receive
  at::Tensor output;                    // written, the input itself for in-place calls
  std::vector<std::int64_t> send_rows;  // all_to_all; reduce_scatter: rows of each rank
  std::vector<std::int64_t> recv_rows;  // all_to_all; all_gather: rows of each rank
  std::vector<Message> sends;
  std::vector<Message> receives;
  std::int64_t sequence = 0;  // per group; collectives and send_receive are counted apart
};

[[nodiscard]] const char* name_of(Operation operation);
[[nodiscard]] const char* name_of(ReduceOp op);

/// What the ranks must agree on, as text: 'all_reduce(Float, 10 elements, sum)'.
[[nodiscard]] std::string signature(const Request& request);

/// Bytes of one row of `tensor` ([rows, ...]), also when it has no rows.
[[nodiscard]] std::int64_t row_bytes(const at::Tensor& tensor);

/// The same data under a tensor of our own. Threads of this library drop tensors; one that Python
/// has seen could not go without the interpreter's lock.
[[nodiscard]] at::Tensor alias_of(const at::Tensor& tensor);

/// Replaces all tensors by aliases; an output that is the input stays so.
void use_aliases(Request& request);

[[nodiscard]] std::int64_t sum(const std::vector<std::int64_t>& values);

}  // namespace meshloom::comm::detail
