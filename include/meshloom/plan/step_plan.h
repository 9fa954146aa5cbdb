#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/cost/cost_model.h"
#include "meshloom/cost/memory_model.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/plan/sample.h"

namespace meshloom::plan {

/// How the ranks of a unit share keys and values.
enum class Exchange : std::uint8_t { kLocal, kRing, kAllGather, kUlysses, kRingUlysses };

/// Whose members run every slot that one of them runs (DESIGN.md, Plan 5).
enum class Lockstep : std::uint8_t { kNone, kEp, kHdp };

[[nodiscard]] MESHLOOM_API std::string_view to_string(Exchange exchange);
[[nodiscard]] MESHLOOM_API std::string_view to_string(Lockstep lockstep);
/// @throws InvalidArgument  unknown name; lists the known ones.
[[nodiscard]] MESHLOOM_API Exchange parse_exchange(std::string_view name);
[[nodiscard]] MESHLOOM_API Lockstep parse_lockstep(std::string_view name);

/// The smallest scheduled piece: an ordered set of HDP ranks and the samples they process together.
struct Unit {
  std::vector<int> ranks;             ///< positions on the HDP axis, ring order, distinct
  std::vector<std::int64_t> samples;  ///< sample ids, in local document order
  Exchange exchange = Exchange::kLocal;
  int ulysses_degree = 0;  ///< with ring_ulysses only
  double offload = 0.0;    ///< fraction of activations moved to host memory, 0 .. 1
  friend bool operator==(const Unit&, const Unit&) = default;
};

/// A position in the global order. Its units have disjoint rank sets.
struct Slot {
  std::vector<Unit> units;
  friend bool operator==(const Slot&, const Slot&) = default;
};

struct Prediction {
  double makespan = 0.0;
  double lower_bound = 0.0;
  double efficiency = 1.0;
  std::int64_t exchange_tokens = 0;
  std::optional<double> step_time;  ///< simulated time of the Programs (pipelines, lockstep)
  friend bool operator==(const Prediction&, const Prediction&) = default;
};

/// What happens in one optimizer step. Plain data, a pure function of its inputs, identical on
/// every rank. The fields are those of the plan file, `meshloom.plan/1`.
struct MESHLOOM_API StepPlan {
  std::int64_t step = 0;
  std::string strategy;
  Layout layout;
  std::int64_t capacity_tokens = 0;
  Lockstep lockstep = Lockstep::kNone;
  int ranks_per_node = 0;  ///< HDP ranks of a node, as the planner was told; 0: all in one
  MemoryModel memory;
  CostModel cost;
  std::vector<SampleInfo> samples;
  std::vector<Slot> slots;
  Prediction predicted;

  [[nodiscard]] std::int64_t total_tokens() const;
  [[nodiscard]] std::int64_t total_loss_tokens() const;

  /// The plan file's text. Canonical: equal plans give equal bytes.
  [[nodiscard]] std::string to_json() const;
  /// @throws PlanError  not JSON, another `format`, a field missing or of the wrong type or range;
  ///   names the field (`slots[3].units[0].ranks`). Contracts between fields are `verify`'s.
  [[nodiscard]] static StepPlan from_json(std::string_view text);

  /// Written to a temporary name in the same folder and renamed. @throws IoError
  void save(const std::string& path) const;
  /// @throws IoError, PlanError
  [[nodiscard]] static StepPlan load(const std::string& path);

  /// 64-bit hash of `to_json()`; what ranks compare.
  [[nodiscard]] std::uint64_t hash() const;

  friend bool operator==(const StepPlan&, const StepPlan&) = default;
};

/// Fills `predicted.makespan`, `.efficiency` and `.exchange_tokens` from the slots (plan-format),
/// `lower_bound` from the samples, and `step_time` where there is a pipeline (in the schedule that
/// the layout's chunks ask for) or lockstep.
MESHLOOM_API void predict_(StepPlan& plan);

/// Finish time of every HDP rank when units start in slot order as soon as all their ranks are
/// free. [hdp]
[[nodiscard]] MESHLOOM_API std::vector<double> rank_finish_times(const StepPlan& plan);

}  // namespace meshloom::plan
