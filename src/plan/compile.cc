#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <numeric>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/schedule.h"
#include "plan/internal/timetable.h"

namespace meshloom::plan {
namespace {

constexpr std::array<std::string_view, 8> kOpNames{"load", "forward", "backward", "weight_gradient",
                                                   "send", "receive", "reduce",   "step"};
constexpr std::array<std::string_view, 5> kRendezvousNames{"exchange", "dispatch", "gather",
                                                           "tensor", "gradient_sync"};

constexpr int kAbsent = -2;  ///< the rank has no part in the slot
constexpr int kIdle = -1;    ///< the rank runs the slot with zero tokens

/// Meetings of each kind in one direction of one layer.
constexpr int kDispatchesPerLayer = 2;  // dispatch and combine
constexpr int kTensorPerLayer = 2;      // attention and feed-forward

/// Turns a schedule over slot indices into the programs of ranks.
class Lowering {
 public:
  Lowering(const StepPlan& plan, const CompileOptions& options)
      : plan_(plan), layout_(plan.layout), options_(options) {
    layout_.validate();
    MESHLOOM_CHECK_GE(options.layers, 1, "plan.compile", "layers");
    const auto slots = static_cast<int>(plan.slots.size());
    schedule_ = options.table ? *options.table : make_schedule(options.schedule, layout_, slots);
    events_ = detail::timetable(schedule_, layout_, slots);
    find_parts();
    find_pieces();
    unit_lists_.resize(first_unit_.back() * static_cast<std::size_t>(layout_.tp * layout_.pp));
    const auto hdp = static_cast<std::size_t>(layout_.hdp);
    const auto planes = static_cast<std::size_t>(layout_.tp * layout_.pp);
    axis_lists_.resize(planes);
    expert_lists_.resize(planes * hdp);
    replica_lists_.resize(planes * hdp);
    tensor_lists_.resize(static_cast<std::size_t>(layout_.pp) * hdp);
  }

  Program lower(int rank) {
    at_ = layout_.coordinates(rank);
    program_ = Program{.step = plan_.step, .rank = rank, .instructions = {}};
    const auto& parts = parts_[static_cast<std::size_t>(at_.hdp)];
    part_of_.assign(plan_.slots.size(), kAbsent);
    for (const auto& [slot, unit] : parts) part_of_[static_cast<std::size_t>(slot)] = unit;
    loaded_.assign(plan_.slots.size(), false);
    for (const detail::StageEvent& event : events_[static_cast<std::size_t>(at_.pp)]) {
      if (part_of_[static_cast<std::size_t>(event.slot)] != kAbsent) add(event);
    }
    add_reduce();
    add_step();
    return std::move(program_);
  }

 private:
  using SlotUnit = std::pair<int, int>;

  /// For every HDP rank the slots it runs, in order, idle ones included.
  void find_parts() {
    parts_.resize(static_cast<std::size_t>(layout_.hdp));
    const int width = plan_.lockstep == Lockstep::kHdp  ? layout_.hdp
                      : plan_.lockstep == Lockstep::kEp ? layout_.ep
                                                        : 1;
    first_unit_.push_back(0);
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) {
      const auto slot = static_cast<int>(s);
      const auto& units = plan_.slots[s].units;
      first_unit_.push_back(first_unit_.back() + units.size());
      std::vector<int> running;  // lockstep groups
      for (std::size_t u = 0; u < units.size(); ++u) {
        for (const int rank : units[u].ranks) {
          if (rank < 0 || rank >= layout_.hdp) {
            throw PlanError("plan.compile",
                            fmt::format("slot {}, unit {}: rank {}, expected 0 .. {}", s, u, rank,
                                        layout_.hdp - 1));
          }
          auto& mine = parts_[static_cast<std::size_t>(rank)];
          if (!mine.empty() && mine.back().first == slot) {
            throw PlanError("plan.compile",
                            fmt::format("slot {}: rank {} is in unit {} and in unit {}", s, rank,
                                        mine.back().second, u));
          }
          mine.emplace_back(slot, static_cast<int>(u));
          if (width > 1) running.push_back(rank / width);
        }
      }
      std::sort(running.begin(), running.end());
      running.erase(std::unique(running.begin(), running.end()), running.end());
      for (const int group : running) {
        for (int rank = group * width; rank < (group + 1) * width; ++rank) {
          auto& mine = parts_[static_cast<std::size_t>(rank)];
          if (mine.empty() || mine.back().first != slot) mine.emplace_back(slot, kIdle);
        }
      }
    }
  }

