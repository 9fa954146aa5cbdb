#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/plan/verifier.h"
#include "plan/internal/violations.h"

// Deliberately shares no helper with the planners or the predictions: every rule is written a
// second time here, from the plan format's text.
namespace meshloom::plan {
namespace {

/// Predictions may have been written by another program, in decimal and summed in another order.
constexpr double kPredictionTolerance = 1e-6;
/// Rounding of the offload ratio's arithmetic, as a fraction of the tokens held.
constexpr long double kCapacityTolerance = 1e-9L;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;

struct Place {
  std::size_t slot = 0;
  std::size_t unit = 0;
  bool known = false;
};

std::string name(std::size_t slot, std::size_t unit) {
  return fmt::format("slot {}, unit {}", slot, unit);
}

class PlanChecker {
 public:
  explicit PlanChecker(const StepPlan& plan) : plan_(plan) {}

  std::vector<Violation> run() {
    check_layout();
    check_models();
    if (!violations_.empty()) return std::move(violations_);  // nothing below has a meaning
    check_samples();
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) check_slot(s);
    check_conservation();
    check_lockstep();
    if (violations_.empty()) check_prediction();
    return std::move(violations_);
  }

 private:
  void report(const char* contract, std::string message) {
    violations_.push_back({contract, std::move(message)});
  }

  void check_layout() {
    const Layout& layout = plan_.layout;
    constexpr int kMost = Layout::kMaxWorldSize;
    const auto size = [&](const char* field, int value) {
      if (value < 1 || value > kMost) {
        report("layout", fmt::format("layout.{} is {}, expected 1 .. {}", field, value, kMost));
      }
    };
    size("tp", layout.tp);
    size("hdp", layout.hdp);
    size("pp", layout.pp);
    size("ep", layout.ep);
    size("chunks", layout.chunks);
    if (!violations_.empty()) return;
    const double world = 1.0 * layout.tp * layout.hdp * layout.pp;
    if (world > kMost) {
      report("layout", fmt::format("layout has {} ranks, expected at most {}", world, kMost));
    }
    if (layout.hdp % layout.ep != 0) {
      report("layout", fmt::format("layout.ep is {}, expected a divisor of layout.hdp = {}",
                                   layout.ep, layout.hdp));
    }
  }

  void check_models() {
    const auto coefficient = [&](const char* field, double value) {
      if (!(value >= 0) || !std::isfinite(value)) {
        report("cost", fmt::format("cost.{} is {}, expected a finite number >= 0", field, value));
      }
    };
    coefficient("quadratic", plan_.cost.quadratic);
    coefficient("linear", plan_.cost.linear);
    coefficient("fixed", plan_.cost.fixed);
    coefficient("exchange", plan_.cost.exchange);
    if (plan_.cost.quadratic == 0 && plan_.cost.linear == 0) {
      report("cost", "cost.quadratic and cost.linear are both 0");
    }
    if (plan_.memory.layers < 0 || plan_.memory.resident_layers < 0) {
      report("memory", fmt::format("memory is layers {}, resident_layers {}, expected >= 0",
                                   plan_.memory.layers, plan_.memory.resident_layers));
    }
    if (!(plan_.memory.transfer >= 0.0 && std::isfinite(plan_.memory.transfer))) {
      report("memory", fmt::format("memory.transfer is {}, expected a finite number >= 0",
                                   plan_.memory.transfer));
    }
    if (plan_.step < 0) report("step", fmt::format("step is {}, expected >= 0", plan_.step));
    if (plan_.capacity_tokens < 1 || plan_.capacity_tokens > kMostTokens) {
      report("capacity", fmt::format("capacity_tokens is {}, expected 1 .. {}",
                                     plan_.capacity_tokens, kMostTokens));
    }
  }

  void check_samples() {
    const auto& samples = plan_.samples;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      const SampleInfo& sample = samples[i];
      if (sample.tokens < 1 || sample.tokens > kMostTokens) {
        report("samples", fmt::format("sample {} has {} tokens, expected 1 .. {}", sample.id,
                                      sample.tokens, kMostTokens));
      } else if (__builtin_add_overflow(total, sample.tokens, &total)) {
        report("samples",
               fmt::format("sample {}: the step has more tokens than 64 bits count", sample.id));
        total = 0;
      }
      if (sample.loss_tokens < 0 || sample.loss_tokens > sample.tokens) {
        report("loss_tokens", fmt::format("sample {} has {} loss tokens, expected 0 .. {}",
                                          sample.id, sample.loss_tokens, sample.tokens));
      }
    }
    order_.resize(samples.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    const auto before = [&](std::size_t a, std::size_t b) { return samples[a].id < samples[b].id; };
    if (!std::is_sorted(order_.begin(), order_.end(), before)) {
      std::stable_sort(order_.begin(), order_.end(), before);
    }
    for (std::size_t i = 1; i < order_.size(); ++i) {
      if (samples[order_[i]].id == samples[order_[i - 1]].id) {
        report("samples",
               fmt::format("sample {} is listed twice in samples", samples[order_[i]].id));
      }
    }
    places_.resize(samples.size());
  }

