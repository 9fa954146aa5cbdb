#include "comm/internal/staging.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace meshloom::comm::detail {
namespace {

bool on_host(const at::Tensor& tensor) { return !tensor.defined() || tensor.is_cpu(); }

bool all_on_host(const std::vector<Message>& messages) {
  return std::all_of(messages.begin(), messages.end(),
                     [](const Message& message) { return on_host(message.tensor); });
}

bool same_memory(const at::Tensor& a, const at::Tensor& b) {
  return a.data_ptr() == b.data_ptr() && a.scalar_type() == b.scalar_type() &&
         a.sizes() == b.sizes();
}

}  // namespace

std::optional<Staging> Staging::begin(Request& request) {
  if (on_host(request.input) && on_host(request.output) && all_on_host(request.sends) &&
      all_on_host(request.receives)) {
    return std::nullopt;
  }
  Staging staging;
  if (request.output.is_same(request.input)) {
    request.input = staging.stage(request.input, true, true);
    request.output = request.input;
  } else {
    staging.output_ = request.output;
    request.input = staging.stage(request.input, true, false);
    request.output = staging.stage(request.output, false, true);
  }
  for (Message& send : request.sends) send.tensor = staging.stage(send.tensor, true, false);
  for (Message& receive : request.receives) {
    receive.tensor = staging.stage(receive.tensor, false, true);
  }
  staging.read_.clear();
  return staging;
}

at::Tensor Staging::stage(const at::Tensor& device, bool reads, bool writes) {
  if (on_host(device)) return device;
  if (reads && !writes) {
    for (const Copy& copy : read_) {
      if (same_memory(copy.device, device)) return copy.host;
    }
  }
  at::Tensor host = at::empty(device.sizes(), device.options().device(at::kCPU));
  if (reads) host.copy_(device);
  (writes ? written_ : read_).push_back({device, host});
  return host;
}

void Staging::finish() {
  for (Copy& copy : written_) copy.device.copy_(copy.host);
  written_.clear();
}

}  // namespace meshloom::comm::detail
