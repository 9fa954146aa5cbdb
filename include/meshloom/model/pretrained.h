#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"
#include "meshloom/model/safetensors.h"

namespace meshloom::model {

/// Where a checkpoint's tensor lies in the flat space. Takes every name that transformers 4 or 5
/// writes for our families: experts one by one, or fused over a layer (`experts.gate_up_proj`,
/// [E, 2 I, hidden], and `experts.down_proj`); Mixtral's block under `block_sparse_moe` or `mlp`; a
/// tied `lm_head.weight` is the embedding.
/// @returns an empty handle for a name that is not in the table.
[[nodiscard]] MESHLOOM_API ParameterHandle locate_tensor(const ModelConfig& config,
                                                         const ParameterTable& table,
                                                         const std::string& name);

/// Reads the weights of a Hugging Face folder into a flat buffer, converting to its dtype.
/// @param table   what is held here: of the whole model, one stage, some experts, or boxes of
/// tensors.
/// @param values  [table.elements], any device; written.
/// @throws IoError, DataError  unreadable or malformed files; a tensor that is missing, unexpected,
///   of the wrong shape or not floating point, by name. `values` may be partly written.
MESHLOOM_API void load_pretrained(const std::string& folder, const ModelConfig& config,
                                  const ParameterTable& table, at::Tensor& values);

/// Names and views of a flat buffer just as the folder's own safetensors name and shape their
/// tensors, e.g. gradients under the names of the checkpoint they belong to. File order.
[[nodiscard]] MESHLOOM_API NamedTensors views_like_checkpoint(const std::string& folder,
                                                              const ModelConfig& config,
                                                              const ParameterTable& table,
                                                              const at::Tensor& flat);

struct SaveOptions {
  at::ScalarType dtype = at::kFloat;             ///< of the stored weights
  std::int64_t max_shard_bytes = 5'000'000'000;  ///< more are split over several files
};

/// Writes config.json and the weights as a folder that transformers opens, under the Hub's names
/// (experts one by one). All files are on the disk under temporary names before the first older one
/// is replaced, so a full disk leaves the folder as it was; older weight files that the new ones do
/// not replace are removed at the end.
/// @param table  of the whole model.
/// @throws IoError  naming the file, e.g. on a full disk. A process that is killed among the last
///   renames leaves old and new files mixed: save into a fresh folder and rename that where it
///   matters.
MESHLOOM_API void save_pretrained(const std::string& folder, const ModelConfig& config,
                                  const ParameterTable& table, const at::Tensor& values,
                                  const SaveOptions& options = {});

/// Gives the tensor of a parameter, in its shape.
using TensorSource = std::function<at::Tensor(const ParameterSpec& spec)>;

/// The same, one tensor in memory at a time.
MESHLOOM_API void save_pretrained(const std::string& folder, const ModelConfig& config,
                                  const ParameterTable& table, const TensorSource& values,
                                  const SaveOptions& options = {});

}  // namespace meshloom::model
