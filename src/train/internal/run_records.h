#pragma once

#include <cstdint>
#include <deque>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/parallel/span.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/train/trainer.h"
#include "train/internal/event_file.h"

namespace meshloom::train::detail {

/// What the run folder gets while a run goes on: metrics.jsonl, ranks.jsonl, TensorBoard events,
/// plans/, traffic.json. One rank has it. Every call throws IoError where the file system fails.
class RunRecords {
 public:
  /// Continues the folder's records at `first_step`: what they hold of later steps is dropped.
  RunRecords(std::string folder, std::int64_t first_step);

  void config(const std::string& yaml);
  void plan(const plan::StepPlan& plan);
  void step(const StepMetrics& metrics);
  void evaluation(std::int64_t step, double loss);
  void notice(std::int64_t step, const std::string& text);
  void traffic(const std::string& json);
  void memory(const std::string& json);

 private:
  void line(const std::string& text);

  std::string folder_;
  std::ofstream metrics_;
  std::ofstream ranks_;
  EventFile events_;
};

/// Moves what an earlier run left in `folder` into `folder`/previous-N; nothing is deleted.
/// @returns the new folder, or nothing where there was nothing to move.
std::string set_aside(const std::string& folder);

/// One step's spans on one rank.
struct StepTrace {
  std::int64_t step = 0;
  std::vector<parallel::Span> spans;
};

/// A rank's events for the Chrome trace format, comma separated, without brackets. Time is the
/// host's wall clock, so that hosts with synchronised clocks line up.
[[nodiscard]] std::string trace_events(int rank, const std::deque<StepTrace>& traces);

/// The metrics as one JSON object, but for `ranks`.
[[nodiscard]] std::string to_json(const StepMetrics& metrics);
/// `step`, and the fields of `ranks` as one array each.
[[nodiscard]] std::string ranks_json(const StepMetrics& metrics);

}  // namespace meshloom::train::detail
