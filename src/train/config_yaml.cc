#include "train/internal/config_yaml.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <concepts>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <type_traits>
#include <vector>

#include "meshloom/core/error.h"
#include "train/internal/yaml_section.h"

namespace meshloom::train {

namespace {

constexpr const char* kYamlWhere = "train.config";

template <class T, class U>
concept Is = std::same_as<std::remove_const_t<T>, U>;

// The keys of every section, once for reading and for writing, in the order of the file.

void fields(auto& visit, Is<Layout> auto& layout) {
  visit("tp", layout.tp);
  visit("hdp", layout.hdp);
  visit("pp", layout.pp);
  visit("ep", layout.ep);
  visit("chunks", layout.chunks);
}

void fields(auto& visit, Is<CostModel> auto& cost) {
  visit("quadratic", cost.quadratic);
  visit("linear", cost.linear);
  visit("fixed", cost.fixed);
  visit("exchange", cost.exchange);
}

void fields(auto& visit, Is<DataSection> auto& data) {
  visit("paths", data.paths);
  visit("weights", data.weights);
  visit("extensions", data.extensions);
  visit("tokenizer", data.tokenizer);
  visit("vocab_size", data.vocab_size);
  visit("max_document_tokens", data.max_document_tokens);
  visit("held_out_fraction", data.held_out_fraction);
  visit("invalid_utf8", data.invalid_utf8);
  visit("cache", data.cache);
}

void fields(auto& visit, Is<AdamWOptions> auto& optimizer) {
  visit("lr", optimizer.lr);
  visit("beta1", optimizer.beta1);
  visit("beta2", optimizer.beta2);
  visit("eps", optimizer.eps);
  visit("weight_decay", optimizer.weight_decay);
}

void fields(auto& visit, Is<ScheduleOptions> auto& schedule) {
  visit("kind", schedule.kind);
  visit("warmup", schedule.warmup);
  visit("steps", schedule.steps);
  visit("final_fraction", schedule.final_fraction);
}

void fields(auto& visit, Is<ParameterRule> auto& rule) {
  visit("pattern", rule.pattern);
  visit("lr_factor", rule.lr_factor);
  visit("weight_decay", rule.weight_decay);
  visit("frozen", rule.frozen);
}

void fields(auto& visit, Is<ExpertsSection> auto& experts) {
  visit("replan_every", experts.replan_every);
  visit("least_gain", experts.least_gain);
}

void fields(auto& visit, Is<ParallelSection> auto& parallel) {
  visit("zero", parallel.zero);
  visit("pipeline", parallel.pipeline);
  visit("split", parallel.split);
  visit("split_by", parallel.split_by);
  visit("recompute", parallel.recompute);
  visit("ranks_per_node", parallel.ranks_per_node);
  visit("experts", parallel.experts);
}

void fields(auto& visit, Is<OffloadSection> auto& offload) {
  visit("enabled", offload.enabled);
  visit("resident_layers", offload.resident_layers);
  visit("transfer", offload.transfer);
  visit("folder", offload.folder);
}

void fields(auto& visit, Is<CheckpointSection> auto& checkpoint) {
  visit("every_steps", checkpoint.every_steps);
  visit("every_minutes", checkpoint.every_minutes);
  visit("keep", checkpoint.keep);
  visit("resume", checkpoint.resume);
}

void fields(auto& visit, Is<TrainConfig> auto& config) {
  visit("run", config.run);
  visit("seed", config.seed);
  visit("steps", config.steps);
  visit("layout", config.layout);
  visit("parallel", config.parallel);
  visit("offload", config.offload);
  visit("device", config.device);
  visit("dtype", config.dtype);
  visit("deterministic", config.deterministic);
  visit("threads", config.threads);
  visit("global_batch_tokens", config.global_batch_tokens);
  visit("capacity_tokens", config.capacity_tokens);
  visit("strategy", config.strategy);
  visit("exchange", config.exchange);
  visit("exchange_dtype", config.exchange_dtype);
  visit("memory_check", config.memory_check);
  visit("cost", config.cost);
  visit("aux_loss_coefficient", config.aux_loss_coefficient);
  visit("aux_loss", config.aux_loss);
  visit("bias_update_speed", config.bias_update_speed);
  visit("z_loss_coefficient", config.z_loss_coefficient);
  visit("clip_norm", config.clip_norm);
  visit("nan_policy", config.nan_policy);
  visit("evaluate_every", config.evaluate_every);
  visit("evaluate_tokens", config.evaluate_tokens);
  visit("timeline_steps", config.timeline_steps);
  visit("save_plans", config.save_plans);
  visit("timeout_seconds", config.timeout_seconds);
  visit("watchdog_seconds", config.watchdog_seconds);
  visit("model", config.model);
  visit("data", config.data);
  visit("optimizer", config.optimizer);
  visit("schedule", config.schedule);
  visit("rules", config.rules);
  visit("checkpoint", config.checkpoint);
}

/// Fills fields from a section; keys that are absent leave them as they are.
class Reader {
 public:
  explicit Reader(detail::YamlSection& section) : section_(section) {}

