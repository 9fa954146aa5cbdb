#include "plan/balance/fill.h"

#include <algorithm>
#include <map>
#include <queue>
#include <utility>

#include "plan/balance/consolidate.h"

namespace meshloom::plan::balance {
std::vector<std::vector<int>> pack(const Model& model, std::span<const int> items) {
  std::vector<std::vector<int>> bins;
  std::multimap<std::int64_t, std::size_t> room;  // tokens left -> bin
  for (const int index : items) {
    const std::int64_t tokens = model.items[static_cast<std::size_t>(index)].tokens;
    const auto found = room.lower_bound(tokens);
    if (found == room.end()) {
      bins.emplace_back().push_back(index);
      room.emplace(model.capacity - tokens, bins.size() - 1);
    } else {
      const auto [left, bin] = *found;
      room.erase(found);
      bins[bin].push_back(index);
      room.emplace(left - tokens, bin);
    }
  }
  return bins;
}

std::vector<Piece> fill(const Model& model, std::span<const Job> jobs, const Placement& placement,
                        std::span<const int> singles, double target, bool consolidate) {
  const double least_gap = Placement::least_gap(model);
  std::vector<double> end(static_cast<std::size_t>(model.ranks), 0.0);
  std::vector<Gap> gaps;
  std::vector<std::size_t> first_gap{0};  // of each job, in placement order
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    for (const int rank : placement.ranks_of(j)) {
      double& at = end[static_cast<std::size_t>(rank)];
      const double idle = placement.start_of(j) - at;
      if (idle > least_gap) gaps.push_back({rank, idle, idle, 0, {}});
      at = placement.end_of(j);
    }
    first_gap.push_back(gaps.size());
  }
  const std::size_t inner = gaps.size();
  for (int rank = 0; rank < model.ranks; ++rank) {
    const double space = target - end[static_cast<std::size_t>(rank)];
    gaps.push_back({rank, space, space, 0, {}});
  }
  // The widest gap first; a gap in front of a unit is never overfilled, since its peers would wait.
  using Entry = std::pair<double, std::size_t>;
  const auto less = [](const Entry& a, const Entry& b) {
    return a.first != b.first ? a.first < b.first : a.second > b.second;
  };
  std::vector<Entry> inner_entries;
  std::vector<Entry> end_entries;
  for (std::size_t g = 0; g < gaps.size(); ++g) {
    (g < inner ? inner_entries : end_entries).emplace_back(gaps[g].left, g);
  }
  std::priority_queue<Entry, std::vector<Entry>, decltype(less)> inners(less,
                                                                        std::move(inner_entries));
  std::priority_queue<Entry, std::vector<Entry>, decltype(less)> ends(less, std::move(end_entries));
  // An item costs its work, and the fixed cost of the bins that it opens.
  const auto added = [&](const Item& item, const Gap& gap) {
    if (model.cost.fixed <= 0.0) return item.work;
    const auto bins = [&](std::int64_t tokens) {
      return (tokens + model.capacity - 1) / model.capacity;
    };
    return item.work + model.cost.fixed *
                           static_cast<double>(bins(gap.tokens + item.tokens) - bins(gap.tokens));
  };
  for (const int index : singles) {
    const Item& item = model.items[static_cast<std::size_t>(index)];
    const bool inside = !inners.empty() && inners.top().first >= ends.top().first &&
                        inners.top().first >= added(item, gaps[inners.top().second]);
    auto& queue = inside ? inners : ends;
    auto [left, g] = queue.top();
    queue.pop();
    queue.emplace(left - added(item, gaps[g]), g);
    gaps[g].items.push_back(index);
    gaps[g].tokens += item.tokens;
  }
  if (consolidate) consolidate_(model, gaps, inner, target);

  std::vector<Piece> pieces;
  const auto emit = [&](const Gap& gap) {
    for (auto& bin : pack(model, gap.items)) pieces.push_back({{gap.rank}, std::move(bin)});
  };
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    for (std::size_t g = first_gap[j]; g < first_gap[j + 1]; ++g) emit(gaps[g]);
    pieces.push_back({placement.ranks_of(j), {jobs[j].item}});
  }
  for (std::size_t g = inner; g < gaps.size(); ++g) emit(gaps[g]);
  return pieces;
}

double makespan(const Model& model, std::span<const Piece> pieces) {
  std::vector<double> free(static_cast<std::size_t>(model.ranks), 0.0);
  double last = 0.0;
  for (const Piece& piece : pieces) {
    double work = 0.0;
    std::int64_t tokens = 0;
    for (const int index : piece.items) {
      work += model.items[static_cast<std::size_t>(index)].work;
      tokens += model.items[static_cast<std::size_t>(index)].tokens;
    }
    double start = 0.0;
    for (const int rank : piece.ranks) {
      start = std::max(start, free[static_cast<std::size_t>(rank)]);
    }
    const double end =
        start + model.cost.unit_time(work, tokens, static_cast<int>(piece.ranks.size()));
    for (const int rank : piece.ranks) free[static_cast<std::size_t>(rank)] = end;
    last = std::max(last, end);
  }
  return last;
}

std::vector<Slot> to_slots(const PlanProblem& problem, const Model& model,
                           std::span<const Piece> pieces) {
  std::vector<Slot> slots;
  std::vector<std::size_t> next(static_cast<std::size_t>(model.ranks), 0);
  for (const Piece& piece : pieces) {
    std::size_t slot = 0;
    for (const int rank : piece.ranks) slot = std::max(slot, next[static_cast<std::size_t>(rank)]);
    for (const int rank : piece.ranks) next[static_cast<std::size_t>(rank)] = slot + 1;
    if (slot >= slots.size()) slots.resize(slot + 1);
    Unit unit;
    std::int64_t tokens = 0;
    unit.ranks = piece.ranks;
    unit.samples.reserve(piece.items.size());
    for (const int index : piece.items) {
      const Item& item = model.items[static_cast<std::size_t>(index)];
      unit.samples.push_back(problem.samples[static_cast<std::size_t>(item.sample)].id);
      if (item.group >= 0) {
        for (const int rider : model.groups[static_cast<std::size_t>(item.group)]) {
          unit.samples.push_back(problem.samples[static_cast<std::size_t>(rider)].id);
        }
      }
      tokens += item.tokens;
    }
    const auto degree = static_cast<int>(piece.ranks.size());
    unit.offload = model.memory.offload_needed(model.capacity, degree, tokens).value_or(0.0);
    unit.exchange = piece.ranks.size() > 1 ? Exchange::kRing : Exchange::kLocal;
    slots[slot].units.push_back(std::move(unit));
  }
  return slots;
}

}  // namespace meshloom::plan::balance
