#include "train/internal/run_lock.h"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>

#include "meshloom/core/error.h"

namespace meshloom::train::detail {

namespace {

constexpr const char* kLockWhere = "train.run_folder";

std::string own_name() {
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  return fmt::format("process {} on {}", ::getpid(), host.data());
}

std::string read_holder(int descriptor) {
  std::array<char, 512> text{};
  const ssize_t count = ::pread(descriptor, text.data(), text.size(), 0);
  std::string_view line(text.data(), count > 0 ? static_cast<std::size_t>(count) : 0);
  line = line.substr(0, line.find('\n'));
  if (line.empty()) return "another process";
  if (line.starts_with(own_name() + " ")) return "a trainer of this process that still lives";
  return std::string(line);
}

/// Of a file system without locks, e.g. Lustre mounted without -o flock.
bool means_no_locks(int code) { return code == ENOSYS || code == ENOLCK || code == EOPNOTSUPP; }

}  // namespace

RunLock::RunLock(const std::string& folder) {
  const std::string path = folder + "/run.lock";
  const auto fail = [&](const char* what) {
    const std::string reason = std::strerror(errno);
    if (descriptor_ >= 0) ::close(descriptor_);
    throw IoError(kLockWhere, fmt::format("cannot {} {}: {}", what, path, reason));
  };
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("open");
  int code = 0;
  while (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    code = errno;
    if (code != EINTR) break;
    code = 0;
  }
  if (code == EWOULDBLOCK) {
    const std::string other = read_holder(descriptor_);
    ::close(descriptor_);
    throw InvalidArgument(
        kLockWhere,
        fmt::format("the run folder {} is in use by {}: wait for it or stop it, or give "
                    "this run a folder of its own (`run:` in the config, --run)",
                    folder, other));
  }
  if (means_no_locks(code)) unsupported_ = std::strerror(code);
  if (code != 0 && unsupported_.empty()) fail("lock");
  const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  const std::string text =
      fmt::format("{} since {:%Y-%m-%d %H:%M:%S} UTC\n", own_name(), fmt::gmtime(now));
  const auto size = static_cast<ssize_t>(text.size());
  if (::ftruncate(descriptor_, 0) != 0 ||
      ::pwrite(descriptor_, text.data(), text.size(), 0) != size)
    fail("write");
}

RunLock::~RunLock() { ::close(descriptor_); }

}  // namespace meshloom::train::detail
