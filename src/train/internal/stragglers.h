#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/train/trainer.h"

namespace meshloom::train::detail {

/// The lower middle of the values that are numbers, so that of two ranks the faster one is the
/// measure; NaN where there is none.
[[nodiscard]] double lower_median(std::vector<double> values);

/// What made a step longer than its mean rank's work.
struct StepBlame {
  int slowest = -1;               ///< the rank that computed longest; -1: nothing to compare
  double data_seconds = 0.0;      ///< planned work of the slowest rank above the mean rank's
  double hardware_seconds = 0.0;  ///< its measured time above what its planned work should take
  double waiting_seconds = 0.0;   ///< mean over ranks, beyond the rank that waited least
};

/// Tells slow data, slow hardware and waiting apart. A rank's work is what the plan gave it, priced
/// in seconds by the rank whose time per work is the (lower) middle one; hardware is slow where a
/// rank needs more than that in the median of a window of steps. A pure function of what it is
/// given: all ranks that feed it the same numbers come to the same sentences. Not thread safe.
class MESHLOOM_API StragglerWatch {
 public:
  /// @param step     number of the step, for the sentences
  /// @param seconds  duration of the step
  /// @param ranks    `planned` in any unit on the way in; in seconds by the middle rank on return
  StepBlame add(std::int64_t step, double seconds, std::vector<RankTimes>& ranks);

  /// Sentences about ranks that are persistently slow, each said once until it is no longer so.
  [[nodiscard]] std::vector<std::string> take_notices() { return std::exchange(notices_, {}); }

 private:
  enum class Cause : std::uint8_t { kHardware, kData, kLoad };
  struct Entry {
    std::int64_t step = 0;
    int slowest = -1;
    double seconds = 0.0;
    double waiting = 0.0;
    std::vector<double> pace;   // time per work against the middle rank; NaN: no work
    std::vector<double> share;  // planned work against the mean
    std::vector<double> load;   // seconds
  };

  void judge();
  void tell(int rank, Cause cause, double value, double begins, double ends,
            const std::string& text);

  std::deque<Entry> window_;
  std::set<std::pair<int, Cause>> told_;
  std::vector<std::string> notices_;
};

}  // namespace meshloom::train::detail
