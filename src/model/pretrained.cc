#include "meshloom/model/pretrained.h"

#include <ATen/ops/equal.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "meshloom/core/check.h"
#include "model/internal/files.h"

namespace meshloom::model {
namespace {

constexpr const char* kLoadWhere = "model.load_pretrained";
constexpr const char* kSaveWhere = "model.save_pretrained";

/// Old Llama checkpoints store a buffer that is computed; others have layers after the last for
/// multi-token prediction.
bool is_ignored(const ModelConfig& config, const std::string& name) {
  if (name.ends_with("rotary_emb.inv_freq")) return true;
  for (std::int64_t i = 0; i < config.prediction_layers; ++i) {
    if (name.starts_with(fmt::format("model.layers.{}.", config.layers + i))) return true;
  }
  return false;
}

/// Name -> the Hub's name, where transformers' module tree differs from it.
std::string hub_name(const ModelConfig& config, std::string name) {
  if (config.model_type != "mixtral") return name;
  const std::size_t block = name.find(".mlp.");
  if (block != std::string::npos) name.replace(block, 5, ".block_sparse_moe.");
  return name;
}

std::string shape_text(at::IntArrayRef shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

at::Tensor flat_part(const at::Tensor& flat, const ParameterHandle& handle) {
  return flat.narrow(0, handle.offset, c10::multiply_integers(handle.shape)).view(handle.shape);
}

/// Finds the tensor in the whole model's table, checks its shape.
ParameterHandle match(const std::string& folder, const ModelConfig& config,
                      const ParameterTable& whole, const TensorInfo& info) {
  const ParameterHandle expected = locate_tensor(config, whole, info.name);
  if (!expected) {
    throw DataError(kLoadWhere,
                    fmt::format("{}: unexpected tensor \"{}\", model_type \"{}\" has none of that "
                                "name",
                                folder, info.name, config.model_type));
  }
  if (expected.shape != info.shape) {
    throw DataError(kLoadWhere,
                    fmt::format("{}: tensor \"{}\" has shape {}, expected {}", folder, info.name,
                                shape_text(info.shape), shape_text(expected.shape)));
  }
  if (!at::isFloatingType(info.dtype)) {
    throw DataError(kLoadWhere, fmt::format("{}: tensor \"{}\" is of dtype {}, expected floating "
                                            "point",
                                            folder, info.name, c10::toString(info.dtype)));
  }
  return expected;
}

/// The parameters that a handle covers.
std::span<const ParameterSpec> covered(const ParameterTable& table, const ParameterHandle& handle) {
  const auto at = [&](std::int64_t offset) {
    return std::lower_bound(table.parameters.begin(), table.parameters.end(), offset,
                            [](const ParameterSpec& s, std::int64_t o) { return s.offset < o; });
  };
  return {at(handle.offset), at(handle.offset + c10::multiply_integers(handle.shape))};
}

/// Copies what is held here of one checkpoint tensor's parameters.
/// @param covers  of the whole model, in `tensor` from `offset` on
/// @returns whether one of them was there before.
bool take(const ParameterTable& table, std::span<const ParameterSpec> covers, std::int64_t offset,
          const at::Tensor& tensor, at::Tensor& values, std::vector<bool>& seen) {
  bool again = false;
  const at::Tensor flat = tensor.view({-1});
  for (const ParameterSpec& whole : covers) {
    const ParameterSpec* own = table.find_if(whole.name);
    if (own == nullptr) continue;
    at::Tensor box = flat_part(flat, {whole.offset - offset, whole.shape});
    for (std::size_t d = 0; d < own->corner.size(); ++d) {
      box = box.narrow(static_cast<std::int64_t>(d), own->corner[d], own->shape[d]);
    }
    flat_part(values, {own->offset, own->shape}).copy_(box);
    auto flag = seen[std::size_t(own - table.parameters.data())];
    again = again || flag;
    flag = true;
  }
  return again;
}

void require_all(const std::string& folder, const ParameterTable& table,
                 const std::vector<bool>& seen) {
  std::vector<std::string> missing;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    if (!seen[i]) missing.push_back(table.parameters[i].name);
  }
  if (missing.empty()) return;
  constexpr std::size_t kShown = 3;
  const std::size_t count = missing.size();
  missing.resize(std::min(count, kShown));
  throw DataError(kLoadWhere, fmt::format("{}: {} tensor(s) missing: {}{}", folder, count,
                                          fmt::join(missing, ", "), count > kShown ? ", ..." : ""));
}

std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      throw NotSupported(kSaveWhere,
                         fmt::format("weights as {} are not built", c10::toString(dtype)));
  }
}