  template <class T>
  void operator()(const char* key, T& field) {
    if constexpr (requires { section_.read(key, field); }) {
      section_.read(key, field);
    } else if (auto inner = section_.section(key)) {
      read_all(*inner, field);
    }
  }

  void operator()(const char* key, Layout& layout) {
    const auto node = section_.find(key);
    if (!node) return;
    if (!node->IsScalar()) {
      auto inner = section_.section(key);
      read_all(*inner, layout);
      return;
    }
    try {
      layout = Layout::parse(node->Scalar());
    } catch (const Error& error) {
      section_.fail(*node, key, error.what());
    }
  }

  void operator()(const char* key, std::optional<CostModel>& cost) {
    if (auto inner = section_.section(key)) read_all(*inner, cost.emplace());
  }

  void operator()(const char* key, ModelSection& model) {
    auto inner = section_.section(key);
    if (!inner) return;
    inner->read("path", model.path);
    if (const auto node = inner->find("config")) {
      if (node->IsMap()) {
        inner->hand_over(*node, "config", [&](const std::string& json) {
          static_cast<void>(model::ModelConfig::from_json(json));
          model.preset = json;
        });
      } else {
        inner->read("config", model.config);
      }
    }
    inner->finish();
  }

  void operator()(const char* key, std::vector<ParameterRule>& rules) {
    for (detail::YamlSection& inner : section_.list(key)) read_all(inner, rules.emplace_back());
  }

 private:
  template <class T>
  static void read_all(detail::YamlSection& section, T& value) {
    Reader reader(section);
    fields(reader, value);
    section.finish();
  }

  detail::YamlSection& section_;
};

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

/// Writes every field, so that the file says all that the run depends on.
class Writer {
 public:
  explicit Writer(YAML::Emitter& out) : out_(out) {}

  template <class T>
  void operator()(const char* key, const T& field) {
    out_ << YAML::Key << key << YAML::Value;
    value(field);
  }
  template <class T>
  void operator()(const char* key, const std::optional<T>& field) {
    if (field) (*this)(key, *field);
  }

 private:
  void value(const std::string& text) { out_ << YAML::DoubleQuoted << text; }
  void value(double real) { out_ << number(real); }
  template <class T>
  void value(const std::vector<T>& list) {
    if constexpr (!std::same_as<T, ParameterRule>) out_ << YAML::Flow;
    out_ << YAML::BeginSeq;
    for (const T& entry : list) value(entry);
    out_ << YAML::EndSeq;
  }
  void value(const ModelSection& model) {
    out_ << YAML::BeginMap;
    if (!model.path.empty()) (*this)("path", model.path);
    if (!model.config.empty()) (*this)("config", model.config);
    if (!model.preset.empty()) {
      out_ << YAML::Key << "config" << YAML::Value;
      emit(out_, nlohmann::ordered_json::parse(model.preset));
    }
    out_ << YAML::EndMap;
  }
  template <class T>
  void value(const T& plain_or_section) {
    if constexpr (std::integral<T>) {
      out_ << plain_or_section;
    } else {
      out_ << YAML::BeginMap;
      fields(*this, plain_or_section);
      out_ << YAML::EndMap;
    }
  }

  YAML::Emitter& out_;
};

int line_of(const std::map<std::string, int>& lines, std::string key) {
  while (true) {
    if (const auto found = lines.find(key); found != lines.end()) return found->second;
    const std::size_t cut = key.find_last_of(".[");
    if (cut == std::string::npos) return 1;
    key.resize(cut);
  }
}

}  // namespace

TrainConfig TrainConfig::from_yaml(const std::string& text, const std::string& name) {
  TrainConfig config;
  std::map<std::string, int> lines;
  try {
    const YAML::Node root = YAML::Load(text);
    detail::YamlSection top(root, "", name, lines);
    Reader reader(top);
    fields(reader, config);
    top.finish();
  } catch (const YAML::Exception& error) {
    throw DataError(kYamlWhere,
                    fmt::format("{}:{}: not YAML: {}", name, error.mark.line + 1, error.msg));
  }
  if (config.checkpoint.resume == "true") config.checkpoint.resume = "auto";
  if (config.checkpoint.resume == "false") config.checkpoint.resume = "no";
  if (const auto issue = detail::find_issue(config)) {
    throw DataError(kYamlWhere, fmt::format("{}:{}: {}: {}", name, line_of(lines, issue->key),
                                            issue->key, issue->message));
  }
  return config;
}

std::string TrainConfig::to_yaml() const {
  YAML::Emitter out;
  out << YAML::BeginMap;
  Writer writer(out);
  fields(writer, *this);
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

}  // namespace meshloom::train
