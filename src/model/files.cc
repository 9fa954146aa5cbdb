#include "model/internal/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ios>
#include <iterator>
#include <utility>

#include "meshloom/core/error.h"
#include "model/internal/safetensors_format.h"

namespace meshloom::model::detail {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw IoError(kSafetensorsWhere, fmt::format("{}: {}: {}", path, what, std::strerror(errno)));
}

/// Makes a rename in the folder of `path` durable.
void sync_folder(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  const int file =
      ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) return;  // some file systems cannot; the data themselves are safe
  ::fsync(file);
  ::close(file);
}

}  // namespace

std::string read_file(const std::string& path, const char* where) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw IoError(where, fmt::format("{}: cannot open: {}", path, std::strerror(errno)));
  try {  // the stream buffer throws where the system cannot read, e.g. a folder
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  } catch (const std::ios_base::failure& error) {
    throw IoError(where, fmt::format("{}: cannot read: {}", path, error.code().message()));
  }
}

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)),
      // No other writer of this or another process uses this name.
      temporary_(fmt::format("{}.tmp-{}-{:x}", path_, ::getpid(),
                             reinterpret_cast<std::uintptr_t>(this))) {
  file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file_ < 0) fail(path_, "cannot create");
}

AtomicFile::~AtomicFile() {
  if (file_ >= 0) ::close(file_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, std::size_t bytes) {
  const char* position = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_, position, std::min<std::size_t>(bytes, 1U << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, "cannot write");
    position += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void AtomicFile::finish() {
  if (file_ < 0) return;
  if (::fsync(file_) != 0) fail(path_, "cannot flush");
  if (::close(std::exchange(file_, -1)) != 0) fail(path_, "cannot close");
}

void AtomicFile::commit() {
  finish();
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot rename into place");
  temporary_.clear();
  sync_folder(path_);
}

}  // namespace meshloom::model::detail
