"""What a layout costs, in the terms of the planner and the simulator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from meshloom import _layout_memory
from meshloom._candidates import Candidate
from meshloom._model_sizes import ModelSizes
from meshloom._plan import Cluster, CostModel, Workload

_BACKWARD = 2.0  # of backward, in forwards: input gradients one, weight gradients one
_MEETINGS = 4.0  # of a tensor or expert group: two a layer, in forward and in backward


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

    The simulator divides bytes of parameters by tp and pp, and lets a step reduce gradients over
    the axis and over the replicas of experts. Figures here are such that what it divides is what a
    rank has: experts are divided by ep, not by tp, and meet their own replicas. ZeRO-2 scatters
    gradients in every slot (four bytes a parameter: two in forward, two in backward, as the
    simulator's gathers are), ZeRO-3 gathers parameters twice beside it.
    Full recomputation repeats forward's traffic in backward, exchanges left out, selective gathers
    the input of dense feed-forwards once more. A mixture of experts has half of a dense layer's
    tensor traffic.
    """
    result = Workload()
    result.layers = model.layers
    result.seconds_per_work = base.seconds_per_work
    result.forward_share = base.forward_share / scale
    result.weight_gradient_share = base.weight_gradient_share / scale
    result.step_seconds = base.step_seconds
    element = model.element_bytes
    full = one.recompute == "full"
    result.hidden_bytes = float(model.hidden * element)
    if one.tp > 1:
        result.hidden_bytes *= _tensor_factor(model, one.recompute)
    result.heads = model.heads // one.tp
    result.key_value_heads = max(model.key_value_heads // one.tp, 1)
    result.head_dim = model.head_dim
    result.element_bytes = model.element_bytes
    result.wire_bytes = model.element_bytes
    saved = sum(model.saved_bytes(i, one.recompute, one.tp) for i in range(model.layers))
    result.saved_bytes = saved / model.layers
    result.dispatch_bytes = (
        model.experts_per_token * model.hidden * element / one.tp
        * sum(model.moe_layers) / model.layers * (1.5 if full else 1.0)
    )
    dense, experts = _layout_memory.parameters_of_rank(model, one.layout, one.pipeline)
    replicas = one.hdp // one.ep
    axis = (one.hdp - 1) / one.hdp
    # Elements that a rank sends once; tensor ranks hold the same experts.
    moved = dense * axis + experts * (1.0 - 1.0 / (replicas * one.tp))
    shards = one.tp * one.pp
    gathered = moved / axis * shards if axis else 0.0
    met = axis + ((replicas - 1) / replicas if one.ep > 1 else 0.0)
    reduced = moved / met * shards if met else 0.0
    result.parameter_bytes = gathered * element
    result.gradient_bytes = reduced * _layout_memory.GRADIENT_BYTES if one.zero == 1 else 0.0
    if one.zero == 2:
        result.parameter_bytes = gathered * _layout_memory.GRADIENT_BYTES / 2
    elif one.zero == 3:
        result.parameter_bytes = gathered * (element + _layout_memory.GRADIENT_BYTES / 2)
    return result


def _tensor_factor(model: ModelSizes, recompute: str) -> float:
    """Tensor traffic of a step over that of dense layers that recompute nothing."""
    again = {"none": 0.0, "selective": 1.0 / 8.0, "full": 0.5}[recompute]
    dense = model.layers - sum(model.moe_layers)
    mixtures = sum(model.moe_layers) * 0.5 * (1.5 if recompute == "full" else 1.0)
    return (dense * (1.0 + again) + mixtures) / model.layers


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
        moved = 2.0 * load.hidden_bytes * (one.tp - 1) / one.tp
        traffic += _MEETINGS * stage_tokens * moved / _bandwidth(cluster, one.tp)
    if one.ep > 1:
        moved = load.dispatch_bytes * (one.ep - 1) / one.ep
        traffic += _MEETINGS * stage_tokens * moved / _bandwidth(cluster, one.tp * one.ep)
    slots = -(-tokens // (one.hdp * capacity_tokens))
    if one.hdp > 1:
        axis = (one.hdp - 1) / one.hdp / shards / _bandwidth(cluster, one.tp * one.hdp)
        traffic += (load.parameter_bytes + load.gradient_bytes) * axis
        if one.lockstep == "hdp":
            traffic += 2.0 * slots * load.parameter_bytes * axis
    bound = compute + traffic
    if one.pp == 1:
        return bound, bound
    micro_batches = max(slots, min(4 * one.pp, len(lengths) / one.hdp), 1)
    bubble = (one.pp - 1) / (micro_batches * one.chunks)
    if one.pipeline.startswith("zb"):
        bubble /= 2.0
    return bound, bound + bubble * compute
