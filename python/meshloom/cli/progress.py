"""What a run shows: a live line while it trains, and a closing table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meshloom import launch, planning

if TYPE_CHECKING:
    from meshloom._core import StepMetrics
    from meshloom._plan import StepPlan

COMPARED = ("static", "naive_hdp", "balanced")
COMPARED_STEPS = 256  # newest ones: planning them again takes well under a second
_SECONDS_BETWEEN_LINES = 5.0


def terminal_width() -> int:
    """Columns of the terminal that shows stdout; 0 where it is a file or a pipe.

    Open MPI hands its ranks a pseudo-terminal whatever its own stdout is, so ranks believe only the
    variable in which `meshloom train` tells them what is behind it.
    """
    if launch.launcher() is None:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    told = os.environ.get(launch.WIDTH_VARIABLE, "")
    return int(told) if told.isdecimal() else 0


def in_bytes(number: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def in_time(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """One line that is rewritten on a terminal; lines some seconds apart elsewhere."""

    def __init__(self, steps: int, width: int) -> None:
        self._steps = steps
        self._width = width
        self._printed = -float("inf")
        self._pace = 0.0
        self._open = False

    def update(self, metrics: StepMetrics) -> None:
        self._pace = metrics.seconds if not self._pace else 0.8 * self._pace + 0.2 * metrics.seconds
        done = metrics.step + 1
        left = in_time((self._steps - done) * self._pace)
        loss = "skipped" if metrics.skipped else f"{metrics.loss:.4f}"
        line = (
            f"step {done:>{len(str(self._steps))}}/{self._steps}  loss {loss}"
            f"  {metrics.tokens_per_second:,.0f} tokens/s"
            f"  balance {100 * metrics.balance_efficiency:.1f}%"
            f"  exchange {in_bytes(metrics.exchange_bytes)}  left {left}"
        )
        if (evaluation := metrics.extra.get("evaluation_loss")) is not None:
            line += f"  held-out {evaluation:.4f}"
        if self._width:
            print("\r" + line[: self._width - 1].ljust(self._width - 1), end="", flush=True)
            self._open = True
        elif done == self._steps or time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            print(line, flush=True)
            self._printed = time.monotonic()

    def say(self, text: str) -> None:
        self.close()
        print(text, flush=True)

    def close(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False


def makespans(plans: Sequence[StepPlan]) -> dict[str, float | None]:
    """Sum of predicted makespans of the same steps by each compared strategy; None: cannot serve.

    All steps are costed by the last plan's model, the best one that the run came to.
    """
    result: dict[str, float | None] = {}
    for name in COMPARED:
        total: float | None = 0.0
        for plan in plans:
            problem = planning.problem_of(plan)
            problem.cost = plans[-1].cost
            again = planning.try_plan(problem, name)
            total = None if again is None or total is None else total + again.predicted.makespan
        result[name] = total
    return result


def closing_table(history: Sequence[StepMetrics], plans: Sequence[StepPlan], width: int) -> str:
    """Losses, speed, and what other strategies would have taken for the same steps."""
    import io

    from rich.console import Console
    from rich.table import Table

    trained = [metrics for metrics in history if not metrics.skipped]
    tokens = sum(metrics.tokens for metrics in history)
    seconds = sum(metrics.seconds for metrics in history)
    table = Table(show_header=False, title=f"{len(history)} steps", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    if trained:
        table.add_row("loss, first step", f"{trained[0].loss:.4f}")
        table.add_row("loss, last step", f"{trained[-1].loss:.4f}")
    table.add_row("tokens", f"{tokens:,}")
    table.add_row("tokens/s", f"{tokens / seconds:,.0f}" if seconds else "-")
    table.add_row("waited for plans", f"{100 * _share(history, 'planning_seconds', seconds):.2f} %")
    table.add_row("exchanged", in_bytes(sum(metrics.exchange_bytes for metrics in history)))
    times = makespans(plans[-COMPARED_STEPS:])
    best = times.get("balanced")
    for name, total in times.items():
        ratio = "cannot serve these steps" if total is None else f"{total / best:.3f} x" if best else "-"
        table.add_row(f"predicted makespan, {name}", ratio)
    shown = io.StringIO()
    Console(file=shown, width=min(width or 100, 100), highlight=False).print(table)
    return shown.getvalue().rstrip()


def _share(history: Sequence[StepMetrics], field: str, whole: float) -> float:
    part: Any = sum(getattr(metrics, field) for metrics in history)
    return float(part) / whole if whole else 0.0
