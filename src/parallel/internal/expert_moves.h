#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/parallel/expert_parallel.h"
#include "meshloom/parallel/model_placement.h"

/// How the experts of one pipeline stage get from one placement to another: data, the same on every
/// rank of the stage.
namespace meshloom::parallel::detail {

/// Neighbouring elements that one rank sends and another receives. Offsets are into what each of
/// them keeps of its part: all of it, or its own range.
struct ExpertRun {
  int from = 0;  ///< world ranks
  int to = 0;
  std::int64_t from_begin = 0;
  std::int64_t to_begin = 0;
  std::int64_t elements = 0;
};

class ExpertMoves {
 public:
  /// @param now  as parameters lie
  /// @param next  of each layer, the same numbers on members
  ExpertMoves(const ModelPlacement& now, int stage, const std::vector<ExpertMap>& next);

  /// The layers of the stage in which an expert moves, ascending.
  [[nodiscard]] const std::vector<std::int64_t>& layers() const { return layers_; }
  /// What moves of one layer, from owner to owner, in an order that both ends share.
  /// @param whole  of what every replica keeps, replica i to replica i; else of what is sharded
  [[nodiscard]] std::vector<ExpertRun> runs(std::int64_t layer, bool whole) const;

 private:
  /// Where a member has a tensor.
  struct Home {
    const PlacedPart* part;
    std::int64_t offset;
  };
  static void append_shards(const Home& from, const Home& to, std::int64_t elements,
                            std::vector<ExpertRun>& runs);

  const ModelPlacement& now_;
  const std::vector<ExpertMap>& next_;
  std::vector<std::vector<PlacedPart>> parts_;  ///< of each member that has experts
  /// By layer and expert: its tensors, in the order of the layer's table.
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::pair<Home, std::int64_t>>>
      homes_;
  std::vector<std::int64_t> layers_;
};

/// Sends and receives the runs of this rank. All ranks of the runs call it, in the same order.
/// @param tensor  what the runs' offsets are into; flat
void move_runs(comm::Communicator& world, const std::vector<ExpertRun>& runs,
               const at::Tensor& tensor);

}  // namespace meshloom::parallel::detail
