#include "plan/balance/search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "meshloom/core/random.h"

namespace meshloom::plan::balance {
namespace {

/// What sending the reference's traffic once more may cost: this part of the makespan.
constexpr double kTrafficPrice = 0.04;
/// Singles above this part of the target are placed one by one in estimates, the rest as a fluid.
constexpr double kLargeSingle = 0.1;
/// Elementary steps that one search may take.
constexpr double kEffort = 1e7;

constexpr PlacementRule kRules[] = {{0.02, 4.0}, {0.2, 4.0}, {1.0, 4.0}};

struct Candidate {
  std::vector<Job> jobs;  ///< in placement order
  PlacementRule rule;
  double target = 0.0;
  double score = std::numeric_limits<double>::infinity();
};

class Search {
 public:
  explicit Search(const Model& model) : model_(model), placement_(model) {}

  Schedule run();

 private:
  Candidate start(double target, const PlacementRule& rule) const;
  void evaluate_(Candidate& candidate);
  void improve_(Candidate& best, int rounds);
  Schedule finish_(const Candidate& candidate);
  double exchange_of(const std::vector<Job>& jobs) const;
  std::uint64_t random_(std::uint64_t below) { return random_bits(1, counter_++) % below; }

  const Model& model_;
  Placement placement_;
  std::vector<char> placed_;     // items that are jobs
  std::vector<double> singles_;  // shares of large singles, largest first
  std::uint64_t counter_ = 0;
};

bool wider(const Model& model, const Job& a, const Job& b) {
  if (a.degree != b.degree) return a.degree > b.degree;
  const double time_a = model.time(model.items[static_cast<std::size_t>(a.item)], a.degree);
  const double time_b = model.time(model.items[static_cast<std::size_t>(b.item)], b.degree);
  return time_a != time_b ? time_a > time_b : a.item < b.item;
}

Candidate Search::start(double target, const PlacementRule& rule) const {
  Candidate candidate;
  candidate.rule = rule;
  candidate.target = target;
  for (std::size_t i = 0; i < model_.items.size(); ++i) {
    const int degree = model_.degree(model_.items[i], target);
    if (degree > 1) candidate.jobs.push_back({static_cast<int>(i), degree});
  }
  std::sort(candidate.jobs.begin(), candidate.jobs.end(),
            [&](const Job& a, const Job& b) { return wider(model_, a, b); });
  return candidate;
}

double Search::exchange_of(const std::vector<Job>& jobs) const {
  double tokens = 0.0;
  for (const Job& job : jobs) {
    tokens += (job.degree - 1.0) *
              static_cast<double>(model_.items[static_cast<std::size_t>(job.item)].tokens);
  }
  return tokens;
}

void Search::evaluate_(Candidate& candidate) {
  placement_.place(candidate.jobs, candidate.target, candidate.rule);
  std::fill(placed_.begin(), placed_.end(), 0);
  for (const Job& job : candidate.jobs) placed_[static_cast<std::size_t>(job.item)] = 1;
  singles_.clear();
  double fluid = model_.total_work + model_.cost.fixed * static_cast<double>(model_.total_tokens) /
                                         static_cast<double>(model_.capacity);
  for (const Job& job : candidate.jobs) {
    fluid -= model_.share(model_.items[static_cast<std::size_t>(job.item)]);
  }
  for (std::size_t i = 0; i < model_.items.size(); ++i) {
    const double share = model_.share(model_.items[i]);
    if (share < kLargeSingle * candidate.target) break;
    if (placed_[i]) continue;
    singles_.push_back(share);
    fluid -= share;
  }
  const double makespan = placement_.estimate(singles_, fluid);
  candidate.score = std::max(makespan, model_.bound) / model_.bound;
  if (model_.reference_exchange > 0.0) {
    candidate.score += kTrafficPrice * exchange_of(candidate.jobs) / model_.reference_exchange;
  }
}

void Search::improve_(Candidate& best, int rounds) {
  Candidate trial;
  for (int round = 0; round < rounds; ++round) {
    trial = best;
    const std::uint64_t kind = random_(4);
    if (kind == 0 && trial.jobs.size() > 1) {  // another order
      const auto from = static_cast<std::ptrdiff_t>(random_(trial.jobs.size()));
      const auto to = static_cast<std::ptrdiff_t>(random_(trial.jobs.size()));
      const Job moved = trial.jobs[static_cast<std::size_t>(from)];
      trial.jobs.erase(trial.jobs.begin() + from);
      trial.jobs.insert(trial.jobs.begin() + to, moved);
    } else {  // another degree
      // Long items are picked more often: they decide.
      std::uint64_t bound = std::min<std::uint64_t>(model_.items.size(), trial.jobs.size() + 8);
      bound = std::max<std::uint64_t>(1, std::min(bound, random_(bound) + 1));
      const auto index = static_cast<int>(random_(bound));
      const Item& item = model_.items[static_cast<std::size_t>(index)];
      int now = 1;
      for (std::size_t j = 0; j < trial.jobs.size(); ++j) {
        if (trial.jobs[j].item != index) continue;
        now = trial.jobs[j].degree;
        trial.jobs.erase(trial.jobs.begin() + static_cast<std::ptrdiff_t>(j));
        break;
      }
      int degree = now;
      switch (random_(4)) {
        case 0:
          degree = now + 1;
          break;
        case 1:
          degree = now - 1;
          break;
        case 2:
          degree = 1 + static_cast<int>(random_(static_cast<std::uint64_t>(model_.ranks)));
          break;
        default:
          degree = now + static_cast<int>(random_(7)) - 3;
          break;
      }
      degree = std::clamp(degree, item.memory_degree, model_.ranks);
      if (degree > 1) {
        const Job job{index, degree};
        const auto at =
            std::upper_bound(trial.jobs.begin(), trial.jobs.end(), job,
                             [&](const Job& a, const Job& b) { return wider(model_, a, b); });
        trial.jobs.insert(at, job);
      }
    }
    evaluate_(trial);
    if (trial.score <= best.score) std::swap(trial, best);
  }
}

Schedule Search::finish_(const Candidate& candidate) {
  placement_.place(candidate.jobs, candidate.target, candidate.rule);
  std::fill(placed_.begin(), placed_.end(), 0);
  for (const Job& job : candidate.jobs) placed_[static_cast<std::size_t>(job.item)] = 1;
  std::vector<int> singles;
  for (std::size_t i = 0; i < model_.items.size(); ++i) {
    if (!placed_[i]) singles.push_back(static_cast<int>(i));
  }
  Schedule schedule;
  schedule.pieces = fill(model_, candidate.jobs, placement_, singles, candidate.target);
  schedule.makespan = makespan(model_, schedule.pieces);
  schedule.exchange = exchange_of(candidate.jobs);
  return schedule;
}

Schedule Search::run() {
  placed_.assign(model_.items.size(), 0);
  Candidate best;
  for (const double factor : {1.0, 0.5}) {
    for (const PlacementRule& rule : kRules) {
      Candidate candidate = start(model_.bound * factor, rule);
      candidate.target = model_.bound;
      evaluate_(candidate);
      if (candidate.score < best.score) best = std::move(candidate);
    }
  }
  const double step =
      static_cast<double>(best.jobs.size() + 4) * (static_cast<double>(model_.ranks) + 16.0) +
      static_cast<double>(model_.ranks) * 40.0 + static_cast<double>(model_.items.size());
  improve_(best, static_cast<int>(std::min(2000.0, kEffort / step)));
  return finish_(best);
}

}  // namespace

Schedule search(const Model& model) { return Search(model).run(); }

}  // namespace meshloom::plan::balance