  /// Index in plan.samples, or -1.
  std::ptrdiff_t find(std::int64_t id) const {
    const auto& samples = plan_.samples;
    if (id >= 0 && id < static_cast<std::int64_t>(samples.size())) {
      const auto guess = static_cast<std::size_t>(id);
      if (samples[guess].id == id) return static_cast<std::ptrdiff_t>(guess);
    }
    const auto at = std::lower_bound(
        order_.begin(), order_.end(), id,
        [&](std::size_t index, std::int64_t wanted) { return samples[index].id < wanted; });
    if (at == order_.end() || samples[*at].id != id) return -1;
    return static_cast<std::ptrdiff_t>(*at);
  }

  void check_slot(std::size_t s) {
    const Slot& slot = plan_.slots[s];
    if (slot.units.empty()) report("empty", fmt::format("slot {} has no units", s));
    // Which unit of which slot last used a rank.
    if (last_use_.empty()) last_use_.resize(static_cast<std::size_t>(plan_.layout.hdp));
    for (std::size_t u = 0; u < slot.units.size(); ++u) {
      check_ranks(s, u);
      check_members(s, u);
      check_exchange(s, u);
    }
  }

  void check_ranks(std::size_t s, std::size_t u) {
    const Unit& unit = plan_.slots[s].units[u];
    if (unit.ranks.empty()) report("empty", fmt::format("{} has no ranks", name(s, u)));
    for (const int rank : unit.ranks) {
      if (rank < 0 || rank >= plan_.layout.hdp) {
        report("ranks", fmt::format("{}: rank {}, expected 0 .. {}", name(s, u), rank,
                                    plan_.layout.hdp - 1));
        continue;
      }
      Place& use = last_use_[static_cast<std::size_t>(rank)];
      if (use.known && use.slot == s) {
        if (use.unit == u) {
          report("ranks", fmt::format("{}: rank {} is listed twice", name(s, u), rank));
        } else {
          report("disjoint", fmt::format("slot {}: rank {} is in unit {} and in unit {}", s, rank,
                                         use.unit, u));
        }
      }
      use = {s, u, true};
    }
  }

  void check_members(std::size_t s, std::size_t u) {
    const Unit& unit = plan_.slots[s].units[u];
    if (unit.samples.empty()) report("empty", fmt::format("{} has no samples", name(s, u)));
    std::int64_t tokens = 0;
    for (const std::int64_t id : unit.samples) {
      const std::ptrdiff_t index = find(id);
      if (index < 0) {
        report("conservation",
               fmt::format("{}: sample {} is not one of the step's", name(s, u), id));
        continue;
      }
      Place& place = places_[static_cast<std::size_t>(index)];
      if (place.known) {
        report("conservation", fmt::format("{}: sample {} is already in {}", name(s, u), id,
                                           name(place.slot, place.unit)));
      } else {
        place = {s, u, true};
      }
      if (__builtin_add_overflow(tokens, plan_.samples[static_cast<std::size_t>(index)].tokens,
                                 &tokens)) {
        report("capacity",
               fmt::format("{}: sample {} overflows the unit's token count", name(s, u), id));
        return;
      }
    }
    check_capacity(s, u, tokens);
  }

  void check_capacity(std::size_t s, std::size_t u, std::int64_t tokens) {
    const Unit& unit = plan_.slots[s].units[u];
    const double r = unit.offload;
    const int layers = plan_.memory.layers;
    if (!(r >= 0.0 && r <= 1.0)) {
      report("offload", fmt::format("{}: offload is {}, expected 0 .. 1", name(s, u), r));
      return;
    }
    if (r > 0.0 && layers == 0) {
      report("offload", fmt::format("{}: offload is {}, but memory.layers is 0", name(s, u), r));
      return;
    }
    const auto degree = static_cast<std::int64_t>(unit.ranks.size());
    long double held = static_cast<long double>(tokens);
    if (layers > 0 && plan_.memory.resident_layers < layers) {
      const int resident = plan_.memory.resident_layers;
      held *= (resident + (1.0L - r) * (layers - resident)) / layers;
    }
    const long double room = static_cast<long double>(degree) * plan_.capacity_tokens;
    if (held <= room * (r > 0.0 ? 1.0L + kCapacityTolerance : 1.0L)) return;
    const std::string with =
        r > 0.0 ? fmt::format(" ({} after offload {})", static_cast<double>(held), r)
                : std::string();
    report("capacity", fmt::format("{}: {} tokens{} (sample {}) on {} rank(s) {} of {} tokens each",
                                   name(s, u), tokens, with, fmt::join(first(unit.samples), ", "),
                                   degree, fmt::format("[{}]", fmt::join(first(unit.ranks), ", ")),
                                   plan_.capacity_tokens));
  }

