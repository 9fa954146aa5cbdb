"""Planning, verifying and simulating from Python and the command line, without torch."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import running

LENGTHS = [812, 96_000, 40, 3_771, 9_000, 15_000, 2, 700, 700, 30_000]


@pytest.fixture(scope="module")
def ml(build_dir: Path) -> Any:
    sys.path.insert(0, str(build_dir / "python"))
    import meshloom

    return meshloom


@pytest.fixture(scope="module")
def cli(build_dir: Path) -> Callable[..., str]:
    """Runs a command; its output, or, with `good=False`, its one line of an error."""

    def call(*arguments: object, good: bool = True) -> str:
        done = running.meshloom(build_dir, *arguments, good=good)
        return done.stdout if good else done.stderr

    return call


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{length}\n" for length in LENGTHS))
    return path


@pytest.fixture
def plan_file(cli: Callable[..., str], lengths_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    cli("plan", "--lengths", lengths_file, "--hdp", 8, "--capacity", 16384, "--out", path)
    return path


def test_plain_lists_hold_every_token_once(ml: Any) -> None:
    plan = ml.plan(LENGTHS, hdp=8, capacity_tokens=16_384)
    ml.verify(plan)
    held = [0] * len(LENGTHS)
    for rank in range(8):
        mine = plan.for_rank(rank)
        for unit, cu_seqlens, local in zip(mine.units, mine.cu_seqlens, mine.local_cu_seqlens):
            assert [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:])] == [
                LENGTHS[i] for i in unit.samples
            ]
            for sample, ranges, a, b in zip(unit.samples, unit.ranges, local, local[1:]):
                assert sum(end - begin for begin, end in ranges) == b - a
                held[sample] += b - a
    assert held == LENGTHS
    ranks = plan.sample_ranks()
    assert sorted(ranks) == list(range(len(LENGTHS)))
    assert len(ranks[1]) >= 96_000 / 16_384


def test_order_of_every_rank_is_one_order(ml: Any) -> None:
    plan = ml.plan(LENGTHS * 3, hdp=5, capacity_tokens=20_000)
    for rank in range(5):
        slots = [unit.slot for unit in plan.for_rank(rank).units]
        assert slots == sorted(set(slots))


def test_planning_commands_start_in_half_a_second(cli: Callable[..., str], lengths_file: Path) -> None:
    """Processor time, the least of three: the wall clock of a busy machine says nothing."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        cli("plan", "--lengths", lengths_file, "--hdp", 8, "--capacity", 16384)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.5, taken


def test_planning_never_imports_torch(build_dir: Path) -> None:
    code = (
        "import sys, meshloom as ml; p = ml.plan([5, 6], hdp=2, capacity_tokens=6);"
        "ml.verify(p); ml.simulate(p); assert 'torch' not in sys.modules"
    )
    running.run(build_dir, [sys.executable, "-c", code])


def test_simulation_follows_the_plan(ml: Any) -> None:
    plan = ml.plan([100] * 8, hdp=4, capacity_tokens=100)
    workload = ml.Workload()
    workload.parameter_bytes = workload.gradient_bytes = 0.0
    cluster = ml.Cluster.from_yaml(
        "{inside: {bandwidth: 1e30, latency: 0}, between: {bandwidth: 1e30, latency: 0}}"
    )
    result = ml.simulate(plan, cluster, workload=workload, spans=True)
    assert result.step_time == pytest.approx(plan.predicted.makespan, rel=1e-12)
    assert {span.rank for span in result.spans} == set(range(4))
    assert result.bubble == pytest.approx(0.0, abs=1e-9)
    slow = ml.Cluster.from_yaml("slow_ranks: {2: 0.5}", "slow", cluster)
    assert ml.simulate(plan, slow, workload=workload).step_time == pytest.approx(
        2 * result.step_time
    )


def test_pipeline_schedules_and_own_tables(ml: Any) -> None:
    lengths = [100] * 16
    cluster = ml.Cluster.from_yaml(
        "{inside: {bandwidth: 1e30, latency: 0}, between: {bandwidth: 1e30, latency: 0}}"
    )
    workload = ml.Workload()
    workload.parameter_bytes = workload.gradient_bytes = 0.0
    times = {}
    for schedule, chunks in (("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_v", 2)):
        plan = ml.plan(lengths, layout=ml.Layout(hdp=2, pp=4, chunks=chunks), capacity_tokens=100)
        ml.verify(plan, ml.compile(plan, layers=8, schedule=schedule))
        times[schedule] = ml.simulate(plan, cluster, workload=workload, schedule=schedule).step_time
    assert times["zb_v"] < times["zb_h1"] < times["1f1b"]
    assert times["interleaved_1f1b"] < times["1f1b"]

    plan = ml.plan(lengths, layout=ml.Layout(hdp=2, pp=4), capacity_tokens=100)
    slots = range(len(plan.slots))
    table = ml.Schedule(
        [[ml.StageAction(op, s) for op in ("forward", "backward") for s in slots] for _ in range(4)]
    )
    ml.verify(plan, ml.compile(plan, layers=8, table=table))
    own = ml.simulate(plan, cluster, workload=workload, table=table)
    assert own.step_time == pytest.approx(times["1f1b"])  # the same bubble, and more memory
    first = ml.simulate(plan, cluster, workload=workload, schedule="1f1b")
    assert max(own.peak_memory) > max(first.peak_memory)
    broken = ml.Schedule([stage[:-1] for stage in table.stages])
    with pytest.raises(ml.PlanError, match="backward of chunk 0, slot .* is missing"):
        ml.compile(plan, table=broken)


