#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"
#include "meshloom/parallel/expert_parallel.h"

namespace meshloom::train::detail {

/// How often each expert was chosen, [layers, experts], over all ranks.
using ExpertCounts = std::vector<double>;

/// How evenly the mixtures of a model are loaded; 1 is even. Layers without tokens do not count.
struct ExpertImbalance {
  double experts = 1.0;  ///< busiest expert over the mean, mean over layers
  double experts_worst = 1.0;
  double members = 1.0;  ///< busiest member of an expert-parallel group, likewise
  double members_worst = 1.0;
  int layers = 0;  ///< that had tokens
};
[[nodiscard]] MESHLOOM_API ExpertImbalance
expert_imbalance(const model::ModelConfig& model, const std::vector<parallel::ExpertMap>& maps,
                 const ExpertCounts& counts);

/// Where experts should go, by the loads of the steps since the last decision. Counts are those of
/// all ranks and whole numbers, so every rank decides the same.
class MESHLOOM_API ExpertLoads {
 public:
  struct Decision {
    std::vector<parallel::ExpertMap> maps;  ///< [layers]
    std::int64_t moved = 0;                 ///< experts, over all layers
    double before = 1.0;  ///< ExpertImbalance::members of the steps, as experts were
    double after = 1.0;   ///< and as it would have been
  };

  /// @param nodes       that an expert-parallel group spans, neighbours first
  /// @param least_gain  a layer's experts stay unless the busiest member's load falls by this share
  ExpertLoads(model::ModelConfig model, int nodes, double least_gain)
      : model_(std::move(model)), nodes_(nodes), least_gain_(least_gain) {}

  void add(const ExpertCounts& counts);
  [[nodiscard]] bool empty() const { return counts_.empty(); }
  /// Begins anew. @param maps  as experts are
  [[nodiscard]] Decision decide(const std::vector<parallel::ExpertMap>& maps);

  [[nodiscard]] const ExpertCounts& counts() const { return counts_; }
  /// @throws DataError  another size than the model's.
  void restore(ExpertCounts counts);

 private:
  model::ModelConfig model_;
  int nodes_;
  double least_gain_;
  ExpertCounts counts_;  ///< empty: none yet
};

/// Placement and loads as checkpoints keep them.
[[nodiscard]] MESHLOOM_API std::string experts_text(const std::vector<parallel::ExpertMap>& maps,
                                                    const ExpertCounts& loads);
struct SavedExperts {
  std::vector<parallel::ExpertMap> maps;
  ExpertCounts loads;
};
/// @param even  as the layout places experts: taken where the text is empty or of other members
/// @throws DataError  the text is damaged.
[[nodiscard]] MESHLOOM_API SavedExperts parse_experts(const std::string& text,
                                                      std::vector<parallel::ExpertMap> even);

}  // namespace meshloom::train::detail
