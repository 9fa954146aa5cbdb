#include "parallel/internal/expert_moves.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>

#include "meshloom/parallel/replicas.h"

namespace meshloom::parallel::detail {
namespace {

/// What the replica at a position owns of a part.
FlatRange range_of(const PlacedPart& part, std::size_t position) {
  return owned_range(part.table.elements, static_cast<int>(position),
                     static_cast<int>(part.replicas.ranks.size()));
}

/// The position of the replica that owns an element of a part.
std::size_t owner_of(const PlacedPart& part, std::int64_t element) {
  std::size_t position = 0;
  while (range_of(part, position).end <= element) ++position;
  return position;
}

}  // namespace

ExpertMoves::ExpertMoves(const ModelPlacement& now, int stage, const std::vector<ExpertMap>& next)
    : now_(now), next_(next) {
  std::set<std::int64_t> moving;
  for (int member = 0; member < now.layout.ep; ++member) {
    std::vector<PlacedPart> parts =
        now.parts(now.layout.rank({.tp = 0, .hdp = member, .pp = stage}));
    std::erase_if(parts, [](const PlacedPart& part) { return part.set != ReplicaSet::kExpert; });
    parts_.push_back(std::move(parts));
    for (const PlacedPart& part : parts_.back()) {
      for (const model::ParameterSpec& spec : part.table.parameters) {
        homes_[{spec.layer, spec.expert}].push_back({{&part, spec.offset}, spec.elements()});
        const auto layer = static_cast<std::size_t>(spec.layer);
        if (now.experts[layer] != next[layer]) moving.insert(spec.layer);
      }
    }
  }
  layers_.assign(moving.begin(), moving.end());
}

std::vector<ExpertRun> ExpertMoves::runs(std::int64_t layer, bool whole) const {
  const ExpertMap& now = now_.experts[static_cast<std::size_t>(layer)];
  const ExpertMap& next = next_[static_cast<std::size_t>(layer)];
  std::vector<ExpertRun> result;
  for (std::size_t place = 0; place < next.by_place().size(); ++place) {
    const std::int64_t former = now.by_place()[place];
    const std::int64_t expert = next.by_place()[place];
    if (expert == former) continue;
    const auto& from = homes_.at({layer, expert});
    const auto& to = homes_.at({layer, former});
    for (std::size_t t = 0; t < from.size(); ++t) {
      const Home& a = from[t].first;
      const Home& b = to[t].first;
      const std::int64_t elements = from[t].second;
      if (!whole) {
        append_shards(a, b, elements, result);
        continue;
      }
      for (std::size_t i = 0; i < a.part->replicas.ranks.size(); ++i) {
        result.push_back({.from = a.part->replicas.ranks[i],
                          .to = b.part->replicas.ranks[i],
                          .from_begin = a.offset,
                          .to_begin = b.offset,
                          .elements = elements});
      }
    }
  }
  return result;
}

void ExpertMoves::append_shards(const Home& from, const Home& to, std::int64_t elements,
                                std::vector<ExpertRun>& runs) {
  std::size_t sender = owner_of(*from.part, from.offset);
  std::size_t receiver = owner_of(*to.part, to.offset);
  for (std::int64_t at = 0; at < elements;) {
    const FlatRange sent = range_of(*from.part, sender);
    const FlatRange received = range_of(*to.part, receiver);
    const std::int64_t count =
        std::min({elements - at, sent.end - from.offset - at, received.end - to.offset - at});
    if (count > 0) {
      runs.push_back({.from = from.part->replicas.ranks[sender],
                      .to = to.part->replicas.ranks[receiver],
                      .from_begin = from.offset + at - sent.begin,
                      .to_begin = to.offset + at - received.begin,
                      .elements = count});
    }
    at += count;
    if (from.offset + at == sent.end) ++sender;
    if (to.offset + at == received.end) ++receiver;
  }
}

void move_runs(comm::Communicator& world, const std::vector<ExpertRun>& runs,
               const at::Tensor& tensor) {
  constexpr comm::CallOptions kExpertsCall{.timeout = std::nullopt, .purpose = "experts"};
  const int self = world.rank();
  std::map<int, std::vector<at::Tensor>> leaving;
  std::map<int, at::Tensor> arriving;
  std::map<int, std::int64_t> elements;
  for (const ExpertRun& run : runs) {
    if (run.from == self) {
      leaving[run.to].push_back(tensor.narrow(0, run.from_begin, run.elements));
    }
    if (run.to == self) elements[run.from] += run.elements;
  }
  std::map<int, at::Tensor> packed;
  for (const auto& [peer, pieces] : leaving) packed[peer] = at::cat(pieces);
  for (const auto& [peer, count] : elements) {
    arriving[peer] = peer == self ? packed.at(self) : at::empty({count}, tensor.options());
  }
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  for (auto& [peer, block] : packed) {
    if (peer != self) sends.push_back({.peer = peer, .tensor = &block});
  }
  for (auto& [peer, block] : arriving) {
    if (peer != self) receives.push_back({.peer = peer, .tensor = &block});
  }
  if (!sends.empty() || !receives.empty()) world.send_receive(sends, receives, kExpertsCall).wait();
  std::map<int, std::int64_t> taken;
  for (const ExpertRun& run : runs) {
    if (run.to != self) continue;
    std::int64_t& begin = taken[run.from];
    tensor.narrow(0, run.to_begin, run.elements)
        .copy_(arriving.at(run.from).narrow(0, begin, run.elements));
    begin += run.elements;
  }
}

}  // namespace meshloom::parallel::detail
