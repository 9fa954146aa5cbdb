#include "plan/internal/program_graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "meshloom/core/hash.h"

namespace meshloom::plan::detail {
namespace {

bool is_transfer(const Instruction& instruction) {
  return instruction.op == Op::kSend || instruction.op == Op::kReceive;
}

std::string what_moves(const Instruction& instruction) {
  return fmt::format("{} of slot {}, unit {}", instruction.gradient ? "gradient" : "activation",
                     instruction.slot, instruction.unit);
}

std::string list_text(const RankList& ranks) {
  constexpr std::size_t kShown = 8;
  std::string text = "[";
  for (std::size_t i = 0; i < std::min(ranks.size(), kShown); ++i) {
    text += fmt::format("{}{}", i ? ", " : "", ranks[i]);
  }
  return text + (ranks.size() > kShown ? fmt::format(", ... {} ranks]", ranks.size()) : "]");
}

}  // namespace

std::string describe(const StepPlan& plan, const Program& program, std::size_t index) {
  const Instruction& instruction = program.instructions[index];
  std::string text =
      fmt::format("rank {}, instruction {} ({}", program.rank, index, to_string(instruction.op));
  const auto slots = static_cast<int>(plan.slots.size());
  if (instruction.slot >= 0) text += fmt::format(", slot {}", instruction.slot);
  if (instruction.slot >= 0 && instruction.unit < 0) text += ", idle";
  if (instruction.unit >= 0) text += fmt::format(", unit {}", instruction.unit);
  if (instruction.slot >= 0 && instruction.slot < slots && instruction.unit >= 0) {
    const auto& units = plan.slots[static_cast<std::size_t>(instruction.slot)].units;
    if (instruction.unit < static_cast<int>(units.size())) {
      constexpr std::size_t kShown = 4;
      const auto& samples = units[static_cast<std::size_t>(instruction.unit)].samples;
      text += samples.size() == 1 ? ", sample " : ", samples ";
      for (std::size_t i = 0; i < std::min(samples.size(), kShown); ++i) {
        text += fmt::format("{}{}", i ? " " : "", samples[i]);
      }
      if (samples.size() > kShown) text += " ...";
    }
  }
  if (instruction.chunk != 0) text += fmt::format(", chunk {}", instruction.chunk);
  if (instruction.peer >= 0) text += fmt::format(", peer {}", instruction.peer);
  return text + ")";
}

ProgramGraph::ProgramGraph(const StepPlan& plan, const std::vector<Program>& programs,
                           std::vector<Violation>& violations)
    : plan_(plan), programs_(programs), violations_(violations) {}

bool ProgramGraph::peer_is_sound(const Place& place) {
  const Instruction& instruction = at(place);
  const Layout& layout = plan_.layout;
  if (instruction.peer < 0 || instruction.peer >= layout.world_size()) {
    report("transfer", fmt::format("{}: peer is {}, expected 0 .. {}", name(place),
                                   instruction.peer, layout.world_size() - 1));
    return false;
  }
  const Coordinates here = layout.coordinates(place.rank);
  const Coordinates there = layout.coordinates(instruction.peer);
  if (here.tp != there.tp || here.hdp != there.hdp || here.pp == there.pp) {
    report("transfer", fmt::format("{}: peer {} is not another stage of the same pipeline",
                                   name(place), instruction.peer));
    return false;
  }
  return true;
}

void ProgramGraph::match_transfers() {
  struct Channel {
    std::vector<Place> sends;
    std::vector<Place> receives;
  };
  std::map<std::pair<int, int>, Channel> channels;  // (sender, receiver)
  for (const Program& program : programs_) {
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      const Instruction& instruction = program.instructions[i];
      if (!is_transfer(instruction)) continue;
      const Place place{program.rank, static_cast<std::uint32_t>(i), 0};
      if (!peer_is_sound(place)) continue;
      if (instruction.op == Op::kSend) {
        channels[{program.rank, instruction.peer}].sends.push_back(place);
      } else {
        channels[{instruction.peer, program.rank}].receives.push_back(place);
      }
    }
  }
  for (const auto& [pair, channel] : channels) match_pair(channel.sends, channel.receives);
}

