#include "train/internal/step_explainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "train/internal/collective.h"

namespace meshloom::train::detail {

namespace {

using nlohmann::json;
using Kind = parallel::Span::Kind;

double seconds_of(const parallel::Span& span) {
  return std::chrono::duration<double>(span.end - span.begin).count();
}

/// Own times of a step; `planned` stays 0.
RankTimes times_of(const std::vector<parallel::Span>& spans) {
  RankTimes times;
  for (const parallel::Span& span : spans) {
    if (span.slot < 0 || span.unit < 0) continue;
    const double seconds = seconds_of(span);
    switch (span.kind) {
      case Kind::kForward:
      case Kind::kBackward:
        times.busy += seconds;
        break;
      case Kind::kWait:
      case Kind::kDispatch:
      case Kind::kTensor:
      case Kind::kPipeline:
      case Kind::kOffload:
        times.busy -= seconds;
        break;
      case Kind::kLoad:
        times.load += seconds;
        break;
      default:
        break;
    }
  }
  times.busy = std::max(times.busy, 0.0);
  return times;
}

/// "ep12" -> "ep": the groups of one kind of axis together.
std::string family_of(const std::string& group) {
  const std::size_t end = group.find_last_not_of("0123456789");
  return end == std::string::npos ? group : group.substr(0, end + 1);
}

/// One rank's part of the step, as its peers get it.
std::string encode(const RankTimes& times, const RankTraffic& traffic) {
  json kinds = json::object();
  for (const auto& [name, kind] : traffic.kinds) {
    kinds[name] = {kind.inside_bytes, kind.between_bytes, kind.seconds, kind.exposed_seconds};
  }
  json groups = json::object();
  for (const auto& [name, bytes] : traffic.groups) {
    auto& sum = groups[family_of(name)];
    sum = sum.is_null() ? bytes : sum.get<std::int64_t>() + bytes;
  }
  return json{{"busy", times.busy}, {"load", times.load}, {"kinds", kinds}, {"groups", groups}}
      .dump();
}

/// Of a rank's units: the cost model's features, each rank's part of them.
struct RankWork {
  double squares = 0.0;
  double tokens = 0.0;
  double units = 0.0;
};

std::vector<RankWork> work_of(const plan::StepPlan& plan) {
  std::map<std::int64_t, std::int64_t> tokens;
  for (const plan::SampleInfo& sample : plan.samples) tokens[sample.id] = sample.tokens;
  std::vector<RankWork> result(static_cast<std::size_t>(plan.layout.hdp));
  for (const plan::Slot& slot : plan.slots) {
    for (const plan::Unit& unit : slot.units) {
      RankWork part;
      const auto degree = static_cast<double>(unit.ranks.size());
      for (const std::int64_t id : unit.samples) {
        const auto length = static_cast<double>(tokens.at(id));
        part.squares += length * length / degree;
        part.tokens += length / degree;
      }
      for (const int rank : unit.ranks) {
        RankWork& sum = result.at(static_cast<std::size_t>(rank));
        sum.squares += part.squares;
        sum.tokens += part.tokens;
        sum.units += 1.0;
      }
    }
  }
  return result;
}

}  // namespace

StepExplainer::StepExplainer(comm::Communicator world, Hosts hosts)
    : world_(std::move(world)), hosts_(std::move(hosts)), meter_(world_, hosts_.host_of) {}

std::vector<double> StepExplainer::planned_work(const plan::StepPlan& plan,
                                                const std::vector<RankTimes>& ranks) {
  const std::vector<RankWork> work = work_of(plan);
  // tp fastest, then hdp, then stages.
  const auto tp = static_cast<std::size_t>(plan.layout.tp);
  const auto hdp = static_cast<std::size_t>(plan.layout.hdp);
  const auto work_on = [&](std::size_t rank) -> const RankWork& { return work[rank / tp % hdp]; };
  if (!prices_) prices_.emplace(plan.cost);
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const RankWork& own = work_on(r);
    if (own.units <= 0.0 || own.tokens <= 0.0 || ranks[r].busy <= 0.0) continue;
    prices_->add({.square_sum = own.squares / own.units,
                  .token_sum = own.tokens / own.units,
                  .degree = 1,
                  .seconds = ranks[r].busy / own.units});
  }
  const CostModel& cost = prices_->model();
  std::vector<double> result;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const RankWork& own = work_on(r);
    result.push_back(cost.quadratic * own.squares + cost.linear * own.tokens +
                     cost.fixed * own.units);
  }
  if (plan.layout.pp == 1) return result;
  // Stages hold different layers: a rank is measured by the middle rank of its own.
  for (std::size_t first = 0; first < result.size(); first += tp * hdp) {
    std::vector<double> paces;
    for (std::size_t r = first; r < first + tp * hdp; ++r) {
      if (result[r] > 0.0 && ranks[r].busy > 0.0) paces.push_back(ranks[r].busy / result[r]);
    }
    const double pace = lower_median(std::move(paces));
    if (std::isnan(pace)) continue;
    for (std::size_t r = first; r < first + tp * hdp; ++r) result[r] *= pace;
  }
  return result;
}

