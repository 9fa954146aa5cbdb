#include "sim/internal/prices.h"

#include <algorithm>

namespace meshloom::sim::detail {

using plan::Instruction;
using plan::Op;
using plan::RendezvousKind;

Prices::Prices(const plan::StepPlan& plan, const Cluster& cluster, const Workload& workload)
    : plan_(plan),
      cluster_(cluster),
      workload_(workload),
      groups_(cluster),
      pieces_(plan.layout.pp * plan.layout.chunks) {
  for (const auto& sample : plan.samples) tokens_[sample.id] = sample.tokens;
  facts_.resize(plan.slots.size());
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    const auto senders = leaving(plan.slots[s]);
    for (const auto& unit : plan.slots[s].units) facts_[s].push_back(facts_of(unit, senders));
  }
}

std::pair<int, int> Prices::edge(const plan::Unit& unit, std::size_t at) const {
  const auto world = [&](std::size_t position) {
    return plan_.layout.rank({.tp = 0, .hdp = unit.ranks[position % unit.ranks.size()], .pp = 0});
  };
  return {world(at), world(at + 1)};
}

std::unordered_map<int, int> Prices::leaving(const plan::Slot& slot) const {
  std::unordered_map<int, int> senders;
  if (cluster_.node_bandwidth <= 0.0) return senders;
  for (const auto& unit : slot.units) {
    for (std::size_t i = 0; unit.ranks.size() > 1 && i < unit.ranks.size(); ++i) {
      const auto [from, to] = edge(unit, i);
      const int node = from / cluster_.ranks_per_node;
      if (node != to / cluster_.ranks_per_node) senders[node] += plan_.layout.tp;
    }
  }
  return senders;
}

UnitFacts Prices::facts_of(const plan::Unit& unit,
                           const std::unordered_map<int, int>& leaving) const {
  UnitFacts facts;
  facts.degree = static_cast<int>(unit.ranks.size());
  for (const auto id : unit.samples) {
    const auto s = tokens_.at(id);
    facts.work += plan_.cost.work(s);
    facts.quadratic += plan_.cost.quadratic * static_cast<double>(s) * static_cast<double>(s);
    facts.tokens += static_cast<double>(s);
  }
  facts.ring = cluster_.inside;
  int inside = 0;
  for (std::size_t i = 0; i < unit.ranks.size(); ++i) {
    const auto [from, to] = edge(unit, i);
    Link link = cluster_.link(from, to);
    const auto senders = leaving.find(from / cluster_.ranks_per_node);
    if (from / cluster_.ranks_per_node == to / cluster_.ranks_per_node) {
      ++inside;
    } else if (senders != leaving.end()) {
      link.bandwidth = cluster_.between_bandwidth(senders->second);
    }
    facts.ring.bandwidth = std::min(facts.ring.bandwidth, link.bandwidth);
    facts.ring.latency = std::max(facts.ring.latency, link.latency);
  }
  facts.share_inside = static_cast<double>(inside) / facts.degree;
  return facts;
}

const UnitFacts* Prices::unit_of(const Instruction& instruction) const {
  if (instruction.slot < 0 || instruction.unit < 0) return nullptr;
  return &facts_[as_size(instruction.slot)][as_size(instruction.unit)];
}

double Prices::member_tokens(const Instruction& instruction) const {
  const auto* facts = unit_of(instruction);
  return facts ? facts->tokens / facts->degree : 0.0;
}

double Prices::piece_layers() const { return static_cast<double>(workload_.layers) / pieces_; }

double Prices::saved(const Instruction& instruction) const {
  return member_tokens(instruction) * workload_.saved_bytes * piece_layers() / plan_.layout.tp;
}

double Prices::held(const Instruction& instruction) const {
  if (instruction.slot < 0 || instruction.unit < 0) return 0.0;
  const auto& unit = plan_.slots[as_size(instruction.slot)].units[as_size(instruction.unit)];
  return saved(instruction) * plan_.memory.resident_fraction(unit.offload);
}

Price Prices::of(int rank, const Instruction& instruction) {
  switch (instruction.op) {
    case Op::kLoad:
      return {.exposed = cluster_.loader_seconds};
    case Op::kForward:
      return compute(rank, instruction, workload_.forward_share, true);
    case Op::kBackward: {
      double share = 1.0 - workload_.forward_share;
      if (instruction.defer_weight_gradient) share -= workload_.weight_gradient_share;
      return compute(rank, instruction, share, true);
    }
    case Op::kWeightGradient:
      return compute(rank, instruction, workload_.weight_gradient_share, false);
    case Op::kReduce:
    case Op::kStep: {
      Price price;
      add_replicas(rank, instruction, price);
      return price;
    }
    case Op::kSend:
    case Op::kReceive:
      break;
  }
  return {};
}

