#include "plan/balance/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "meshloom/core/random.h"

namespace meshloom::plan::balance {
namespace {

/// What sending the reference's traffic once more may cost, as a part of the makespan.
constexpr double kTrafficPrice = 0.2;
/// Traffic is counted against the reference's plus this part of all tokens, so that a step whose
/// reference sends next to nothing still may cut a sample.
constexpr double kTrafficBase = 0.5;
/// Price of a makespan above the bound: a slope from each gap on.
constexpr std::pair<double, double> kGapSlopes[] = {{0.0, 0.5}, {0.005, 1.0}, {0.02, 3.5}};
/// A score this close to the best imaginable ends the search.
constexpr double kGoodEnough = 5e-4;
/// Singles above this part of the target, up to so many for every rank, are placed one by one in
/// estimates, the rest as a fluid. Placing one counts as some elementary steps.
constexpr double kLargeSingle = 0.01;
constexpr std::size_t kSinglesOfRank = 6;
constexpr std::size_t kMostSingles = 512;
constexpr double kStepsOfSingle = 60.0;
constexpr double kMostRounds = 6000.0;
/// Elementary steps that one search may take.
constexpr double kEffort = 9e6;
/// Evaluations from which on placing freely is affordable.
constexpr double kFreeFrom = 300.0;
/// Rounds without anything better after which a descent ends.
constexpr int kPatience = 400;
/// How much worse a change may be at first.
constexpr double kUphill = 0.001;

/// A makespan is not late by rounding alone.
constexpr double kRounding = 1e-9;

constexpr PlacementRule kRules[] = {{1.0, 4.0}, {0.2, 4.0}, {0.02, 4.0}};

constexpr double kNever = std::numeric_limits<double>::infinity();

struct Candidate {
  std::vector<Job> jobs;  ///< in placement order
  PlacementRule rule;
  double target = 0.0;
  double makespan = 0.0;  ///< estimate
  double score = kNever;
};

class Search {
 public:
  explicit Search(const Model& model) : model_(model), placement_(model) {}

  Schedule run();

 private:
  enum class Fit { kNone, kAligned, kFree };
  Candidate start_(double target, Fit fit, const PlacementRule& rule);
  /// @param most  score beyond which the candidate is of no use; its own is then infinite
  void evaluate_(Candidate& candidate, double most = kNever);
  /// The longest makespan whose price is at most `price`.
  [[nodiscard]] double latest(double price) const;
  [[nodiscard]] int random_degree_(const Candidate& candidate, int now);
  void set_degree_(Candidate& candidate, int item, int degree) const;
  void change_(Candidate& candidate);
  void improve_(Candidate& best, int rounds, double enough);
  Schedule finish_(const Candidate& candidate, bool consolidate);
  [[nodiscard]] double score(double makespan, double exchange) const;
  /// What an exchange token may cost in rank time.
  [[nodiscard]] double price_of_token() const;
  [[nodiscard]] double exchange_of(const std::vector<Job>& jobs) const;
  [[nodiscard]] double large_singles() const;
  std::uint64_t random_(std::uint64_t below) { return random_bits(1, counter_++) % below; }

