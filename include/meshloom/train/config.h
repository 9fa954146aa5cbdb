#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/cost/cost_model.h"
#include "meshloom/cost/memory_model.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/model/config.h"

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
/// `final_fraction` at `steps`, and constant from there on.
struct ScheduleOptions {
  std::string kind = "cosine";  ///< cosine, linear, constant
  std::int64_t warmup = 0;      ///< steps; step w < warmup runs at (w + 1) / (warmup + 1)
  std::int64_t steps = 0;       ///< 0: the run's
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

/// At most one is set; none where the program builds the model's config itself.
struct ModelSection {
  std::string path;    ///< Hugging Face folder with weights
  std::string config;  ///< a config.json; weights initialised by `seed`
  std::string preset;  ///< the same as JSON text (in YAML: `config:` holding a mapping)
};

struct DataSection {
  std::vector<std::string> paths;  ///< folders of text files, or .jsonl files; YAML takes one too
  std::vector<double> weights;     ///< one a path; empty: by size
  std::vector<std::string> extensions;  ///< of files in folders, e.g. ".py"; empty: all text files
  std::string tokenizer;                ///< tokenizer.json or SentencePiece model; empty: train one
  std::int64_t vocab_size = 8192;       ///< of a tokenizer trained here
  std::int64_t max_document_tokens = 0;
  double held_out_fraction = 0.0;
  std::string invalid_utf8 = "error";  ///< a document that is not UTF-8: error, or skip (counted)
  std::string cache;  ///< folder of tokenizer and tokenised documents; empty: <run>/cache
};

struct CheckpointSection {
  std::int64_t every_steps = 0;  ///< 0: only at the end
  double every_minutes = 0.0;    ///< 0: by steps alone
  int keep = 2;                  ///< newest complete ones; 0 keeps all
  /// auto: continue from the newest good checkpoint of the run folder, reporting damaged ones;
  /// strict: the newest has to be good; no: start over, moving the run folder's old records aside.
  /// YAML's true and false mean auto and no.
  std::string resume = "auto";
};

/// Which rank of an expert-parallel group holds which expert, while training.
struct ExpertsSection {
  std::int64_t replan_every = 0;  ///< steps between new decisions by observed loads; 0: none
  /// A layer's experts stay unless the load of its busiest rank falls by this share.
  double least_gain = 0.05;
};

/// How the model is spread over the layout's ranks.
struct ParallelSection {
  int zero = 1;  ///< what is sharded over replicas: 1 optimizer state, 2 gradients, 3 parameters
  std::string pipeline;            ///< schedule by name; empty: 1f1b, with chunks interleaved_1f1b
  std::vector<int> split;          ///< layers of each piece of the pipeline; empty: `split_by`
  std::string split_by = "cost";   ///< cost: the slowest piece as fast as can be; layers: as many
  std::string recompute = "none";  ///< what backward computes again: none, selective, full
  /// Consecutive ranks that count as one node; 0: those of a host. Plans keep units inside nodes,
  /// and sums of gradients cross them once for all their ranks.
  int ranks_per_node = 0;
  ExpertsSection experts;
};

/// What plans may move to host memory between forward and backward, see docs/parallel.md.
struct OffloadSection {
  bool enabled = false;
  int resident_layers = 2;  ///< of the model, that stay
  double transfer = 0.0;    ///< MemoryModel::transfer; 0: measured, where costs are
  std::string folder;       ///< of the file for what leaves CPU memory; empty: the system's
};

/// One training run, as config.yaml says it. Unknown keys are refused by name, with the
/// nearest known one.
struct MESHLOOM_API TrainConfig {
  std::string run = "runs/run";
  std::uint64_t seed = 0;
  std::int64_t steps = 100;
  Layout layout{.hdp = 0};  ///< hdp 0: all ranks
  ParallelSection parallel;
  OffloadSection offload;
  std::string device = "cpu";     ///< cpu, cuda (the rank's local device), cuda:N
  std::string dtype = "float32";  ///< compute: float32, bfloat16, float64
  bool deterministic = false;
  int threads = 0;  ///< intra-op threads of a rank; 0: cores / ranks on the host, at least 1
  std::int64_t global_batch_tokens = 0;
  std::int64_t capacity_tokens = 0;  ///< of one rank for one unit; 0: see `resolve`
  std::string strategy = "balanced";
  /// How ranks of a unit share keys and values: `auto`, by figures measured when the run starts, or
  /// rules as `plan::parse_exchange_rules` reads them.
  std::string exchange = "auto";
  std::string exchange_dtype = "same";  ///< keys and values between ranks: same, float32, bfloat16
  std::optional<CostModel> cost;        ///< absent: measured while training
  double aux_loss_coefficient = -1.0;   ///< negative: the model config's
  std::string aux_loss = "global_lagged";  ///< none, sequence, global_lagged, global
  /// How far correction biases of routers move a step; negative: 0.001 where the model has them.
  double bias_update_speed = -1.0;
  double z_loss_coefficient = 0.0;
  /// Where memory is predicted not to do: auto (refuse only what cannot fit whatever the data is),
  /// warn, refuse.
  std::string memory_check = "auto";
  double clip_norm = 1.0;           ///< 0: none
  std::string nan_policy = "stop";  ///< stop, skip
  std::int64_t evaluate_every = 0;  ///< steps; 0: never
  std::int64_t evaluate_tokens = 65536;
  std::int64_t timeline_steps = 16;  ///< newest steps in timeline.json; 0: no timeline
  bool save_plans = true;            ///< plans/step-N.json
  double timeout_seconds = 600;
  double watchdog_seconds = 120;  ///< calls that hang for longer are reported; 0: none
  ModelSection model;
  DataSection data;
  AdamWOptions optimizer;
  ScheduleOptions schedule;
  std::vector<ParameterRule> rules;
  CheckpointSection checkpoint;

  /// @throws IoError    the file cannot be read.
  /// @throws DataError  not YAML, unknown key, wrong type or range; names file, line and key.
  [[nodiscard]] static TrainConfig load(const std::string& path);
  /// @param name  of the text in messages, e.g. the file's path
  [[nodiscard]] static TrainConfig from_yaml(const std::string& text, const std::string& name);
  /// Text that `from_yaml` reads back to an equal config.
  [[nodiscard]] std::string to_yaml() const;
  /// @throws InvalidArgument  a value is out of range; names the key and both values.
  void validate() const;

  /// Fills what depends on the world: layout.hdp, threads are left to the trainer.
  /// `capacity_tokens` 0 becomes the larger of global_batch_tokens / hdp and the share of the
  /// longest document on the whole axis, data.max_document_tokens / hdp, rounded up.
  /// @param layers  of the model, for what the axis holds with offload; 0: as without
  /// @throws InvalidArgument  the layout does not fit `world_size`, or max_document_tokens does not
  ///   fit the axis.
  void resolve(int world_size, int layers = 0);

  /// What planning knows of memory for a model of `layers`.
  [[nodiscard]] MemoryModel memory(int layers) const;
};

/// The model that the `model` section describes.
/// @throws InvalidArgument  the section is empty.
/// @throws IoError, DataError, NotSupported  as ModelConfig::load.
[[nodiscard]] MESHLOOM_API model::ModelConfig load_model_config(const TrainConfig& config);

}  // namespace meshloom::train
