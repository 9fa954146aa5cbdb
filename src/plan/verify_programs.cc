#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "meshloom/plan/verifier.h"
#include "plan/internal/program_graph.h"
#include "plan/internal/violations.h"

namespace meshloom::plan {
namespace {

constexpr int kNoPart = -2;
constexpr int kIdlePart = -1;

/// Checks what each rank does by itself, then hands the matching to ProgramGraph.
class ProgramChecker {
 public:
  ProgramChecker(const StepPlan& plan, const std::vector<Program>& programs)
      : plan_(plan),
        layout_(plan.layout),
        programs_(programs),
        graph_(plan, programs, violations_) {}

  std::vector<Violation> run() {
    if (!check_header()) return std::move(violations_);
    chunks_ = static_cast<std::size_t>(layout_.chunks);
    trained_.resize(plan_.slots.size());
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) {
      trained_[s].resize(plan_.slots[s].units.size());
    }
    find_parts();
    graph_.match_transfers();
    order_pieces();
    for (const Program& program : programs_) check_rank(program);
    check_pieces();
    check_loss_weights();
    graph_.match_rendezvous();
    if (violations_.empty()) graph_.check_acyclic();
    return std::move(violations_);
  }

 private:
  /// What the pieces of the model do, (stage, chunk): each of them always or, without layers that
  /// do it, never.
  class PieceHabit {
   public:
    /// Whether a piece does as before, or is seen for the first time.
    bool agrees(const std::pair<int, int>& piece, bool does) {
      return does_.emplace(piece, does).first->second == does;
    }
    [[nodiscard]] bool nobody() const {
      return !does_.empty() && std::none_of(does_.begin(), does_.end(),
                                            [](const auto& entry) { return entry.second; });
    }

   private:
    std::map<std::pair<int, int>, bool> does_;
  };

  /// How often a rank ran the parts of one slot and chunk.
  struct Count {
    int forward = 0;
    int backward = 0;
    int weight = 0;
    bool deferred = false;
    int received[2] = {0, 0};  // activation, gradient
    int sent[2] = {0, 0};
  };

  void report(const char* contract, std::string message) {
    violations_.push_back({contract, std::move(message)});
  }
  std::string name(const Program& program, std::size_t index) const {
    return detail::describe(plan_, program, index);
  }

  bool check_header() {
    const auto world = static_cast<std::size_t>(layout_.world_size());
    if (programs_.size() != world) {
      report("programs", fmt::format("{} programs for a world of {}", programs_.size(), world));
      return false;
    }
    for (std::size_t rank = 0; rank < world; ++rank) {
      if (programs_[rank].rank != static_cast<int>(rank)) {
        report("programs", fmt::format("programs[{}] is of rank {}", rank, programs_[rank].rank));
      }
      if (programs_[rank].step != plan_.step) {
        report("programs", fmt::format("rank {}: the program is of step {}, the plan of step {}",
                                       rank, programs_[rank].step, plan_.step));
      }
    }
    return violations_.empty();
  }

  /// What every HDP rank has to do, from the plan alone: (slot, unit or idle).
  void find_parts() {
    std::size_t width = 1;
    if (plan_.lockstep == Lockstep::kEp) width = static_cast<std::size_t>(layout_.ep);
    if (plan_.lockstep == Lockstep::kHdp) width = static_cast<std::size_t>(layout_.hdp);
    parts_by_rank_.resize(static_cast<std::size_t>(layout_.hdp));
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) {
      const auto slot = static_cast<int>(s);
      std::set<std::size_t> groups;
      for (std::size_t u = 0; u < plan_.slots[s].units.size(); ++u) {
        for (const int rank : plan_.slots[s].units[u].ranks) {
          const auto at = static_cast<std::size_t>(rank);
          parts_by_rank_[at].emplace_back(slot, static_cast<int>(u));
          if (width > 1) groups.insert(at / width);
        }
      }
      for (const std::size_t group : groups) {
        for (std::size_t at = group * width; at < (group + 1) * width; ++at) {
          auto& mine = parts_by_rank_[at];
          if (mine.empty() || mine.back().first != slot) mine.emplace_back(slot, kIdlePart);
        }
      }
    }
  }

  /// A list of ranks that many programs should name; compared once per shared buffer.
  struct Expected {
    std::vector<int> ranks;
    const std::vector<int>* alike = nullptr;
    bool matches(const RankList& given) {
      if (&given.values() == alike) return true;
      if (given.values() != ranks) return false;
      alike = &given.values();
      return true;
    }
  };

