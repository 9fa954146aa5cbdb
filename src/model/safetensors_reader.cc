#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "meshloom/core/check.h"
#include "meshloom/model/safetensors.h"
#include "model/internal/files.h"
#include "model/internal/safetensors_format.h"

namespace meshloom::model {
namespace {

using HeaderJson = nlohmann::json;
using detail::kSafetensorsWhere;

/// Parses JSON that may be hostile: no name twice in one object, no deep nesting.
/// @throws DataError, its message starting with `path`.
HeaderJson parse_strictly(const std::string& path, const char* begin, const char* end) {
  constexpr int kMaxDepth = 4;
  std::vector<std::set<std::string>> names;
  std::string problem;
  const auto watch = [&](int depth, HeaderJson::parse_event_t event, HeaderJson& parsed) {
    using Event = HeaderJson::parse_event_t;
    if (depth > kMaxDepth) {
      problem = "it nests too deeply";
      return false;
    }
    if (event == Event::object_start) names.emplace_back();
    if (event == Event::object_end && !names.empty()) names.pop_back();
    if (event == Event::key && !names.empty() &&
        !names.back().insert(parsed.get<std::string>()).second) {
      problem = fmt::format("the name \"{}\" is there twice", parsed.get<std::string>());
    }
    return problem.empty();
  };
  HeaderJson root = HeaderJson::parse(begin, end, watch, /*allow_exceptions=*/false);
  if (!problem.empty()) throw DataError(kSafetensorsWhere, path + ": header: " + problem);
  if (root.is_discarded() || !root.is_object()) {
    throw DataError(kSafetensorsWhere, path + ": header is not a JSON object");
  }
  return root;
}

/// Reads one header entry; `where` is the message's beginning.
TensorInfo parse_entry(const std::string& where, const std::string& name, const HeaderJson& entry,
                       std::int64_t data_bytes) {
  const auto bad = [&](const std::string& what) {
    return DataError(kSafetensorsWhere, where + what);
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets") || !entry["dtype"].is_string() ||
      !entry["shape"].is_array() || !entry["data_offsets"].is_array() ||
      entry["data_offsets"].size() != 2) {
    throw bad("expected dtype, shape and two data_offsets");
  }
  const auto integer = [&](const HeaderJson& value) {
    constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > kMost) {
      throw bad(fmt::format("{} is no size", value.dump()));
    }
    return value.get<std::int64_t>();
  };
  TensorInfo info;
  info.name = name;
  const std::string dtype = entry["dtype"].get<std::string>();
  const auto* known = std::find_if(detail::kDtypes.begin(), detail::kDtypes.end(),
                                   [&](const auto& d) { return d.name == dtype; });
  if (known == detail::kDtypes.end()) {
    throw NotSupported(kSafetensorsWhere, where + fmt::format("dtype \"{}\" is not built", dtype));
  }
  info.dtype = known->dtype;
  std::int64_t bytes = known->bytes;
  bool overflow = false;
  bool empty = false;
  for (const HeaderJson& extent : entry["shape"]) {
    info.shape.push_back(integer(extent));
    if (info.shape.back() == 0) {
      empty = true;  // whatever the other extents are
    } else {
      overflow = __builtin_mul_overflow(bytes, info.shape.back(), &bytes) || overflow;
    }
  }
  if (overflow) throw bad("the size of its shape overflows");
  if (empty) bytes = 0;
  info.begin = integer(entry["data_offsets"][0]);
  info.end = integer(entry["data_offsets"][1]);
  if (info.begin > info.end || info.end > data_bytes) {
    throw bad(fmt::format("data_offsets [{}, {}] lie outside the {} bytes of data", info.begin,
                          info.end, data_bytes));
  }
  if (info.end - info.begin != bytes) {
    throw bad(fmt::format("data_offsets span {} bytes, dtype and shape need {}",
                          info.end - info.begin, bytes));
  }
  return info;
}

}  // namespace

/// A private, writable map of a whole file: writes stay in this process.
struct SafetensorsFile::Mapping {
  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const auto fail = [&](const char* what) {
      const int code = errno;
      if (file >= 0) ::close(file);
      return IoError(kSafetensorsWhere, fmt::format("{}: {}: {}", path, what, std::strerror(code)));
    };
    if (file < 0) throw fail("cannot open");
    struct stat status {};
    if (::fstat(file, &status) != 0) throw fail("cannot stat");
    if (!S_ISREG(status.st_mode)) {
      ::close(file);
      throw IoError(kSafetensorsWhere, path + ": not a regular file");
    }
    bytes = static_cast<std::int64_t>(status.st_size);
    if (bytes > 0) {
      void* address = ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE, file, 0);
      if (address == MAP_FAILED) throw fail("cannot map");
      data = static_cast<char*>(address);
    }
    ::close(file);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (data != nullptr) ::munmap(data, static_cast<std::size_t>(bytes));
  }
  char* data = nullptr;
  std::int64_t bytes = 0;
};

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path), mapping_(std::make_shared<Mapping>(path)) {
  read_header();
}

