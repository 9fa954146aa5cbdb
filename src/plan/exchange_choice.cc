#include "meshloom/plan/exchange_choice.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "meshloom/core/check.h"
#include "plan/internal/exchange_time.h"
#include "plan/internal/unit_times.h"

namespace meshloom::plan {
namespace {

constexpr const char* kChoiceWhere = "plan.exchange_chooser";

bool applies(const ExchangeRule& rule, int degree, std::int64_t tokens) {
  if (degree < rule.least_degree || degree > rule.most_degree) return false;
  if (tokens < rule.least_tokens || tokens > rule.most_tokens) return false;
  if (rule.exchange != Exchange::kRingUlysses) return true;
  if (rule.group > 0) return degree % rule.group == 0 && rule.group < degree;
  for (int group = 2; group < degree; ++group) {
    if (degree % group == 0) return true;
  }
  return false;
}

/// The divisor nearest to the square root, for who has no figures.
int middle_group(int degree) {
  int best = 1;
  for (int group = 2; group * group <= degree; ++group) {
    if (degree % group == 0) best = group;
  }
  return best;
}

bool is_best_of_its_kind(const ExchangeCandidate& candidate,
                         const std::vector<ExchangeCandidate>& all) {
  return std::none_of(all.begin(), all.end(), [&](const ExchangeCandidate& other) {
    return other.exchange == candidate.exchange && other.seconds < candidate.seconds;
  });
}

std::string name_of(const ExchangeCandidate& candidate) {
  if (candidate.exchange != Exchange::kRingUlysses) {
    return std::string(to_string(candidate.exchange));
  }
  return fmt::format("{}/{}", to_string(candidate.exchange), candidate.group);
}

}  // namespace

void ExchangeModel::validate() const {
  shape.validate();
  MESHLOOM_CHECK(layers >= 1, kChoiceWhere, fmt::format("layers is {}, expected >= 1", layers));
  MESHLOOM_CHECK(ranks_per_node >= 0, kChoiceWhere,
                 fmt::format("ranks_per_node is {}, expected >= 0", ranks_per_node));
  const auto check = [](double value, const char* name, bool zero) {
    MESHLOOM_CHECK(std::isfinite(value) && (zero ? value >= 0.0 : value > 0.0), kChoiceWhere,
                   fmt::format("{} is {}, expected a number {} 0", name, value, zero ? ">=" : ">"));
  };
  check(forward_pair_seconds, "forward_pair_seconds", true);
  check(backward_pair_seconds, "backward_pair_seconds", true);
  check(expand_seconds, "expand_seconds", true);
  check(inside.bandwidth, "inside.bandwidth", false);
  check(inside.latency, "inside.latency", true);
  check(between.bandwidth, "between.bandwidth", false);
  check(between.latency, "between.latency", true);
  check(copy_bandwidth, "copy_bandwidth", true);
}

ExchangeChooser::ExchangeChooser(std::optional<ExchangeModel> model,
                                 std::vector<ExchangeRule> rules)
    : model_(std::move(model)), rules_(std::move(rules)) {
  if (model_) model_->validate();
}

ExchangeChoice ExchangeChooser::choose(std::span<const std::int64_t> lengths,
                                       std::span<const int> ranks) const {
  const auto degree = static_cast<int>(ranks.size());
  MESHLOOM_CHECK(degree >= 2, kChoiceWhere, fmt::format("{} ranks, expected at least 2", degree));
  std::int64_t tokens = 0;
  for (const std::int64_t length : lengths) tokens += length;
  ExchangeChoice choice;
  if (model_) choice.candidates = detail::candidates(*model_, lengths, ranks);

  const auto rule = std::find_if(rules_.begin(), rules_.end(),
                                 [&](const ExchangeRule& r) { return applies(r, degree, tokens); });
  const bool named = rule != rules_.end() && rule->exchange.has_value();
  choice.by_rule = named;
  const ExchangeCandidate* best = nullptr;
  for (const ExchangeCandidate& candidate : choice.candidates) {
    if (named && candidate.exchange != *rule->exchange) continue;
    if (named && rule->group > 0 && candidate.group != rule->group) continue;
    if (best == nullptr || candidate.seconds < best->seconds) best = &candidate;
  }
  if (best != nullptr) {
    choice.chosen = *best;
  } else if (named) {
    choice.chosen.exchange = *rule->exchange;
    if (choice.chosen.exchange == Exchange::kRingUlysses) {
      choice.chosen.group = rule->group > 0 ? rule->group : middle_group(degree);
    }
  }
  return choice;
}

void ExchangeChooser::apply_(std::vector<Slot>& slots,
                             const std::vector<SampleInfo>& samples) const {
  const detail::TokensById tokens_of(samples);
  std::vector<std::int64_t> lengths;
  for (Slot& slot : slots) {
    for (Unit& unit : slot.units) {
      if (unit.ranks.size() < 2 || unit.exchange != Exchange::kRing) continue;
      lengths.clear();
      for (const std::int64_t id : unit.samples) lengths.push_back(tokens_of(id));
      const ExchangeChoice choice = choose(lengths, unit.ranks);
      unit.exchange = choice.chosen.exchange;
      unit.ulysses_degree = choice.chosen.group;
    }
  }
}

std::string ExchangeChooser::table(const StepPlan& plan) const {
  const bool named = std::any_of(rules_.begin(), rules_.end(), [](const ExchangeRule& rule) {
    return rule.exchange.has_value();
  });
  if (!model_ && !named) return {};
  struct Row {
    const Unit* unit;
    std::vector<std::int64_t> lengths;
    std::int64_t tokens;
    int units;
  };
  const detail::TokensById tokens_of(plan.samples);
  std::map<std::size_t, Row> by_degree;
  for (const Slot& slot : plan.slots) {
    for (const Unit& unit : slot.units) {
      if (unit.ranks.size() < 2) continue;
      Row row{&unit, {}, 0, 1};
      for (const std::int64_t id : unit.samples) {
        row.lengths.push_back(tokens_of(id));
        row.tokens += row.lengths.back();
      }
      const auto [found, added] = by_degree.emplace(unit.ranks.size(), row);
      if (added) continue;
      row.units += found->second.units;
      if (row.tokens <= found->second.tokens) {
        ++found->second.units;
      } else {
        found->second = std::move(row);
      }
    }
  }
  if (by_degree.empty()) return {};
  std::string text =
      "exchange of the largest unit of each degree: milliseconds of attention with "
      "its exchange, all layers (exposed; MB sent)";
  for (const auto& [degree, row] : by_degree) {
    const ExchangeChoice choice = choose(row.lengths, row.unit->ranks);
    ExchangeCandidate taken{.exchange = row.unit->exchange, .group = row.unit->ulysses_degree};
    text += fmt::format("\n  {} ranks, {} of {} unit(s), {} tokens in {} document(s): {}{}", degree,
                        1, row.units, row.tokens, row.lengths.size(), name_of(taken),
                        choice.by_rule ? " by rule" : "");
    const double layers = model_ ? model_->layers : 1.0;
    for (const ExchangeCandidate& candidate : choice.candidates) {
      if (!is_best_of_its_kind(candidate, choice.candidates)) continue;
      text += fmt::format(
          "{} {} {:.2f} ({:.2f}; {:.2f})", &candidate == &choice.candidates.front() ? ";" : ",",
          name_of(candidate), 1e3 * layers * candidate.seconds, 1e3 * layers * candidate.exposed(),
          1e-6 * layers * static_cast<double>(candidate.bytes.forward + candidate.bytes.backward));
    }
  }
  return text;
}

}  // namespace meshloom::plan