void ProgramGraph::match_pair(const std::vector<Place>& sends, const std::vector<Place>& receives) {
  const std::size_t both = std::min(sends.size(), receives.size());
  for (std::size_t i = 0; i < both; ++i) {
    const Instruction& send = at(sends[i]);
    const Instruction& receive = at(receives[i]);
    if (send.slot != receive.slot || send.unit != receive.unit ||
        send.gradient != receive.gradient) {
      report("transfer", fmt::format("{} brings the {}, but {} expects the {}", name(sends[i]),
                                     what_moves(send), name(receives[i]), what_moves(receive)));
      return;  // what follows on this channel is out of step
    }
    link(sends[i], receives[i]);
    transfers_.emplace_back(sends[i], receives[i]);
  }
  for (std::size_t i = both; i < sends.size(); ++i) {
    report("transfer",
           fmt::format("{} meets no receive on rank {}", name(sends[i]), at(sends[i]).peer));
  }
  for (std::size_t i = both; i < receives.size(); ++i) {
    report("transfer",
           fmt::format("{} meets no send on rank {}", name(receives[i]), at(receives[i]).peer));
  }
}

void ProgramGraph::link(const Place& send, const Place& receive) {
  // A gradient runs against the model's order.
  const Place& first = at(send).gradient ? receive : send;
  const Place& second = at(send).gradient ? send : receive;
  const std::pair<int, int> from{plan_.layout.coordinates(first.rank).pp, at(first).chunk};
  const std::pair<int, int> to{plan_.layout.coordinates(second.rank).pp, at(second).chunk};
  const auto [found, added] = links_.emplace(from, to);
  if (!added && found->second != to) {
    report("pipeline",
           fmt::format("{}: stage {} chunk {} is followed by stage {} chunk {} here, by "
                       "stage {} chunk {} elsewhere",
                       name(send), from.first, from.second, to.first, to.second,
                       found->second.first, found->second.second));
  }
}

bool ProgramGraph::ranks_are_sound(const Place& place) {
  std::vector<int> sorted = rendezvous_at(place).ranks.values();
  std::sort(sorted.begin(), sorted.end());
  if (sorted.empty() || sorted.front() < 0 || sorted.back() >= plan_.layout.world_size() ||
      std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    report("rendezvous",
           fmt::format("{}: {} with ranks {}, expected distinct ranks in 0 .. {}", name(place),
                       to_string(rendezvous_at(place).kind), list_text(rendezvous_at(place).ranks),
                       plan_.layout.world_size() - 1));
    return false;
  }
  return true;
}

ProgramGraph::Meeting* ProgramGraph::meeting_of(const Place& place) {
  const RankList& ranks = rendezvous_at(place).ranks;
  const std::vector<int>& values = ranks.values();
  std::size_t list = lists_.size();
  const auto known = list_of_address_.find(&values);
  if (known != list_of_address_.end()) {
    list = known->second;
  } else {
    const std::string_view bytes(reinterpret_cast<const char*>(values.data()),
                                 values.size() * sizeof(int));
    auto& alike = lists_by_hash_[hash_bytes(bytes)];
    const auto same = std::find_if(alike.begin(), alike.end(),
                                   [&](std::size_t other) { return lists_[other] == ranks; });
    if (same != alike.end()) {
      list = *same;
    } else {
      alike.push_back(list);
      lists_.push_back(ranks);
      list_is_sound_.push_back(ranks_are_sound(place));
    }
    list_of_address_.emplace(&values, list);
  }
  if (!list_is_sound_[list]) return nullptr;
  const auto [found, added] = meeting_of_.emplace(
      std::make_pair(static_cast<int>(rendezvous_at(place).kind), list), meetings_.size());
  if (added) meetings_.push_back({rendezvous_at(place).kind, ranks, {}});
  return &meetings_[found->second];
}

