#include "comm/internal/staging.h"

#include <ATen/ops/empty.h>

#include <utility>

namespace meshloom::comm::detail {
namespace {

at::Tensor host_space(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
}

at::Tensor host_copy(const at::Tensor& tensor) {
  auto copy = host_space(tensor);
  copy.copy_(tensor);
  return copy;
}

}  // namespace

Staged stage_through_host(const Request& request) {
  Staged staged;
  staged.host = request;
  std::vector<std::pair<at::Tensor, at::Tensor>> back;  // (device, host)
  if (request.input.defined()) staged.host.input = host_copy(request.input);
  if (request.output.defined()) {
    const bool in_place = request.output.is_same(request.input);
    staged.host.output = in_place ? staged.host.input : host_space(request.output);
    back.emplace_back(request.output, staged.host.output);
    if (!in_place) staged.output = request.output;
  }
  for (Message& send : staged.host.sends) send.tensor = host_copy(send.tensor);
  for (Message& receive : staged.host.receives) {
    const at::Tensor target = receive.tensor;
    receive.tensor = host_space(target);
    back.emplace_back(target, receive.tensor);
  }
  staged.deliver = [back = std::move(back)] {
    for (const auto& [device, host] : back) device.copy_(host);
  };
  return staged;
}

}  // namespace meshloom::comm::detail
