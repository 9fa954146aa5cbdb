#pragma once

#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/cost/fit.h"
#include "meshloom/parallel/span.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/train/trainer.h"
#include "train/internal/setup.h"
#include "train/internal/stragglers.h"
#include "train/internal/traffic_meter.h"

namespace meshloom::train::detail {

/// Says of every step where its bytes and its time went. One a rank; not thread safe.
class StepExplainer {
 public:
  StepExplainer(comm::Communicator world, Hosts hosts);

  /// A step begins: what was moved since the last one belongs to none.
  void begin() { (void)meter_.take(); }

  /// Fills `metrics.traffic`, `.group_bytes`, `.ranks` and what `extra` has of both, from the spans
  /// and accounts of all ranks. Collective.
  /// @param metrics  `seconds` and `step` are read
  /// @returns sentences about ranks that are persistently slow; equal on all ranks
  [[nodiscard]] std::vector<std::string> explain(const plan::StepPlan& plan,
                                                 const std::vector<parallel::Span>& spans,
                                                 StepMetrics& metrics);

  /// The text of traffic.json, on every rank. Collective.
  /// @param first, end  steps that the totals are of, [first, end)
  [[nodiscard]] std::string traffic_json(std::int64_t first, std::int64_t end);

 private:
  [[nodiscard]] std::vector<double> planned_work(const plan::StepPlan& plan,
                                                 const std::vector<RankTimes>& ranks);

  comm::Communicator world_;
  Hosts hosts_;
  TrafficMeter meter_;
  std::optional<CostRefiner> prices_;  ///< of this run's ranks, whatever the plans reckon with
  StragglerWatch stragglers_;
};

}  // namespace meshloom::train::detail
