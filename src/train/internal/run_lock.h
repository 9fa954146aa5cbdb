#pragma once

#include <string>

namespace meshloom::train::detail {

/// Keeps other runs out of a run folder: an flock on `<folder>/run.lock`, which also says who holds
/// it. The kernel lets go of it when the process ends, however it ends; the file stays.
class RunLock {
 public:
  /// @throws InvalidArgument  another run holds the folder; names the folder and the holder.
  /// @throws IoError          the lock file cannot be opened, locked or written.
  explicit RunLock(const std::string& folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

  /// Why the file system keeps nobody out; empty where it does.
  [[nodiscard]] const std::string& unsupported() const { return unsupported_; }

 private:
  int descriptor_ = -1;
  std::string unsupported_;
};

}  // namespace meshloom::train::detail
