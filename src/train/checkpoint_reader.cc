#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/core/error.h"
#include "meshloom/train/checkpoint.h"
#include "train/internal/checkpoint_file.h"

namespace meshloom::train {

namespace {

constexpr const char* kReadWhere = "train.read_checkpoint";

/// A slice as the manifest lists it.
struct StoredSlice {
  std::string file;
  std::vector<std::int64_t> shape;
  at::ScalarType dtype = at::kFloat;
  TensorBlock block;
  std::int64_t begin = 0;
  std::int64_t bytes = 0;
  std::string checksum;
};

at::ScalarType parse_dtype(const std::string& name, const std::string& path) {
  if (name == "F64") return at::kDouble;
  if (name == "F32") return at::kFloat;
  if (name == "BF16") return at::kBFloat16;
  throw DataError(kReadWhere, fmt::format("{}: unknown dtype \"{}\"", path, name));
}

/// The common box of two, or an empty one.
TensorBlock intersect(const TensorBlock& a, const TensorBlock& b) {
  TensorBlock result;
  for (std::size_t d = 0; d < a.offset.size(); ++d) {
    const std::int64_t begin = std::max(a.offset[d], b.offset[d]);
    const std::int64_t end = std::min(a.offset[d] + a.extent[d], b.offset[d] + b.extent[d]);
    result.offset.push_back(begin);
    result.extent.push_back(std::max<std::int64_t>(0, end - begin));
  }
  return result;
}

/// The part of `tensor`, which covers `whole`, that is `part`.
at::Tensor view_of(at::Tensor tensor, const TensorBlock& whole, const TensorBlock& part) {
  for (std::size_t d = 0; d < part.offset.size(); ++d) {
    tensor = tensor.narrow(static_cast<std::int64_t>(d), part.offset[d] - whole.offset[d],
                           part.extent[d]);
  }
  return tensor;
}

at::Tensor load_slice(const std::string& path, const std::string& tensor,
                      const StoredSlice& slice) {
  at::Tensor values = at::empty(slice.block.extent, slice.dtype);
  const auto bytes = static_cast<std::size_t>(slice.bytes);
  if (values.nbytes() != bytes) {
    throw DataError(kReadWhere, fmt::format("{}: {} has {} bytes, its shape needs {}", path, tensor,
                                            bytes, values.nbytes()));
  }
  std::ifstream file(path, std::ios::binary);
  file.seekg(slice.begin);
  file.read(static_cast<char*>(values.mutable_data_ptr()), slice.bytes);
  if (!file) throw IoError(kReadWhere, fmt::format("cannot read {}", path));
  const std::string sum = detail::hex64(detail::xxhash64(values.const_data_ptr(), bytes));
  if (sum != slice.checksum) {
    throw DataError(kReadWhere, fmt::format("{} is damaged: {} has checksum {}, expected {}", path,
                                            tensor, sum, slice.checksum));
  }
  return values;
}

}  // namespace

std::vector<std::string> list_checkpoints(const std::string& root) {
  std::vector<std::pair<std::int64_t, std::string>> found;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(root, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const std::string digits = name.starts_with("step-") ? name.substr(5) : std::string();
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    found.emplace_back(std::stoll(digits), entry->path().string());
  }
  std::sort(found.rbegin(), found.rend());
  std::vector<std::string> result;
  for (auto& entry : found) result.push_back(std::move(entry.second));
  return result;
}

class CheckpointReader::Impl {
 public:
  explicit Impl(std::string folder) : folder_(std::move(folder)) {
    const std::string path = fmt::format("{}/{}", folder_, detail::kManifestName);
    const std::string text = detail::read_whole(path);
    try {
      const nlohmann::json file = nlohmann::json::parse(text);
      const nlohmann::json& manifest = file.at("manifest");
      const std::string body = manifest.dump();
      const std::string sum = detail::hex64(detail::xxhash64(body.data(), body.size()));
      if (sum != file.at("xxh64").get<std::string>()) {
        throw DataError(kReadWhere, fmt::format("{} is damaged: checksum {}, expected {}", path,
                                                sum, file.at("xxh64").get<std::string>()));
      }
      const auto format = manifest.at("format").get<std::string>();
      if (format != detail::kCheckpointFormat) {
        throw DataError(kReadWhere, fmt::format("{} has format \"{}\", expected \"{}\"", path,
                                                format, detail::kCheckpointFormat));
      }
      parse(manifest);
    } catch (const nlohmann::json::exception& error) {
      throw DataError(kReadWhere, fmt::format("{} is damaged: {}", path, error.what()));
    }
  }

  void read(const model::ParameterTable& table, parallel::FlatRange range, const std::string& state,
            at::Tensor& values) const {
    MESHLOOM_CHECK_EQ(values.numel(), range.size(), kReadWhere, "elements of the destination");
    const auto tensors = states_.find(state);
    if (tensors == states_.end()) {
      throw DataError(kReadWhere, fmt::format("{} has no state \"{}\"", folder_, state));
    }
    for (const model::ParameterSpec& spec : table.parameters) {
      const std::int64_t begin = std::max(spec.offset, range.begin);
      const std::int64_t end = std::min(spec.offset + spec.elements(), range.end);
      if (begin >= end) continue;
      const auto slices = tensors->second.find(spec.name);
      if (slices == tensors->second.end()) {
        throw DataError(kReadWhere, fmt::format("{} has no tensor \"{}\" in state \"{}\"", folder_,
                                                spec.name, state));
      }
      const at::Tensor part = values.narrow(0, begin - range.begin, end - begin);
      fill(spec, begin - spec.offset, end - spec.offset, slices->second, part);
    }
  }

