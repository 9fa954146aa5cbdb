"""What one rank of a layout holds: parameters, gradients, optimizer state, activations."""

from __future__ import annotations

import dataclasses
import functools

from meshloom import _plan
from meshloom._model_sizes import ModelSizes
from meshloom._plan import Layout

GRADIENT_BYTES = 4.0  # gradients are summed in fp32


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Of the ranks of one pipeline stage, in bytes."""

    states: float
    """Parameters, gradients, optimizer state, and with ZeRO-2 and 3 two layers that are whole."""
    token: float
    """Of one token of every unit in flight, at the schedule's peak."""


def even_split(layers: int, pieces: int) -> list[int]:
    """First layer of every piece of a pipeline, then the number of layers."""
    return [v * layers // pieces for v in range(pieces + 1)]


@functools.cache
def _stages_of_pieces(
    schedule: str, pp: int, chunks: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """(stage, chunk) of every piece, and for every stage the (chunk, +1 | -1) of its actions."""
    slots = 4 * pp  # the peak of every schedule comes in its first 2 pp slots
    table = _plan.make_schedule(schedule, Layout(pp=pp, chunks=chunks), slots)
    changes = []
    for actions in table.stages:
        of_stage = []
        for action in actions:
            if action.op == "forward":
                of_stage.append((action.chunk, 1))
            elif action.op == "weight_gradient" or not action.defer_weight_gradient:
                of_stage.append((action.chunk, -1))
        changes.append(tuple(of_stage))
    return tuple((stage, chunk) for stage, chunk in table.placement), tuple(changes)


def _peak(changes: tuple[tuple[int, int], ...], bytes_of_chunk: dict[int, float]) -> float:
    held = most = 0.0
    for chunk, sign in changes:
        held += sign * bytes_of_chunk[chunk]
        most = max(most, held)
    return most


@functools.cache
def recomputed_bytes(model: ModelSizes, tp: int, recompute: str) -> float:
    """Of one token on a rank: what backward of the largest layer computes again and holds."""
    again = (
        model.saved_bytes(i, "none", tp) - model.saved_bytes(i, recompute, tp)
        for i in range(model.layers)
    )
    return max(again) / tp


@functools.cache
def stage_activations(
    model: ModelSizes, tp: int, pp: int, chunks: int, schedule: str, recompute: str
) -> tuple[float, ...]:
    """Bytes of every stage at the schedule's peak, of one token in each unit, on one rank."""
    first = even_split(model.layers, pp * chunks)
    saved = [model.saved_bytes(layer, recompute, tp) / tp for layer in range(model.layers)]
    again = recomputed_bytes(model, tp, recompute)
    if pp == 1:
        return (sum(saved) + again,)
    placement, changes = _stages_of_pieces(schedule, pp, chunks)
    of_chunk: list[dict[int, float]] = [{} for _ in range(pp)]
    for piece, (stage, chunk) in enumerate(placement):
        of_chunk[stage][chunk] = sum(saved[first[piece] : first[piece + 1]])
    return tuple(_peak(changes[stage], of_chunk[stage]) + again for stage in range(pp))


def piece_stages(pp: int, chunks: int, schedule: str) -> list[int]:
    """The stage of every piece of the model."""
    if pp == 1:
        return [0] * chunks
    return [stage for stage, _ in _stages_of_pieces(schedule, pp, chunks)[0]]


Parts = tuple[tuple[float, float], ...]


@functools.cache
def _stage_parts(
    model: ModelSizes, tp: int, pp: int, chunks: int, schedule: str
) -> tuple[Parts, ...]:
    """Of every stage, of every layer, embedding and head: parameters of a rank that are no experts,
    and experts of a whole expert group."""
    first = even_split(model.layers, pp * chunks)
    stages = piece_stages(pp, chunks, schedule)
    parts: list[list[tuple[float, float]]] = [[] for _ in range(pp)]
    for piece, stage in enumerate(stages):
        for layer in range(first[piece], first[piece + 1]):
            own = model.attention(tp) + model.feed_forward(layer, tp) + 2 * model.hidden
            parts[stage].append((float(own), float(model.layer_experts(layer))))
    parts[stages[0]].append((model.embedding / tp, 0.0))
    if stages[0] != stages[-1] or not model.tied_embeddings:
        parts[stages[-1]].append((model.embedding / tp, 0.0))
    parts[stages[-1]].append((float(model.hidden), 0.0))
    return tuple(tuple(one) for one in parts)


@functools.cache
def stage_states(
    model: ModelSizes, layout: tuple[int, int, int, int, int], schedule: str, zero: int
) -> tuple[float, ...]:
    """Parameters, gradients and optimizer state of a rank of every stage, in bytes.

    `layout` is (tp, hdp, pp, ep, chunks). The optimizer state is spread over the replicas, with
    ZeRO-2 gradients too, with ZeRO-3 parameters too. What is sharded is whole of two layers at a
    time: one travels while the other computes. Replicas of an expert are the ranks of all tensor
    groups that hold it.
    """
    tp, hdp, pp, ep, chunks = layout
    result = []
    for parts in _stage_parts(model, tp, pp, chunks, schedule):
        dense, experts = sum(own for own, _ in parts), sum(group for _, group in parts)
        whole = sum(sorted(own + group / ep for own, group in parts)[-2:])
        total = 0.0
        for count, replicas in ((dense, hdp), (experts / ep, hdp // ep * tp)):
            total += count * model.optimizer_bytes / replicas
            total += count * GRADIENT_BYTES / (replicas if zero >= 2 else 1)
            total += count * model.element_bytes / (replicas if zero >= 3 else 1)
        if hdp > 1:
            total += whole * GRADIENT_BYTES * (zero >= 2)
            total += whole * model.element_bytes * (zero >= 3)
        result.append(total)
    return tuple(result)


def stage_memory(
    model: ModelSizes, layout: Layout, schedule: str, zero: int, recompute: str
) -> list[StageMemory]:
    """What a rank of every stage holds under a layout."""
    tp, pp, chunks = layout.tp, layout.pp, layout.chunks
    sizes = (tp, layout.hdp, pp, layout.ep, chunks)
    states = stage_states(model, sizes, schedule, zero)
    tokens = stage_activations(model, tp, pp, chunks, schedule, recompute)
    return [StageMemory(one, token) for one, token in zip(states, tokens)]


def parameters_of_rank(model: ModelSizes, layout: Layout, schedule: str) -> tuple[float, float]:
    """Parameters of a rank that are no experts, and its experts; means over stages."""
    stages = _stage_parts(model, layout.tp, layout.pp, layout.chunks, schedule)
    dense = sum(own for parts in stages for own, _ in parts)
    experts = sum(group for parts in stages for _, group in parts)
    return dense / layout.pp, experts / layout.ep / layout.pp
