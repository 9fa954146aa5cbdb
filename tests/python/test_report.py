"""`meshloom report RUN_DIR`, and what a run writes for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import running
from running import meshloom, write_config, write_corpus


@pytest.fixture(scope="module")
def finished(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three ranks."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "corpus.jsonl")
    config = write_config(
        folder / "config.yaml", steps=12, evaluate_every=5, evaluate_tokens=100,
        data={"held_out_fraction": 0.1},
    )
    meshloom(build_dir, "train", config, "--ranks", 3, "--backend", "thread")
    return folder / "run"


def page_data(build: Path, run: Path, out: Path) -> dict[str, Any]:
    meshloom(build, "report", run, "-o", out)
    page = out.read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page and "@import" not in page
    assert "<!--COMMON-->" not in page
    start = page.index("const data = ") + len("const data = ")
    return dict(json.loads(page[start : page.index(";\n", start)]))


def test_page_holds_what_the_run_folder_does(build_dir: Path, finished: Path, tmp_path: Path) -> None:
    data = page_data(build_dir, finished, tmp_path / "run.html")
    entries = running.metrics(finished)
    assert data["curves"]["loss"] == pytest.approx([entry["loss"] for entry in entries], rel=1e-5)
    assert [step for step, _ in data["evaluations"]] == [4, 9]
    assert dict(data["figures"])["ranks"].startswith("3 on 1 host")
    # Bytes by kind are those of the metrics, and the matrix has them by sender and receiver.
    by_kind = {row[0]: row[1] + row[2] for row in data["kind_table"]}
    exchanged = sum(entry["exchange_bytes"] for entry in entries)
    assert by_kind["exchange"] * len(entries) == pytest.approx(exchanged, rel=1e-4)
    matrix = data["matrix"]["kinds"]["exchange"]
    assert sum(sent for row in matrix for _, sent in row) >= exchanged
    assert all(peer != rank for rank, row in enumerate(matrix) for peer, _ in row)
    assert len(data["ranks"]["busy"]) == 3 and data["ranks"]["steps"] == 12
    assert {len(pair) for pair in data["pairs"]} == {4}
    # The timeline's steps come with their plans' units.
    assert [entry["step"] for entry in data["timeline"]] == list(range(12))
    for entry in data["timeline"]:
        slots = data["plans"][str(entry["step"])]["slots"]
        assert {span[0] for span in entry["spans"]} == {0, 1, 2}
        for rank, kind, slot, unit, begin, end in entry["spans"]:
            assert 0 <= begin <= end
            if kind == "forward" and unit >= 0:
                assert rank in slots[slot][unit][0]
    assert data["config"].startswith("run:")
    assert data["flights"] == []


def test_runs_that_go_on_and_old_ones_have_pages(build_dir: Path, finished: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    # The run is writing its third line; it has no timeline, no traffic and no plans yet.
    (part / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))
    data = page_data(build_dir, part, tmp_path / "part.html")
    assert len(data["curves"]["step"]) == 2
    assert data["timeline"] == [] and data["matrix"] is None and data["ranks"] is None


def test_long_runs_are_averaged(build_dir: Path, finished: Path, tmp_path: Path) -> None:
    long = tmp_path / "long"
    long.mkdir()
    for name in ("metrics.jsonl", "ranks.jsonl"):
        entries = [json.loads(line) for line in (finished / name).read_text().splitlines()]
        entries = [entry for entry in entries if "evaluation_loss" not in entry]
        many = [{**entries[i % len(entries)], "step": i} for i in range(5000)]
        (long / name).write_text("\n".join(json.dumps(entry) for entry in many) + "\n")
    data = page_data(build_dir, long, tmp_path / "long.html")
    assert len(data["curves"]["step"]) == 556 and data["curves"]["every"] == 9
    assert data["curves"]["step"][-1] == 4995
    assert (tmp_path / "long.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no metrics", "has no metrics.jsonl"),
        ("no step", "has no finished step"),
        ("line", r"metrics.jsonl:3 is damaged"),
        ("timeline", "timeline.json is damaged"),
    ],
)
def test_what_is_no_run_folder_is_refused(
    build_dir: Path, finished: Path, tmp_path: Path, damage: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoint*", "cache"))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    if damage == "no metrics":
        metrics.unlink()
    elif damage == "no step":
        metrics.write_text("")
    elif damage == "line":
        metrics.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    else:
        (run / "timeline.json").write_text("[{")
    result = meshloom(build_dir, "report", run, "-o", tmp_path / "x.html", good=False)
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "x.html").exists()


def test_a_signal_asks_every_rank_for_its_report(build_dir: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(tmp_path / "config.yaml", steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "meshloom", "train", str(config), "--ranks", "2"],
        env=running.environment(build_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    flights = [tmp_path / f"run/flight/rank-0000{rank}.txt" for rank in range(2)]
    deadline = time.monotonic() + running.LIMIT
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    while not all(path.exists() and path.read_text() for path in flights) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, "the signal ended the run"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=running.LIMIT)
    assert process.returncode == 0, errors
    for rank, path in enumerate(flights):
        text = path.read_text()
        assert re.search(rf"== \S+Z: asked for\nrank {rank}/2 group \"world\", backend mpi", text), text
        assert re.search(rf"#\d+ rank {rank}/2 .* purpose gradients .* \(step \d+ (backward|reduce)", text), text
    assert f"more in {tmp_path}/run/flight" in errors


@pytest.mark.full
def test_page_in_a_browser(build_dir: Path, finished: Path, tmp_path: Path) -> None:
    """The script runs through: nothing of the page stays empty."""
    browser = os.environ.get("MESHLOOM_BROWSER") or shutil.which("chromium")
    assert browser is not None, "install chromium, or name a browser by MESHLOOM_BROWSER"
    page = tmp_path / "run.html"
    meshloom(build_dir, "report", finished, "-o", page)
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path}/profile", page.as_uri()],
        capture_output=True, text=True, timeout=running.LIMIT, check=True,
    ).stdout
    for text in ("Run run", "steps", "held out", "waits for keys and values", "Typical error",
                 "Senders down, receivers across", "inside hosts"):
        assert text in shown, text
    assert len(re.findall(r"<td>", shown)) > 20
