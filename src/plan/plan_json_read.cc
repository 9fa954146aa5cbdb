#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/plan/strategy.h"
#include "plan/internal/json_tree.h"

namespace meshloom::plan {
namespace {

using detail::JsonNode;

constexpr const char* kRead = "plan.from_json";
constexpr std::string_view kFormat = "meshloom.plan/1";

/// A value and the path that leads to it; the path is only written out for an error.
class Field {
 public:
  Field(const JsonNode& node, const Field* parent, std::string_view key)
      : node_(node), parent_(parent), key_(key) {}
  Field(const JsonNode& node, const Field* parent, std::size_t index)
      : node_(node), parent_(parent), index_(index) {}

  [[nodiscard]] std::string path() const {
    if (parent_ == nullptr) return "";
    const std::string above = parent_->path();
    if (key_.empty()) return fmt::format("{}[{}]", above, index_);
    return above.empty() ? std::string(key_) : fmt::format("{}.{}", above, key_);
  }

  [[noreturn]] void refuse(std::string_view expected) const {
    const std::string at = path();
    throw PlanError(kRead, fmt::format("{} is {}, expected {}", at.empty() ? "the file" : at,
                                       detail::describe(node_), expected));
  }

  [[nodiscard]] const JsonNode* find(std::string_view name) const {
    const auto* object = std::get_if<JsonNode::Object>(&node_.value);
    if (object == nullptr) refuse("an object");
    for (const auto& [key, value] : *object) {
      if (key == name) return &value;
    }
    return nullptr;
  }

  [[nodiscard]] Field operator[](std::string_view name) const {
    const JsonNode* found = find(name);
    if (found == nullptr) {
      const std::string above = path();
      throw PlanError(kRead,
                      fmt::format("{}{}{} is missing", above, above.empty() ? "" : ".", name));
    }
    return {*found, this, name};
  }

  [[nodiscard]] std::int64_t integer(std::int64_t least, std::int64_t most) const {
    const auto* value = std::get_if<std::int64_t>(&node_.value);
    if (value == nullptr || *value < least || *value > most) {
      refuse(fmt::format("an integer in {} .. {}", least, most));
    }
    return *value;
  }

  [[nodiscard]] int count(int least) const {
    return static_cast<int>(integer(least, std::numeric_limits<int>::max()));
  }

  /// A finite number >= 0, at most `most`.
  [[nodiscard]] double number(double most = std::numeric_limits<double>::max()) const {
    double value = -1.0;
    if (const auto* real = std::get_if<double>(&node_.value)) value = *real;
    if (const auto* whole = std::get_if<std::int64_t>(&node_.value)) {
      value = static_cast<double>(*whole);
    }
    if (const auto* large = std::get_if<std::uint64_t>(&node_.value)) {
      value = static_cast<double>(*large);
    }
    if (!(value >= 0.0 && value <= most)) {
      refuse(most < std::numeric_limits<double>::max() ? fmt::format("a number in 0 .. {}", most)
                                                       : "a finite number >= 0");
    }
    return value;
  }

  [[nodiscard]] const std::string& text() const {
    const auto* value = std::get_if<std::string>(&node_.value);
    if (value == nullptr) refuse("a string");
    return *value;
  }

  template <class Read>
  auto list(Read read) const {
    const auto* array = std::get_if<JsonNode::Array>(&node_.value);
    if (array == nullptr) refuse("an array");
    std::vector<decltype(read(*this))> result;
    result.reserve(array->size());
    for (std::size_t i = 0; i < array->size(); ++i) {
      result.push_back(read(Field((*array)[i], this, i)));
    }
    return result;
  }

  /// A name that `parse` knows.
  template <class Parse>
  auto name(Parse parse) const {
    const std::string& given = text();
    try {
      return parse(given);
    } catch (const InvalidArgument& error) {
      const std::string message = error.what();
      refuse("a known name" + message.substr(message.rfind("; known")));
    }
  }