Price Prices::compute(int rank, const Instruction& instruction, double share, bool exchanges) {
  const auto* facts = unit_of(instruction);
  Price price;
  if (facts) {
    const double scale =
        workload_.seconds_per_work * share / (pieces_ * plan_.layout.tp * cluster_.rate_of(rank));
    price.compute = scale * (facts->work / facts->degree + plan_.cost.fixed);
    if (facts->degree > 1 && exchanges) add_exchange(instruction, price);
  }
  for (const auto& rendezvous : instruction.rendezvous) {
    if (rendezvous.kind == RendezvousKind::kExchange) continue;
    add_meeting(rank, instruction, rendezvous, price);
  }
  if (facts && instruction.op != Op::kWeightGradient) {
    const double moved = saved(instruction) - held(instruction);
    if (moved > 0.0) {
      price.exposed += std::max(0.0, cluster_.host.seconds(moved) - price.compute);
    }
  }
  return price;
}

plan::ExchangeCandidate Prices::predict(const plan::Unit& unit, const UnitFacts& facts,
                                        bool deferred) const {
  plan::ExchangeModel model;
  model.shape = workload_.attention;
  // A document of s tokens has s^2 / 2 pairs.
  const double pair = 2.0 * plan_.cost.quadratic * workload_.seconds_per_work /
                      (workload_.layers * plan_.layout.tp * cluster_.compute_rate);
  model.forward_pair_seconds = pair * workload_.forward_share;
  model.backward_pair_seconds =
      pair * (1.0 - workload_.forward_share - (deferred ? workload_.weight_gradient_share : 0.0));
  const auto figures = [&](const Link& link) {
    return plan::LinkFigures{.bandwidth = link.bandwidth * plan_.layout.tp,
                             .latency = link.latency};
  };
  model.inside = figures(cluster_.inside);
  // What leaves a node may share its link with other units of the slot.
  model.between = figures(facts.share_inside < 1.0 ? facts.ring : cluster_.between);
  model.ranks_per_node = std::max(1, cluster_.ranks_per_node / plan_.layout.tp);
  std::vector<std::int64_t> lengths;
  for (const auto id : unit.samples) lengths.push_back(tokens_.at(id));
  return plan::predict_exchange(model, lengths, unit.ranks, unit.exchange, unit.ulysses_degree);
}

/// The mean member's bytes; tensor ranks move a part of the heads each.
void Prices::add_exchange(const Instruction& instruction, Price& price) {
  UnitFacts& facts = facts_[as_size(instruction.slot)][as_size(instruction.unit)];
  auto& known = instruction.defer_weight_gradient ? facts.deferred : facts.exchange;
  if (!known) {
    known = predict(plan_.slots[as_size(instruction.slot)].units[as_size(instruction.unit)], facts,
                    instruction.defer_weight_gradient);
  }
  const bool forward = instruction.op == Op::kForward;
  const double bytes = static_cast<double>(forward ? known->bytes.forward : known->bytes.backward) *
                       piece_layers() / facts.degree / plan_.layout.tp;
  price.inside += bytes * facts.share_inside;
  price.between += bytes * (1.0 - facts.share_inside);
  price.exposed += piece_layers() * (forward ? known->exposed_forward : known->exposed_backward);
}

void Prices::add_meeting(int rank, const Instruction& instruction,
                         const plan::Rendezvous& rendezvous, Price& price) {
  const auto members = static_cast<double>(rendezvous.ranks.size());
  const double others = (members - 1.0) / members;
  double bytes = 0.0;
  switch (rendezvous.kind) {
    case RendezvousKind::kDispatch:
      bytes = member_tokens(instruction) * workload_.dispatch_bytes * others;
      break;
    case RendezvousKind::kTensor:
      bytes = 2.0 * member_tokens(instruction) * workload_.hidden_bytes * others;
      break;
    case RendezvousKind::kGather:
      bytes = workload_.parameter_bytes / (plan_.layout.tp * plan_.layout.pp) / workload_.layers *
              others;
      break;
    case RendezvousKind::kExchange:
    case RendezvousKind::kGradientSync:
      break;
  }
  add_group(rank, rendezvous, bytes * rendezvous.count, rendezvous.count, price);
}

/// Reduce-scatter of gradients, then all-gather of parameters, over the replicas.
void Prices::add_replicas(int rank, const Instruction& instruction, Price& price) {
  const bool step = instruction.op == Op::kStep;
  price.compute = step ? workload_.step_seconds / cluster_.rate_of(rank) : 0.0;
  const double bytes = (step ? workload_.parameter_bytes : workload_.gradient_bytes) /
                       (plan_.layout.tp * plan_.layout.pp);
  for (const auto& rendezvous : instruction.rendezvous) {
    const auto members = static_cast<double>(rendezvous.ranks.size());
    add_group(rank, rendezvous, bytes * (members - 1.0) / members, 1, price);
  }
}

void Prices::add_group(int rank, const plan::Rendezvous& rendezvous, double bytes, int calls,
                       Price& price) {
  const Group& group = groups_[groups_.of(rendezvous.ranks)];
  const auto others = static_cast<double>(group.ranks.size()) - 1.0;
  const auto own = group.on_node.find(rank / cluster_.ranks_per_node);
  const double inside = own == group.on_node.end() ? 0.0 : own->second - 1.0;
  const double share = others > 0.0 ? inside / others : 1.0;
  price.inside += bytes * share;
  price.between += bytes * (1.0 - share);
  price.exposed += calls * group.link.latency + bytes / group.link.bandwidth;
}

}  // namespace meshloom::sim::detail
