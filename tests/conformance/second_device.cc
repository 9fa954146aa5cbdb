#include "conformance/second_device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace meshloom::comm::conformance {
namespace {

constexpr at::DeviceType kType = at::DeviceType::PrivateUse1;

class SecondAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* data = std::malloc(bytes > 0 ? bytes : 1);
    return {data, data, &std::free, second_device()};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

c10::Allocator* allocator() {
  static SecondAllocator instance;
  return &instance;
}

at::Tensor empty_second(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                        std::optional<at::Layout> /*layout*/, std::optional<at::Device> /*device*/,
                        std::optional<bool> /*pinned*/, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided_second(at::IntArrayRef sizes, at::IntArrayRef strides,
                                std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout> /*layout*/,
                                std::optional<at::Device> /*device*/,
                                std::optional<bool> /*pinned*/) {
  return at::detail::empty_strided_generic(sizes, strides, allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

void invert(const at::Tensor& from, const at::Tensor& to) {
  const auto* in = static_cast<const unsigned char*>(from.const_data_ptr());
  auto* out = static_cast<unsigned char*>(to.mutable_data_ptr());
  for (std::size_t i = 0; i < from.nbytes(); ++i) {
    out[i] = static_cast<unsigned char>(~in[i]);
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  TORCH_CHECK(from.is_contiguous() && to.is_contiguous(), "only whole tensors are copied");
  if (from.is_cpu() != to.is_cpu()) {
    // The type changes on the host.
    if (from.scalar_type() == to.scalar_type()) {
      invert(from, to);
    } else if (from.is_cpu()) {
      invert(from.to(to.scalar_type()), to);
    } else {
      to.copy_(from.to(at::kCPU));
    }
  } else {
    to.copy_(from.to(at::kCPU));
  }
  return to;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, module) {
  module.impl("empty.memory_format", empty_second);
  module.impl("empty_strided", empty_strided_second);
  module.impl("_copy_from", copy_from);
  module.impl("as_strided", at::native::as_strided_tensorimpl);
  module.impl("view", at::native::view);
}

}  // namespace

at::Device second_device() { return {kType, 0}; }

}  // namespace meshloom::comm::conformance

namespace c10 {
C10_REGISTER_GUARD_IMPL(PrivateUse1, impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1>)
}