  /// Position in the model and number of layers of every (stage, chunk).
  void find_pieces() {
    const auto pieces = static_cast<int>(schedule_.placement.size());
    piece_.resize(schedule_.placement.size());
    for (int v = 0; v < pieces; ++v) {
      const StageChunk& place = schedule_.placement[static_cast<std::size_t>(v)];
      piece_[chunk_index(place.stage, place.chunk)] = v;
    }
    layers_ = options_.split.empty() ? even_split(options_.layers, pieces) : options_.split;
    MESHLOOM_CHECK_EQ(std::ssize(layers_), pieces, "plan.compile", "pieces of the split");
    MESHLOOM_CHECK_EQ(std::accumulate(layers_.begin(), layers_.end(), 0), options_.layers,
                      "plan.compile", "layers of the split");
  }

  [[nodiscard]] std::size_t chunk_index(int stage, int chunk) const {
    return static_cast<std::size_t>(stage * layout_.chunks + chunk);
  }
  [[nodiscard]] std::size_t plane() const {
    return static_cast<std::size_t>(at_.pp * layout_.tp + at_.tp);
  }
  [[nodiscard]] int world_rank(int hdp) const {
    return layout_.rank({.tp = at_.tp, .hdp = hdp, .pp = at_.pp});
  }

  /// A group of HDP ranks begin, begin + step, ... as world ranks of this rank's plane.
  [[nodiscard]] RankList hdp_ranks(int begin, int count, int step) const {
    std::vector<int> ranks;
    for (int i = 0; i < count; ++i) ranks.push_back(world_rank(begin + i * step));
    return ranks;
  }

  const RankList& axis_list() {
    RankList& list = axis_lists_[plane()];
    if (list.empty()) list = hdp_ranks(0, layout_.hdp, 1);
    return list;
  }

  const RankList& expert_list() {
    const int group = at_.hdp / layout_.ep;
    RankList& list = expert_lists_[plane() * static_cast<std::size_t>(layout_.hdp) +
                                   static_cast<std::size_t>(group)];
    if (list.empty()) list = hdp_ranks(group * layout_.ep, layout_.ep, 1);
    return list;
  }

  /// Who holds the same experts.
  const RankList& replica_list() {
    const int member = at_.hdp % layout_.ep;
    RankList& list = replica_lists_[plane() * static_cast<std::size_t>(layout_.hdp) +
                                    static_cast<std::size_t>(member)];
    if (list.empty()) list = hdp_ranks(member, layout_.hdp / layout_.ep, layout_.ep);
    return list;
  }

  const RankList& tensor_list() {
    RankList& list =
        tensor_lists_[static_cast<std::size_t>(at_.pp) * static_cast<std::size_t>(layout_.hdp) +
                      static_cast<std::size_t>(at_.hdp)];
    if (list.empty()) {
      std::vector<int> ranks;
      for (int tp = 0; tp < layout_.tp; ++tp) {
        ranks.push_back(layout_.rank({.tp = tp, .hdp = at_.hdp, .pp = at_.pp}));
      }
      list = ranks;
    }
    return list;
  }

  const RankList& unit_list(int slot, int unit) {
    RankList& list =
        unit_lists_[plane() * first_unit_.back() + first_unit_[static_cast<std::size_t>(slot)] +
                    static_cast<std::size_t>(unit)];
    if (list.empty()) {
      std::vector<int> ranks;
      for (const int rank : unit_of(slot, unit).ranks) ranks.push_back(world_rank(rank));
      list = ranks;
    }
    return list;
  }

  [[nodiscard]] const Unit& unit_of(int slot, int unit) const {
    return plan_.slots[static_cast<std::size_t>(slot)].units[static_cast<std::size_t>(unit)];
  }

