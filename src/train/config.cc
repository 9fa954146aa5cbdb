#include "meshloom/train/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <initializer_list>
#include <regex>
#include <sstream>
#include <string_view>

#include "meshloom/core/error.h"
#include "meshloom/plan/exchange_choice.h"
#include "train/internal/config_yaml.h"

namespace meshloom::train {

namespace {

constexpr const char* kConfigWhere = "train.config";

class RangeCheck {
 public:
  void at_least(const char* key, double value, double limit) {
    if (!(value >= limit)) add(key, fmt::format("got {}, expected at least {}", value, limit));
  }
  void above(const char* key, double value, double limit) {
    if (!(value > limit)) add(key, fmt::format("got {}, expected more than {}", value, limit));
  }
  /// lower <= value < upper
  void fraction(const char* key, double value) {
    if (!(value >= 0.0 && value < 1.0)) add(key, fmt::format("got {}, expected 0 <= x < 1", value));
  }
  void one_of(const char* key, const std::string& value,
              std::initializer_list<std::string_view> names) {
    if (std::find(names.begin(), names.end(), value) == names.end()) {
      add(key, fmt::format("got \"{}\", expected one of: {}", value, fmt::join(names, ", ")));
    }
  }
  void add(std::string key, std::string message) {
    if (!issue) issue = detail::ConfigIssue{std::move(key), std::move(message)};
  }
  std::optional<detail::ConfigIssue> issue;
};

}  // namespace

std::optional<detail::ConfigIssue> detail::find_issue(const TrainConfig& c) {
  RangeCheck check;
  if (c.run.empty()) check.add("run", "the run folder's name is empty");
  check.at_least("steps", static_cast<double>(c.steps), 0);
  check.at_least("layout.hdp", c.layout.hdp, 0);
  check.at_least("layout.tp", c.layout.tp, 1);
  check.at_least("layout.pp", c.layout.pp, 1);
  check.at_least("layout.ep", c.layout.ep, 1);
  check.at_least("layout.chunks", c.layout.chunks, 1);
  if (c.parallel.zero < 1 || c.parallel.zero > 3) {
    check.add("parallel.zero", fmt::format("got {}, expected 1, 2 or 3", c.parallel.zero));
  }
  check.one_of("parallel.split_by", c.parallel.split_by, {"cost", "layers"});
  check.one_of("parallel.recompute", c.parallel.recompute, {"none", "selective", "full"});
  check.at_least("parallel.experts.replan_every",
                 static_cast<double>(c.parallel.experts.replan_every), 0);
  check.fraction("parallel.experts.least_gain", c.parallel.experts.least_gain);
  check.at_least("offload.resident_layers", c.offload.resident_layers, 0);
  if (!(c.offload.transfer >= 0.0 && std::isfinite(c.offload.transfer))) {
    check.add("offload.transfer",
              fmt::format("got {}, expected a number of at least 0", c.offload.transfer));
  }
  if (!std::regex_match(c.device, std::regex("cpu|cuda(:[0-9]+)?"))) {
    check.add("device", fmt::format("got \"{}\", expected cpu, cuda or cuda:N", c.device));
  }
  check.one_of("dtype", c.dtype, {"float32", "bfloat16", "float64"});
  check.at_least("threads", c.threads, 0);
  check.at_least("global_batch_tokens", static_cast<double>(c.global_batch_tokens), 1);
  check.at_least("capacity_tokens", static_cast<double>(c.capacity_tokens), 0);
  if (c.strategy.empty()) check.add("strategy", "the name is empty");
  try {
    (void)plan::parse_exchange_rules(c.exchange);
  } catch (const Error& error) {
    check.add("exchange", error.what());
  }
  check.one_of("memory_check", c.memory_check, {"auto", "warn", "refuse"});
  check.one_of("exchange_dtype", c.exchange_dtype, {"same", "float32", "bfloat16"});
  if (c.cost) {
    try {
      c.cost->validate();
    } catch (const Error& error) {
      check.add("cost", error.what());
    }
  }
  check.one_of("aux_loss", c.aux_loss, {"none", "sequence", "global_lagged", "global"});
  check.at_least("z_loss_coefficient", c.z_loss_coefficient, 0);
  check.at_least("clip_norm", c.clip_norm, 0);
  check.one_of("nan_policy", c.nan_policy, {"stop", "skip"});
  check.at_least("evaluate_every", static_cast<double>(c.evaluate_every), 0);
  check.at_least("evaluate_tokens", static_cast<double>(c.evaluate_tokens), 1);
  check.at_least("timeline_steps", static_cast<double>(c.timeline_steps), 0);
  check.above("timeout_seconds", c.timeout_seconds, 0);
  check.at_least("watchdog_seconds", c.watchdog_seconds, 0);

  const int sources = static_cast<int>(!c.model.path.empty()) +
                      static_cast<int>(!c.model.config.empty() || !c.model.preset.empty());
  if (sources > 1) check.add("model", "path and config are both given; only one can be");

  if (!c.data.weights.empty() && c.data.weights.size() != c.data.paths.size()) {
    check.add("data.weights", fmt::format("got {} weights, expected one a path: {}",
                                          c.data.weights.size(), c.data.paths.size()));
  }
  for (const double weight : c.data.weights) check.above("data.weights", weight, 0);
  check.at_least("data.vocab_size", static_cast<double>(c.data.vocab_size), 2);
  check.at_least("data.max_document_tokens", static_cast<double>(c.data.max_document_tokens), 0);
  check.fraction("data.held_out_fraction", c.data.held_out_fraction);
  check.one_of("data.invalid_utf8", c.data.invalid_utf8, {"error", "skip"});

  check.at_least("optimizer.lr", c.optimizer.lr, 0);
  check.fraction("optimizer.beta1", c.optimizer.beta1);
  check.fraction("optimizer.beta2", c.optimizer.beta2);
  check.above("optimizer.eps", c.optimizer.eps, 0);
  check.at_least("optimizer.weight_decay", c.optimizer.weight_decay, 0);
  check.one_of("schedule.kind", c.schedule.kind, {"cosine", "linear", "constant"});
  check.at_least("schedule.warmup", static_cast<double>(c.schedule.warmup), 0);
  check.at_least("schedule.steps", static_cast<double>(c.schedule.steps), 0);
  check.at_least("schedule.final_fraction", c.schedule.final_fraction, 0);
  for (std::size_t i = 0; i < c.rules.size(); ++i) {
    const ParameterRule& rule = c.rules[i];
    const std::string key = fmt::format("rules[{}]", i);
    if (rule.pattern.empty()) check.add(key + ".pattern", "the pattern is empty");
    try {
      const std::regex parsed(rule.pattern, std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      check.add(key + ".pattern",
                fmt::format("\"{}\" is no regular expression: {}", rule.pattern, error.what()));
    }
    check.at_least((key + ".lr_factor").c_str(), rule.lr_factor, 0);
    check.at_least((key + ".weight_decay").c_str(), rule.weight_decay.value_or(0), 0);
  }
  check.at_least("checkpoint.every_steps", static_cast<double>(c.checkpoint.every_steps), 0);
  check.at_least("checkpoint.every_minutes", c.checkpoint.every_minutes, 0);
  check.at_least("checkpoint.keep", c.checkpoint.keep, 0);
  check.one_of("checkpoint.resume", c.checkpoint.resume, {"auto", "strict", "no"});
  return check.issue;
}

TrainConfig TrainConfig::load(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  if (file) text << file.rdbuf();
  if (!file) throw IoError(kConfigWhere, fmt::format("cannot read {}", path));
  return from_yaml(text.str(), path);
}

void TrainConfig::validate() const {
  if (const auto issue = detail::find_issue(*this)) {
    throw InvalidArgument(kConfigWhere, fmt::format("{}: {}", issue->key, issue->message));
  }
}

MemoryModel TrainConfig::memory(int layers) const {
  return {.layers = offload.enabled ? layers : 0,
          .resident_layers = offload.resident_layers,
          .transfer = offload.transfer};
}

void TrainConfig::resolve(int world_size, int layers) {
  validate();
  if (layout.hdp == 0) layout.hdp = std::max(1, world_size / (layout.tp * layout.pp));
  layout.validate();
  if (layout.world_size() != world_size) {
    throw InvalidArgument(
        kConfigWhere, fmt::format("layout {} needs {} ranks, the world has {}", layout.to_string(),
                                  layout.world_size(), world_size));
  }
  const auto share = [&](std::int64_t tokens) { return (tokens + layout.hdp - 1) / layout.hdp; };
  // As the loader has it: documents without a limit of their own are cut at a step's tokens.
  const std::int64_t most =
      data.max_document_tokens > 0 ? data.max_document_tokens : global_batch_tokens;
  if (capacity_tokens == 0) {
    capacity_tokens = std::max(share(global_batch_tokens), share(most));
    return;
  }
  const std::int64_t held = memory(layers).unit_capacity(capacity_tokens, layout.hdp, 1.0);
  if (most > held) {
    throw InvalidArgument(
        kConfigWhere,
        fmt::format("documents of {} tokens ({}) do not fit {} ranks of capacity_tokens {}; the "
                    "axis holds {}",
                    most,
                    data.max_document_tokens > 0 ? "data.max_document_tokens"
                                                 : "global_batch_tokens, without "
                                                   "data.max_document_tokens",
                    layout.hdp, capacity_tokens, held));
  }
}

model::ModelConfig load_model_config(const TrainConfig& config) {
  if (!config.model.path.empty())
    return model::ModelConfig::load(config.model.path + "/config.json");
  if (!config.model.config.empty()) return model::ModelConfig::load(config.model.config);
  if (!config.model.preset.empty()) return model::ModelConfig::from_json(config.model.preset);
  throw InvalidArgument(kConfigWhere,
                        "the model section is empty; give model.path (a Hugging Face folder) or "
                        "model.config (a config.json or a mapping)");
}

}  // namespace meshloom::train