  void verify() const {
    for (const auto& [state, tensors] : states_) {
      for (const auto& [name, slices] : tensors) {
        for (const StoredSlice& slice : slices) {
          static_cast<void>(load_slice(slice.file, name, slice));
        }
      }
    }
  }

  CheckpointInfo info;

 private:
  void parse(const nlohmann::json& manifest) {
    info.step = manifest.at("step").get<std::int64_t>();
    const nlohmann::json& layout = manifest.at("layout");
    info.layout = {.tp = layout.at("tp").get<int>(),
                   .hdp = layout.at("hdp").get<int>(),
                   .pp = layout.at("pp").get<int>(),
                   .ep = layout.at("ep").get<int>(),
                   .chunks = layout.at("chunks").get<int>()};
    info.texts = manifest.at("texts").get<std::map<std::string, std::string>>();
    info.numbers = manifest.at("numbers").get<std::map<std::string, double>>();
    for (const nlohmann::json& file : manifest.at("files")) {
      const std::string path = fmt::format("{}/{}", folder_, file.at("name").get<std::string>());
      std::error_code error;
      const auto size = std::filesystem::file_size(path, error);
      if (error) {
        throw DataError(kReadWhere, fmt::format("{} is missing: {}", path, error.message()));
      }
      const auto expected = file.at("bytes").get<std::uintmax_t>();
      if (size != expected) {
        throw DataError(kReadWhere,
                        fmt::format("{} is damaged: {} bytes, expected {}", path, size, expected));
      }
      for (const nlohmann::json& slice : file.at("slices")) {
        StoredSlice stored;
        stored.file = path;
        stored.shape = slice.at("shape").get<std::vector<std::int64_t>>();
        stored.dtype = parse_dtype(slice.at("dtype").get<std::string>(), path);
        stored.block.offset = slice.at("offset").get<std::vector<std::int64_t>>();
        stored.block.extent = slice.at("extent").get<std::vector<std::int64_t>>();
        stored.begin = slice.at("begin").get<std::int64_t>();
        stored.bytes = slice.at("bytes").get<std::int64_t>();
        stored.checksum = slice.at("xxh64").get<std::string>();
        states_[slice.at("state").get<std::string>()][slice.at("tensor").get<std::string>()]
            .push_back(std::move(stored));
      }
    }
  }

  /// @param part  elements [begin, end) of the tensor
  void fill(const model::ParameterSpec& spec, std::int64_t begin, std::int64_t end,
            const std::vector<StoredSlice>& slices, const at::Tensor& part) const {
    const std::vector<TensorBlock> wanted = blocks_of_range(spec.shape, begin, end);
    const std::vector<std::int64_t>& whole = spec.whole_shape();
    std::int64_t filled = 0;
    for (const StoredSlice& slice : slices) {
      if (slice.shape != whole) {
        throw DataError(kReadWhere, fmt::format("{}: \"{}\" has shape [{}], the model's is [{}]",
                                                folder_, spec.name, fmt::join(slice.shape, ", "),
                                                fmt::join(whole, ", ")));
      }
      at::Tensor loaded;
      std::int64_t at = 0;
      for (TensorBlock block : wanted) {
        const std::int64_t size = block.elements();
        for (std::size_t d = 0; d < spec.corner.size(); ++d) block.offset[d] += spec.corner[d];
        const TensorBlock common = intersect(block, slice.block);
        if (common.elements() > 0) {
          if (!loaded.defined()) loaded = load_slice(slice.file, spec.name, slice);
          at::Tensor destination = part.narrow(0, at, size).view(block.extent);
          view_of(destination, block, common).copy_(view_of(loaded, slice.block, common));
          filled += common.elements();
        }
        at += size;
      }
    }
    if (filled != end - begin) {
      throw DataError(kReadWhere,
                      fmt::format("{}: slices give {} elements of \"{}\" [{}, {}), expected {}",
                                  folder_, filled, spec.name, begin, end, end - begin));
    }
  }

  std::string folder_;
  std::map<std::string, std::map<std::string, std::vector<StoredSlice>>> states_;
};

CheckpointReader::CheckpointReader(const std::string& folder)
    : impl_(std::make_unique<Impl>(folder)) {}
CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;
CheckpointReader& CheckpointReader::operator=(CheckpointReader&&) noexcept = default;

const CheckpointInfo& CheckpointReader::info() const { return impl_->info; }

void CheckpointReader::read(const model::ParameterTable& table, parallel::FlatRange range,
                            const std::string& state, at::Tensor& values) const {
  impl_->read(table, range, state, values);
}

void CheckpointReader::verify() const { impl_->verify(); }

}  // namespace meshloom::train