  void add(const detail::StageEvent& event) {
    const auto slot = static_cast<std::size_t>(event.slot);
    const int unit = part_of_[slot];
    Instruction instruction{.op = event.op,
                            .slot = event.slot,
                            .unit = unit,
                            .chunk = event.chunk,
                            .gradient = event.gradient,
                            .defer_weight_gradient = event.defer_weight_gradient};
    if (event.peer_stage >= 0) {
      if (unit == kIdle) return;  // nothing to move
      instruction.peer = layout_.rank({.tp = at_.tp, .hdp = at_.hdp, .pp = event.peer_stage});
    } else if (event.op != Op::kWeightGradient) {
      const int piece = piece_[chunk_index(at_.pp, event.chunk)];
      instruction.rendezvous = meetings(event.slot, unit, layers_[static_cast<std::size_t>(piece)]);
      if (!loaded_[slot]) {
        loaded_[slot] = true;
        program_.instructions.push_back({.op = Op::kLoad, .slot = event.slot, .unit = unit});
      }
    }
    program_.instructions.push_back(std::move(instruction));
  }

  std::vector<Rendezvous> meetings(int slot, int unit, int layers) {
    std::vector<Rendezvous> result;
    if (layers == 0) return result;
    if (plan_.lockstep == Lockstep::kHdp && layout_.hdp > 1) {
      result.push_back({RendezvousKind::kGather, axis_list(), layers});
    }
    if (layout_.tp > 1) {
      result.push_back({RendezvousKind::kTensor, tensor_list(), layers * kTensorPerLayer});
    }
    if (unit != kIdle && unit_of(slot, unit).ranks.size() > 1) {
      result.push_back({RendezvousKind::kExchange, unit_list(slot, unit), layers});
    }
    if (layout_.ep > 1) {
      result.push_back({RendezvousKind::kDispatch, expert_list(), layers * kDispatchesPerLayer});
    }
    return result;
  }

  void add_reduce() {
    Instruction instruction{.op = Op::kReduce};
    if (layout_.hdp > 1) {
      instruction.rendezvous.push_back({RendezvousKind::kGradientSync, axis_list(), 1});
    }
    if (layout_.ep > 1 && layout_.ep < layout_.hdp) {
      instruction.rendezvous.push_back({RendezvousKind::kGradientSync, replica_list(), 1});
    }
    program_.instructions.push_back(std::move(instruction));
  }

  void add_step() {
    Instruction instruction{.op = Op::kStep};
    if (layout_.hdp > 1) {
      instruction.rendezvous.push_back({RendezvousKind::kGather, axis_list(), 1});
    }
    program_.instructions.push_back(std::move(instruction));
  }

  const StepPlan& plan_;
  const Layout& layout_;
  const CompileOptions& options_;
  Schedule schedule_;
  std::vector<std::vector<detail::StageEvent>> events_;  // [pp]
  std::vector<std::vector<SlotUnit>> parts_;             // [hdp]
  std::vector<std::size_t> first_unit_;                  // units before each slot; last: all
  std::vector<int> piece_;                               // [stage, chunk] -> position in the model
  std::vector<int> layers_;                              // [piece]
  // Rank lists, made once and shared by all who name them.
  std::vector<RankList> unit_lists_;
  std::vector<RankList> axis_lists_;
  std::vector<RankList> expert_lists_;
  std::vector<RankList> replica_lists_;
  std::vector<RankList> tensor_lists_;
  // Of the rank being lowered.
  Coordinates at_;
  Program program_;
  std::vector<int> part_of_;  // [slot] -> unit, kIdle or kAbsent
  std::vector<bool> loaded_;  // [slot]
};

}  // namespace

std::string_view to_string(Op op) { return kOpNames.at(static_cast<std::size_t>(op)); }

std::string_view to_string(RendezvousKind kind) {
  return kRendezvousNames.at(static_cast<std::size_t>(kind));
}

std::vector<Program> compile(const StepPlan& plan, const CompileOptions& options) {
  Lowering lowering(plan, options);
  std::vector<Program> programs;
  programs.reserve(static_cast<std::size_t>(plan.layout.world_size()));
  for (int rank = 0; rank < plan.layout.world_size(); ++rank) {
    programs.push_back(lowering.lower(rank));
  }
  return programs;
}

Program compile_rank(const StepPlan& plan, const CompileOptions& options, int rank) {
  return Lowering(plan, options).lower(rank);
}

}  // namespace meshloom::plan
