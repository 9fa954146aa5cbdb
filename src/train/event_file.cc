#include "train/internal/event_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "meshloom/core/error.h"

namespace meshloom::train::detail {

namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0x82F63B78U : 0U);
    table[i] = value;
  }
  return table;
}

constexpr std::array<std::uint32_t, 256> kCrcTable = make_crc_table();

/// TFRecord stores checksums rotated and offset, so that a checksum of checksums stays useful.
std::uint32_t masked_crc(const std::string& bytes) {
  const std::uint32_t crc = crc32c(bytes.data(), bytes.size());
  return std::rotr(crc, 15) + 0xA282EAD8U;
}

template <class T>
std::string little_endian(T value) {
  static_assert(std::endian::native == std::endian::little);
  std::string result(sizeof(T), '\0');
  std::memcpy(result.data(), &value, sizeof(T));
  return result;
}

// Protocol buffers' wire types.
constexpr int kVarint = 0;
constexpr int kFixed64 = 1;
constexpr int kBytes = 2;
constexpr int kFixed32 = 5;

std::string varint(std::uint64_t value) {
  std::string result;
  while (value >= 0x80) {
    result.push_back(static_cast<char>((value & 0x7F) | 0x80));
    value >>= 7;
  }
  result.push_back(static_cast<char>(value));
  return result;
}

std::string field(int number, int wire_type, const std::string& payload) {
  return varint(static_cast<std::uint64_t>(number << 3 | wire_type)) + payload;
}

std::string bytes_field(int number, const std::string& payload) {
  return field(number, kBytes, varint(payload.size()) + payload);
}

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// tensorflow.Event: wall_time = 1, step = 2, then one of file_version = 3, summary = 5,
/// session_log = 7.
std::string event(std::int64_t step, const std::string& what) {
  return field(1, kFixed64, little_endian(wall_time())) +
         field(2, kVarint, varint(static_cast<std::uint64_t>(step))) + what;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~0U;
  for (std::size_t i = 0; i < bytes; ++i) crc = kCrcTable[(crc ^ at[i]) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

EventFile::EventFile(const std::string& folder, std::int64_t first_step) {
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  path_ = fmt::format("{}/events.out.tfevents.{:.6f}.{}.{}", folder, wall_time(), host.data(),
                      ::getpid());
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor_ < 0) {
    throw IoError("train.events", fmt::format("cannot create {}: {}", path_, std::strerror(errno)));
  }
  record(event(0, bytes_field(3, "brain.Event:2")));
  if (first_step > 0) {
    constexpr int kSessionStart = 1;
    record(event(first_step, bytes_field(7, field(1, kVarint, varint(kSessionStart)))));
  }
  flush();
}

EventFile::~EventFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void EventFile::record(const std::string& message) {
  const std::string length = little_endian(static_cast<std::uint64_t>(message.size()));
  pending_ +=
      length + little_endian(masked_crc(length)) + message + little_endian(masked_crc(message));
}

void EventFile::scalar(const std::string& tag, std::int64_t step, double value) {
  // Summary.value = 1; Summary.Value: tag = 1, simple_value = 2.
  const std::string entry =
      bytes_field(1, tag) + field(2, kFixed32, little_endian(static_cast<float>(value)));
  record(event(step, bytes_field(5, bytes_field(1, entry))));
}

void EventFile::flush() {
  std::size_t done = 0;
  while (done < pending_.size()) {
    const ssize_t written = ::write(descriptor_, pending_.data() + done, pending_.size() - done);
    if (written < 0) {
      if (errno == EINTR) continue;
      throw IoError("train.events",
                    fmt::format("cannot write {}: {}", path_, std::strerror(errno)));
    }
    done += static_cast<std::size_t>(written);
  }
  pending_.clear();
}

}  // namespace meshloom::train::detail
