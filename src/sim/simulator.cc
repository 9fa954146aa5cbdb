#include "meshloom/sim/simulator.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "meshloom/core/check.h"
#include "sim/internal/prices.h"

namespace meshloom::sim {
namespace {

using detail::as_size;
using plan::Instruction;
using plan::Op;

class Simulator {
 public:
  Simulator(const plan::StepPlan& plan, const std::vector<plan::Program>& programs,
            const Cluster& cluster, const Workload& workload, const SimulateOptions& options)
      : plan_(plan),
        programs_(programs),
        cluster_(cluster),
        options_(options),
        prices_(plan, cluster, workload) {
    const int world = plan.layout.world_size();
    MESHLOOM_CHECK_EQ(programs.size(), as_size(world), "sim.simulate", "programs");
    MESHLOOM_CHECK_GT(cluster.ranks_per_node, 0, "sim.simulate", "ranks_per_node");
    MESHLOOM_CHECK(cluster.nodes == 0 || world <= cluster.nodes * cluster.ranks_per_node,
                   "sim.simulate",
                   fmt::format("the plan's {} ranks do not fit {} nodes of {}", world,
                               cluster.nodes, cluster.ranks_per_node));
    ranks_.resize(as_size(world));
    result_.finish.resize(as_size(world));
    result_.busy.resize(as_size(world));
    result_.exposed.resize(as_size(world));
    result_.peak_memory.resize(as_size(world));
  }

  Simulation run() {
    std::size_t left = 0;
    for (int rank = 0; rank < static_cast<int>(ranks_.size()); ++rank) {
      left += programs_[as_size(rank)].instructions.size();
      runnable_.push_back(rank);
    }
    while (!runnable_.empty()) {
      const int rank = runnable_.front();
      runnable_.pop_front();
      left -= advance(rank);
    }
    if (left > 0) stuck();
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      result_.finish[r] = ranks_[r].now;
      result_.step_time = std::max(result_.step_time, ranks_[r].now);
    }
    return std::move(result_);
  }

 private:
  struct Rank {
    std::size_t at = 0;  ///< next instruction
    double now = 0.0;
    double port_free = 0.0;  ///< when its sending side is idle again
    double memory = 0.0;
    bool missing = false;  ///< waits for others at a rendezvous
    double begin = 0.0;    ///< of the current instruction
    double joint_end = 0.0;
    bool entered = false;
    detail::Price price;
  };

  /// Rendezvous of one computation that share members, directly or over others: since they repeat
  /// layer by layer, nobody gets ahead of who starts last and who takes longest.
  struct Meeting {
    std::size_t parent = 0;  ///< union-find
    std::size_t missing = 0;
    double start = 0.0;     ///< of who starts last
    double duration = 0.0;  ///< of who takes longest
    std::vector<int> waiting;
  };
  using MeetingKey = std::tuple<int, std::size_t, int, int, int>;  // kind, group, slot, op, chunk

  /// Transfers from one rank to another: the n-th send meets the n-th receive.
  struct Channel {
    std::vector<double> arrivals;
    std::size_t received = 0;
    int waiting = -1;  ///< the receiver, if it waits for a message that was not sent yet
  };

  using OfferKey = std::tuple<int, int, int, bool>;  // rank, slot, chunk, gradient
  struct Offer {
    Channel* channel = nullptr;
    int peer = -1;
    std::size_t index = 0;
  };

  /// Runs instructions of one rank until it has to wait. @returns instructions finished.
  std::size_t advance(int r) {
    auto& rank = ranks_[as_size(r)];
    const auto& instructions = programs_[as_size(r)].instructions;
    std::size_t finished = 0;
    while (rank.at < instructions.size()) {
      const auto& instruction = instructions[rank.at];
      if (!rank.entered && !enter(r, instruction)) break;
      if (rank.missing) break;
      leave(r, instruction);
      ++finished;
    }
    return finished;
  }