/// Parameters cut into files of at most `limit` bytes (one tensor at least), as index ranges.
std::vector<std::pair<std::size_t, std::size_t>> cut_shards(const ParameterTable& table,
                                                            std::int64_t element_bytes,
                                                            std::int64_t limit) {
  std::vector<std::pair<std::size_t, std::size_t>> shards;
  std::size_t begin = 0;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < table.parameters.size(); ++i) {
    const std::int64_t size = table.parameters[i].elements() * element_bytes;
    if (i > begin && bytes + size > limit) {
      shards.emplace_back(begin, i);
      begin = i;
      bytes = 0;
    }
    bytes += size;
  }
  shards.emplace_back(begin, table.parameters.size());
  return shards;
}

/// Weight files in `folder` that are not among `kept`.
void remove_stale(const std::filesystem::path& folder, const std::set<std::string>& kept) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    const bool weights = name == "model.safetensors" || name == "model.safetensors.index.json" ||
                         (name.starts_with("model-") && name.ends_with(".safetensors"));
    if (weights && !kept.contains(name)) std::filesystem::remove(entry.path(), ignored);
  }
}

}  // namespace

ParameterHandle locate_tensor(const ModelConfig& config, const ParameterTable& table,
                              const std::string& given) {
  const std::string name = hub_name(config, given);
  if (const ParameterSpec* spec = table.find_if(name)) return {spec->offset, spec->shape};
  if (name == "lm_head.weight" && config.tie_word_embeddings) {
    return locate_tensor(config, table, "model.embed_tokens.weight");
  }
  const bool mixtral = config.model_type == "mixtral";
  const MoeConfig& moe = config.moe;
  const auto fused = [&](const char* suffix, const char* first,
                         std::vector<std::int64_t> shape) -> ParameterHandle {
    if (!name.ends_with(suffix)) return {};
    const std::string prefix = name.substr(0, name.size() - std::string(suffix).size());
    const ParameterSpec* spec = table.find_if(prefix + ".experts.0." + first + ".weight");
    if (spec == nullptr) return {};
    return {spec->offset, std::move(shape)};
  };
  if (ParameterHandle handle =
          fused(".experts.gate_up_proj", mixtral ? "w1" : "gate_proj",
                {moe.experts, 2 * moe.intermediate_size, config.hidden_size})) {
    return handle;
  }
  return fused(".experts.down_proj", mixtral ? "w2" : "down_proj",
               {moe.experts, config.hidden_size, moe.intermediate_size});
}

void load_pretrained(const std::string& folder, const ModelConfig& config,
                     const ParameterTable& table, at::Tensor& values) {
  MESHLOOM_CHECK_EQ(values.numel(), table.elements, kLoadWhere, "elements of values");
  const SafetensorsFolder files(folder);
  const ParameterTable whole = parameter_table(config, {0, config.layers}, true, true);
  std::vector<bool> seen(table.parameters.size(), false);
  const SafetensorsFolder::Entry* tied_head = nullptr;
  for (const SafetensorsFolder::Entry& entry : files.entries()) {
    const std::string& name = entry.info->name;
    if (is_ignored(config, name)) continue;
    const ParameterHandle handle = match(folder, config, whole, *entry.info);
    if (name == "lm_head.weight" && config.tie_word_embeddings) {
      tied_head = &entry;
      continue;
    }
    const std::span<const ParameterSpec> covers = covered(whole, handle);
    if (std::none_of(covers.begin(), covers.end(),
                     [&](const ParameterSpec& s) { return table.find_if(s.name) != nullptr; })) {
      continue;
    }
    if (take(table, covers, handle.offset, entry.file->tensor(name), values, seen)) {
      throw DataError(kLoadWhere,
                      fmt::format("{}: tensor \"{}\" is there under two names", folder, name));
    }
  }
  require_all(folder, table, seen);
  const ParameterSpec* embedding = table.find_if("model.embed_tokens.weight");
  if (tied_head != nullptr && embedding != nullptr) {
    at::Tensor head = tied_head->file->tensor(tied_head->info->name);
    for (std::size_t d = 0; d < embedding->corner.size(); ++d) {
      head = head.narrow(static_cast<std::int64_t>(d), embedding->corner[d], embedding->shape[d]);
    }
    const at::Tensor own = flat_part(values, {embedding->offset, embedding->shape}).to(at::kCPU);
    if (!at::equal(own, head.to(own.scalar_type()))) {
      throw DataError(kLoadWhere, fmt::format("{}: lm_head.weight differs from the embedding that "
                                              "tie_word_embeddings ties it to",
                                              folder));
    }
  }
}

