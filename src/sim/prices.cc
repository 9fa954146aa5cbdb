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
  if (!expert_parallel()) return;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    auto& tokens = tokens_of_.emplace_back(as_size(plan.layout.hdp), 0.0);
    for (std::size_t u = 0; u < plan.slots[s].units.size(); ++u) {
      for (const int member : plan.slots[s].units[u].ranks) {
        tokens[as_size(member)] = facts_[s][u].tokens / facts_[s][u].degree;
      }
    }
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

double Prices::work_of(int rank, const Instruction& instruction) const {
  const auto* facts = unit_of(instruction);
  double work = facts ? facts->work / facts->degree : 0.0;
  if (!expert_parallel() || instruction.slot < 0) return work;
  // Tokens of all members meet the experts, a part of them on each.
  const auto& tokens = tokens_of_[as_size(instruction.slot)];
  const int hdp = plan_.layout.coordinates(rank).hdp;
  const int first = hdp / plan_.layout.ep * plan_.layout.ep;
  double mean = 0.0;
  for (int member = first; member < first + plan_.layout.ep; ++member) {
    mean += tokens[as_size(member)] / plan_.layout.ep;
  }
  const double moved = workload_.expert_share * plan_.cost.linear;
  return work + moved * (mean - tokens[as_size(hdp)]);
}

Price Prices::compute(int rank, const Instruction& instruction, double share, bool exchanges) {
  const auto* facts = unit_of(instruction);
  const Layout& layout = plan_.layout;
  const double stage_share = workload_.stage_shares.empty()
                                 ? 1.0 / layout.pp
                                 : workload_.stage_shares.at(as_size(layout.coordinates(rank).pp));
  const double scale = workload_.seconds_per_work * share * stage_share /
                       (layout.chunks * layout.tp * cluster_.rate_of(rank));
  Price price;
  price.compute = scale * (work_of(rank, instruction) + (facts ? plan_.cost.fixed : 0.0));
  if (facts && facts->degree > 1 && exchanges) add_exchange(instruction, price);
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
  const double exposed =
      piece_layers() * (forward ? known->exposed_forward : known->exposed_backward);
  // What the prediction takes to be hidden is so in part.
  const double moving = bytes / facts.ring.bandwidth;
  price.exposed += exposed + (1.0 - cluster_.overlap) * std::max(0.0, moving - exposed);
}

void Prices::add_meeting(int rank, const Instruction& instruction,
                         const plan::Rendezvous& rendezvous, Price& price) {
  const auto members = static_cast<double>(rendezvous.ranks.size());
  const bool forward = instruction.op == Op::kForward;
  const bool again = !forward && workload_.recompute == "full";
  switch (rendezvous.kind) {
    case RendezvousKind::kDispatch: {
      const double times = rendezvous.count * (again ? 2.0 : 1.0);
      const double bytes =
          member_tokens(instruction) * workload_.dispatch_bytes * (members - 1.0) / members;
      price.exposed += add_group(rank, rendezvous, bytes * times, times, price);
      break;
    }
    case RendezvousKind::kTensor: {
      // Attention and dense feed-forwards gather rows and scatter sums; in backward they gather the
      // output's gradient, and the input and the input's gradient travel beside products.
      // docs/layouts.md
      const Coordinates at = plan_.layout.coordinates(rank);
      const bool first = at.pp == 0 && instruction.chunk == 0;
      const bool last =
          at.pp + 1 == plan_.layout.pp && instruction.chunk + 1 == plan_.layout.chunks;
      const double layers = rendezvous.count / 2.0;
      const double dense = layers * (1.0 - workload_.mixture_share);
      const double sublayers = layers + dense;
      double calls = forward ? 2.0 * sublayers : sublayers;
      if (again) calls += 2.0 * sublayers;
      if (!forward && workload_.recompute == "selective") calls += dense;
      if (first) calls += 1.0;            // the embedding's rows, or their gradients
      if (last && forward) calls += 2.0;  // the head's input and its gradient
      add_rows(rank, instruction, rendezvous, calls, forward ? 0.0 : 2.0 * sublayers, price);
      break;
    }
    case RendezvousKind::kGather:
      add_sharded(rank, instruction, rendezvous, price);
      break;
    case RendezvousKind::kExchange:
    case RendezvousKind::kGradientSync:
      break;
  }
}