  /// Enough of a list to recognise it by.
  template <class T>
  static std::vector<T> first(const std::vector<T>& list) {
    constexpr std::size_t kShown = 8;
    return {list.begin(),
            list.begin() + static_cast<std::ptrdiff_t>(std::min(list.size(), kShown))};
  }

  void check_exchange(std::size_t s, std::size_t u) {
    const Unit& unit = plan_.slots[s].units[u];
    const auto degree = static_cast<int>(unit.ranks.size());
    if (degree == 0) return;
    const bool local = unit.exchange == Exchange::kLocal;
    if (local != (degree == 1)) {
      report("exchange",
             fmt::format("{}: exchange is {} on {} rank(s), expected local if and only if one",
                         name(s, u), to_string(unit.exchange), degree));
    }
    if (unit.exchange == Exchange::kRingUlysses) {
      if (unit.ulysses_degree < 1 || degree % unit.ulysses_degree != 0) {
        report("exchange", fmt::format("{}: ulysses_degree is {}, expected a divisor of {} ranks",
                                       name(s, u), unit.ulysses_degree, degree));
      }
    } else if (unit.ulysses_degree != 0) {
      report("exchange", fmt::format("{}: ulysses_degree is {} with exchange {}, expected none",
                                     name(s, u), unit.ulysses_degree, to_string(unit.exchange)));
    }
  }

  void check_conservation() {
    for (std::size_t i = 0; i < places_.size(); ++i) {
      if (!places_[i].known) {
        report("conservation", fmt::format("sample {} ({} tokens) is in no unit",
                                           plan_.samples[i].id, plan_.samples[i].tokens));
      }
    }
  }

  void check_lockstep() {
    if (plan_.layout.ep > 1 && plan_.lockstep == Lockstep::kNone) {
      report("lockstep",
             fmt::format("lockstep is none, but layout.ep is {}: dispatch is wider than "
                         "a unit, expected ep or hdp",
                         plan_.layout.ep));
    }
  }

  double unit_time(const Unit& unit) const {
    double work = 0.0;
    double tokens = 0.0;
    for (const std::int64_t id : unit.samples) {
      const auto s = static_cast<double>(plan_.samples[static_cast<std::size_t>(find(id))].tokens);
      work += s * (plan_.cost.quadratic * s + plan_.cost.linear);
      tokens += s;
    }
    const auto degree = static_cast<double>(unit.ranks.size());
    return work / degree + plan_.cost.fixed + plan_.cost.exchange * (degree - 1) / degree * tokens;
  }

  /// Replays the slots on a clock per rank; in lockstep, ranks that a unit or a lockstep group ties
  /// together start a slot together and leave it together.
  double replay() const {
    const auto hdp = static_cast<std::size_t>(plan_.layout.hdp);
    std::size_t width = 1;
    if (plan_.lockstep == Lockstep::kEp) width = static_cast<std::size_t>(plan_.layout.ep);
    if (plan_.lockstep == Lockstep::kHdp) width = hdp;
    std::vector<double> clock(hdp, 0.0);
    for (const Slot& slot : plan_.slots) {
      // Ranks tied together, as lists that merge: the larger takes the smaller in.
      std::vector<std::vector<std::size_t>> tied;
      std::vector<double> time;
      std::vector<std::ptrdiff_t> owner(width > 1 ? hdp : 0, -1);
      for (const Unit& unit : slot.units) {
        std::vector<std::size_t> ranks;
        if (width == 1) {
          ranks.assign(unit.ranks.begin(), unit.ranks.end());
          tied.push_back(std::move(ranks));
          time.push_back(unit_time(unit));
          continue;
        }
        const auto mine = static_cast<std::ptrdiff_t>(tied.size());
        tied.emplace_back();
        time.push_back(unit_time(unit));
        for (const int rank : unit.ranks) {
          const std::size_t begin = static_cast<std::size_t>(rank) / width * width;
          for (std::size_t member = begin; member < begin + width; ++member) {
            const std::ptrdiff_t other = owner[member];
            if (other == mine) continue;
            if (other < 0) {
              owner[member] = mine;
              tied[static_cast<std::size_t>(mine)].push_back(member);
              continue;
            }
            auto& theirs = tied[static_cast<std::size_t>(other)];
            for (const std::size_t moved : theirs) {
              owner[moved] = mine;
              tied[static_cast<std::size_t>(mine)].push_back(moved);
            }
            theirs.clear();
            time[static_cast<std::size_t>(mine)] = std::max(time[static_cast<std::size_t>(mine)],
                                                            time[static_cast<std::size_t>(other)]);
          }
        }
      }
      for (std::size_t g = 0; g < tied.size(); ++g) {
        double start = 0.0;
        for (const std::size_t rank : tied[g]) start = std::max(start, clock[rank]);
        for (const std::size_t rank : tied[g]) clock[rank] = start + time[g];
      }
    }
    return *std::max_element(clock.begin(), clock.end());
  }