NamedTensors views_like_checkpoint(const std::string& folder, const ModelConfig& config,
                                   const ParameterTable& table, const at::Tensor& flat) {
  const SafetensorsFolder files(folder);
  NamedTensors result;
  for (const SafetensorsFolder::Entry& entry : files.entries()) {
    if (is_ignored(config, entry.info->name)) continue;
    const ParameterHandle handle = match(folder, config, table, *entry.info);
    result.emplace_back(entry.info->name, flat_part(flat, handle));
  }
  return result;
}

void save_pretrained(const std::string& folder, const ModelConfig& config,
                     const ParameterTable& table, const at::Tensor& values,
                     const SaveOptions& options) {
  MESHLOOM_CHECK_EQ(values.numel(), table.elements, kSaveWhere, "elements of values");
  save_pretrained(
      folder, config, table,
      [&](const ParameterSpec& spec) {
        return flat_part(values, {spec.offset, spec.shape});
      },
      options);
}

void save_pretrained(const std::string& folder, const ModelConfig& config,
                     const ParameterTable& table, const TensorSource& values,
                     const SaveOptions& options) {
  namespace fs = std::filesystem;
  MESHLOOM_CHECK_GT(options.max_shard_bytes, 0, kSaveWhere, "max_shard_bytes");
  ModelConfig stored = config;
  stored.dtype = dtype_name(options.dtype);
  const fs::path root(folder);
  std::error_code error;
  fs::create_directories(root, error);
  if (error) {
    throw IoError(kSaveWhere, fmt::format("{}: cannot create: {}", folder, error.message()));
  }

  // Everything is on the disk under temporary names before the first file is replaced.
  const auto element_bytes = static_cast<std::int64_t>(c10::elementSize(options.dtype));
  const auto shards = cut_shards(table, element_bytes, options.max_shard_bytes);
  std::set<std::string> kept;
  std::vector<std::unique_ptr<SafetensorsWriter>> writers;
  nlohmann::json index{{"metadata", {{"total_size", table.elements * element_bytes}}},
                       {"weight_map", nlohmann::json::object()}};
  for (std::size_t shard = 0; shard < shards.size(); ++shard) {
    const std::string file = shards.size() == 1 ? "model.safetensors"
                                                : fmt::format("model-{:05}-of-{:05}.safetensors",
                                                              shard + 1, shards.size());
    std::vector<TensorInfo> entries;
    for (std::size_t i = shards[shard].first; i < shards[shard].second; ++i) {
      const ParameterSpec& spec = table.parameters[i];
      entries.push_back({spec.name, options.dtype, spec.shape});
      index["weight_map"][spec.name] = file;
    }
    auto writer =
        std::make_unique<SafetensorsWriter>((root / file).string(), std::move(entries),
                                            std::map<std::string, std::string>{{"format", "pt"}});
    for (std::size_t i = shards[shard].first; i < shards[shard].second; ++i) {
      writer->write(values(table.parameters[i]));
    }
    writer->finish();
    writers.push_back(std::move(writer));
    kept.insert(file);
  }
  std::vector<std::unique_ptr<detail::AtomicFile>> texts;
  const auto prepare = [&](const char* name, const std::string& text) {
    texts.push_back(std::make_unique<detail::AtomicFile>((root / name).string()));
    texts.back()->write(text.data(), text.size());
    texts.back()->finish();
  };
  prepare("config.json", stored.to_json());
  if (shards.size() > 1) {
    prepare("model.safetensors.index.json", index.dump(2) + "\n");
    kept.insert("model.safetensors.index.json");
  }
  for (const auto& writer : writers) writer->commit();
  for (const auto& text : texts) text->commit();
  remove_stale(root, kept);
}

}  // namespace meshloom::model
