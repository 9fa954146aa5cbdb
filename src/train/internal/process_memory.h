#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace meshloom::train::detail {

/// What this process holds, in bytes. Pages of files (code, mapped weights) are apart: the kernel
/// takes those back when it needs room.
struct ProcessMemory {
  std::int64_t own = 0;    ///< anonymous and shared memory now
  std::int64_t files = 0;  ///< pages of files now
  std::int64_t peak = 0;   ///< most of all together since the process began
};
[[nodiscard]] ProcessMemory process_memory();

/// What the machine lets this process and its neighbours have, in bytes: physical memory, or less
/// where a control group says so. 0: unknown.
[[nodiscard]] std::int64_t host_memory();

/// The same of a device, and the most that tensors took of it since the process began.
struct DeviceMemory {
  std::int64_t total = 0;
  std::int64_t peak = 0;
};
[[nodiscard]] DeviceMemory device_memory(const c10::Device& device);

}  // namespace meshloom::train::detail