  /// @returns false where the instruction can't begin yet.
  bool enter(int r, const Instruction& instruction) {
    auto& rank = ranks_[as_size(r)];
    rank.begin = rank.now;
    rank.price = {};
    rank.joint_end = rank.now;
    if (instruction.op == Op::kReceive) {
      auto& channel = channels_[{instruction.peer, r}];
      offered_[{r, instruction.slot, instruction.chunk, instruction.gradient}] = {
          &channel, instruction.peer, channel.received++};
      rank.entered = true;
      return true;
    }
    double start = rank.now;
    if (instruction.op == Op::kForward || instruction.op == Op::kBackward) {
      const auto offer =
          offered_.find({r, instruction.slot, instruction.chunk, instruction.op == Op::kBackward});
      if (offer != offered_.end()) {
        auto& channel = *offer->second.channel;
        if (channel.arrivals.size() <= offer->second.index) {
          channel.waiting = r;
          return false;
        }
        start = std::max(start, channel.arrivals[offer->second.index]);
        offered_.erase(offer);
      }
    }
    rank.price = prices_.of(r, instruction);
    result_.bytes_inside += rank.price.inside;
    result_.bytes_between += rank.price.between;
    rank.entered = true;
    rank.begin = start;
    const double duration = rank.price.compute + rank.price.exposed;
    rank.joint_end = start + duration;
    if (!instruction.rendezvous.empty()) meet(r, instruction, start, duration);
    return true;
  }

  std::size_t root(std::size_t meeting) {
    while (meetings_[meeting].parent != meeting) {
      meeting = meetings_[meeting].parent = meetings_[meetings_[meeting].parent].parent;
    }
    return meeting;
  }

  void meet(int r, const Instruction& instruction, double start, double duration) {
    constexpr auto kNone = static_cast<std::size_t>(-1);
    std::size_t joined = kNone;
    for (const auto& rendezvous : instruction.rendezvous) {
      const auto [found, added] = meeting_of_.try_emplace(
          MeetingKey{static_cast<int>(rendezvous.kind), prices_.groups().of(rendezvous.ranks),
                     instruction.slot, static_cast<int>(instruction.op), instruction.chunk},
          meetings_.size());
      if (added) {
        meetings_.push_back({.parent = meetings_.size(),
                             .missing = rendezvous.ranks.size(),
                             .start = 0.0,
                             .duration = 0.0,
                             .waiting = {}});
      }
      const std::size_t mine = root(found->second);
      --meetings_[mine].missing;
      joined = joined == kNone || joined == mine ? mine : merge(joined, mine);
    }
    auto& meeting = meetings_[joined];
    meeting.start = std::max(meeting.start, start);
    meeting.duration = std::max(meeting.duration, duration);
    if (meeting.missing > 0) {
      meeting.waiting.push_back(r);
      ranks_[as_size(r)].missing = true;
      return;
    }
    ranks_[as_size(r)].joint_end = meeting.start + meeting.duration;
    for (const int other : meeting.waiting) {
      auto& waiter = ranks_[as_size(other)];
      waiter.joint_end = meeting.start + meeting.duration;
      waiter.missing = false;
      runnable_.push_back(other);
    }
    meeting.waiting = {};
  }

  std::size_t merge(std::size_t a, std::size_t b) {
    if (meetings_[a].waiting.size() < meetings_[b].waiting.size()) std::swap(a, b);
    auto& into = meetings_[a];
    auto& from = meetings_[b];
    from.parent = a;
    into.missing += from.missing;
    into.start = std::max(into.start, from.start);
    into.duration = std::max(into.duration, from.duration);
    into.waiting.insert(into.waiting.end(), from.waiting.begin(), from.waiting.end());
    from.waiting = {};
    return a;
  }

