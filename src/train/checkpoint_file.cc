#include "train/internal/checkpoint_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "meshloom/core/error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace meshloom::train::detail {

namespace {

constexpr const char* kFileWhere = "train.checkpoint";

[[noreturn]] void throw_errno(const char* what, const std::string& path, int code) {
  throw IoError(kFileWhere, fmt::format("cannot {} {}: {}", what, path, std::strerror(code)));
}

}  // namespace

std::uint64_t xxhash64(const void* data, std::size_t bytes) { return XXH64(data, bytes, 0); }

std::string hex64(std::uint64_t value) { return fmt::format("{:016x}", value); }

DurableFile::DurableFile(std::string path) : path_(std::move(path)) {
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor_ < 0) throw_errno("create", path_, errno);
}

DurableFile::~DurableFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void DurableFile::write(const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    constexpr std::size_t kLargestWrite = std::size_t{1} << 30;
    const ssize_t written = ::write(descriptor_, at, std::min(bytes, kLargestWrite));
    if (written < 0) {
      if (errno == EINTR) continue;
      throw_errno("write", path_, errno);
    }
    at += written;
    bytes -= static_cast<std::size_t>(written);
    bytes_ += written;
  }
}

void DurableFile::close() {
  if (::fsync(descriptor_) != 0) throw_errno("sync", path_, errno);
  if (::close(std::exchange(descriptor_, -1)) != 0) throw_errno("close", path_, errno);
}

void sync_folder(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) throw_errno("open", path, errno);
  // Some file systems cannot sync folders; their renames are durable without it.
  const int code = ::fsync(descriptor) == 0 || errno == EINVAL ? 0 : errno;
  ::close(descriptor);
  if (code != 0) throw_errno("sync", path, code);
}

void write_durably(const std::string& path, const std::string& text) {
  DurableFile file(path);
  file.write(text.data(), text.size());
  file.close();
}

std::string read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  if (file) text << file.rdbuf();
  if (!file) throw IoError(kFileWhere, fmt::format("cannot read {}", path));
  return text.str();
}

}  // namespace meshloom::train::detail
