#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/cost/cost_model.h"
#include "meshloom/mesh/layout.h"

namespace meshloom::train {

/// AdamW (Loshchilov & Hutter). Masters and moments in max(fp32, parameter dtype).
struct AdamWOptions {
  double lr = 3e-4;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
};

/// Factor on the learning rate by step: linear warm-up, then constant, linear or cosine down to
/// `final_fraction` at `steps`.
struct ScheduleOptions {
  std::string kind = "cosine";  ///< cosine, linear, constant
  std::int64_t warmup = 0;
  std::int64_t steps = 0;
  double final_fraction = 0.1;
};

/// Overrides for parameters whose name matches `pattern` (ECMAScript regex, searched); the first
/// match wins.
struct ParameterRule {
  std::string pattern;
  double lr_factor = 1.0;
  std::optional<double> weight_decay;
  bool frozen = false;
};

struct ModelSection {
  std::string path;      ///< Hugging Face folder with weights; or
  std::string config;    ///< a config.json, weights initialised by `seed`; or
  std::string preset;    ///< inline config as JSON text (the YAML's `model.config:` mapping)
};

struct DataSection {
  std::vector<std::string> paths;  ///< folders of text files, or .jsonl files
  std::vector<double> weights;     ///< one a path; empty: by size
  std::string tokenizer;           ///< tokenizer.json or SentencePiece model; empty: train one
  std::int64_t vocab_size = 8192;  ///< of a tokenizer trained here
  std::int64_t max_document_tokens = 0;
  double held_out_fraction = 0.0;
  std::string cache;  ///< folder; empty: <run>/cache
};

struct CheckpointSection {
  std::int64_t every_steps = 0;  ///< 0: only at the end
  double every_minutes = 0.0;
  int keep = 2;
  bool resume = true;  ///< continue from the newest good checkpoint of the run folder
};

/// One training run, as config.yaml says it. Unknown keys are refused by name.
struct MESHLOOM_API TrainConfig {
  std::string run = "runs/run";
  std::uint64_t seed = 0;
  std::int64_t steps = 100;
  Layout layout;
  std::string device = "cpu";
  std::string dtype = "float32";  ///< compute: float32, bfloat16, float64
  bool deterministic = false;
  int threads = 0;  ///< intra-op threads of a rank; 0: cores / ranks on the host, at least 1
  std::int64_t global_batch_tokens = 0;
  std::int64_t capacity_tokens = 0;
  std::string strategy = "balanced";
  std::optional<CostModel> cost;  ///< absent: measured while training
  double aux_loss_coefficient = -1.0;  ///< negative: the model config's
  std::string aux_loss = "global_lagged";  ///< none, sequence, global_lagged, global
  double z_loss_coefficient = 0.0;
  double clip_norm = 1.0;  ///< 0: none
  std::string nan_policy = "stop";  ///< stop, skip
  std::int64_t evaluate_every = 0;
  std::int64_t evaluate_tokens = 65536;
  double timeout_seconds = 600;
  ModelSection model;
  DataSection data;
  AdamWOptions optimizer;
  ScheduleOptions schedule;
  std::vector<ParameterRule> rules;
  CheckpointSection checkpoint;

  /// @throws IoError, DataError  not YAML, unknown key, wrong type or range; names file and key.
  [[nodiscard]] static TrainConfig load(const std::string& path);
  [[nodiscard]] static TrainConfig from_yaml(const std::string& text, const std::string& name);
  [[nodiscard]] std::string to_yaml() const;
  void validate() const;
};

}  // namespace meshloom::train