def test_command_line_simulates_what_if(cli: Callable[..., str], plan_file: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("ranks_per_node: 4\nworkload: {layers: 8}\n")
    trace = tmp_path / "trace.json"
    (row,) = json.loads(cli("simulate", plan_file, "--cluster", cluster,
                            "--timeline", trace, "--json"))
    assert row["ranks"] == 8 and row["step_time"] > 0 and row["bytes_between_nodes"] > 0
    assert len(json.loads(trace.read_text())["traceEvents"]) > 8
    rows = json.loads(cli("simulate", plan_file, "--cluster", cluster, "--json",
        "--set", "between.bandwidth=1e8", "--strategy", "static", "--strategy", "balanced",
    ))
    assert [row["strategy"] for row in rows] == ["balanced", "static", "balanced"]
    assert rows[0]["step_time"] > row["step_time"]
    assert rows[1]["step_time"] > rows[2]["step_time"]
    _, piped = json.loads(cli("simulate", plan_file, "--layout", "hdp=8,pp=2",
                              "--schedule", "zb_h1", "--json"))
    assert piped["ranks"] == 16
    text = cli("simulate", plan_file, "--capacity", "32768")
    assert "faster than as given" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cluster", "{tmp}/missing.yaml"], "missing.yaml"),
        (["--set", "inside.width=3"], "unknown key"),
        (["--set", "inside"], "expected KEY.KEY=VALUE"),
        (["--set", "nodes=1", "--set", "ranks_per_node=2"], "do not fit 1 nodes of 2"),
        (["--strategy", "nope"], "nope"),
        (["--layout", "hdp=2"], "do not fit the whole axis"),
        (["--layout", "hdp=8,pp=2", "--schedule", "gpipe"], "gpipe"),
    ],
)
def test_simulate_says_what_is_wrong(
    cli: Callable[..., str], plan_file: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    error = cli("simulate", plan_file, *filled, good=False)
    assert says in error and error.count("\n") == 1


def test_lengths_are_whole_numbers(ml: Any) -> None:
    for wrong in (3.7, True, "12", None):
        with pytest.raises(ml.InvalidArgument, match="length 1 is"):
            ml.plan([5, wrong], hdp=2, capacity_tokens=8)


def test_rules_choose_exchanges(ml: Any, cli: Callable[..., str], tmp_path: Path) -> None:
    lengths = [40, 20, 20, 9, 9]
    plan = ml.plan(lengths, hdp=4, capacity_tokens=12, exchanges="all_gather:2-3,ulysses:4-")
    chosen = {len(unit.ranks): unit.exchange for slot in plan.slots for unit in slot.units}
    assert chosen[4] == "ulysses" and chosen[2] == "all_gather"
    with pytest.raises(ml.InvalidArgument, match="braid"):
        ml.plan(lengths, hdp=4, capacity_tokens=12, exchanges="braid")
    file = tmp_path / "lengths.txt"
    file.write_text("\n".join(map(str, lengths)) + "\n")
    text = cli("plan", "--lengths", file, "--hdp", "4", "--capacity", "12", "--exchange", "all_gather", "--json")
    units = [unit for slot in json.loads(text)["slots"] for unit in slot["units"]]
    assert {unit["exchange"] for unit in units if len(unit["ranks"]) > 1} == {"all_gather"}


def test_planning_again_remembers_nodes(ml: Any, tmp_path: Path) -> None:
    lengths = [40_000] * 3 + [900] * 40
    plan = ml.plan(lengths, hdp=16, capacity_tokens=16_384, ranks_per_node=4)
    path = tmp_path / "plan.json"
    plan.save(path)
    read = ml.StepPlan.load(path)
    assert read == plan and read.ranks_per_node == 4
    again = ml.planning.make_plan(ml.planning.problem_of(read), "balanced")
    assert again == plan
    assert "ranks_per_node" not in ml.plan(lengths, hdp=16, capacity_tokens=16_384).to_json()


def test_plan_takes_pipelines_and_experts(cli: Callable[..., str], tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("".join(json.dumps({"tokens": n, "loss_tokens": n // 2}) + "\n" for n in LENGTHS))
    text = cli("plan", "--lengths", lengths, "--hdp", "8", "--capacity", "16384",
               "--pp", "2", "--chunks", "2", "--ep", "4", "--json")
    plan = json.loads(text)
    assert plan["layout"] == {"tp": 1, "hdp": 8, "pp": 2, "ep": 4, "chunks": 2}
    assert plan["lockstep"] == "ep"
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert "valid" in cli("verify", path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("12\n0\n", ":2:"),
        ("12\n-3\n", ":2:"),
        ("12\nabc\n", ":2:"),
        ("12 13\n", ":1:"),
        ('{"tokens": 5, "loss_tokens": 6}\n', ":1:"),
        ('{"tokens": 5}\n{"tokens": 3.5}\n', ":2:"),
        ('{"tokens": true}\n', ":1:"),
        ('{"tokens": "7"}\n', ":1:"),
        ('{"tokens": 5, "loss_tokens": 1.5}\n', ":1:"),
        ('{"loss_tokens": 5}\n', ":1:"),
        ("1_000\n", ":1:"),
        ("2.5\n", ":1:"),
        ("9" * 30 + "\n", "tokens"),
        ("", "no samples"),
    ],
)
def test_bad_lengths_are_named(
    cli: Callable[..., str], tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    error = cli("plan", "--lengths", path, "--hdp", "2", "--capacity", "100", good=False)
    assert says in error and error.count("\n") == 1


def test_bad_plan_files_fail_verify(cli: Callable[..., str], plan_file: Path) -> None:
    assert "valid" in cli("verify", plan_file)
    plan = json.loads(plan_file.read_text())
    plan["slots"][0]["units"][0]["samples"].append(0)
    plan_file.write_text(json.dumps(plan))
    cli("verify", plan_file, good=False)
    plan["format"] = "meshloom.plan/9"
    plan_file.write_text(json.dumps(plan))
    assert "1 of 1" in cli("verify", plan_file, good=False)


def test_compare_shows_all_strategies(cli: Callable[..., str], lengths_file: Path) -> None:
    rows = json.loads(cli("compare", "--lengths", lengths_file, "--hdp", "8",
                          "--capacity", "16384", "--json"))
    assert {row["strategy"] for row in rows} >= {"static", "naive_hdp", "balanced", "bytescale"}


def test_compare_orders_pipelines_by_step_time(cli: Callable[..., str], lengths_file: Path) -> None:
    arguments = ("compare", "--lengths", lengths_file, "--hdp", 8, "--capacity", 16384, "--pp", 2)
    rows = {row["strategy"]: row for row in json.loads(cli(*arguments, "--json")) if "error" not in row}
    best = min(rows.values(), key=lambda row: row["step_time"])
    table = cli(*arguments)
    assert "step time" in table and "makespan" not in table
    first = next(line for line in table.splitlines() if line.split()[:1] and line.split()[0] in rows)
    assert first.split()[0] == best["strategy"]


@pytest.mark.parametrize("extra", [(), ("--pp", 2, "--chunks", 2), ("--ep", 4)])
def test_report_is_one_page(
    cli: Callable[..., str], lengths_file: Path, tmp_path: Path, extra: tuple[object, ...]
) -> None:
    plan_path, page_path = tmp_path / "plan.json", tmp_path / "report.html"
    cli("plan", "--lengths", lengths_file, "--hdp", 8, "--capacity", 16384, "--out", plan_path, *extra)
    cli("report", plan_path, "-o", page_path)
    page = page_path.read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page and "@import" not in page
    start = page.index("const data = ") + len("const data = ")
    data = json.loads(page[start : page.index(";\n", start)])
    assert data["tokens"] == {str(i): length for i, length in enumerate(LENGTHS)}
    assert {span[0] for span in data["spans"]} == set(range(data["rows"]))
    assert max(span[-1] for span in data["spans"]) == pytest.approx(data["time"], rel=1e-4)
    samples = [sample for slot in data["slots"] for _, held in slot for sample in held]
    assert sorted(samples) == list(range(len(LENGTHS)))


def test_costs_are_fitted_and_refined(ml: Any) -> None:
    truth = ml.CostModel(quadratic=2e-9, linear=5e-5, fixed=3e-3)
    timings = []
    for index in range(40):
        lengths = [50 + 37 * index * index] if index % 2 else [100 + index, 7 * index + 1, 900]
        seconds = sum(truth.work(length) for length in lengths) + truth.fixed
        timings.append(ml.UnitTiming(lengths, seconds * (9 if index == 20 else 1)))
    fit = ml.fit_cost(timings)
    assert fit.outliers == 1
    assert fit.model.quadratic == pytest.approx(truth.quadratic, rel=1e-3)
    assert fit.model.linear == pytest.approx(truth.linear, rel=1e-3)
    refiner = ml.CostRefiner(ml.CostModel())
    for timing in timings * 5:
        refiner.add(timing)
    assert refiner.model.quadratic == pytest.approx(truth.quadratic, rel=0.1)
    assert type(refiner).from_json(refiner.to_json()) == refiner
    with pytest.raises(ml.InvalidArgument, match="too alike"):
        ml.fit_cost([timings[1]] * 9)
