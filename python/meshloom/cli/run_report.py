"""The page about a run: what its folder holds, as data for run_report.html."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshloom._errors import DataError, InvalidArgument

_POINTS = 600  # of a curve; more steps than that are averaged
_RANK_STEPS = 256  # newest steps that figures about ranks are of
_PAIRS = 2000  # planned and measured times of one rank in one step
_SPANS = 120_000  # of the timeline, newest steps first
_WORST = 8
_FLIGHT_BYTES = 20_000  # of each rank's newest flight report
_DIGITS = 6

Entry = dict[str, Any]


def data(folder: Path) -> dict[str, Any]:
    """Everything that the page shows of `folder`."""
    if not (folder / "metrics.jsonl").is_file():
        raise InvalidArgument(
            f"[report] {folder} is no run folder: it has no metrics.jsonl (meshloom train writes it)"
        )
    entries = _lines(folder / "metrics.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    if not steps:
        raise DataError(f"[report] {folder}/metrics.jsonl has no finished step")
    ranks = {entry["step"]: entry for entry in _lines(folder / "ranks.jsonl")}
    traffic = _object(folder / "traffic.json")
    timeline, plans = _timeline(folder)
    return {
        "folder": folder.resolve().name,
        "config": _text(folder / "config.yaml"),
        "figures": [*_figures(steps, entries, traffic, ranks), *_memory(folder / "memory.json")],
        "curves": _curves(steps, ranks),
        "evaluations": [
            [entry["step"], entry["evaluation_loss"]] for entry in entries if "evaluation_loss" in entry
        ],
        "kinds": sorted({kind for entry in steps for kind in entry.get("traffic", {})}),
        "kind_table": _kind_table(steps),
        "group_table": _group_table(steps),
        "matrix": _matrix(traffic),
        "ranks": _ranks(steps, ranks),
        "pairs": _pairs(ranks),
        "worst": _worst(steps),
        "timeline": timeline,
        "plans": plans,
        "notices": _lines(folder / "notices.jsonl"),
        "flights": _flights(folder / "flight"),
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(_text(path)))
    except ValueError as error:
        raise DataError(f"[report] {path} is damaged: {error}") from None


def _lines(path: Path) -> list[Entry]:
    """A file of one object a line; a run that goes on may be writing its last one."""
    result: list[Entry] = []
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            result.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"[report] {path}:{number} is damaged: {error}") from None
    return result


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(statistics.fmean(known)) if known else None


def _bytes(entry: Entry, kind: str | None = None, *, between: bool | None = None) -> float:
    """Bytes sent in a step."""
    total = 0.0
    for name, sums in entry.get("traffic", {}).items():
        if kind is not None and name != kind:
            continue
        if between is not True:
            total += sums["inside_bytes"]
        if between is not False:
            total += sums["between_bytes"]
    return total


def _curves(steps: Sequence[Entry], ranks: Mapping[int, Entry]) -> dict[str, Any]:
    """Series over the run: a point a step, or the mean of some neighbouring steps."""
    every = -(-len(steps) // _POINTS)
    kinds = sorted({kind for entry in steps for kind in entry.get("traffic", {})})
    result: dict[str, Any] = {"step": [], "every": every, "bytes": {kind: [] for kind in kinds}}
    direct = (
        "loss", "tokens_per_second", "seconds", "balance_efficiency", "measured_efficiency",
        "planning_seconds", "exposed_seconds", "hidden_seconds", "waiting_seconds", "gradient_norm", "lr",
    )
    derived: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "busy_mean": lambda rank: statistics.fmean(rank["busy"]),
        "busy_max": lambda rank: max(rank["busy"]),
        "load_mean": lambda rank: statistics.fmean(rank["load"]),
        "planned_mean": lambda rank: statistics.fmean(rank["planned"]),
        "planned_max": lambda rank: max(rank["planned"]),
    }
    for name in (*direct, *derived):
        result[name] = []
    for first in range(0, len(steps), every):
        part = steps[first : first + every]
        trained = [entry for entry in part if not entry.get("skipped")]
        own = [ranks[entry["step"]] for entry in trained if ranks.get(entry["step"], {}).get("busy")]
        result["step"].append(part[0]["step"])
        for name in direct:
            result[name].append(_mean(entry.get(name) for entry in trained))
        for name, value in derived.items():
            result[name].append(_mean(value(rank) for rank in own))
        for kind in kinds:
            result["bytes"][kind].append(_mean(_bytes(entry, kind) for entry in part))
    return result


def _figures(
    steps: Sequence[Entry], entries: Sequence[Entry], traffic: Mapping[str, Any], ranks: Mapping[int, Entry]
) -> list[tuple[str, str]]:
    from meshloom.cli.common import short
    from meshloom.cli.progress import in_bytes

    trained = [entry for entry in steps if not entry.get("skipped")] or list(steps)
    later = trained[len(trained) // 2 :]  # after warming up
    seconds = sum(entry["seconds"] for entry in later)

    def share(name: str) -> str:
        known = [entry for entry in later if entry.get(name) is not None]
        whole = sum(entry["seconds"] for entry in known)
        return f"{sum(entry[name] for entry in known) / whole:.1%}" if whole else "-"

    def percent(name: str) -> str:
        mean = _mean(entry.get(name) for entry in later)
        return f"{mean:.1%}" if mean is not None else "-"

    def sent(between: bool) -> str:
        return in_bytes(_mean(_bytes(entry, between=between) for entry in later) or 0.0)

    def loss(entry: Entry) -> str:
        return f"{entry['loss']:.4f}" if entry["loss"] is not None else "not finite"

    count = len(next(iter(ranks.values()))["busy"]) if ranks else 0
    hosts = len(traffic.get("hosts", []))
    held_out = [entry["evaluation_loss"] for entry in entries if entry.get("evaluation_loss") is not None]
    figures = [
        ("steps", f"{steps[0]['step']} to {steps[-1]['step']}"),
        ("ranks", f"{count}" + (f" on {hosts} host{'s' if hosts > 1 else ''}" if hosts else "")),
        ("loss, first and last step", f"{loss(trained[0])} → {loss(trained[-1])}"),
        ("held-out loss, last", f"{held_out[-1]:.4f}" if held_out else "-"),
        ("tokens", short(sum(entry["tokens"] for entry in steps))),
        ("tokens a second", f"{sum(entry['tokens'] for entry in later) / seconds:,.0f}" if seconds else "-"),
        ("seconds a step", f"{seconds / len(later):.3g}"),
        ("balance: planned, measured", f"{percent('balance_efficiency')}, {percent('measured_efficiency')}"),
        ("waiting for communication", share("exposed_seconds")),
        ("of that for late peers", share("waiting_seconds")),
        ("communication behind computation", share("hidden_seconds")),
        ("waiting for plans", share("planning_seconds")),
        ("sent inside hosts, a step", sent(False)),
        ("sent between hosts, a step", sent(True)),
        ("skipped steps", str(sum(1 for entry in steps if entry.get("skipped")))),
    ]
    if any("offload_bytes" in entry for entry in later):
        figures += [
            ("activations offloaded, a step", in_bytes(_mean(entry.get("offload_bytes") for entry in later) or 0.0)),
            ("waiting for offloaded activations", share("offload_exposed_seconds")),
        ]
    return figures


def _memory(path: Path) -> list[tuple[str, str]]:
    """The fullest rank's peak beside what was predicted for it."""
    from meshloom.cli.progress import in_bytes

    ranks = _object(path).get("ranks", [])
    if not ranks:
        return []
    most = max(ranks, key=lambda rank: rank["measured"])
    return [("memory of a rank: predicted, measured", f"{in_bytes(most['predicted'])}, {in_bytes(most['measured'])}")]