  static bool near(double given, double expected) {
    return std::abs(given - expected) <=
           kPredictionTolerance * std::max(std::abs(expected), 1e-300);
  }

  void check_prediction() {
    const Prediction& given = plan_.predicted;
    std::int64_t exchange_tokens = 0;
    double work = 0.0;
    for (const Slot& slot : plan_.slots) {
      for (const Unit& unit : slot.units) {
        for (const std::int64_t id : unit.samples) {
          const std::int64_t tokens = plan_.samples[static_cast<std::size_t>(find(id))].tokens;
          exchange_tokens += (static_cast<std::int64_t>(unit.ranks.size()) - 1) * tokens;
          const auto s = static_cast<double>(tokens);
          work += s * (plan_.cost.quadratic * s + plan_.cost.linear);
        }
      }
    }
    const auto differs = [&](const char* field, const auto& value, const auto& expected) {
      report("prediction",
             fmt::format("predicted.{} is {}, the slots give {}", field, value, expected));
    };
    if (given.exchange_tokens != exchange_tokens) {
      differs("exchange_tokens", given.exchange_tokens, exchange_tokens);
    }
    if (given.step_time && !(*given.step_time >= 0.0 && std::isfinite(*given.step_time))) {
      report("prediction", fmt::format("predicted.step_time is {}, expected a finite time >= 0",
                                       *given.step_time));
    }
    // All work on all ranks at once; a micro-batch's is shared out over the stages.
    const double least = work / (1.0 * plan_.layout.hdp * plan_.layout.pp);
    if (given.step_time && *given.step_time < least * (1.0 - kPredictionTolerance)) {
      report("prediction", fmt::format("predicted.step_time is {}, expected at least {}, all work "
                                       "over all ranks",
                                       *given.step_time, least));
    }
    // Under a pipeline the figures below are the planner's guide; step_time is the prediction.
    if (plan_.layout.pp > 1) {
      if (!(given.efficiency >= 0.0 && given.efficiency <= 1.0 + kPredictionTolerance)) {
        report("prediction",
               fmt::format("predicted.efficiency is {}, expected 0 .. 1", given.efficiency));
      }
      if (!(given.lower_bound >= 0.0 &&
            given.lower_bound <= given.makespan * (1.0 + kPredictionTolerance))) {
        report("prediction", fmt::format("predicted.lower_bound is {}, expected 0 .. {}, the "
                                         "makespan",
                                         given.lower_bound, given.makespan));
      }
      return;
    }
    const double makespan = replay();
    const double efficiency = makespan > 0 ? work / (plan_.layout.hdp * makespan) : 1.0;
    if (!near(given.makespan, makespan)) differs("makespan", given.makespan, makespan);
    if (!near(given.efficiency, efficiency)) differs("efficiency", given.efficiency, efficiency);
    if (!(given.lower_bound >= 0.0 &&
          given.lower_bound <= makespan * (1.0 + kPredictionTolerance))) {
      report("prediction",
             fmt::format("predicted.lower_bound is {}, expected 0 .. {}, the makespan",
                         given.lower_bound, makespan));
    }
  }

  const StepPlan& plan_;
  std::vector<Violation> violations_;
  std::vector<std::size_t> order_;  // indices of samples by id
  std::vector<Place> places_;       // of samples
  std::vector<Place> last_use_;     // of ranks
};

}  // namespace

std::vector<Violation> check_plan(const StepPlan& plan) { return PlanChecker(plan).run(); }

void verify(const StepPlan& plan) { detail::refuse_if_any(plan, check_plan(plan)); }

void detail::refuse_if_any(const StepPlan& plan, const std::vector<Violation>& violations) {
  if (violations.empty()) return;
  std::string text = fmt::format("step {}: {}: {}", plan.step, violations.front().contract,
                                 violations.front().message);
  if (violations.size() > 1) text += fmt::format(" (and {} more)", violations.size() - 1);
  throw PlanError("plan.verify", text);
}

}  // namespace meshloom::plan
