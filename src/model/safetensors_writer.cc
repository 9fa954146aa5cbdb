#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "meshloom/core/check.h"
#include "meshloom/model/safetensors.h"
#include "model/internal/safetensors_format.h"

namespace meshloom::model {
namespace {

using detail::kSafetensorsWhere;

/// A name beside `path` that no other writer of this or another process uses.
std::string temporary_name(const std::string& path, const void* owner) {
  return fmt::format("{}.tmp-{}-{:x}", path, ::getpid(), reinterpret_cast<std::uintptr_t>(owner));
}

IoError io_error(const std::string& path, const char* what) {
  return {kSafetensorsWhere, fmt::format("{}: {}: {}", path, what, std::strerror(errno))};
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

/// @returns false with errno set.
bool write_all(int file, const void* data, std::size_t bytes) {
  const char* position = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file, position, std::min<std::size_t>(bytes, 1U << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    position += written;
    bytes -= static_cast<std::size_t>(written);
  }
  return true;
}

/// The header with its length in front, padded with blanks so that data start at a multiple of 64.
std::string make_header(std::vector<TensorInfo>& entries,
                        const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json root = nlohmann::ordered_json::object();
  if (!metadata.empty()) root["__metadata__"] = metadata;
  std::set<std::string> names{"__metadata__"};
  std::int64_t position = 0;
  for (TensorInfo& entry : entries) {
    MESHLOOM_CHECK(names.insert(entry.name).second, kSafetensorsWhere,
                   fmt::format("the name \"{}\" is taken", entry.name));
    const auto* dtype = std::find_if(detail::kDtypes.begin(), detail::kDtypes.end(),
                                     [&](const auto& d) { return d.dtype == entry.dtype; });
    if (dtype == detail::kDtypes.end()) {
      throw NotSupported(kSafetensorsWhere, fmt::format("tensor \"{}\": dtype {} is not built",
                                                        entry.name, c10::toString(entry.dtype)));
    }
    entry.begin = position;
    position += c10::multiply_integers(entry.shape) * dtype->bytes;
    entry.end = position;
    root[entry.name] = {
        {"dtype", dtype->name}, {"shape", entry.shape}, {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text = root.dump();
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kLengthBytes = 8;
  text.append((kAlignment - (text.size() + kLengthBytes) % kAlignment) % kAlignment, ' ');
  std::string header;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header.push_back(static_cast<char>((text.size() >> (8 * i)) & 0xFF));
  }
  return header + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorInfo> entries,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), temporary_(temporary_name(path, this)), entries_(std::move(entries)) {
  const std::string header = make_header(entries_, metadata);
  file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file_ < 0) fail("cannot create");
  try {
    write_bytes(header.data(), header.size());
  } catch (...) {
    ::close(file_);
    ::unlink(temporary_.c_str());
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_ < 0) return;
  ::close(file_);
  ::unlink(temporary_.c_str());
}

void SafetensorsWriter::fail(const char* what) const { throw io_error(path_, what); }

void SafetensorsWriter::write_bytes(const void* data, std::size_t bytes) {
  if (!write_all(file_, data, bytes)) fail("cannot write");
}

void SafetensorsWriter::write(const at::Tensor& tensor) {
  MESHLOOM_CHECK(next_ < entries_.size(), kSafetensorsWhere,
                 fmt::format("{}: all {} tensors are written", path_, entries_.size()));
  const TensorInfo& entry = entries_[next_];
  MESHLOOM_CHECK(tensor.sizes() == at::IntArrayRef(entry.shape), kSafetensorsWhere,
                 fmt::format("{}: tensor \"{}\" is not of the announced shape", path_, entry.name));
  const at::Tensor stored = tensor.to(at::kCPU, entry.dtype).contiguous();
  write_bytes(stored.const_data_ptr(), stored.nbytes());
  ++next_;
}

void SafetensorsWriter::commit() {
  MESHLOOM_CHECK_EQ(next_, entries_.size(), kSafetensorsWhere, "tensors written before commit");
  if (::fsync(file_) != 0) fail("cannot flush");
  const int file = std::exchange(file_, -1);
  if (::close(file) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const IoError error = io_error(path_, "cannot rename into place");
    ::unlink(temporary_.c_str());
    throw error;
  }
  sync_folder(path_);
}

void save_safetensors(const std::string& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata) {
  // Wide elements first, so that every tensor is aligned in the file.
  NamedTensors sorted = tensors;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();
  });
  std::vector<TensorInfo> entries;
  for (const auto& [name, tensor] : sorted) {
    entries.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  }
  SafetensorsWriter writer(path, std::move(entries), metadata);
  for (const auto& [name, tensor] : sorted) writer.write(tensor);
  writer.commit();
}

void write_file_atomically(const std::string& path, const std::string& text) {
  const std::string temporary = temporary_name(path, &text);
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) throw io_error(path, "cannot create");
  const bool written = write_all(file, text.data(), text.size()) && ::fsync(file) == 0;
  const IoError write_error = io_error(path, "cannot write");
  const bool closed = ::close(file) == 0;
  if (!written || !closed || ::rename(temporary.c_str(), path.c_str()) != 0) {
    const IoError error = written ? io_error(path, "cannot rename into place") : write_error;
    ::unlink(temporary.c_str());
    throw error;
  }
  sync_folder(path);
}

}  // namespace meshloom::model