  const Model& model_;
  Placement placement_;
  std::vector<char> placed_;     // items that are jobs
  std::vector<double> singles_;  // shares of large singles, largest first
  std::size_t most_singles_ = 0;
  double traffic_ = 1.0;  ///< exchange tokens that the price of traffic is for
  std::uint64_t counter_ = 0;
};

bool wider(const Model& model, const Job& a, const Job& b) {
  if (a.degree != b.degree) return a.degree > b.degree;
  const double time_a = model.time(model.items[static_cast<std::size_t>(a.item)], a.degree);
  const double time_b = model.time(model.items[static_cast<std::size_t>(b.item)], b.degree);
  return time_a != time_b ? time_a > time_b : a.item < b.item;
}

Candidate Search::start_(double target, Fit fit, const PlacementRule& rule) {
  Candidate candidate;
  candidate.rule = rule;
  candidate.target = target;
  for (std::size_t i = 0; i < model_.items.size(); ++i) {
    int degree = model_.degree(model_.items[i], target);
    if (fit == Fit::kAligned) {
      degree = std::min(model_.ranks / (model_.ranks / degree),
                        std::max(degree, model_.most_ranks(model_.items[i])));
    }
    if (degree > 1) candidate.jobs.push_back({static_cast<int>(i), degree});
  }
  std::sort(candidate.jobs.begin(), candidate.jobs.end(),
            [&](const Job& a, const Job& b) { return wider(model_, a, b); });
  if (fit == Fit::kFree) {
    placement_.place_freely(candidate.jobs, model_.bound, rule, price_of_token());
  }
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

double Search::price_of_token() const {
  return kTrafficPrice / traffic_ * model_.bound * model_.ranks;
}

double Search::score(double makespan, double exchange) const {
  const double gap = std::max(0.0, makespan / model_.bound - 1.0);
  double price = 0.0;
  for (const auto& [from, slope] : kGapSlopes) price += slope * std::max(0.0, gap - from);
  return price + kTrafficPrice * exchange / traffic_;
}

double Search::latest(double price) const {
  if (price < 0.0) return -1.0;
  double slope = 0.0;
  for (std::size_t i = 0; i < std::size(kGapSlopes); ++i) {
    slope += kGapSlopes[i].second;
    const double gap = kGapSlopes[i].first + price / slope;
    if (i + 1 == std::size(kGapSlopes) || gap < kGapSlopes[i + 1].first) {
      return model_.bound * (1.0 + gap) * (1.0 + kRounding);
    }
    price -= slope * (kGapSlopes[i + 1].first - kGapSlopes[i].first);
  }
  return -1.0;
}

void Search::evaluate_(Candidate& candidate, double most) {
  const double traffic = kTrafficPrice * exchange_of(candidate.jobs) / traffic_;
  candidate.score = kNever;
  if (!placement_.place(candidate.jobs, candidate.target, candidate.rule, latest(most - traffic))) {
    return;
  }
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
    if (share < kLargeSingle * candidate.target || singles_.size() >= most_singles_) break;
    if (placed_[i]) continue;
    singles_.push_back(share);
    fluid -= share;
  }
  candidate.makespan = placement_.estimate(singles_, fluid);
  candidate.score = score(candidate.makespan, exchange_of(candidate.jobs));
}

int Search::random_degree_(const Candidate& candidate, int now) {
  switch (random_(6)) {
    case 0:
      return now + 1;
    case 1:
      return now - 1;
    case 2:
      return now + static_cast<int>(random_(7)) - 3;
    case 3:  // so that several fit side by side
      return model_.ranks / (1 + static_cast<int>(random_(static_cast<std::uint64_t>(
                                     std::min(8, model_.ranks / now + 1)))));
    case 4: {  // what the widest ones leave, or a part of it
      int left = model_.ranks;
      for (std::uint64_t beside = 1 + random_(8); const Job& job : candidate.jobs) {
        if (job.degree >= left || beside-- == 0) break;
        left -= job.degree;
      }
      return left / (1 + static_cast<int>(random_(3)));
    }
    default:  // so that it fits beside another
      if (candidate.jobs.empty()) return now + 1;
      return model_.ranks - candidate.jobs[random_(candidate.jobs.size())].degree;
  }
}

void Search::set_degree_(Candidate& candidate, int item, int degree) const {
  auto& jobs = candidate.jobs;
  std::erase_if(jobs, [&](const Job& job) { return job.item == item; });
  const Item& of = model_.items[static_cast<std::size_t>(item)];
  degree = std::clamp(degree, of.memory_degree, model_.most_ranks(of));
  if (degree == 1) return;
  const Job job{item, degree};
  jobs.insert(std::upper_bound(jobs.begin(), jobs.end(), job,
                               [&](const Job& a, const Job& b) { return wider(model_, a, b); }),
              job);
}

void Search::change_(Candidate& candidate) {
  auto& jobs = candidate.jobs;
  const std::uint64_t kind = random_(8);
  if (kind < 2 && jobs.size() > 1) {  // another order
    const auto from = static_cast<std::ptrdiff_t>(random_(jobs.size()));
    const auto to = static_cast<std::ptrdiff_t>(random_(jobs.size()));
    const Job moved = jobs[static_cast<std::size_t>(from)];
    jobs.erase(jobs.begin() + from);
    jobs.insert(jobs.begin() + to, moved);
  } else if (kind == 2 && !jobs.empty()) {  // another degree for all of one degree
    const int from = jobs[random_(jobs.size())].degree;
    const int to = random_degree_(candidate, from);
    std::vector<int> items;
    for (const Job& job : jobs) {
      if (job.degree == from) items.push_back(job.item);
    }
    for (const int item : items) set_degree_(candidate, item, to);
  } else {  // another degree for one item, or two; long ones are picked more often: they decide
    const std::uint64_t most = std::min<std::uint64_t>(model_.items.size(), jobs.size() + 8);
    for (std::uint64_t times = kind == 3 ? 2 : 1; times > 0; --times) {
      const auto item = static_cast<int>(random_(random_(most) + 1));
      const auto found =
          std::find_if(jobs.begin(), jobs.end(), [&](const Job& job) { return job.item == item; });
      const int now = found == jobs.end() ? 1 : found->degree;
      set_degree_(candidate, item, random_degree_(candidate, now));
    }
  }
}

void Search::improve_(Candidate& best, int rounds, double enough) {
  Candidate trial;
  Candidate now = best;
  int last = 0;  // round that found something better
  for (int round = 0; round < rounds && best.score > enough; ++round) {
    if (round > last + kPatience) break;
    trial = now;
    change_(trial);
    const double left = 1.0 - static_cast<double>(round) / rounds;
    const double most = now.score + kUphill * left * left;
    evaluate_(trial, most);
    if (trial.score > most) continue;
    std::swap(trial, now);
    if (now.score < best.score) {
      best = now;
      last = round;
    }
  }
}

Schedule Search::finish_(const Candidate& candidate, bool consolidate) {
  (void)placement_.place(candidate.jobs, candidate.target, candidate.rule, kNever);
  std::fill(placed_.begin(), placed_.end(), 0);
  for (const Job& job : candidate.jobs) placed_[static_cast<std::size_t>(job.item)] = 1;
  std::vector<int> singles;
  for (std::size_t i = 0; i < model_.items.size(); ++i) {
    if (!placed_[i]) singles.push_back(static_cast<int>(i));
  }
  Schedule schedule;
  schedule.pieces =
      fill(model_, candidate.jobs, placement_, singles, candidate.makespan, consolidate);
  schedule.makespan = makespan(model_, schedule.pieces);
  schedule.exchange = exchange_of(candidate.jobs);
  return schedule;
}

double Search::large_singles() const {
  const auto large = std::partition_point(
      model_.items.begin(), model_.items.end(),
      [&](const Item& item) { return model_.share(item) >= kLargeSingle * model_.bound; });
  return static_cast<double>(
      std::min(static_cast<std::size_t>(large - model_.items.begin()), most_singles_));
}

Schedule Search::run() {
  placed_.assign(model_.items.size(), 0);
  double needed = 0.0;
  for (const Item& item : model_.items) {
    needed += (model_.degree(item, model_.bound) - 1.0) * static_cast<double>(item.tokens);
  }
  traffic_ = std::max(model_.reference_exchange, needed) +
             kTrafficBase * static_cast<double>(model_.total_tokens);
  most_singles_ = std::min(kMostSingles, kSinglesOfRank * static_cast<std::size_t>(model_.ranks));
  // Steps of one evaluation, roughly: windows looked at, and the estimate.
  const Candidate first = start_(model_.bound, Fit::kNone, kRules[0]);
  const double ranks = model_.ranks;
  const double step = static_cast<double>(first.jobs.size() + 4) * std::min(2.0 * ranks, 2200.0) +
                      ranks * 8.0 + 0.1 * static_cast<double>(model_.items.size()) +
                      kStepsOfSingle * large_singles();
  const double evaluations = kEffort / step;
  // The last of a rank's units is half empty on average.
  const double enough =
      score(model_.bound + 0.5 * model_.cost.fixed, exchange_of(first.jobs)) + kGoodEnough;
  // One descent from the best start of each kind: degrees that the bound asks for, the same raised
  // to where a unit's place is cheapest, or made to fit side by side, and generous ones.
  struct Kind {
    double factor;
    Fit fit;
  };
  std::vector<Candidate> starts;
  double tried = 0.0;
  Candidate best_candidate;
  Schedule best_schedule;
  double best_score = kNever;
  const auto settle = [&](const Candidate& candidate) {  // true if nothing better is in sight
    Schedule schedule = finish_(candidate, false);
    const double reached = score(schedule.makespan, schedule.exchange);
    if (reached < best_score) {
      best_score = reached;
      best_candidate = candidate;
      best_schedule = std::move(schedule);
    }
    return best_score <= enough + kGoodEnough;
  };
  const auto result = [&] {
    if (model_.cost.fixed <= 0.0) return std::move(best_schedule);
    Schedule fewer = finish_(best_candidate, true);
    return fewer.makespan < best_schedule.makespan ? std::move(fewer) : std::move(best_schedule);
  };
  for (const Kind& kind : {Kind{1.0, Fit::kNone}, Kind{1.0, Fit::kFree}, Kind{1.0, Fit::kAligned},
                           Kind{0.5, Fit::kNone}}) {
    if (kind.fit == Fit::kFree && evaluations < kFreeFrom) continue;  // costs as much as many
    Candidate best;
    for (const PlacementRule& rule : kRules) {
      if (tried > 0.0 && (tried >= evaluations || best.score <= enough)) break;
      Candidate candidate = start_(model_.bound * kind.factor, kind.fit, rule);
      candidate.target = model_.bound;
      evaluate_(candidate);
      tried += 1.0;
      if (candidate.score < best.score) best = std::move(candidate);
    }
    if (best.target == 0.0) break;
    if (best.score <= enough && settle(best)) return result();
    starts.push_back(std::move(best));
  }
  const int rounds = static_cast<int>(std::clamp(evaluations - tried, 0.0, kMostRounds));
  std::sort(starts.begin(), starts.end(),
            [](const Candidate& a, const Candidate& b) { return a.score < b.score; });
  for (Candidate& candidate : starts) {
    improve_(candidate, rounds / static_cast<int>(starts.size()), enough);
    if (settle(candidate)) break;
  }
  return result();
}

}  // namespace

Schedule search(Model& model) {
  const double base =
      model.reference_exchange + kTrafficBase * static_cast<double>(model.total_tokens);
  model.share_units_(kTrafficPrice / base);
  return Search(model).run();
}

}  // namespace meshloom::plan::balance
