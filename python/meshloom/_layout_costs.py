"""What a layout costs, in the terms of the planner and the simulator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from meshloom import _layout_memory
from meshloom._candidates import Candidate
from meshloom._model_sizes import ModelSizes
from meshloom._plan import Cluster, CostModel, Workload

_BACKWARD = 2.0  # of backward, in forwards: input gradients one, weight gradients one


def reference_rate() -> float:
    """Operations a second of a device on which ByteScale's 7B takes what figure 6 says."""
    hidden, intermediate, layers = 4096, 11008, 32
    operations = 2.0 * (1.0 + _BACKWARD) * layers * (4 * hidden**2 + 3 * hidden * intermediate)
    return operations / Workload.llama_7b_cost().linear


def operations(model: ModelSizes) -> float:
    """Of one unit of `cost_model`, forward and backward."""
    return 2.0 * (1.0 + _BACKWARD) * model.pair_work


@functools.cache
def cost_model(model: ModelSizes, recompute: str) -> CostModel:
    """Work in units of the model's attention without recomputation.

    Per layer a causal pair costs 2 heads * head_dim operations, a token 2 for every parameter that
    it meets. Full recomputation adds a forward to the three of a step, selective the gate and up
    projections' forward.
    """
    quadratic, linear = 1.0, float(model.active_parameters)
    if recompute == "full":
        scale = (2.0 + _BACKWARD) / (1.0 + _BACKWARD)
        quadratic, linear = quadratic * scale, linear * scale
    elif recompute == "selective":
        linear += model.gate_and_up() / (1.0 + _BACKWARD)
    return CostModel(quadratic=quadratic, linear=linear / model.pair_work)


def recompute_scale(model: ModelSizes, recompute: str, lengths: Sequence[int]) -> float:
    """Work of samples of these lengths over that without recomputation."""
    own, plain = cost_model(model, recompute), cost_model(model, "none")
    return sum(map(own.work, lengths)) / sum(map(plain.work, lengths))


def workload(model: ModelSizes, one: Candidate, base: Workload, scale: float) -> Workload:
    """The model under a layout, as the simulator prices it.

    Bytes of parameters are the whole model's, experts apart; the simulator knows who holds what.
    Full recomputation repeats forward's traffic in backward, exchanges left out.
    """
    result = Workload()
    result.layers = model.layers
    result.seconds_per_work = base.seconds_per_work
    result.forward_share = base.forward_share / scale
    result.weight_gradient_share = base.weight_gradient_share / scale
    result.step_seconds = base.step_seconds
    element = model.element_bytes
    result.hidden_bytes = float(model.hidden * element)
    result.heads = model.heads // one.tp
    result.key_value_heads = max(model.key_value_heads // one.tp, 1)
    result.head_dim = model.head_dim
    result.element_bytes = model.element_bytes
    result.wire_bytes = model.element_bytes
    result.mixture_share = sum(model.moe_layers) / model.layers
    result.recompute = one.recompute
    result.dispatch_bytes = (
        model.experts_per_token * model.hidden * element / one.tp * result.mixture_share
    )
    experts = sum(model.layer_experts(i) for i in range(model.layers))
    dense = model.parameters - experts
    result.zero = one.zero
    result.parameter_bytes, result.expert_parameter_bytes = dense * element, experts * element
    gradient = _layout_memory.GRADIENT_BYTES
    result.gradient_bytes, result.expert_gradient_bytes = dense * gradient, experts * gradient
    return result


def _bandwidth(cluster: Cluster, span: int) -> float:
    """Of a group whose members are spread over so many neighbouring ranks."""
    if span <= cluster.ranks_per_node:
        return cluster.inside.bandwidth
    between = cluster.between.bandwidth
    if cluster.node_bandwidth > 0:
        between = min(between, cluster.node_bandwidth / cluster.ranks_per_node)
    return min(cluster.inside.bandwidth, between)


def least_seconds(
    one: Candidate, cost: CostModel, load: Workload, cluster: Cluster, lengths: Sequence[int],
    capacity_tokens: int,
) -> tuple[float, float]:
    """A bound from below on a step's simulated time, and a guess that knows of bubbles.

    Bound: what a rank computes and what it can't hide of its groups' traffic, the mean over ranks.
    """
    rates = [cluster.compute_rate, *(cluster.compute_rate * r for r in cluster.slow_ranks.values())]
    shards = one.tp * one.pp
    work = sum(map(cost.work, lengths))
    compute = work * load.seconds_per_work / (one.hdp * shards * max(rates))
    tokens = sum(lengths)
    stage_tokens = tokens / one.hdp * load.layers / one.pp
    traffic = 0.0
    if one.tp > 1:
        sublayers = 2.0 - load.mixture_share
        calls = 3.0 * sublayers  # what products hide is left out
        if one.recompute == "full":
            calls += 2.0 * sublayers
        elif one.recompute == "selective":
            calls += 1.0 - load.mixture_share
        moved = load.hidden_bytes * (one.tp - 1) / one.tp
        traffic += calls * stage_tokens * moved / _bandwidth(cluster, one.tp)
    if one.ep > 1:
        meetings = 6.0 if one.recompute == "full" else 4.0  # two a layer, forward and backward
        moved = load.dispatch_bytes * (one.ep - 1) / one.ep
        traffic += meetings * stage_tokens * moved / _bandwidth(cluster, one.tp * one.ep)
    slots = -(-tokens // (one.hdp * capacity_tokens))
    if one.hdp > 1:
        holders = one.hdp / one.ep * one.tp

        def moving(dense: float, experts: float) -> float:
            own = dense / one.tp * (1 - 1 / one.hdp) + experts / one.ep * (1 - 1 / holders)
            return own / one.pp / _bandwidth(cluster, one.tp * one.hdp)

        parameters = moving(load.parameter_bytes, load.expert_parameter_bytes)
        gradients = moving(load.gradient_bytes, load.expert_gradient_bytes)
        if one.zero == 1:
            traffic += parameters + gradients
        else:  # micro-batches hide all but a layer's
            layers = -(-load.layers // (one.pp * one.chunks))
            in_slot = gradients + (2.0 * parameters if one.zero == 3 else 0.0)
            traffic += slots * in_slot / layers
            traffic += parameters if one.zero == 2 else 0.0
    bound = compute + traffic
    if one.pp == 1:
        return bound, bound
    micro_batches = max(slots, min(4 * one.pp, len(lengths) / one.hdp), 1)
    bubble = (one.pp - 1) / (micro_batches * one.chunks)
    if one.pipeline.startswith("zb"):
        bubble /= 2.0
    return bound, bound + bubble * compute