void ProgramGraph::match_rendezvous() {
  for (const Program& program : programs_) {
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      const auto& list = program.instructions[i].rendezvous;
      for (std::size_t r = 0; r < list.size(); ++r) {
        const Place place{program.rank, static_cast<std::uint32_t>(i),
                          static_cast<std::uint32_t>(r)};
        if (list[r].count < 1) {
          report("rendezvous", fmt::format("{}: {} happens {} times, expected >= 1", name(place),
                                           to_string(list[r].kind), list[r].count));
        }
        if (Meeting* meeting = meeting_of(place)) meeting->places.push_back(place);
      }
    }
  }
  for (const Meeting& meeting : meetings_) match_meeting(meeting);
}

void ProgramGraph::match_meeting(const Meeting& meeting) {
  std::vector<int> members = meeting.ranks.values();
  std::sort(members.begin(), members.end());
  // Where each member's meetings begin among the places, which are in rank order.
  std::vector<std::size_t> begin;
  std::size_t next = 0;
  for (const int member : members) {
    while (next < meeting.places.size() && meeting.places[next].rank < member) {
      report("rendezvous", fmt::format("{}: {} with ranks {}, which leave this rank out",
                                       name(meeting.places[next]), to_string(meeting.kind),
                                       list_text(meeting.ranks)));
      ++next;
    }
    begin.push_back(next);
    while (next < meeting.places.size() && meeting.places[next].rank == member) ++next;
  }
  const std::size_t stop = next;
  for (; next < meeting.places.size(); ++next) {
    report("rendezvous", fmt::format("{}: {} with ranks {}, which leave this rank out",
                                     name(meeting.places[next]), to_string(meeting.kind),
                                     list_text(meeting.ranks)));
  }
  begin.push_back(stop);
  std::size_t rounds = 0;
  std::size_t busiest = 0;
  for (std::size_t m = 0; m < members.size(); ++m) {
    if (begin[m + 1] - begin[m] > rounds) {
      rounds = begin[m + 1] - begin[m];
      busiest = m;
    }
  }
  for (std::size_t round = 0; round < rounds; ++round) {
    const Place& model = meeting.places[begin[busiest] + round];
    std::vector<Place> present;
    for (std::size_t m = 0; m < members.size(); ++m) {
      if (begin[m] + round >= begin[m + 1]) {
        report("rendezvous",
               fmt::format("{}: {} with ranks {}: rank {} never comes", name(model),
                           to_string(meeting.kind), list_text(meeting.ranks), members[m]));
        continue;
      }
      const Place& place = meeting.places[begin[m] + round];
      const Instruction& mine = at(place);
      const Instruction& theirs = at(model);
      if (mine.op != theirs.op || mine.slot != theirs.slot || mine.chunk != theirs.chunk ||
          rendezvous_at(place).count != rendezvous_at(model).count) {
        report("rendezvous",
               fmt::format("{} meets {} in {} with ranks {}, {} times against {}", name(model),
                           name(place), to_string(meeting.kind), list_text(meeting.ranks),
                           rendezvous_at(model).count, rendezvous_at(place).count));
        return;  // what follows in this group is out of step
      }
      present.push_back(place);
    }
    if (present.size() == members.size()) joint_.push_back(std::move(present));
  }
}

std::size_t ProgramGraph::start_of(const Place& place) const {
  // Neighbouring transfers share the nodes of the first of them.
  const auto& instructions = programs_[static_cast<std::size_t>(place.rank)].instructions;
  std::size_t index = place.index;
  while (index > 0 && is_transfer(instructions[index]) && is_transfer(instructions[index - 1])) {
    --index;
  }
  return base_[static_cast<std::size_t>(place.rank)] + 2 * index;
}