  /// The given HDP ranks as world ranks of the same stage and tensor position.
  [[nodiscard]] std::vector<int> world_ranks(const std::vector<int>& hdp_ranks,
                                             const Coordinates& at) const {
    std::vector<int> ranks;
    ranks.reserve(hdp_ranks.size());
    for (const int hdp : hdp_ranks)
      ranks.push_back((at.pp * layout_.hdp + hdp) * layout_.tp + at.tp);
    return ranks;
  }

  Expected& neighbours(const Coordinates& at, int width) {
    Expected& expected = neighbours_[{width, at.pp * layout_.tp + at.tp, at.hdp / width}];
    if (expected.ranks.empty()) {
      std::vector<int> group(static_cast<std::size_t>(width));
      std::iota(group.begin(), group.end(), at.hdp / width * width);
      expected.ranks = world_ranks(group, at);
    }
    return expected;
  }

  void check_rank(const Program& program) {
    const Coordinates at = layout_.coordinates(program.rank);
    parts_.assign(plan_.slots.size(), kNoPart);
    for (const auto& [slot, unit] : parts_by_rank_[static_cast<std::size_t>(at.hdp)]) {
      parts_[static_cast<std::size_t>(slot)] = unit;
    }
    loads_.assign(plan_.slots.size(), 0);
    counts_.assign(plan_.slots.size() * chunks_, Count{});
    int reduces = 0;
    int steps = 0;
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      const Instruction& instruction = program.instructions[i];
      switch (instruction.op) {
        case Op::kReduce:
          ++reduces;
          check_gradient_sync(program, i, at);
          break;
        case Op::kStep:
          ++steps;
          if (reduces == 0) {
            report("order", fmt::format("{} comes before the reduce", name(program, i)));
          }
          break;
        default:
          if (reduces > 0) {
            report("order", fmt::format("{} comes after the reduce", name(program, i)));
          }
          check_instruction(program, i, at);
      }
    }
    if (reduces != 1) {
      report("conservation",
             fmt::format("rank {} reduces {} times, expected once", program.rank, reduces));
    }
    if (steps != 1) {
      report("conservation",
             fmt::format("rank {} steps {} times, expected once", program.rank, steps));
    }
    check_counts(program.rank, at);
  }

  void check_instruction(const Program& program, std::size_t i, const Coordinates& at) {
    const Instruction& instruction = program.instructions[i];
    if (instruction.slot < 0 || instruction.slot >= static_cast<int>(plan_.slots.size())) {
      report("conservation",
             fmt::format("{}: the plan has {} slots", name(program, i), plan_.slots.size()));
      return;
    }
    const auto slot = static_cast<std::size_t>(instruction.slot);
    if (instruction.chunk < 0 || instruction.chunk >= layout_.chunks) {
      report("conservation", fmt::format("{}: chunk {}, expected 0 .. {}", name(program, i),
                                         instruction.chunk, layout_.chunks - 1));
      return;
    }
    if (parts_[slot] == kNoPart || parts_[slot] != instruction.unit) {
      const std::string part = parts_[slot] == kNoPart ? "has no part in the slot"
                               : parts_[slot] == kIdlePart
                                   ? "is idle in the slot"
                                   : fmt::format("is in unit {}", parts_[slot]);
      report("conservation", fmt::format("{}: by the plan the rank {}", name(program, i), part));
      return;
    }
    Count& count = counts_[slot * chunks_ + static_cast<std::size_t>(instruction.chunk)];
    const auto piece = std::make_pair(at.pp, instruction.chunk);
    const auto need = [&](bool holds, const char* what) {
      if (!holds) report("order", fmt::format("{} comes before {}", name(program, i), what));
    };
    const bool computes = parts_[slot] != kIdlePart;
    switch (instruction.op) {
      case Op::kLoad:
        ++loads_[slot];
        break;
      case Op::kForward:
        need(loads_[slot] > 0, "its load");
        need(!computes || !has_source_.contains(piece) || count.received[0] > count.forward,
             "its activation is received");
        ++count.forward;
        check_meetings(program, i, at);
        break;
      case Op::kBackward:
        need(count.forward > count.backward, "its forward");
        need(!computes || !graph_.links().contains(piece) || count.received[1] > count.backward,
             "its gradient is received");
        ++count.backward;
        count.deferred = count.deferred || instruction.defer_weight_gradient;
        check_meetings(program, i, at);
        break;
      case Op::kWeightGradient:
        need(count.backward > count.weight, "its backward");
        ++count.weight;
        break;
      case Op::kSend:
        need((instruction.gradient ? count.backward : count.forward) >
                 count.sent[instruction.gradient],
             "what it sends is computed");
        ++count.sent[instruction.gradient];
        break;
      case Op::kReceive:
        ++count.received[instruction.gradient];
        break;
      case Op::kReduce:
      case Op::kStep:
        break;
    }
  }

  /// A forward or backward meets its unit, and its lockstep group, as the plan says.
  void check_meetings(const Program& program, std::size_t i, const Coordinates& at) {
    const Instruction& instruction = program.instructions[i];
    const auto slot = static_cast<std::size_t>(instruction.slot);
    int exchanges = 0;
    bool with_group = false;
    Expected* group = nullptr;
    if (plan_.lockstep == Lockstep::kEp && layout_.ep > 1) group = &neighbours(at, layout_.ep);
    if (plan_.lockstep == Lockstep::kHdp && layout_.hdp > 1) group = &neighbours(at, layout_.hdp);
    for (const Rendezvous& meeting : instruction.rendezvous) {
      if (meeting.kind == RendezvousKind::kExchange) {
        ++exchanges;
        if (instruction.unit < 0) continue;
        const auto u = static_cast<std::size_t>(instruction.unit);
        Expected& expected =
            exchanges_[{at.pp * layout_.tp + at.tp, instruction.slot, instruction.unit}];
        if (expected.ranks.empty()) {
          expected.ranks = world_ranks(plan_.slots[slot].units[u].ranks, at);
        }
        if (!expected.matches(meeting.ranks)) {
          report("rendezvous", fmt::format("{}: its exchange is with other ranks, or in another "
                                           "order, than the unit's",
                                           name(program, i)));
        }
      } else if (group != nullptr && group->matches(meeting.ranks)) {
        with_group = true;
      }
    }
    const int expected =
        instruction.unit >= 0 &&
                plan_.slots[slot].units[static_cast<std::size_t>(instruction.unit)].ranks.size() > 1
            ? 1
            : 0;
    const std::pair<int, int> piece{at.pp, instruction.chunk};
    const bool several = layout_.pp * layout_.chunks > 1;
    const bool exchanges_right = expected == 1 && several
                                     ? exchanges <= 1 && exchanging_.agrees(piece, exchanges == 1)
                                     : exchanges == expected;
    if (!exchanges_right) {
      report("rendezvous", fmt::format("{} has {} exchanges, expected {}", name(program, i),
                                       exchanges, expected));
    }
    if (group != nullptr && !(several ? meeting_.agrees(piece, with_group) : with_group)) {
      report("lockstep", fmt::format("{} does not meet its lockstep group{}", name(program, i),
                                     several ? " as others of its piece of the model do" : ""));
    }
  }

  /// Layers exchange, and meet their lockstep group; not every piece has some.
  void check_pieces() {
    if (exchanging_.nobody()) {
      report("rendezvous",
             "no piece of the model exchanges keys and values, though units have "
             "several ranks");
    }
    if (meeting_.nobody()) {
      report("lockstep", "no piece of the model meets its lockstep group");
    }
  }

  void check_gradient_sync(const Program& program, std::size_t i, const Coordinates& at) {
    if (layout_.hdp == 1) return;
    Expected& expected = neighbours(at, layout_.hdp);
    for (const Rendezvous& meeting : program.instructions[i].rendezvous) {
      if (meeting.kind == RendezvousKind::kGradientSync && expected.matches(meeting.ranks)) return;
    }
    report("rendezvous", fmt::format("{} does not sum gradients with all {} HDP ranks",
                                     name(program, i), layout_.hdp));
  }

  /// Everything that the plan gives the rank happened exactly once.
  void check_counts(int rank, const Coordinates& at) {
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) {
      if (parts_[s] == kNoPart) continue;
      const auto expect = [&](const char* what, int times, int expected) {
        if (times == expected) return;
        const std::string unit = parts_[s] >= 0 ? fmt::format("unit {}", parts_[s]) : "idle";
        report("conservation", fmt::format("rank {}, slot {}, {}: {} happens {} times, expected {}",
                                           rank, s, unit, what, times, expected));
      };
      expect("load", loads_[s], 1);
      for (std::size_t c = 0; c < chunks_; ++c) {
        const Count& count = counts_[s * chunks_ + c];
        const auto piece = std::make_pair(at.pp, static_cast<int>(c));
        const bool computes = parts_[s] != kIdlePart;
        const int in = computes && has_source_.contains(piece) ? 1 : 0;
        const int out = computes && graph_.links().contains(piece) ? 1 : 0;
        expect("forward", count.forward, 1);
        expect("backward", count.backward, 1);
        expect("weight_gradient", count.weight, count.deferred ? 1 : 0);
        expect("receive of the activation", count.received[0], in);
        expect("send of the activation", count.sent[0], out);
        expect("receive of the gradient", count.received[1], out);
        expect("send of the gradient", count.sent[1], in);
        const bool complete = count.forward == 1 && count.backward == 1;
        if (complete && computes && at.tp == 0 && piece == last_piece_) {
          ++trained_[s][static_cast<std::size_t>(parts_[s])];
        }
      }
    }
  }

  /// The model's pieces in order: activations link them, or they follow each other on one stage.
  void order_pieces() {
    const auto& links = graph_.links();
    for (const auto& [from, to] : links) {
      if (!has_source_.insert(to).second) {
        report("pipeline", fmt::format("stage {} chunk {} receives from two pieces of the model",
                                       to.first, to.second));
      }
    }
    std::vector<std::pair<int, int>> heads;
    std::vector<std::pair<int, int>> tails;
    for (int stage = 0; stage < layout_.pp; ++stage) {
      for (int chunk = 0; chunk < layout_.chunks; ++chunk) {
        if (!has_source_.contains({stage, chunk})) heads.emplace_back(stage, chunk);
        if (!links.contains({stage, chunk})) tails.emplace_back(stage, chunk);
      }
    }
    // Follow the model from its first piece; where no activation leaves, it goes on at a chunk of
    // the same stage that nothing reaches.
    const std::size_t pieces = static_cast<std::size_t>(layout_.pp) * chunks_;
    if (heads.empty()) {
      report("pipeline", "activations go round in a ring: the model has no first piece");
      return;
    }
    std::pair<int, int> piece = heads.front();
    std::size_t visited = 0;
    std::set<std::pair<int, int>> seen;
    while (visited < pieces && seen.insert(piece).second) {
      ++visited;
      last_piece_ = piece;
      if (const auto next = links.find(piece); next != links.end()) {
        piece = next->second;
        continue;
      }
      for (const auto& head : heads) {
        if (head.first == piece.first && !seen.contains(head)) {
          piece = head;
          break;
        }
      }
    }
    if (visited < pieces) {
      report("pipeline", fmt::format("activations connect {} of the model's {} pieces: none leaves "
                                     "stage {} chunk {}",
                                     visited, pieces, last_piece_.first, last_piece_.second));
    }
  }

  /// Each unit is trained by all its ranks; the loss tokens trained are the step's denominator.
  void check_loss_weights() {
    std::vector<std::pair<std::int64_t, std::int64_t>> loss;  // (id, loss tokens)
    std::int64_t denominator = 0;
    for (const SampleInfo& sample : plan_.samples) {
      loss.emplace_back(sample.id, sample.loss_tokens);
      denominator += sample.loss_tokens;
    }
    std::sort(loss.begin(), loss.end());
    std::int64_t trained = 0;
    for (std::size_t s = 0; s < plan_.slots.size(); ++s) {
      for (std::size_t u = 0; u < plan_.slots[s].units.size(); ++u) {
        const Unit& unit = plan_.slots[s].units[u];
        const auto ranks = static_cast<int>(unit.ranks.size());
        if (trained_[s][u] != ranks) {
          report("conservation",
                 fmt::format("slot {}, unit {}: {} of {} ranks train it to the loss", s, u,
                             trained_[s][u], ranks));
          continue;
        }
        for (const std::int64_t id : unit.samples) {
          const auto found =
              std::lower_bound(loss.begin(), loss.end(), std::make_pair(id, INT64_MIN));
          trained += found->second;
        }
      }
    }
    if (trained != denominator && violations_.empty()) {
      report("loss_weights", fmt::format("units hold {} loss tokens, the step's denominator is {}",
                                         trained, denominator));
    }
  }

  const StepPlan& plan_;
  const Layout& layout_;
  const std::vector<Program>& programs_;
  PieceHabit exchanging_;
  PieceHabit meeting_;
  std::vector<Violation> violations_;
  detail::ProgramGraph graph_;
  std::size_t chunks_ = 1;
  std::set<std::pair<int, int>> has_source_;  // (stage, chunk) that an activation reaches
  std::pair<int, int> last_piece_{0, 0};      // computes the loss
  std::vector<std::vector<int>> trained_;     // [slot][unit]: ranks that did
  std::vector<std::vector<std::pair<int, int>>> parts_by_rank_;  // [hdp]
  std::map<std::tuple<int, int, int>, Expected> neighbours_;     // (width, plane, group)
  std::map<std::tuple<int, int, int>, Expected> exchanges_;      // (plane, slot, unit)
  // Of the rank being checked.
  std::vector<int> parts_;     // [slot]
  std::vector<int> loads_;     // [slot]
  std::vector<Count> counts_;  // [slot, chunk]
};

}  // namespace

std::vector<Violation> check_programs(const StepPlan& plan, const std::vector<Program>& programs) {
  std::vector<Violation> violations = check_plan(plan);
  if (!violations.empty()) return violations;
  return ProgramChecker(plan, programs).run();
}

void verify(const StepPlan& plan, const std::vector<Program>& programs) {
  detail::refuse_if_any(plan, check_programs(plan, programs));
}

}  // namespace meshloom::plan
