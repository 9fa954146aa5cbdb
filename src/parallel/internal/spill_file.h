#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace meshloom::parallel::detail {

/// A file without a name: the system removes it when the process ends, however it ends. Space in it
/// is handed out in extents and used again. Thread safe but for `allocate` and `release`, which one
/// thread at a time may call.
class SpillFile {
 public:
  /// @param folder  empty: the system's for temporary files
  /// @throws IoError  names the folder.
  explicit SpillFile(std::string folder);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  /// @returns offset of `bytes` free bytes, the lowest there is
  [[nodiscard]] std::int64_t allocate(std::int64_t bytes);
  void release(std::int64_t offset, std::int64_t bytes);

  /// @throws IoError  names folder, bytes and what is free.
  void write(const void* data, std::int64_t bytes, std::int64_t offset) const;
  /// @throws IoError  names folder and bytes.
  void read(void* data, std::int64_t bytes, std::int64_t offset) const;

 private:
  std::string folder_;
  int file_ = -1;
  std::int64_t end_ = 0;
  std::map<std::int64_t, std::int64_t>
      free_;  ///< offset -> bytes, no two adjacent, none at the end
};

}  // namespace meshloom::parallel::detail
