#include "train/internal/process_memory.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace meshloom::train::detail {

namespace {

constexpr std::int64_t kKiB = 1024;
/// Control groups without a limit say "max", or a number near the largest.
constexpr std::int64_t kNoLimit = std::int64_t{1} << 60;

/// The number after `key` in a file of "key: number kB" lines; 0 where there is none.
std::int64_t field(const std::string& text, const std::string& key) {
  const std::size_t at = text.find("\n" + key + ":");
  if (at == std::string::npos) return 0;
  return std::atoll(text.c_str() + at + key.size() + 2) * kKiB;
}

std::string text_of(const char* path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << "\n" << file.rdbuf();
  return text.str();
}

/// The least limit from the process's control group up to the root (version 2).
std::int64_t group_limit() {
  std::int64_t least = kNoLimit;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t at = line.rfind(':');
    if (at == std::string::npos) continue;
    const bool unified = line.starts_with("0::");
    if (!unified && line.find(":memory:") == std::string::npos) continue;
    const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const std::string name = unified ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = line.substr(at + 1);; path.resize(path.rfind('/'))) {
      std::ifstream file(root + path + name);
      std::int64_t limit = 0;
      if (file >> limit && limit > 0) least = std::min(least, limit);
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

}  // namespace

ProcessMemory process_memory() {
  const std::string status = text_of("/proc/self/status");
  return {.own = field(status, "RssAnon") + field(status, "RssShmem"),
          .files = field(status, "RssFile"),
          .peak = field(status, "VmHWM")};
}

std::int64_t host_memory() {
  const std::int64_t physical = field(text_of("/proc/meminfo"), "MemTotal");
  const std::int64_t limit = group_limit();
  return physical > 0 ? std::min(physical, limit) : limit < kNoLimit ? limit : 0;
}

DeviceMemory device_memory(const c10::Device& device) {
  using c10::CachingAllocator::StatType;
  const auto all = static_cast<std::size_t>(StatType::AGGREGATE);
  return {.total = static_cast<std::int64_t>(at::accelerator::getMemoryInfo(device.index()).second),
          .peak = at::accelerator::getDeviceStats(device.index()).allocated_bytes[all].peak};
}

}  // namespace meshloom::train::detail
