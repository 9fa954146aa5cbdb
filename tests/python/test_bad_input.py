"""What goes wrong ends in one clear line that names it, on every rank, with an exit code not 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import running
from running import losses, meshloom, write_config, write_corpus


def error_of(build: Path, *arguments: object, **settings: Any) -> str:
    """The one line that a failing command leaves on stderr."""
    result = meshloom(build, *arguments, good=False, **settings)
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus.jsonl")
    return write_config(tmp_path / "config.yaml")


def test_missing_config(build_dir: Path, tmp_path: Path) -> None:
    assert "nowhere.yaml" in error_of(build_dir, "train", tmp_path / "nowhere.yaml")


def test_malformed_config(build_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("steps: 3\nrun: [unclosed\n")
    line = error_of(build_dir, "train", tmp_path / "bad.yaml")
    assert "bad.yaml" in line and "YAML" in line


def test_unknown_key(build_dir: Path, config: Path) -> None:
    write_config(config, stepps=4)
    line = error_of(build_dir, "train", config)
    assert "stepps" in line and "steps" in line


def test_unknown_family(build_dir: Path, config: Path) -> None:
    write_config(config, model={"config": running.MODEL | {"model_type": "gpt_oss"}})
    line = error_of(build_dir, "train", config)
    assert "gpt_oss" in line and f"{config}:" in line and "model.config.model_type" in line


def test_unknown_strategy(build_dir: Path, config: Path) -> None:
    line = error_of(build_dir, "train", config, "--strategy", "balancd")
    assert "balancd" in line and "balanced" in line


def test_empty_corpus(build_dir: Path, config: Path) -> None:
    empty = config.parent / "empty"
    empty.mkdir()
    line = error_of(build_dir, "train", config, "--data", empty, "-n", 3, "--backend", "thread")
    assert "empty" in line
    assert "absent" in error_of(build_dir, "train", config, "--data", config.parent / "absent")


def test_invalid_utf8(build_dir: Path, config: Path) -> None:
    folder = config.parent / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("a text that is fine " * 60)
    (folder / "broken.txt").write_bytes(b"fine so far \xff\xfe and not here " * 3)
    line = error_of(build_dir, "train", config, "--data", folder, "-n", 2, "--backend", "thread")
    assert "broken.txt" in line and "UTF-8" in line
    write_config(config, data={"invalid_utf8": "skip"})
    meshloom(build_dir, "train", config, "--data", folder)


def test_layout_that_ranks_do_not_allow(build_dir: Path, config: Path) -> None:
    write_config(config, layout={"hdp": 3})
    line = error_of(build_dir, "train", config, "-n", 2, "--backend", "thread")
    assert "hdp=3" in line and "2" in line


def folder_with_weights(build: Path, config: Path) -> Path:
    meshloom(build, "train", config)
    shutil.move(config.parent / "run/checkpoint", config.parent / "model")
    shutil.rmtree(config.parent / "run")
    model = config.parent / "model"
    write_config(config, model={"config": None, "path": str(model)})
    text = json.loads(config.read_text())
    del text["model"]["config"]
    config.write_text(json.dumps(text))
    return model


def test_damaged_weights(build_dir: Path, config: Path) -> None:
    weights = folder_with_weights(build_dir, config) / "model.safetensors"
    whole = weights.read_bytes()
    ranks = ("-n", 2, "--backend", "thread")
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in error_of(build_dir, "train", config, *ranks)
    weights.write_bytes(b"\xff" * 64)
    assert "model.safetensors" in error_of(build_dir, "train", config, *ranks)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name.endswith("q_proj.weight"))
    header[name]["shape"] = header[name]["shape"][::-1][:1] + [1] + header[name]["shape"][:1]
    changed = json.dumps(header).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + size :])
    line = error_of(build_dir, "train", config, *ranks)
    assert str(weights.parent) in line and name in line
    weights.unlink()
    assert str(weights.parent) in error_of(build_dir, "train", config, *ranks)


def test_full_disk_leaves_the_last_checkpoint(build_dir: Path, config: Path) -> None:
    """A file size limit stands for the full disk; the earlier checkpoint stays good."""
    write_config(config, steps=2, schedule={"steps": 4}, save_plans=False, timeline_steps=0)
    meshloom(build_dir, "train", config)
    checkpoints = config.parent / "run/checkpoints"
    before = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    assert before
    write_config(config, steps=4, schedule={"steps": 4}, save_plans=False, timeline_steps=0)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from meshloom.cli import main; main()"
    )
    result = running.run(
        build_dir, [sys.executable, "-c", limited, "train", config, "-n", 2, "--backend", "thread"],
        good=False,
    )
    assert result.stderr.count("error: ") == 1 and "checkpoints" in result.stderr, result.stderr
    assert {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()} == before
    meshloom(build_dir, "train", config)
    assert len(losses(config.parent / "run")) == 4


def test_nan_stops_and_names_the_place(build_dir: Path, config: Path) -> None:
    write_config(config, optimizer={"lr": 1e200}, clip_norm=0.0, schedule={"kind": "constant"})
    line = error_of(build_dir, "train", config, "-n", 2, "--backend", "thread")
    assert "NaN" in line and "rank" in line and "samples" in line


def test_killed_rank(build_dir: Path, tmp_path: Path) -> None:
    """kill -9 of one rank of three: all end, the exit code tells, the last checkpoint stays good."""
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(
        tmp_path / "config.yaml", steps=100_000, schedule={"steps": 100}, save_plans=False,
        checkpoint={"every_steps": 5}, timeline_steps=0,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "meshloom", "train", str(config), "--ranks", "3"],
        env=running.environment(build_dir, MESHLOOM_TIMEOUT_SECONDS="30"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.monotonic() + running.LIMIT
    checkpoints = tmp_path / "run/checkpoints"
    while time.monotonic() < deadline and not list(checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    # Meanwhile nobody else gets into the folder, whatever the launcher.
    line = error_of(build_dir, "train", config)
    assert f"{tmp_path / 'run'} is in use by process" in line and "--run" in line
    victim = next(
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/environ")
        if b"OMPI_COMM_WORLD_RANK=1\0" in _read(entry)
        and str(config).encode() in _read(entry.parent / "cmdline")
    )
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    _, errors = process.communicate(timeout=running.LIMIT)
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    assert "rank 1" in errors, errors
    text = json.loads(config.read_text())
    newest = max(int(p.name.split("-")[1]) for p in checkpoints.glob("step-*"))
    config.write_text(json.dumps(text | {"steps": newest + 2}))
    result = meshloom(build_dir, "train", config)
    assert f"at step {newest}" in result.stdout
    assert len(losses(tmp_path / "run")) == newest + 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_debug_shows_the_traceback(build_dir: Path, tmp_path: Path) -> None:
    result = meshloom(build_dir, "train", tmp_path / "nowhere.yaml", "--debug", good=False)
    assert "Traceback" in result.stderr


def test_ranks_report_an_error_once(build_dir: Path, config: Path) -> None:
    """Three processes fail alike: one line, no talk of mpirun."""
    result = meshloom(build_dir, "train", config, "--ranks", 3, "--data", config.parent / "absent", good=False)
    assert result.stderr.count("error:") == 1 and "absent" in result.stderr
    assert "mpirun" not in result.stderr


def test_checkpoint_of_another_model(build_dir: Path, config: Path) -> None:
    write_config(config, steps=2)
    meshloom(build_dir, "train", config)
    write_config(config, model={"config": running.MODEL | {"rope_theta": 77.0}})
    line = error_of(build_dir, "train", config)
    assert "rope_theta" in line and "checkpoint" in line


def test_evaluation_without_held_out_documents(build_dir: Path, config: Path) -> None:
    write_config(config, evaluate_every=2)
    assert "held_out_fraction" in error_of(build_dir, "train", config)


def test_capacity_that_no_document_fits(build_dir: Path, config: Path) -> None:
    write_config(config, data={"max_document_tokens": 0})
    line = error_of(build_dir, "train", config, "--capacity", 20, "-n", 2, "--backend", "thread")
    assert "global_batch_tokens" in line and "20" in line


def test_pretrained_weights_without_a_tokenizer(build_dir: Path, config: Path) -> None:
    model = folder_with_weights(build_dir, config)
    (model / "tokenizer.model").unlink()
    (config.parent / "a.txt").write_text("some text " * 50)
    line = error_of(build_dir, "train", config, "--data", config.parent / "a.txt")
    assert "data.tokenizer" in line and "a.txt" in line


def test_documents_of_the_wrong_type(build_dir: Path, tmp_path: Path) -> None:
    program = (
        "import meshloom as ml\n"
        "for bad in ([[1, 2], [1.5]], ['abc'], [{'token': [1]}], [[2**40]]):\n"
        "    try:\n"
        "        ml.data.documents(iter(bad))\n"
        "    except ml.DataError:\n"
        "        continue\n"
        "    raise SystemExit(f'{bad} was taken')\n"
    )
    running.run(build_dir, [sys.executable, "-c", program])
