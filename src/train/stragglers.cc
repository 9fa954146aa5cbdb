#include "train/internal/stragglers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>

namespace meshloom::train::detail {

namespace {

/// Steps that a judgement looks back on, and the fewest it is passed on.
constexpr std::size_t kWindow = 16;
constexpr std::size_t kFewest = 8;
/// In the median of the window: where a rank counts as slow, and where it no longer does. In its
/// lower quarter, too, it has to be above the latter: units on shared cores scatter.
constexpr double kSlow = 1.25;
constexpr double kFine = 1.1;
/// Of a step, spent on loading.
constexpr double kSlowLoad = 0.25;
constexpr double kFineLoad = 0.1;
/// A rank that holds the others up is the slowest in this part of the window.
constexpr double kMostly = 0.75;
constexpr double kNoPace = std::numeric_limits<double>::quiet_NaN();

}  // namespace

double lower_median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return std::isnan(value); });
  if (values.empty()) return kNoPace;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

StepBlame StragglerWatch::add(std::int64_t step, double seconds, std::vector<RankTimes>& ranks) {
  const std::size_t n = ranks.size();
  std::vector<double> paces(n, kNoPace);
  for (std::size_t r = 0; r < n; ++r) {
    if (ranks[r].planned > 0.0 && ranks[r].busy > 0.0) {
      paces[r] = ranks[r].busy / ranks[r].planned;
    }
  }
  const double scale = lower_median(paces);
  StepBlame blame;
  if (std::isnan(scale)) return blame;
  Entry entry{.step = step,
              .slowest = -1,
              .seconds = seconds,
              .waiting = 0.0,
              .pace = {},
              .share = {},
              .load = {}};
  double planned = 0.0;
  double exposed = 0.0;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t r = 0; r < n; ++r) {
    ranks[r].planned *= scale;
    planned += ranks[r].planned / static_cast<double>(n);
    exposed += ranks[r].exposed / static_cast<double>(n);
    least = std::min(least, ranks[r].exposed);
    if (entry.slowest < 0 || ranks[r].busy > ranks[static_cast<std::size_t>(entry.slowest)].busy) {
      entry.slowest = static_cast<int>(r);
    }
  }
  if (n < 2) return blame;
  const RankTimes& slowest = ranks[static_cast<std::size_t>(entry.slowest)];
  blame.slowest = entry.slowest;
  blame.data_seconds = slowest.planned - planned;
  blame.hardware_seconds = slowest.busy - slowest.planned;
  blame.waiting_seconds = exposed - least;
  entry.waiting = blame.waiting_seconds;
  for (std::size_t r = 0; r < n; ++r) {
    entry.pace.push_back(paces[r] / scale);
    entry.share.push_back(ranks[r].planned / planned);
    entry.load.push_back(ranks[r].load);
  }
  window_.push_back(std::move(entry));
  if (window_.size() > kWindow) window_.pop_front();
  judge();
  return blame;
}

void StragglerWatch::tell(int rank, Cause cause, double value, double begins, double ends,
                          const std::string& text) {
  const auto key = std::pair(rank, cause);
  if (value >= begins && told_.insert(key).second) {
    notices_.push_back(fmt::format("steps {} to {}: rank {} {}", window_.front().step,
                                   window_.back().step, rank, text));
  } else if (value < ends) {
    told_.erase(key);
  }
}

void StragglerWatch::judge() {
  if (window_.size() < kFewest) return;
  const std::size_t n = window_.back().pace.size();
  const auto over_window = [&](const auto& of) {
    std::vector<double> values;
    for (const Entry& entry : window_) values.push_back(of(entry));
    return lower_median(std::move(values));
  };
  const auto lower_quarter = [&](const auto& of) {
    std::vector<double> values;
    for (const Entry& entry : window_) {
      if (!std::isnan(of(entry))) values.push_back(of(entry));
    }
    if (values.empty()) return kNoPace;
    const auto at = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 4);
    std::nth_element(values.begin(), at, values.end());
    return *at;
  };
  const double seconds = over_window([](const Entry& entry) { return entry.seconds; });
  const double waiting = over_window([](const Entry& entry) { return entry.waiting; });
  for (std::size_t r = 0; r < n; ++r) {
    const int rank = static_cast<int>(r);
    const double pace = over_window([&](const Entry& entry) { return entry.pace[r]; });
    const double quick = lower_quarter([&](const Entry& entry) { return entry.pace[r]; });
    const auto led = std::count_if(window_.begin(), window_.end(),
                                   [&](const Entry& entry) { return entry.slowest == rank; });
    const bool mostly = static_cast<double>(led) >= kMostly * static_cast<double>(window_.size());
    tell(rank, Cause::kHardware, mostly && quick >= kFine ? pace : std::min(pace, kFine), kSlow,
         kFine,
         fmt::format("took {:.2f} times as long for its work as the middle rank (slow hardware, or "
                     "a busy host); ranks waited {:.3g} s a step for their peers",
                     pace, waiting));
    const double share = over_window([&](const Entry& entry) { return entry.share[r]; });
    const bool leads = mostly && !told_.contains({rank, Cause::kHardware});
    tell(rank, Cause::kData, leads ? share : 1.0, kSlow, kFine,
         fmt::format("was the slowest because its plans held {:.2f} times the mean work (slow "
                     "data); ranks waited {:.3g} s a step for their peers",
                     share, waiting));
    const double load = over_window([&](const Entry& entry) { return entry.load[r]; });
    tell(rank, Cause::kLoad, seconds > 0.0 ? load / seconds : 0.0, kSlowLoad, kFineLoad,
         fmt::format("spent {:.3g} s of a step of {:.3g} s loading its documents", load, seconds));
  }
}

}  // namespace meshloom::train::detail
