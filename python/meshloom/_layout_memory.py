"""What one rank of a layout holds, as a line over the tokens of its units: `forecast_memory`'s."""

from __future__ import annotations

import dataclasses
import functools

from meshloom import _plan
from meshloom._model_sizes import ModelSizes
from meshloom._plan import Layout

GRADIENT_BYTES = 4.0  # gradients are summed in fp32
_NEAR = 1 << 14  # tokens of a unit around which the line is taken


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Of the ranks of one pipeline stage, in bytes."""

    states: float
    """What does not grow with tokens: states, whole layers of sharded ones, chunks of logits."""
    token: float
    """Of one token of every unit in flight, at the schedule's peak."""


@functools.cache
def _stages(
    model: ModelSizes, layout: tuple[int, int, int, int, int], schedule: str, zero: int,
    recompute: str,
) -> tuple[StageMemory, ...]:
    tp, hdp, pp, ep, chunks = layout
    setting = _plan.MemorySetting()
    setting.model = model.forecast_sizes
    setting.layout = Layout(tp=tp, hdp=hdp, pp=pp, ep=ep, chunks=chunks)
    setting.schedule, setting.zero, setting.recompute = schedule, zero, recompute
    setting.element_bytes = model.element_bytes

    def totals(tokens: int) -> list[int]:
        # A step with as many micro-batches as a schedule has in flight.
        limits = _plan.StepLimits(capacity=tokens, global_batch=2 * pp * hdp * tokens)
        return [stage.total for stage in _plan.forecast_memory(setting, limits)]

    result = []
    for one, two in zip(totals(_NEAR), totals(2 * _NEAR), strict=True):
        token = (two - one) / _NEAR
        result.append(StageMemory(one - token * _NEAR, token))
    return tuple(result)


def stage_memory(
    model: ModelSizes, layout: Layout, schedule: str, zero: int, recompute: str
) -> tuple[StageMemory, ...]:
    """What a rank of every stage holds under a layout."""
    sizes = (layout.tp, layout.hdp, layout.pp, layout.ep, layout.chunks)
    return _stages(model, sizes, schedule, zero, recompute)