std::vector<std::string> StepExplainer::explain(const plan::StepPlan& plan,
                                                const std::vector<parallel::Span>& spans,
                                                StepMetrics& metrics) {
  const std::string own = encode(times_of(spans), meter_.take());
  double exposed = 0.0;
  double hidden = 0.0;
  metrics.ranks.clear();
  for (const std::string& text : gather_text(world_, own)) {
    const json part = json::parse(text);
    RankTimes times;
    part.at("busy").get_to(times.busy);
    part.at("load").get_to(times.load);
    for (const auto& [name, kind] : part.at("kinds").items()) {
      KindTraffic& sum = metrics.traffic[name];
      sum.inside_bytes += kind.at(0).get<std::int64_t>();
      sum.between_bytes += kind.at(1).get<std::int64_t>();
      const double seconds = kind.at(2).get<double>();
      const double waited = kind.at(3).get<double>();
      sum.seconds += seconds;
      sum.exposed_seconds += waited;
      times.exposed += waited;
      hidden += std::max(0.0, seconds - waited);
    }
    exposed += times.exposed;
    for (const auto& [name, bytes] : part.at("groups").items()) {
      metrics.group_bytes[name] += bytes.get<std::int64_t>();
    }
    metrics.ranks.push_back(times);
  }
  const auto ranks = static_cast<double>(metrics.ranks.size());
  metrics.extra["exposed_seconds"] = exposed / ranks;
  metrics.extra["hidden_seconds"] = hidden / ranks;
  if (metrics.skipped) return {};
  const std::vector<double> planned = planned_work(plan, metrics.ranks);
  for (std::size_t r = 0; r < planned.size(); ++r) metrics.ranks[r].planned = planned[r];
  const StepBlame blame = stragglers_.add(metrics.step, metrics.seconds, metrics.ranks);
  if (blame.slowest >= 0) {
    metrics.extra["slowest_rank"] = blame.slowest;
    metrics.extra["slow_data_seconds"] = blame.data_seconds;
    metrics.extra["slow_hardware_seconds"] = blame.hardware_seconds;
    metrics.extra["waiting_seconds"] = blame.waiting_seconds;
  }
  return stragglers_.take_notices();
}

std::string StepExplainer::traffic_json(std::int64_t first, std::int64_t end) {
  nlohmann::ordered_json result{{"format", "meshloom.traffic/1"},
                                {"steps", {first, end}},
                                {"hosts", hosts_.names},
                                {"host_of", hosts_.host_of},
                                {"ranks", nlohmann::ordered_json::array()}};
  for (const std::string& text : gather_text(world_, meter_.totals_json())) {
    result["ranks"].push_back(nlohmann::ordered_json::parse(text));
  }
  return result.dump() + "\n";
}

}  // namespace meshloom::train::detail