def _kind_table(steps: Sequence[Entry]) -> list[list[Any]]:
    """Kind, bytes a step inside and between hosts, seconds a step under way and exposed (all ranks)."""
    sums: dict[str, list[float]] = {}
    for entry in steps:
        for kind, own in entry.get("traffic", {}).items():
            row = sums.setdefault(kind, [0.0] * 4)
            for i, name in enumerate(("inside_bytes", "between_bytes", "seconds", "exposed_seconds")):
                row[i] += own[name] / len(steps)
    ordered = sorted(sums.items(), key=lambda item: -(item[1][0] + item[1][1]))
    return [[kind, *map(_rounded, row)] for kind, row in ordered]


def _group_table(steps: Sequence[Entry]) -> list[list[Any]]:
    sums: dict[str, float] = {}
    for entry in steps:
        for group, sent in entry.get("group_bytes", {}).items():
            sums[group] = sums.get(group, 0.0) + sent / len(steps)
    return [[group, _rounded(sent)] for group, sent in sorted(sums.items(), key=lambda item: -item[1])]


def _matrix(traffic: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bytes from rank to rank by kind, sparse: rows of [peer, bytes]."""
    if not traffic.get("ranks"):
        return None
    kinds: dict[str, list[list[list[int]]]] = {}
    for number, rank in enumerate(traffic["ranks"]):
        for kind, peers in rank["sent"].items():
            rows = kinds.setdefault(kind, [[] for _ in traffic["ranks"]])
            rows[number] = [[int(peer), sent] for peer, sent in peers.items()]
    return {
        "kinds": kinds, "hosts": traffic["hosts"], "host_of": traffic["host_of"], "steps": traffic["steps"],
    }


def _ranks(steps: Sequence[Entry], ranks: Mapping[int, Entry]) -> dict[str, Any] | None:
    """Means over the newest steps, by rank, and the median of measured over planned time."""
    trained = {entry["step"]: entry for entry in steps if not entry.get("skipped")}
    newest = [ranks[step] for step in sorted(ranks)[-_RANK_STEPS:] if step in trained]
    if not newest:
        return None
    count = len(newest[-1]["busy"])
    newest = [entry for entry in newest if len(entry["busy"]) == count]  # another layout before a restart
    result: dict[str, Any] = {
        "steps": len(newest),
        "seconds": _mean(trained[entry["step"]]["seconds"] for entry in newest),
        "pace": [],
    }
    for name in ("planned", "busy", "load", "exposed"):
        result[name] = [_mean(entry[name][rank] for entry in newest) for rank in range(count)]
    for rank in range(count):
        paces = [e["busy"][rank] / e["planned"][rank] for e in newest if e["planned"][rank] > 0]
        result["pace"].append(_rounded(statistics.median(paces)) if paces else None)
    return result


def _pairs(ranks: Mapping[int, Entry]) -> list[list[float]]:
    """[planned, measured, rank, step] of the newest steps."""
    result: list[list[float]] = []
    for step in sorted(ranks, reverse=True):
        own = zip(ranks[step]["planned"], ranks[step]["busy"], strict=True)
        for rank, (planned, busy) in enumerate(own):
            if planned > 0:
                result.append([planned, busy, rank, step])
        if len(result) >= _PAIRS:
            break
    return result[:_PAIRS]


def _worst(steps: Sequence[Entry]) -> list[Entry]:
    """The steps that lost most time to what the columns say."""
    columns = ("slow_data_seconds", "slow_hardware_seconds", "waiting_seconds", "planning_seconds")
    judged = [entry for entry in steps if entry.get("slowest_rank") is not None]
    judged.sort(key=lambda entry: -max(float(entry.get(name, 0.0)) for name in columns))
    names = ("step", "seconds", "slowest_rank", *columns, "balance_efficiency", "measured_efficiency")
    return [{name: entry.get(name) for name in names} for entry in judged[:_WORST]]


def _timeline(folder: Path) -> tuple[list[Entry], dict[str, Any]]:
    """Newest steps: spans [rank, kind, slot, unit, begin, end] in seconds; and their units by step."""
    path = folder / "timeline.json"
    if not path.is_file():
        return [], {}
    try:
        events = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"[report] {path} is damaged: {error}") from None
    spans: dict[int, list[list[Any]]] = {}
    begun: dict[str, Entry] = {}
    for event in events:
        kind, at = event["ph"], event.get("ts", 0.0)
        if kind == "b":
            begun[event["id"]] = event
            continue
        if kind == "e" and event["id"] in begun:
            start = begun.pop(event["id"])["ts"]
        elif kind == "X":
            start, at = at, at + event["dur"]
        else:
            continue
        args = event["args"]
        span = [event["pid"], event["name"], args["slot"], args["unit"], start, at]
        spans.setdefault(args["step"], []).append(span)
    result: list[Entry] = []
    plans: dict[str, Any] = {}
    left = _SPANS
    for step in sorted(spans, reverse=True):
        own = spans[step]
        left -= len(own)
        if result and left < 0:
            break
        zero = min(span[4] for span in own)
        for span in own:
            span[4:] = [round((value - zero) / 1e6, 6) for value in span[4:]]
        result.insert(0, {"step": step, "spans": sorted(own, key=lambda span: (span[0], span[4]))})
        plan = _object(folder / "plans" / f"step-{step:08d}.json")
        if plan:
            plans[str(step)] = {
                "slots": [[[unit["ranks"], unit["samples"]] for unit in slot["units"]] for slot in plan["slots"]],
                "tokens": {sample["id"]: sample["tokens"] for sample in plan["samples"]},
            }
    return result, plans


def _flights(folder: Path) -> list[tuple[str, str]]:
    """Name and the newest part of every rank's flight report."""
    result = []
    for path in sorted(folder.glob("rank-*.txt")):
        text = _text(path)
        last = text.rfind("\n== ")
        newest = text[last + 1 :]
        shown = newest if len(newest) <= _FLIGHT_BYTES else newest[:_FLIGHT_BYTES] + "\n..."
        result.append((path.name, shown))
    return result