 private:
  const JsonNode& node_;
  const Field* parent_;
  std::string_view key_;
  std::size_t index_ = 0;
};

Layout read_layout(const Field& field) {
  Layout layout;
  layout.tp = field["tp"].count(1);
  layout.hdp = field["hdp"].count(1);
  layout.pp = field["pp"].count(1);
  layout.ep = field["ep"].count(1);
  layout.chunks = field["chunks"].count(1);
  try {
    layout.validate();
  } catch (const InvalidArgument& error) {
    throw PlanError(kRead, fmt::format("layout: {}", error.what()));
  }
  return layout;
}

CostModel read_cost(const Field& field) {
  return {.quadratic = field["quadratic"].number(),
          .linear = field["linear"].number(),
          .fixed = field["fixed"].number(),
          .exchange = field["exchange"].number()};
}

SampleInfo read_sample(const Field& field) {
  SampleInfo sample;
  sample.id = field["id"].integer(std::numeric_limits<std::int64_t>::min(),
                                  std::numeric_limits<std::int64_t>::max());
  sample.tokens = field["tokens"].integer(1, PlanProblem::kMaxTokens);
  sample.loss_tokens = field["loss_tokens"].integer(0, PlanProblem::kMaxTokens);
  return sample;
}

Unit read_unit(const Field& field) {
  Unit unit;
  unit.ranks = field["ranks"].list([](const Field& rank) { return rank.count(0); });
  unit.samples = field["samples"].list([](const Field& id) {
    return id.integer(std::numeric_limits<std::int64_t>::min(),
                      std::numeric_limits<std::int64_t>::max());
  });
  unit.exchange = field["exchange"].name(parse_exchange);
  if (unit.exchange == Exchange::kRingUlysses || field.find("ulysses_degree") != nullptr) {
    unit.ulysses_degree = field["ulysses_degree"].count(0);
  }
  unit.offload = field["offload"].number(1.0);
  return unit;
}

Prediction read_prediction(const Field& field) {
  Prediction predicted;
  predicted.makespan = field["makespan"].number();
  predicted.lower_bound = field["lower_bound"].number();
  predicted.efficiency = field["efficiency"].number();
  predicted.exchange_tokens =
      field["exchange_tokens"].integer(0, std::numeric_limits<std::int64_t>::max());
  if (field.find("step_time") != nullptr) predicted.step_time = field["step_time"].number();
  return predicted;
}

}  // namespace

StepPlan StepPlan::from_json(std::string_view text) {
  const JsonNode tree = detail::parse_json(text, kRead);
  const Field root(tree, nullptr, "");
  const Field format = root["format"];
  if (format.text() != kFormat) format.refuse(fmt::format("\"{}\"", kFormat));

  StepPlan plan;
  plan.step = root["step"].integer(0, std::numeric_limits<std::int64_t>::max());
  plan.strategy = root["strategy"].text();
  plan.layout = read_layout(root["layout"]);
  plan.capacity_tokens = root["capacity_tokens"].integer(1, PlanProblem::kMaxTokens);
  if (root.find("lockstep") != nullptr) plan.lockstep = root["lockstep"].name(parse_lockstep);
  if (root.find("ranks_per_node") != nullptr) {
    plan.ranks_per_node = root["ranks_per_node"].count(0);
  }
  if (root.find("memory") != nullptr) {
    const Field memory = root["memory"];
    plan.memory.layers = memory["layers"].count(0);
    plan.memory.resident_layers = memory["resident_layers"].count(0);
    if (memory.find("transfer") != nullptr) plan.memory.transfer = memory["transfer"].number();
  }
  plan.cost = read_cost(root["cost"]);
  plan.samples = root["samples"].list(read_sample);
  plan.slots = root["slots"].list(
      [](const Field& slot) { return Slot{.units = slot["units"].list(read_unit)}; });
  plan.predicted = read_prediction(root["predicted"]);
  return plan;
}

}  // namespace meshloom::plan
