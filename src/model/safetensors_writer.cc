#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "meshloom/core/check.h"
#include "meshloom/model/safetensors.h"
#include "model/internal/files.h"
#include "model/internal/safetensors_format.h"

namespace meshloom::model {
namespace {

using detail::kSafetensorsWhere;

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
    : entries_(std::move(entries)) {
  const std::string header = make_header(entries_, metadata);
  file_ = std::make_unique<detail::AtomicFile>(path);
  file_->write(header.data(), header.size());
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const at::Tensor& tensor) {
  MESHLOOM_CHECK(next_ < entries_.size(), kSafetensorsWhere,
                 fmt::format("{}: all {} tensors are written", file_->path(), entries_.size()));
  const TensorInfo& entry = entries_[next_];
  MESHLOOM_CHECK(
      tensor.sizes() == at::IntArrayRef(entry.shape), kSafetensorsWhere,
      fmt::format("{}: tensor \"{}\" is not of the announced shape", file_->path(), entry.name));
  const at::Tensor stored = tensor.to(at::kCPU, entry.dtype).contiguous();
  file_->write(stored.const_data_ptr(), stored.nbytes());
  ++next_;
}

void SafetensorsWriter::finish() {
  MESHLOOM_CHECK_EQ(next_, entries_.size(), kSafetensorsWhere, "tensors written before commit");
  file_->finish();
}

void SafetensorsWriter::commit() {
  finish();
  file_->commit();
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
  detail::AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace meshloom::model
