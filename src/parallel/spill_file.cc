#include "parallel/internal/spill_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <utility>

#include "meshloom/core/error.h"

namespace meshloom::parallel::detail {
namespace {

constexpr const char* kSpillWhere = "parallel.offload";

/// A file in `folder` that has no name, or has lost it again where the file system knows no others.
int open_nameless(const std::string& folder) {
  const int file = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return file;
  std::string name = folder + "/.meshloom-spill-XXXXXX";
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) ::unlink(name.c_str());
  return named;
}

std::string free_in(const std::string& folder) {
  struct statvfs info {};
  if (::statvfs(folder.c_str(), &info) != 0) return "unknown";
  return fmt::format("{} bytes", static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize);
}

}  // namespace

SpillFile::SpillFile(std::string folder)
    : folder_(folder.empty() ? std::filesystem::temp_directory_path().string() : std::move(folder)),
      file_(open_nameless(folder_)) {
  if (file_ >= 0) return;
  throw IoError(kSpillWhere,
                fmt::format("cannot create the file for offloaded activations in {}: {}; name a "
                            "folder that is there and can be written to",
                            folder_, std::strerror(errno)));
}

SpillFile::~SpillFile() { ::close(file_); }

std::int64_t SpillFile::allocate(std::int64_t bytes) {
  for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
    const auto [offset, room] = *hole;
    if (room < bytes) continue;
    free_.erase(hole);
    if (room > bytes) free_.emplace(offset + bytes, room - bytes);
    return offset;
  }
  return std::exchange(end_, end_ + bytes);
}

void SpillFile::release(std::int64_t offset, std::int64_t bytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
    --next;
    offset = next->first;
    bytes += next->second;
    free_.erase(next);
  }
  if (offset + bytes == end_) {
    end_ = offset;
  } else {
    free_.emplace(offset, bytes);
  }
}

void SpillFile::write(const void* data, std::int64_t bytes, std::int64_t offset) const {
  const char* at = static_cast<const char*>(data);
  const std::int64_t end = offset + bytes;
  std::int64_t left = bytes;
  while (left > 0) {
    const ssize_t done = ::pwrite(file_, at, static_cast<std::size_t>(left), offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      const int reason = done < 0 ? errno : ENOSPC;
      throw IoError(kSpillWhere,
                    fmt::format("cannot write {} bytes of activations to the file for them in {}, "
                                "which needs {}: {}; free there: {}. Name a folder with more room, "
                                "or offload less",
                                bytes, folder_, end, std::strerror(reason), free_in(folder_)));
    }
    at += done;
    offset += done;
    left -= done;
  }
}

void SpillFile::read(void* data, std::int64_t bytes, std::int64_t offset) const {
  char* at = static_cast<char*>(data);
  std::int64_t left = bytes;
  while (left > 0) {
    const ssize_t done = ::pread(file_, at, static_cast<std::size_t>(left), offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      throw IoError(kSpillWhere,
                    fmt::format("cannot read {} bytes of activations back from the file for them "
                                "in {}: {}",
                                bytes, folder_, done < 0 ? std::strerror(errno) : "it ends early"));
    }
    at += done;
    offset += done;
    left -= done;
  }
}

}  // namespace meshloom::parallel::detail