void SafetensorsFile::read_header() {
  constexpr std::int64_t kLengthBytes = 8;
  const std::int64_t bytes = mapping_->bytes;
  if (bytes < kLengthBytes) {
    throw DataError(kSafetensorsWhere,
                    fmt::format("{}: {} bytes are too few for a header", path_, bytes));
  }
  std::uint64_t length = 0;
  for (int i = 0; i < kLengthBytes; ++i) {
    length |= static_cast<std::uint64_t>(static_cast<unsigned char>(mapping_->data[i])) << (8 * i);
  }
  if (length >
      static_cast<std::uint64_t>(std::min(detail::kMaxHeaderBytes, bytes - kLengthBytes))) {
    throw DataError(kSafetensorsWhere,
                    fmt::format("{}: header of {} bytes in a file of {}; truncated, or not "
                                "safetensors",
                                path_, length, bytes));
  }
  data_begin_ = kLengthBytes + static_cast<std::int64_t>(length);
  const std::int64_t data_bytes = bytes - data_begin_;
  const HeaderJson root =
      parse_strictly(path_, mapping_->data + kLengthBytes, mapping_->data + data_begin_);
  for (const auto& [name, entry] : root.items()) {
    const std::string where = fmt::format("{}: tensor \"{}\": ", path_, name);
    if (name != "__metadata__") {
      tensors_.push_back(parse_entry(where, name, entry, data_bytes));
      continue;
    }
    if (!entry.is_object())
      throw DataError(kSafetensorsWhere, path_ + ": __metadata__ is no object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) {
        throw DataError(kSafetensorsWhere,
                        fmt::format("{}: __metadata__.{} is no string", path_, key));
      }
      metadata_[key] = value.get<std::string>();
    }
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::int64_t position = 0;
  for (const TensorInfo& info : tensors_) {
    if (info.begin != position) {
      throw DataError(kSafetensorsWhere,
                      fmt::format("{}: tensor \"{}\": starts at byte {} of the data, expected {}: "
                                  "tensors overlap or leave a gap",
                                  path_, info.name, info.begin, position));
    }
    position = info.end;
    index_.emplace(info.name, index_.size());
  }
  if (position != data_bytes) {
    throw DataError(kSafetensorsWhere, fmt::format("{}: tensors take {} bytes, the file holds {}",
                                                   path_, position, data_bytes));
  }
}

const TensorInfo* SafetensorsFile::find_if(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const TensorInfo* info = find_if(name);
  MESHLOOM_CHECK(info != nullptr, kSafetensorsWhere,
                 fmt::format("{} has no tensor \"{}\"", path_, name));
  const auto options = at::TensorOptions().dtype(info->dtype);
  if (info->begin == info->end) return at::empty(info->shape, options);
  char* data = mapping_->data + data_begin_ + info->begin;
  const auto width = static_cast<std::uintptr_t>(c10::elementSize(info->dtype));
  if (reinterpret_cast<std::uintptr_t>(data) % width != 0) {
    at::Tensor copy = at::empty(info->shape, options);
    std::memcpy(copy.data_ptr(), data, static_cast<std::size_t>(info->end - info->begin));
    return copy;
  }
  return at::from_blob(
      data, info->shape, [keep = mapping_](void*) mutable { keep.reset(); }, options);
}

NamedTensors load_safetensors(const std::string& path) {
  const SafetensorsFile file(path);
  NamedTensors result;
  for (const TensorInfo& info : file.tensors()) {
    result.emplace_back(info.name, file.tensor(info.name));
  }
  return result;
}

SafetensorsFolder::SafetensorsFolder(const std::string& folder) {
  namespace fs = std::filesystem;
  const fs::path root(folder);
  const fs::path single = root / "model.safetensors";
  if (fs::exists(single)) {
    files_.push_back(std::make_unique<SafetensorsFile>(single.string()));
    for (const TensorInfo& info : files_.back()->tensors()) {
      entries_.push_back({files_.back().get(), &info});
    }
    return;
  }
  const fs::path index = root / "model.safetensors.index.json";
  if (!fs::exists(index)) {
    throw IoError(
        kSafetensorsWhere,
        fmt::format("{}: neither model.safetensors nor model.safetensors.index.json", folder));
  }
  const std::string text = detail::read_file(index.string(), kSafetensorsWhere);
  const HeaderJson parsed = parse_strictly(index.string(), text.data(), text.data() + text.size());
  const auto map = parsed.find("weight_map");
  const auto bad = [&](const std::string& what) {
    return DataError(kSafetensorsWhere, index.string() + ": " + what);
  };
  if (map == parsed.end() || !map->is_object()) throw bad("weight_map is missing");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string()) throw bad(fmt::format("the file of \"{}\" is no string", name));
    const std::string shard = file.get<std::string>();
    if (shard.empty() || fs::path(shard).filename() != shard || shard == "..") {
      throw bad(fmt::format("\"{}\" is not the name of a file in the folder", shard));
    }
    shards[shard].insert(name);
  }
  for (const auto& [shard, names] : shards) {
    files_.push_back(std::make_unique<SafetensorsFile>((root / shard).string()));
    const SafetensorsFile& file = *files_.back();
    for (const std::string& name : names) {
      if (file.find_if(name) == nullptr) {
        throw bad(fmt::format("tensor \"{}\" is not in {}", name, shard));
      }
    }
    for (const TensorInfo& info : file.tensors()) {
      if (!names.contains(info.name)) {
        throw bad(fmt::format("tensor \"{}\" of {} is not listed, or for another file", info.name,
                              shard));
      }
      entries_.push_back({&file, &info});
    }
  }
}

}  // namespace meshloom::model
