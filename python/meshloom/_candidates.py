"""Layouts of a number of ranks that divide a model, and everything else that is chosen with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from meshloom import _plan
from meshloom._errors import InvalidArgument
from meshloom._model_sizes import ModelSizes
from meshloom._plan import Layout

RECOMPUTE = ("none", "selective", "full")
_SCHEDULES = (
    ("1f1b", 1), ("zb_h1", 1), ("zb_v", 2), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4)
)
_FIXABLE = ("tp", "pp", "hdp", "ep", "chunks", "zero", "pipeline", "recompute")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout and everything else that the search decides."""

    tp: int
    hdp: int
    pp: int
    ep: int
    chunks: int
    pipeline: str
    """Schedule by name; empty without a pipeline."""
    zero: int
    recompute: str

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, hdp=self.hdp, pp=self.pp, ep=self.ep, chunks=self.chunks)

    @property
    def lockstep(self) -> str:
        """As the trainer plans: ZeRO-2 and 3 meet the whole axis in every slot."""
        if self.zero > 1:
            return "hdp"
        return "ep" if self.ep > 1 else "none"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def candidates(
    model: ModelSizes, ranks: int, fixed: Mapping[str, int | str] | None = None
) -> Iterator[Candidate]:
    """Every layout of so many ranks that divides heads, experts and ranks, in a fixed order."""
    fixed = fixed or {}

    def allowed(key: str, values: Iterable[Any]) -> list[Any]:
        return [value for value in values if key not in fixed or fixed[key] == value]

    schedules = list(_SCHEDULES)
    own_chunks = fixed.get("chunks")
    if isinstance(own_chunks, int) and own_chunks > 1:
        schedules = sorted({*schedules, ("interleaved_1f1b", own_chunks)})
    for tp in allowed("tp", _divisors(ranks)):
        shares = model.key_value_heads % tp == 0 or tp % model.key_value_heads == 0
        if model.heads % tp or not shares:
            continue
        for pp in allowed("pp", _divisors(ranks // tp)):
            hdp = ranks // tp // pp
            pipelines = [("", 1)] if pp == 1 else schedules
            for pipeline, chunks in pipelines:
                if pp * chunks > model.layers:
                    continue
                if not allowed("pipeline", [pipeline]) or not allowed("chunks", [chunks]):
                    continue
                for ep in allowed("ep", _divisors(hdp)):
                    if ep > max(1, model.experts) or not allowed("hdp", [hdp]):
                        continue
                    for zero in allowed("zero", (1, 2, 3)):
                        if zero > 1 and hdp == 1 and "zero" not in fixed:
                            continue  # nothing to spread it over
                        for recompute in allowed("recompute", RECOMPUTE):
                            yield Candidate(tp, hdp, pp, ep, chunks, pipeline, zero, recompute)


def check_fixed(fixed: Mapping[str, int | str]) -> dict[str, int | str]:
    """A copy of the parts that are given. Raises InvalidArgument for one that is none."""
    names: dict[str, Sequence[Any]] = {
        "zero": (1, 2, 3), "recompute": RECOMPUTE, "pipeline": ["", *_plan.schedule_names()],
    }
    for key, value in fixed.items():
        if key not in _FIXABLE:
            known = ", ".join(_FIXABLE)
            raise InvalidArgument(f"[autotune] {key!r} cannot be fixed; known: {known}")
        if key in names and value not in names[key]:
            known = ", ".join(str(name) for name in names[key] if name)
            raise InvalidArgument(f"[autotune] {key} is {value!r}, expected one of: {known}")
        if key not in names and (not isinstance(value, int) or value < 1):
            raise InvalidArgument(f"[autotune] {key} is {value!r}, expected a positive integer")
    return dict(fixed)


def nothing_divides(model: ModelSizes, ranks: int, fixed: Mapping[str, int | str]) -> str:
    """Why there is no candidate, as an error says it."""
    given = ", ".join(f"{key}={value}" for key, value in fixed.items()) or "nothing fixed"
    return (
        f"[autotune] no layout of {ranks} ranks has {given}: tp has to divide {model.heads} heads"
        f" and divide {model.key_value_heads} K/V heads or be a multiple of them, pp times chunks"
        f" may be at most {model.layers} layers, ep has to divide hdp and be at most"
        f" {max(1, model.experts)}"
    )
