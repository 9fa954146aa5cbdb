#include "train/internal/expert_loads.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/plan/expert_replan.h"

namespace meshloom::train::detail {

namespace {

constexpr const char* kExpertsWhere = "train.experts";

plan::HeldExperts held_by(const parallel::ExpertMap& map) {
  plan::HeldExperts result;
  result.expert.assign(map.by_place().begin(), map.by_place().end());
  for (int member = 0; member < map.ranks(); ++member) {
    result.held.push_back(static_cast<int>(map.experts_of(member).size()));
  }
  return result;
}

std::span<const double> layer_counts(const model::ModelConfig& model, const ExpertCounts& counts,
                                     std::size_t layer) {
  const auto experts = static_cast<std::size_t>(model.moe.experts);
  return std::span(counts).subspan(layer * experts, experts);
}

}  // namespace

ExpertImbalance expert_imbalance(const model::ModelConfig& model,
                                 const std::vector<parallel::ExpertMap>& maps,
                                 const ExpertCounts& counts) {
  ExpertImbalance result{.experts = 0.0, .members = 0.0};
  for (std::size_t layer = 0; layer < model.moe_layers.size(); ++layer) {
    if (!model.moe_layers[layer]) continue;
    const std::span<const double> own = layer_counts(model, counts, layer);
    const double total = std::accumulate(own.begin(), own.end(), 0.0);
    if (total <= 0.0) continue;
    const double expert =
        *std::max_element(own.begin(), own.end()) * static_cast<double>(own.size()) / total;
    const double member = plan::member_imbalance(own, held_by(maps[layer]));
    result.experts += expert;
    result.experts_worst = std::max(result.experts_worst, expert);
    result.members += member;
    result.members_worst = std::max(result.members_worst, member);
    ++result.layers;
  }
  if (result.layers == 0) return {};
  result.experts /= result.layers;
  result.members /= result.layers;
  return result;
}

void ExpertLoads::add(const ExpertCounts& counts) {
  if (counts_.empty()) counts_.assign(counts.size(), 0.0);
  for (std::size_t i = 0; i < counts.size(); ++i) counts_[i] += counts[i];
}

ExpertLoads::Decision ExpertLoads::decide(const std::vector<parallel::ExpertMap>& maps) {
  Decision result{.maps = maps};
  result.before = expert_imbalance(model_, maps, counts_).members;
  // Routing limits a token to some groups of experts; where it does not, nothing binds them.
  const int groups =
      static_cast<int>(model_.moe.top_groups < model_.moe.groups ? model_.moe.groups : 1);
  for (std::size_t layer = 0; layer < maps.size(); ++layer) {
    if (!model_.moe_layers[layer]) continue;
    const std::span<const double> loads = layer_counts(model_, counts_, layer);
    const plan::HeldExperts now = held_by(maps[layer]);
    plan::HeldExperts then{.expert = plan::replan_experts(loads, now, groups, nodes_),
                           .held = now.held};
    const double gain =
        1.0 - plan::member_imbalance(loads, then) / plan::member_imbalance(loads, now);
    if (gain <= 0.0 || gain < least_gain_) continue;
    for (std::size_t p = 0; p < now.expert.size(); ++p) {
      if (then.expert[p] != now.expert[p]) ++result.moved;
    }
    result.maps[layer] = maps[layer].rearranged({then.expert.begin(), then.expert.end()});
  }
  result.after = expert_imbalance(model_, result.maps, counts_).members;
  counts_.clear();
  return result;
}

void ExpertLoads::restore(ExpertCounts counts) {
  const auto size = model_.moe_layers.size() * static_cast<std::size_t>(model_.moe.experts);
  if (!counts.empty() && counts.size() != size) {
    throw DataError(kExpertsWhere, fmt::format("the checkpoint has loads of {} experts in all "
                                               "layers, the model has {}",
                                               counts.size(), size));
  }
  counts_ = std::move(counts);
}

std::string experts_text(const std::vector<parallel::ExpertMap>& maps, const ExpertCounts& loads) {
  nlohmann::json places = nlohmann::json::array();
  for (const parallel::ExpertMap& map : maps) places.push_back(map.by_place());
  return nlohmann::json{
      {"members", maps.empty() ? 1 : maps.front().ranks()}, {"places", places}, {"loads", loads}}
      .dump();
}

SavedExperts parse_experts(const std::string& text, std::vector<parallel::ExpertMap> even) {
  SavedExperts result{.maps = std::move(even), .loads = {}};
  if (text.empty() || result.maps.empty()) return result;
  try {
    const auto saved = nlohmann::json::parse(text);
    result.loads = saved.at("loads").get<ExpertCounts>();
    if (saved.at("members").get<int>() != result.maps.front().ranks()) return result;
    const nlohmann::json& places = saved.at("places");
    for (std::size_t layer = 0; layer < result.maps.size(); ++layer) {
      result.maps[layer] =
          result.maps[layer].rearranged(places.at(layer).get<std::vector<std::int64_t>>());
    }
  } catch (const nlohmann::json::exception& error) {
    throw DataError(kExpertsWhere,
                    fmt::format("the checkpoint's placement of experts: {}", error.what()));
  } catch (const InvalidArgument& error) {
    throw DataError(kExpertsWhere,
                    fmt::format("the checkpoint's placement of experts: {}", error.what()));
  }
  return result;
}

}  // namespace meshloom::train::detail
