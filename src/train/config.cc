#include "meshloom/train/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>
#include <string_view>

#include "meshloom/core/error.h"
#include "train/internal/yaml_section.h"

namespace meshloom::train {

namespace {

constexpr const char* kConfigWhere = "train.config";

/// A value out of range: the dotted key and what is wrong with it.
struct Issue {
  std::string key;
  std::string message;
};

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
    if (!issue) issue = Issue{std::move(key), std::move(message)};
  }
  std::optional<Issue> issue;
};

std::optional<Issue> find_issue(const TrainConfig& c) {
  RangeCheck check;
  if (c.run.empty()) check.add("run", "the run folder's name is empty");
  check.at_least("steps", static_cast<double>(c.steps), 0);
  check.at_least("layout.hdp", c.layout.hdp, 0);
  check.at_least("layout.tp", c.layout.tp, 1);
  check.at_least("layout.pp", c.layout.pp, 1);
  check.at_least("layout.ep", c.layout.ep, 1);
  check.at_least("layout.chunks", c.layout.chunks, 1);
  if (!std::regex_match(c.device, std::regex("cpu|cuda(:[0-9]+)?"))) {
    check.add("device", fmt::format("got \"{}\", expected cpu, cuda or cuda:N", c.device));
  }
  check.one_of("dtype", c.dtype, {"float32", "bfloat16", "float64"});
  check.at_least("threads", c.threads, 0);
  check.at_least("global_batch_tokens", static_cast<double>(c.global_batch_tokens), 1);
  check.at_least("capacity_tokens", static_cast<double>(c.capacity_tokens), 0);
  if (c.strategy.empty()) check.add("strategy", "the name is empty");
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

void read_layout(detail::YamlSection& top, Layout& layout) {
  const auto node = top.find("layout");
  if (!node) return;
  if (node->IsScalar()) {
    try {
      layout = Layout::parse(node->Scalar());
    } catch (const Error& error) {
      top.fail(*node, "layout", error.what());
    }
    return;
  }
  auto section = top.section("layout");
  section->read("tp", layout.tp);
  section->read("hdp", layout.hdp);
  section->read("pp", layout.pp);
  section->read("ep", layout.ep);
  section->read("chunks", layout.chunks);
  section->finish();
}

void read_model(detail::YamlSection& top, ModelSection& model) {
  auto section = top.section("model");
  if (!section) return;
  section->read("path", model.path);
  if (const auto node = section->find("config")) {
    if (node->IsMap()) {
      model.preset = detail::yaml_to_json(*node);
    } else {
      section->read("config", model.config);
    }
  }
  section->finish();
}

void read_data(detail::YamlSection& top, DataSection& data) {
  auto section = top.section("data");
  if (!section) return;
  section->read("paths", data.paths);
  section->read("weights", data.weights);
  section->read("extensions", data.extensions);
  section->read("tokenizer", data.tokenizer);
  section->read("vocab_size", data.vocab_size);
  section->read("max_document_tokens", data.max_document_tokens);
  section->read("held_out_fraction", data.held_out_fraction);
  section->read("invalid_utf8", data.invalid_utf8);
  section->read("cache", data.cache);
  section->finish();
}

void read_optimisation(detail::YamlSection& top, TrainConfig& config) {
  if (auto section = top.section("optimizer")) {
    section->read("lr", config.optimizer.lr);
    section->read("beta1", config.optimizer.beta1);
    section->read("beta2", config.optimizer.beta2);
    section->read("eps", config.optimizer.eps);
    section->read("weight_decay", config.optimizer.weight_decay);
    section->finish();
  }
  if (auto section = top.section("schedule")) {
    section->read("kind", config.schedule.kind);
    section->read("warmup", config.schedule.warmup);
    section->read("steps", config.schedule.steps);
    section->read("final_fraction", config.schedule.final_fraction);
    section->finish();
  }
  for (detail::YamlSection& section : top.list("rules")) {
    ParameterRule rule;
    section.read("pattern", rule.pattern);
    section.read("lr_factor", rule.lr_factor);
    section.read("weight_decay", rule.weight_decay);
    section.read("frozen", rule.frozen);
    section.finish();
    config.rules.push_back(std::move(rule));
  }
}

void read_checkpoint(detail::YamlSection& top, CheckpointSection& checkpoint) {
  auto section = top.section("checkpoint");
  if (!section) return;
  section->read("every_steps", checkpoint.every_steps);
  section->read("every_minutes", checkpoint.every_minutes);
  section->read("keep", checkpoint.keep);
  section->read("resume", checkpoint.resume);
  section->finish();
  if (checkpoint.resume == "true") checkpoint.resume = "auto";
  if (checkpoint.resume == "false") checkpoint.resume = "no";
}

void read_cost(detail::YamlSection& top, std::optional<CostModel>& cost) {
  auto section = top.section("cost");
  if (!section) return;
  CostModel model;
  section->read("quadratic", model.quadratic);
  section->read("linear", model.linear);
  section->read("fixed", model.fixed);
  section->read("exchange", model.exchange);
  section->finish();
  cost = model;
}

int line_of(const std::map<std::string, int>& lines, std::string key) {
  while (true) {
    if (const auto found = lines.find(key); found != lines.end()) return found->second;
    const std::size_t cut = key.find_last_of(".[");
    if (cut == std::string::npos) return 1;
    key.resize(cut);
  }
}

/// JSON as YAML; strings are quoted, so that they stay strings.
void emit(YAML::Emitter& out, const nlohmann::ordered_json& value) {
  if (value.is_object()) {
    out << YAML::BeginMap;
    for (const auto& [key, entry] : value.items()) {
      out << YAML::Key << key << YAML::Value;
      emit(out, entry);
    }
    out << YAML::EndMap;
  } else if (value.is_array()) {
    out << YAML::Flow << YAML::BeginSeq;
    for (const auto& entry : value) emit(out, entry);
    out << YAML::EndSeq;
  } else if (value.is_string()) {
    out << YAML::DoubleQuoted << value.get<std::string>();
  } else if (value.is_null()) {
    out << YAML::Null;
  } else {
    out << value.dump();
  }
}

/// The shortest text that reads back as the same number, and as a float.
std::string number(double value) {
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".en") == std::string::npos) text += ".0";
  return text;
}

}  // namespace

