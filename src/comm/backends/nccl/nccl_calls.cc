#include <algorithm>

#include "comm/backends/nccl/nccl_engine.h"

namespace meshloom::comm::detail {
namespace {

std::byte* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr()))
                          : nullptr;
}

bool all_equal(const std::vector<std::int64_t>& rows) {
  return std::all_of(rows.begin(), rows.end(), [&](auto count) { return count == rows[0]; });
}

// Calls between group_start and group_end; the first bad result stops the rest.
class NcclCalls {
 public:
  explicit NcclCalls(NcclApi& api)
      : api_(api), result_(api.group_start()), open_(!is_bad(result_)) {}

  template <class Call>
  void add(Call&& call) {
    if (!is_bad(result_)) result_ = call();
  }

  NcclResult end() {
    if (!open_) return result_;
    const NcclResult ended = api_.group_end();
    return is_bad(result_) ? result_ : ended;
  }

 private:
  NcclApi& api_;
  NcclResult result_;
  bool open_;
};

struct Place {
  NcclApi& api;
  const Request& request;
  int rank;
  NcclComm comm;
  DeviceStream stream;
};

constexpr auto kBytes = c10::ScalarType::Byte;

std::size_t count_of(std::int64_t count) { return static_cast<std::size_t>(count); }

NcclResult all_gather(const Place& at) {
  const auto& rows = at.request.recv_rows;
  const std::int64_t row = row_bytes(at.request.input);
  std::byte* out = data_of(at.request.output);
  std::byte* in = data_of(at.request.input);
  if (all_equal(rows)) {
    return at.api.all_gather(in, out, count_of(rows[0] * row), kBytes, at.comm, at.stream);
  }
  NcclCalls calls(at.api);
  for (int r = 0; r < static_cast<int>(rows.size()); ++r) {
    const auto bytes = count_of(rows[r] * row);
    if (bytes > 0) {
      calls.add([&] {
        return at.api.broadcast(r == at.rank ? in : out, out, bytes, kBytes, r, at.comm, at.stream);
      });
    }
    out += bytes;
  }
  return calls.end();
}

NcclResult reduce_scatter(const Place& at) {
  const auto& rows = at.request.send_rows;
  const auto type = at.request.input.scalar_type();
  const std::int64_t row = row_bytes(at.request.input);
  const std::int64_t columns = row / static_cast<std::int64_t>(at.request.input.element_size());
  std::byte* in = data_of(at.request.input);
  std::byte* out = data_of(at.request.output);
  if (all_equal(rows)) {
    return at.api.reduce_scatter(in, out, count_of(rows[0] * columns), type, ReduceOp::kSum,
                                 at.comm, at.stream);
  }
  NcclCalls calls(at.api);
  for (int r = 0; r < static_cast<int>(rows.size()); ++r) {
    if (rows[r] > 0) {
      calls.add([&] {
        return at.api.reduce(in, out, count_of(rows[r] * columns), type, ReduceOp::kSum, r, at.comm,
                             at.stream);
      });
    }
    in += rows[r] * row;
  }
  return calls.end();
}

// Not NCCL's own all-to-all: it takes equal blocks only, and the counts that one rank knows do not
// tell whether those of all others are equal.
NcclResult all_to_all(const Place& at) {
  const auto& to = at.request.send_rows;
  const auto& from = at.request.recv_rows;
  const std::int64_t row = row_bytes(at.request.input);
  std::byte* in = data_of(at.request.input);
  std::byte* out = data_of(at.request.output);
  NcclCalls calls(at.api);
  for (int r = 0; r < static_cast<int>(to.size()); ++r) {
    const auto sent = count_of(to[r] * row);
    const auto received = count_of(from[r] * row);
    if (sent > 0) calls.add([&] { return at.api.send(in, sent, kBytes, r, at.comm, at.stream); });
    if (received > 0) {
      calls.add([&] { return at.api.receive(out, received, kBytes, r, at.comm, at.stream); });
    }
    in += sent;
    out += received;
  }
  return calls.end();
}

NcclResult send_receive(const Place& at, const std::vector<int>& members) {
  NcclCalls calls(at.api);
  for (const Message& send : at.request.sends) {
    if (send.tensor.nbytes() == 0) continue;
    calls.add([&] {
      return at.api.send(data_of(send.tensor), send.tensor.nbytes(), kBytes, members[send.peer],
                         at.comm, at.stream);
    });
  }
  for (const Message& receive : at.request.receives) {
    if (receive.tensor.nbytes() == 0) continue;
    calls.add([&] {
      return at.api.receive(data_of(receive.tensor), receive.tensor.nbytes(), kBytes,
                            members[receive.peer], at.comm, at.stream);
    });
  }
  return calls.end();
}

// Nothing to move on any rank: sizes that decide it are equal on all.
bool is_empty(const Request& request) {
  switch (request.operation) {
    case Operation::kAllReduce:
    case Operation::kBroadcast:
      return request.input.numel() == 0;
    case Operation::kAllGather:
      return request.output.numel() == 0;
    case Operation::kReduceScatter:
      return request.input.numel() == 0;
    case Operation::kAllToAll:
      return row_bytes(request.input) == 0;
    case Operation::kBarrier:
    case Operation::kSendReceive:
      return false;
  }
  return false;
}

}  // namespace

NcclResult enqueue_nccl(NcclApi& api, const Request& request, int rank,
                        const std::vector<int>& members, NcclComm comm, DeviceStream stream,
                        const at::Tensor& token) {
  if (is_empty(request)) return NcclResult::kSuccess;
  const Place at{api, request, rank, comm, stream};
  switch (request.operation) {
    case Operation::kAllReduce:
      return api.all_reduce(data_of(request.input), data_of(request.output),
                            count_of(request.input.numel()), request.input.scalar_type(),
                            request.reduce, comm, stream);
    case Operation::kAllGather:
      return all_gather(at);
    case Operation::kReduceScatter:
      return reduce_scatter(at);
    case Operation::kAllToAll:
      return all_to_all(at);
    case Operation::kBroadcast:
      return api.broadcast(data_of(request.input), data_of(request.output), request.input.nbytes(),
                           kBytes, request.root, comm, stream);
    case Operation::kBarrier:
      return api.all_reduce(data_of(token), data_of(token), 1, token.scalar_type(), ReduceOp::kSum,
                            comm, stream);
    case Operation::kSendReceive:
      return send_receive(at, members);
  }
  return NcclResult::kSuccess;
}

}  // namespace meshloom::comm::detail
