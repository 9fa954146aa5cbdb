"""Kills or stops a rank in every phase of a training step and checks what the others report.

    train_deaths.py MPIRUN PROGRAM [FIRST COUNT]

A sample of the cases; all where MESHLOOM_FULL is set; those from FIRST where it is given. The first
hundred are of expert and data parallelism, the others of every phase of other layouts.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

RANKS = 4
LIMIT = 3.0
# Survivors may come to their own limits one after another, on a loaded machine.
PATIENCE = 4 * LIMIT + 10.0
INSTRUCTIONS = ("load", "forward", "backward", "reduce", "step")
DRAWN = 100


class Spread(NamedTuple):
    layout: str
    zero: int
    phases: tuple[str, ...]


EXPERTS = Spread("hdp=4,ep=2", 1, ("load", "forward", "exchange", "backward", "dispatch", "reduce",
                                   "step", "experts", "checkpoint"))
OTHERS = (
    Spread("tp=2,hdp=2", 1, ("load", "forward", "tensor", "exchange", "backward", "gradients",
                             "reduce", "step", "checkpoint")),
    Spread("hdp=2,pp=2", 2, ("forward", "pipeline", "backward", "gradients", "step", "checkpoint")),
    Spread("hdp=4", 3, ("forward", "parameters", "backward", "gradients", "reduce", "step")),
    Spread("tp=2,pp=2", 1, ("forward", "tensor", "pipeline", "backward", "step")),
)


class Case(NamedTuple):
    how: str
    phase: str
    victim: int
    step: int
    spread: Spread = EXPERTS


class Report(NamedTuple):
    at: float
    text: str


def cases() -> list[Case]:
    """Every phase and signal in turn; victims and steps are drawn."""
    draw = random.Random(5)
    turns = [(how, phase) for phase in EXPERTS.phases for how in ("kill", "stop")]
    result = [
        Case(*turns[i % len(turns)], draw.randrange(RANKS), draw.randrange(1, 5))
        for i in range(DRAWN)
    ]
    for spread in OTHERS:
        for phase in spread.phases:
            for how in ("kill", "stop"):
                victim, step = draw.randrange(RANKS), draw.randrange(1, 5)
                result.append(Case(how, phase, victim, step, spread))
    return result


SAMPLE = (
    Case("kill", "exchange", 2, 2), Case("stop", "forward", 1, 3), Case("kill", "checkpoint", 0, 2),
    Case("stop", "dispatch", 3, 1), Case("kill", "experts", 1, 2),
    Case("kill", "tensor", 1, 2, OTHERS[0]),
    Case("stop", "pipeline", 3, 1, OTHERS[1]), Case("kill", "parameters", 2, 1, OTHERS[2]),
)


def read(output: str) -> tuple[dict[int, Report], tuple[int, float] | None]:
    """What the survivors said, and the victim's process and time."""
    said: dict[int, Report] = {}
    death = None
    for line in output.splitlines():
        if match := re.match(r"rank (\d+) at ([\d.]+) (says: .*|ok)", line):
            said[int(match[1])] = Report(float(match[2]), match[3])
        elif match := re.match(r"rank \d+ at ([\d.]+) pid (\d+) dies", line):
            death = int(match[2]), float(match[1])
    return said, death


def problems(case: Case, output: str, folder: pathlib.Path) -> list[str]:
    said, death = read(output)
    if death is None:
        return ["nobody died"]
    found = []
    # What a thread does to the process lands a little later than what it saw.
    late = case.phase not in INSTRUCTIONS
    steps = f"({case.step}|{case.step + 1})" if late else str(case.step)
    for rank in range(RANKS):
        if rank == case.victim:
            continue
        if rank not in said:
            found.append(f"rank {rank} reported nothing")
            continue
        at, text = said[rank]
        if at - death[1] > PATIENCE:
            found.append(f"rank {rank} reported after {at - death[1]:.1f} s")
        if not re.search(rf"in step {steps} \w+", text):
            found.append(f"rank {rank} does not say what it was doing: {text}")
        flight = folder / "flight" / f"rank-{rank:05d}.txt"
        written = flight.read_text(encoding="utf-8") if flight.exists() else ""
        if text.removeprefix("says: ") not in written:
            found.append(f"rank {rank}: {flight.name} lacks what it said")
        if not re.search(rf"#\d+ rank {rank}/{RANKS} .* \(step {steps} \w+", written):
            found.append(f"rank {rank}: {flight.name} lacks its calls in step {steps}")
    named = rf"missing peers: [\d, ]*\b{case.victim}\b|rank {case.victim}\b"
    if not any(re.search(named, text) for _, text in said.values()):
        found.append(f"nobody names rank {case.victim}")
    return found


def run(case: Case, mpirun: str, program: str, folder: pathlib.Path) -> str:
    command = [
        mpirun, "--allow-run-as-root", "--oversubscribe", "--enable-recovery",
        "--mca", "mpi_yield_when_idle", "1", "-n", str(RANKS), program, case.how, case.phase,
        str(case.victim), str(case.step), str(LIMIT), str(folder), case.spread.layout,
        str(case.spread.zero),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)

        def output() -> str:
            log.seek(0)
            return log.read()

        until = time.monotonic() + 2 * PATIENCE
        death = None
        while time.monotonic() < until and job.poll() is None:
            said, death = read(output())
            if len(said.keys() - {case.victim}) >= RANKS - 1:
                break
            time.sleep(0.05)
        if death is not None and case.how == "stop":
            try:
                os.kill(death[0], signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            job.wait(PATIENCE)  # with --enable-recovery it ends with 0 whatever its ranks did
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            return output() + "\nmpirun does not end\n"
        return output()


def main() -> int:
    mpirun, program, *part = sys.argv[1:]
    wanted: list[Case] = list(SAMPLE)
    if part or os.environ.get("MESHLOOM_FULL"):
        first, count = (int(word) for word in part) if part else (0, len(cases()))
        wanted = cases()[first : first + count]
    good = 0
    for case in wanted:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            output = run(case, mpirun, program, pathlib.Path(folder, "run"))
            found = problems(case, output, pathlib.Path(folder, "run"))
            if "mpirun does not end" in output:
                found.append("a rank does not end")
        words = (
            f"{case.how} rank {case.victim} in {case.phase} of step {case.step}, "
            f"{case.spread.layout}, ZeRO-{case.spread.zero}"
        )
        print(f"{words}: {'FAILED' if found else 'ok'}, {time.monotonic() - start:.1f} s", flush=True)
        if found:
            print("\n".join([*found, output]), flush=True)
        good += not found
    print(f"{good} of {len(wanted)} good")
    return 0 if good == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