TrainConfig TrainConfig::load(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  if (file) text << file.rdbuf();
  if (!file) throw IoError(kConfigWhere, fmt::format("cannot read {}", path));
  return from_yaml(text.str(), path);
}

TrainConfig TrainConfig::from_yaml(const std::string& text, const std::string& name) {
  TrainConfig config;
  std::map<std::string, int> lines;
  try {
    const YAML::Node root = YAML::Load(text);
    detail::YamlSection top(root, "", name, lines);
    top.read("run", config.run);
    top.read("seed", config.seed);
    top.read("steps", config.steps);
    read_layout(top, config.layout);
    top.read("device", config.device);
    top.read("dtype", config.dtype);
    top.read("deterministic", config.deterministic);
    top.read("threads", config.threads);
    top.read("global_batch_tokens", config.global_batch_tokens);
    top.read("capacity_tokens", config.capacity_tokens);
    top.read("strategy", config.strategy);
    read_cost(top, config.cost);
    top.read("aux_loss_coefficient", config.aux_loss_coefficient);
    top.read("aux_loss", config.aux_loss);
    top.read("z_loss_coefficient", config.z_loss_coefficient);
    top.read("clip_norm", config.clip_norm);
    top.read("nan_policy", config.nan_policy);
    top.read("evaluate_every", config.evaluate_every);
    top.read("evaluate_tokens", config.evaluate_tokens);
    top.read("timeline_steps", config.timeline_steps);
    top.read("save_plans", config.save_plans);
    top.read("timeout_seconds", config.timeout_seconds);
    read_model(top, config.model);
    read_data(top, config.data);
    read_optimisation(top, config);
    read_checkpoint(top, config.checkpoint);
    top.finish();
  } catch (const YAML::Exception& error) {
    throw DataError(kConfigWhere,
                    fmt::format("{}:{}: not YAML: {}", name, error.mark.line + 1, error.msg));
  }
  if (const auto issue = find_issue(config)) {
    throw DataError(kConfigWhere, fmt::format("{}:{}: {}: {}", name, line_of(lines, issue->key),
                                              issue->key, issue->message));
  }
  return config;
}