  void leave(int r, const Instruction& instruction) {
    auto& rank = ranks_[as_size(r)];
    const detail::Price price = rank.price;
    const double begin = rank.begin;
    rank.now = rank.joint_end;
    rank.entered = false;
    ++rank.at;
    result_.busy[as_size(r)] += price.compute;
    result_.exposed[as_size(r)] += price.exposed;
    if (instruction.op == Op::kSend) post(r, instruction);
    track_memory(r, instruction);
    if (options_.spans) {
      result_.spans.push_back({.rank = r,
                               .op = instruction.op,
                               .slot = instruction.slot,
                               .unit = instruction.unit,
                               .chunk = instruction.chunk,
                               .begin = begin,
                               .compute = price.compute,
                               .exposed = price.exposed,
                               .end = rank.now});
    }
  }

  /// Sends do not hold up the sender; its messages leave one after another.
  void post(int r, const Instruction& instruction) {
    auto& rank = ranks_[as_size(r)];
    const double bytes = prices_.transfer(instruction);
    const Link* const own = &cluster_.link(r, instruction.peer);
    const bool inside = own == &cluster_.inside;
    Link link = *own;
    if (!inside) link.bandwidth = cluster_.between_bandwidth(cluster_.ranks_per_node);
    const double begin = std::max(rank.now, rank.port_free);
    rank.port_free = begin + bytes / link.bandwidth;
    (inside ? result_.bytes_inside : result_.bytes_between) += bytes;
    auto& channel = channels_[{r, instruction.peer}];
    channel.arrivals.push_back(begin + link.seconds(bytes));
    if (channel.waiting >= 0) runnable_.push_back(std::exchange(channel.waiting, -1));
  }

  void track_memory(int r, const Instruction& instruction) {
    auto& rank = ranks_[as_size(r)];
    if (instruction.op == Op::kForward) {
      const double held = prices_.held(instruction);
      rank.memory += held;
      result_.bytes_host += 2.0 * (prices_.saved(instruction) - held);
      result_.peak_memory[as_size(r)] = std::max(result_.peak_memory[as_size(r)], rank.memory);
    } else if ((instruction.op == Op::kBackward && !instruction.defer_weight_gradient) ||
               instruction.op == Op::kWeightGradient) {
      rank.memory -= prices_.held(instruction);
    }
  }

  [[noreturn]] void stuck() const {
    std::string who;
    int shown = 0;
    for (std::size_t r = 0; r < ranks_.size() && shown < 8; ++r) {
      const auto& instructions = programs_[r].instructions;
      if (ranks_[r].at >= instructions.size()) continue;
      const auto& instruction = instructions[ranks_[r].at];
      who += fmt::format("{}rank {} at {} of slot {}", shown++ ? ", " : "", r,
                         plan::to_string(instruction.op), instruction.slot);
      const auto offer = offered_.find({static_cast<int>(r), instruction.slot, instruction.chunk,
                                        instruction.op == Op::kBackward});
      if (offer != offered_.end()) {
        who += fmt::format(" (nothing from rank {})", offer->second.peer);
      }
    }
    throw PlanError("sim.simulate", "the programs can't finish: " + who);
  }

  const plan::StepPlan& plan_;
  const std::vector<plan::Program>& programs_;
  const Cluster& cluster_;
  const SimulateOptions& options_;
  detail::Prices prices_;
  std::vector<Rank> ranks_;
  std::deque<int> runnable_;
  std::vector<Meeting> meetings_;
  std::map<MeetingKey, std::size_t> meeting_of_;
  std::map<std::pair<int, int>, Channel> channels_;  // from, to
  std::map<OfferKey, Offer> offered_;
  Simulation result_;
};

}  // namespace

double Simulation::bubble() const {
  if (busy.empty() || step_time <= 0.0) return 0.0;
  const double total = std::accumulate(busy.begin(), busy.end(), 0.0);
  return 1.0 - total / (step_time * static_cast<double>(busy.size()));
}

Simulation simulate(const plan::StepPlan& plan, const std::vector<plan::Program>& programs,
                    const Cluster& cluster, const Workload& workload,
                    const SimulateOptions& options) {
  return Simulator(plan, programs, cluster, workload, options).run();
}

}  // namespace meshloom::sim
