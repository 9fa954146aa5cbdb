#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace meshloom::train::detail {

inline constexpr const char* kCheckpointFormat = "meshloom.checkpoint/1";
inline constexpr const char* kManifestName = "manifest.json";

[[nodiscard]] std::uint64_t xxhash64(const void* data, std::size_t bytes);
[[nodiscard]] std::string hex64(std::uint64_t value);

/// A new file, written through and synced; every failure is an IoError that names file and reason.
class DurableFile {
 public:
  explicit DurableFile(std::string path);
  ~DurableFile();
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;

  void write(const void* data, std::size_t bytes);
  /// Syncs and closes.
  void close();
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

 private:
  std::string path_;
  int descriptor_ = -1;
  std::int64_t bytes_ = 0;
};

void sync_folder(const std::string& path);
void write_durably(const std::string& path, const std::string& text);
/// @throws IoError
[[nodiscard]] std::string read_whole(const std::string& path);

}  // namespace meshloom::train::detail
