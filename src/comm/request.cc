#include "comm/internal/request.h"

#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <numeric>

namespace meshloom::comm::detail {

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kAllReduce:
      return "all_reduce";
    case Operation::kAllGather:
      return "all_gather";
    case Operation::kReduceScatter:
      return "reduce_scatter";
    case Operation::kAllToAll:
      return "all_to_all";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kBarrier:
      return "barrier";
    case Operation::kSendReceive:
      return "send_receive";
  }
  return "";
}

const char* name_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kMax:
      return "max";
    case ReduceOp::kMin:
      return "min";
  }
  return "";
}

std::string signature(const Request& request) {
  const char* name = name_of(request.operation);
  const auto dtype = [&] { return c10::toString(request.input.scalar_type()); };
  switch (request.operation) {
    case Operation::kAllReduce:
      return fmt::format("{}({}, {} elements, {})", name, dtype(), request.input.numel(),
                         name_of(request.reduce));
    case Operation::kAllGather:
      return fmt::format("{}({}, rows [{}] of {} bytes)", name, dtype(),
                         fmt::join(request.recv_rows, ", "), row_bytes(request.input));
    case Operation::kReduceScatter:
      return fmt::format("{}({}, rows [{}] of {} bytes)", name, dtype(),
                         fmt::join(request.send_rows, ", "), row_bytes(request.input));
    case Operation::kAllToAll:
      return fmt::format("{}({}, rows of {} bytes)", name, dtype(), row_bytes(request.input));
    case Operation::kBroadcast:
      return fmt::format("{}({}, {} elements, root {})", name, dtype(), request.input.numel(),
                         request.root);
    case Operation::kBarrier:
    case Operation::kSendReceive:
      return name;
  }
  return name;
}

std::int64_t row_bytes(const at::Tensor& tensor) {
  std::int64_t result = static_cast<std::int64_t>(tensor.element_size());
  for (std::int64_t d = 1; d < tensor.dim(); ++d) result *= tensor.size(d);
  return result;
}

at::Tensor alias_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto* const impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), false));
}

void use_aliases(Request& request) {
  const bool in_place = request.output.is_same(request.input);
  request.input = alias_of(request.input);
  request.output = in_place ? request.input : alias_of(request.output);
  for (auto* messages : {&request.sends, &request.receives}) {
    for (Message& message : *messages) message.tensor = alias_of(message.tensor);
  }
}

std::int64_t sum(const std::vector<std::int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

}  // namespace meshloom::comm::detail
