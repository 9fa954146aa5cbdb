#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace meshloom::train::detail {

/// CRC-32C (Castagnoli, RFC 3720).
[[nodiscard]] std::uint32_t crc32c(const void* data, std::size_t bytes);

/// TensorBoard's event file: TFRecord frames around `tensorflow.Event` messages, encoded by hand
/// (scalars need four fields). Every call flushes.
class EventFile {
 public:
  /// Creates `<folder>/events.out.tfevents.<time>.<host>.<pid>`. Points of an earlier file from
  /// `first_step` on are dropped by readers.
  /// @throws IoError
  EventFile(const std::string& folder, std::int64_t first_step);
  ~EventFile();
  EventFile(const EventFile&) = delete;
  EventFile& operator=(const EventFile&) = delete;

  /// @throws IoError
  void scalar(const std::string& tag, std::int64_t step, double value);
  void flush();

 private:
  void record(const std::string& event);

  std::string path_;
  int descriptor_ = -1;
  std::string pending_;
};

}  // namespace meshloom::train::detail