std::string TrainConfig::to_yaml() const {
  YAML::Emitter out;
  const auto text = [&](const char* key, const std::string& value) {
    out << YAML::Key << key << YAML::Value << YAML::DoubleQuoted << value;
  };
  const auto real = [&](const char* key, double value) {
    out << YAML::Key << key << YAML::Value << number(value);
  };
  const auto plain = [&](const char* key, const auto& value) {
    out << YAML::Key << key << YAML::Value << value;
  };
  const auto open = [&](const char* key) {
    out << YAML::Key << key << YAML::Value << YAML::BeginMap;
  };
  out << YAML::BeginMap;
  text("run", run);
  plain("seed", seed);
  plain("steps", steps);
  open("layout");
  plain("tp", layout.tp);
  plain("hdp", layout.hdp);
  plain("pp", layout.pp);
  plain("ep", layout.ep);
  plain("chunks", layout.chunks);
  out << YAML::EndMap;
  text("device", device);
  text("dtype", dtype);
  plain("deterministic", deterministic);
  plain("threads", threads);
  plain("global_batch_tokens", global_batch_tokens);
  plain("capacity_tokens", capacity_tokens);
  text("strategy", strategy);
  if (cost) {
    open("cost");
    real("quadratic", cost->quadratic);
    real("linear", cost->linear);
    real("fixed", cost->fixed);
    real("exchange", cost->exchange);
    out << YAML::EndMap;
  }
  real("aux_loss_coefficient", aux_loss_coefficient);
  text("aux_loss", aux_loss);
  real("z_loss_coefficient", z_loss_coefficient);
  real("clip_norm", clip_norm);
  text("nan_policy", nan_policy);
  plain("evaluate_every", evaluate_every);
  plain("evaluate_tokens", evaluate_tokens);
  plain("timeline_steps", timeline_steps);
  plain("save_plans", save_plans);
  real("timeout_seconds", timeout_seconds);
  open("model");
  if (!model.path.empty()) text("path", model.path);
  if (!model.config.empty()) text("config", model.config);
  if (!model.preset.empty()) {
    out << YAML::Key << "config" << YAML::Value;
    emit(out, nlohmann::ordered_json::parse(model.preset));
  }
  out << YAML::EndMap;
  open("data");
  out << YAML::Key << "paths" << YAML::Value << YAML::Flow << YAML::BeginSeq;
  for (const std::string& path : data.paths) out << YAML::DoubleQuoted << path;
  out << YAML::EndSeq;
  out << YAML::Key << "weights" << YAML::Value << YAML::Flow << YAML::BeginSeq;
  for (const double weight : data.weights) out << number(weight);
  out << YAML::EndSeq;
  out << YAML::Key << "extensions" << YAML::Value << YAML::Flow << YAML::BeginSeq;
  for (const std::string& ending : data.extensions) out << YAML::DoubleQuoted << ending;
  out << YAML::EndSeq;
  text("tokenizer", data.tokenizer);
  plain("vocab_size", data.vocab_size);
  plain("max_document_tokens", data.max_document_tokens);
  real("held_out_fraction", data.held_out_fraction);
  text("invalid_utf8", data.invalid_utf8);
  text("cache", data.cache);
  out << YAML::EndMap;
  open("optimizer");
  real("lr", optimizer.lr);
  real("beta1", optimizer.beta1);
  real("beta2", optimizer.beta2);
  real("eps", optimizer.eps);
  real("weight_decay", optimizer.weight_decay);
  out << YAML::EndMap;
  open("schedule");
  text("kind", schedule.kind);
  plain("warmup", schedule.warmup);
  plain("steps", schedule.steps);
  real("final_fraction", schedule.final_fraction);
  out << YAML::EndMap;
  out << YAML::Key << "rules" << YAML::Value << YAML::BeginSeq;
  for (const ParameterRule& rule : rules) {
    out << YAML::BeginMap;
    text("pattern", rule.pattern);
    real("lr_factor", rule.lr_factor);
    if (rule.weight_decay) real("weight_decay", *rule.weight_decay);
    plain("frozen", rule.frozen);
    out << YAML::EndMap;
  }
  out << YAML::EndSeq;
  open("checkpoint");
  plain("every_steps", checkpoint.every_steps);
  real("every_minutes", checkpoint.every_minutes);
  plain("keep", checkpoint.keep);
  text("resume", checkpoint.resume);
  out << YAML::EndMap << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

void TrainConfig::validate() const {
  if (const auto issue = find_issue(*this)) {
    throw InvalidArgument(kConfigWhere, fmt::format("{}: {}", issue->key, issue->message));
  }
}

void TrainConfig::resolve(int world_size) {
  validate();
  if (layout.hdp == 0) layout.hdp = std::max(1, world_size / (layout.tp * layout.pp));
  layout.validate();
  if (layout.world_size() != world_size) {
    throw InvalidArgument(
        kConfigWhere, fmt::format("layout {} needs {} ranks, the world has {}", layout.to_string(),
                                  layout.world_size(), world_size));
  }
  const auto share = [&](std::int64_t tokens) { return (tokens + layout.hdp - 1) / layout.hdp; };
  const std::int64_t longest = share(data.max_document_tokens);
  if (capacity_tokens == 0) {
    capacity_tokens = std::max(share(global_batch_tokens), longest);
  } else if (longest > capacity_tokens) {
    throw InvalidArgument(
        kConfigWhere,
        fmt::format("data.max_document_tokens {} does not fit {} ranks of capacity_tokens {}; the "
                    "axis holds {}",
                    data.max_document_tokens, layout.hdp, capacity_tokens,
                    layout.hdp * capacity_tokens));
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