void Prices::add_rows(int rank, const Instruction& instruction, const plan::Rendezvous& rendezvous,
                      double calls, double hidden, Price& price) {
  const auto members = static_cast<double>(rendezvous.ranks.size());
  const double bytes =
      member_tokens(instruction) * workload_.hidden_bytes * (members - 1.0) / members;
  price.exposed += add_group(rank, rendezvous, bytes * calls, calls, price);
  const double beside = add_group(rank, rendezvous, bytes * hidden, hidden, price);
  price.exposed += shown(beside, price.compute);
}

void Prices::add_sharded(int rank, const Instruction& instruction,
                         const plan::Rendezvous& rendezvous, Price& price) {
  const bool forward = instruction.op == Op::kForward;
  const bool parameters = workload_.zero == 3;
  const Layout& layout = plan_.layout;
  const double axis = 1.0 - 1.0 / layout.hdp;
  const double holders = static_cast<double>(layout.hdp) / layout.ep * layout.tp;
  const auto moved = [&](double dense, double experts) {
    return (dense / layout.tp * axis + experts / layout.ep * (1.0 - 1.0 / holders)) / layout.pp /
           layout.chunks;
  };
  double bytes =
      parameters ? moved(workload_.parameter_bytes, workload_.expert_parameter_bytes) : 0;
  if (!forward) bytes += moved(workload_.gradient_bytes, workload_.expert_gradient_bytes);
  if (bytes <= 0.0) return;
  const double layers = rendezvous.count;
  const double calls = layers * (parameters && !forward ? 2.0 : 1.0);
  const double transfer = add_group(rank, rendezvous, bytes, calls, price);
  // One layer has nothing to hide behind.
  price.exposed += transfer / layers + (layers - 1.0) / layers * shown(transfer, price.compute);
}

/// Reduce-scatter of gradients, then all-gather of parameters, over the replicas.
void Prices::add_replicas(int rank, const Instruction& instruction, Price& price) {
  const bool step = instruction.op == Op::kStep;
  price.compute = step ? workload_.step_seconds / cluster_.rate_of(rank) : 0.0;
  const Layout& layout = plan_.layout;
  // Micro-batches have summed sharded gradients, and gather sharded parameters.
  const bool sharded = plan_.lockstep == plan::Lockstep::kHdp;
  if (sharded && (!step || workload_.zero == 3)) return;
  const double dense = step ? workload_.parameter_bytes : workload_.gradient_bytes;
  const double experts = step ? workload_.expert_parameter_bytes : workload_.expert_gradient_bytes;
  const double holders = static_cast<double>(layout.hdp) / layout.ep * layout.tp;
  bool experts_left = true;
  for (const auto& rendezvous : instruction.rendezvous) {
    const auto members = static_cast<double>(rendezvous.ranks.size());
    const bool axis = rendezvous.ranks.size() == as_size(layout.hdp);
    double bytes = axis ? dense / (layout.tp * layout.pp) * (members - 1.0) / members : 0.0;
    const bool own_list = !axis || &rendezvous == &instruction.rendezvous.back();
    if (experts_left && own_list) {
      bytes += experts / (layout.ep * layout.pp) * (1.0 - 1.0 / holders);
      experts_left = false;
    }
    price.exposed += add_group(rank, rendezvous, bytes, 1, price);
  }
}

double Prices::add_group(int rank, const plan::Rendezvous& rendezvous, double bytes, double calls,
                         Price& price) {
  const Group& group = groups_[groups_.of(rendezvous.ranks)];
  const auto others = static_cast<double>(group.ranks.size()) - 1.0;
  const auto own = group.on_node.find(rank / cluster_.ranks_per_node);
  const double inside = own == group.on_node.end() ? 0.0 : own->second - 1.0;
  const double share = others > 0.0 ? inside / others : 1.0;
  price.inside += bytes * share;
  price.between += bytes * (1.0 - share);
  return calls * group.link.latency + bytes / group.link.bandwidth;
}

}  // namespace meshloom::sim::detail