void ProgramGraph::check_acyclic() {
  // Two nodes an instruction, its start and its end, and one a meeting.
  base_.clear();
  std::size_t nodes = 0;
  for (const Program& program : programs_) {
    base_.push_back(nodes);
    nodes += 2 * program.instructions.size();
  }
  const std::size_t first_meeting = nodes;
  nodes += joint_.size();

  edges_.clear();
  const auto edge = [&](std::size_t from, std::size_t to) {
    edges_.emplace_back(static_cast<std::uint32_t>(from), static_cast<std::uint32_t>(to));
  };
  // Where each rendezvous' meeting is: filled per instruction below.
  std::vector<std::vector<std::pair<std::uint32_t, std::size_t>>> of_instruction(first_meeting / 2);
  for (std::size_t j = 0; j < joint_.size(); ++j) {
    for (const Place& place : joint_[j]) {
      const std::size_t key = base_[static_cast<std::size_t>(place.rank)] / 2 + place.index;
      of_instruction[key].emplace_back(place.rendezvous, first_meeting + j);
    }
  }
  for (const Program& program : programs_) {
    std::size_t previous_end = 0;
    bool first = true;
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      const Place place{program.rank, static_cast<std::uint32_t>(i), 0};
      const std::size_t start = start_of(place);
      const std::size_t end = start + 1;
      if (start != base_[static_cast<std::size_t>(program.rank)] + 2 * i) continue;  // joined above
      if (!first) edge(previous_end, start);
      edge(start, end);
      auto& meetings = of_instruction[start / 2];
      std::sort(meetings.begin(), meetings.end());
      std::size_t before = start;
      for (const auto& [order, node] : meetings) {
        edge(before, node);
        before = node;
      }
      if (before != start) edge(before, end);
      previous_end = end;
      first = false;
    }
  }
  for (const auto& [send, receive] : transfers_) {
    edge(start_of(send), start_of(receive) + 1);
    edge(start_of(receive), start_of(send) + 1);
  }

  std::vector<std::uint32_t> waits_for(nodes, 0);
  std::vector<std::uint32_t> begin(nodes + 1, 0);
  for (const auto& [from, to] : edges_) {
    ++waits_for[to];
    ++begin[from + 1];
  }
  for (std::size_t node = 0; node < nodes; ++node) begin[node + 1] += begin[node];
  std::vector<std::uint32_t> targets(edges_.size());
  {
    std::vector<std::uint32_t> fill(begin.begin(), begin.end() - 1);
    for (const auto& [from, to] : edges_) targets[fill[from]++] = to;
  }
  std::vector<std::uint32_t> ready;
  for (std::size_t node = 0; node < nodes; ++node) {
    if (waits_for[node] == 0) ready.push_back(static_cast<std::uint32_t>(node));
  }
  std::vector<bool> done(nodes, false);
  std::size_t finished = 0;
  while (!ready.empty()) {
    const std::uint32_t node = ready.back();
    ready.pop_back();
    done[node] = true;
    ++finished;
    for (std::uint32_t e = begin[node]; e < begin[node + 1]; ++e) {
      if (--waits_for[targets[e]] == 0) ready.push_back(targets[e]);
    }
  }
  if (finished < nodes) report_cycle(done);
}

void ProgramGraph::report_cycle(const std::vector<bool>& done) {
  // Every node that is left has a predecessor that is left: walking back must come round.
  std::vector<std::uint32_t> before(done.size(), 0);
  std::size_t node = 0;
  for (const auto& [from, to] : edges_) {
    if (done[from] || done[to]) continue;
    before[to] = from;
    node = to;
  }
  std::vector<bool> seen(done.size(), false);
  while (!seen[node]) {
    seen[node] = true;
    node = before[node];
  }
  const std::size_t first_meeting = base_.back() + 2 * programs_.back().instructions.size();
  std::vector<std::string> names;
  const std::size_t round = node;
  do {
    std::string text;
    if (node >= first_meeting) {
      const Place& place = joint_[node - first_meeting].front();
      text = fmt::format("{} of ranks {} in {}", to_string(rendezvous_at(place).kind),
                         list_text(rendezvous_at(place).ranks), name(place));
    } else {
      const auto owner = std::upper_bound(base_.begin(), base_.end(), node) - base_.begin() - 1;
      const auto rank = static_cast<std::size_t>(owner);
      text = describe(plan_, programs_[rank], (node - base_[rank]) / 2);
    }
    if (names.empty() || names.back() != text) names.push_back(std::move(text));
    node = before[node];
  } while (node != round);
  if (names.size() > 1 && names.front() == names.back()) names.pop_back();
  constexpr std::size_t kShown = 12;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i) {
    text += (i ? " waits for " : "") + names[i];
  }
  if (names.size() > kShown) text += fmt::format(" waits for ... {} in all", names.size());
  report("deadlock", "a cycle: " + text + " waits for the first");
}

}  // namespace meshloom::plan::detail
