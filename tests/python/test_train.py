"""`meshloom train` and the launchers that people have: they all do the same thing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import running
from running import MPIRUN, losses, meshloom, run, write_config, write_corpus

# fp64 sums in another order; one wrong token moves a loss by 1e-3.
SAME = dict(rel=1e-10)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus.jsonl")
    return write_config(tmp_path / "config.yaml")


@pytest.fixture(scope="module")
def reference(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the tiny run in one process."""
    folder = tmp_path_factory.mktemp("reference")
    write_corpus(folder / "corpus.jsonl")
    meshloom(build_dir, "train", write_config(folder / "config.yaml"))
    result = losses(folder / "run")
    assert len(result) == 4 and result[-1] < result[0]
    return result


def test_run_folder_and_closing_table(build_dir: Path, config: Path) -> None:
    result = meshloom(build_dir, "train", config, "--ranks", 3, "--backend", "thread")
    folder = config.parent / "run"
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "plans", "checkpoint", "checkpoints", "timeline.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len(list((folder / "plans").iterdir())) == 4
    for entry in running.metrics(folder):
        assert {"step", "loss", "tokens", "tokens_per_second", "balance_efficiency",
                "exchange_bytes"} <= set(entry)
    tracks = {event["pid"] for event in json.loads((folder / "timeline.json").read_text())}
    assert len(tracks) == 3
    kinds = {event.get("name") for event in json.loads((folder / "timeline.json").read_text())}
    assert {"forward", "backward", "exchange", "wait"} <= kinds
    for row in ("loss, first step", "loss, last step", "tokens/s", "predicted makespan, static",
                "predicted makespan, naive_hdp", "predicted makespan, balanced"):
        assert row in result.stdout
    assert re.search(r"step 4/4 +loss \d.*tokens/s +balance .*% +exchange .* left 0:00", result.stdout)


def test_transformers_opens_the_checkpoint(build_dir: Path, config: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    meshloom(build_dir, "train", config)
    model = AutoModelForCausalLM.from_pretrained(config.parent / "run/checkpoint", dtype=torch.float32)
    assert model.config.model_type == "qwen3_moe"
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, 300) and torch.isfinite(logits).all()
    assert (config.parent / "run/checkpoint/tokenizer.model").is_file()


@pytest.mark.parametrize(
    "how",
    ["threads", "own_ranks", "mpirun", "script", "script_mpirun", "c++", "c++_mpirun"],
)
def test_every_launcher_gives_the_same_losses(
    build_dir: Path, config: Path, reference: list[float], how: str
) -> None:
    python, script = sys.executable, running.ROOT / "examples/01_train_text/train.py"
    program = build_dir / "examples/train_text"
    command: list[object] = {
        "threads": [python, "-m", "meshloom", "train", config, "--ranks", 5, "--backend", "thread"],
        "own_ranks": [python, "-m", "meshloom", "train", config, "--ranks", 2],
        "mpirun": [*MPIRUN, "-n", 3, python, "-m", "meshloom", "train", config],
        "script": [python, script, config],
        "script_mpirun": [*MPIRUN, "-n", 2, python, script, config],
        "c++": [program, config],
        "c++_mpirun": [*MPIRUN, "-n", 4, program, config],
    }[how]
    run(build_dir, command)
    assert losses(config.parent / "run") == pytest.approx(reference, **SAME)


def test_own_strategies_reach_the_trainer(
    build_dir: Path, config: Path, reference: list[float]
) -> None:
    name = f"{running.ROOT}/examples/extend_balance_strategy/longest_first.py:LongestFirst"
    meshloom(build_dir, "check-strategy", name, "--problems", 40)
    meshloom(build_dir, "train", config, "-n", 3, "--backend", "thread", "--strategy", name)
    assert losses(config.parent / "run") == pytest.approx(reference, **SAME)
    plan = json.loads((config.parent / "run/plans/step-00000001.json").read_text())
    assert "LongestFirst" in plan["strategy"]

    program = build_dir / "examples/extend_balance_strategy"
    run(build_dir, [*MPIRUN, "-n", 2, program, config])
    assert losses(config.parent / "run_longest_first") == pytest.approx(reference, **SAME)


def test_a_broken_strategy_is_refused_by_name(build_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lossy.py").write_text(
        "import meshloom as ml\n"
        "class Lossy(ml.BalanceStrategy):\n"
        "    def assign(self, problem):\n"
        "        return [ml.Unit(ranks=[0], samples=[problem.samples[0].id])]\n"
    )
    result = meshloom(build_dir, "check-strategy", f"{tmp_path}/lossy.py:Lossy", good=False)
    assert "error:" in result.stderr and "sample" in result.stderr
    assert "Traceback" not in result.stderr


def test_stopped_by_a_signal_it_saves_and_continues(
    build_dir: Path, tmp_path: Path
) -> None:
    """SIGINT of the launcher's process; the continued run ends like one that never stopped."""
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(tmp_path / "config.yaml", steps=300)
    command = [sys.executable, "-m", "meshloom", "train", str(config), "--ranks", "2"]
    process = subprocess.Popen(
        command, env=running.environment(build_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + running.LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=running.LIMIT)
    assert process.returncode == 0, output
    assert "stopping after this step" in output
    assert "the same command continues" in output
    done = len(losses(tmp_path / "run"))
    assert 3 < done < 300

    steps = done + 3
    write_config(tmp_path / "config.yaml", steps=steps)
    # the schedule's length is the run's: give it, so that both runs have the same learning rates
    changes = {"steps": steps, "schedule": {"steps": 300}}
    write_config(tmp_path / "config.yaml", **changes)
    result = meshloom(build_dir, "train", config, "--ranks", 2)
    assert "continuing from" in result.stdout
    continued = losses(tmp_path / "run")
    straight = write_config(tmp_path / "straight.yaml", run=str(tmp_path / "straight"), **changes)
    meshloom(build_dir, "train", straight, "-n", 2, "--backend", "thread")
    assert continued == pytest.approx(losses(tmp_path / "straight"), **SAME)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_a_rank_save_and_end(
    build_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(tmp_path / "config.yaml", steps=100_000, save_plans=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "meshloom", "train", str(config)],
        env=running.environment(build_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.monotonic() + running.LIMIT
    while time.monotonic() < deadline and not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=running.LIMIT)
    assert process.returncode == 0, errors
    steps = len(losses(tmp_path / "run"))
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert saved == [f"step-{steps:08}"]


def test_tensorboard_reads_the_events(build_dir: Path, config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    meshloom(build_dir, "train", config)
    events = EventAccumulator(str(config.parent / "run"))
    events.Reload()
    tag = next(tag for tag in events.Tags()["scalars"] if tag.split("/")[-1] == "loss")
    scalars = events.Scalars(tag)
    assert [event.step for event in scalars] == [0, 1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx(losses(config.parent / "run"), rel=1e-6)


def test_resume_on_another_number_of_ranks(build_dir: Path, config: Path, reference: list[float]) -> None:
    """Two steps on 4 ranks, the rest on 3: the same losses as one rank throughout."""
    folder = config.parent
    write_config(config, steps=2, schedule={"steps": 4})
    meshloom(build_dir, "train", config, "-n", 4, "--backend", "thread")
    write_config(config, steps=4, schedule={"steps": 4})
    meshloom(build_dir, "train", config, "-n", 3, "--backend", "thread")
    assert losses(folder / "run") == pytest.approx(reference, **SAME)


def test_tokenizer_json_is_used(build_dir: Path, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    write_corpus(tmp_path / "corpus.jsonl")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").open()]
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = write_config(tmp_path / "config.yaml", data={"tokenizer": str(tmp_path / "tokenizer.json")})
    meshloom(build_dir, "train", config, "-n", 2, "--backend", "thread")
    assert len(losses(tmp_path / "run")) == 4
    assert not list((tmp_path / "run/cache").glob("tokenizer-*"))


def test_planning_is_hidden(build_dir: Path, config: Path) -> None:
    """After the first step a plan is ready before it is needed."""
    write_config(config, steps=12, global_batch_tokens=2000)
    meshloom(build_dir, "train", config)
    entries = running.metrics(config.parent / "run")[1:]
    waited = sum(entry["planning_seconds"] for entry in entries)
    assert waited < 0.01 * sum(entry["seconds"] for entry in entries)


def test_training_works_from_a_python_iterable(build_dir: Path, tmp_path: Path) -> None:
    """A script with its own documents, model config and loop."""
    script = tmp_path / "own.py"
    script.write_text(f"""
import json
import meshloom as ml

documents = [{{"tokens": [(7 * i + j) % 250 for j in range(5 + 3 * i)]}} for i in range(20)]
documents[3]["loss_mask"] = [j % 2 for j in range(14)]
config = ml.TrainConfig(run={str(tmp_path / "run")!r}, steps=3, dtype="float64")
config.global_batch_tokens = 150
config.optimizer.lr = 1e-2
model = ml.ModelConfig.from_json(json.dumps({running.MODEL!r}))
def rank(world):
    loader = ml.data.Loader([(ml.data.documents(documents), 1.0)], global_batch_tokens=150, vocab_size=300)
    trainer = ml.make_trainer(config, world, model=model, loader=loader)
    for step in trainer:
        if world.rank == 0:
            print(json.dumps({{"loss": step.loss}}))
ml.run_thread_ranks(2, rank)
try:
    ml.TrainConfig(stepz=3)
except ml.InvalidArgument as error:
    assert "stepz" in str(error)
else:
    raise SystemExit("an unknown field was taken")
""")
    result = run(build_dir, [sys.executable, script])
    assert len(result.stdout.splitlines()) == 3
    assert losses(tmp_path / "run") == [json.loads(line)["loss"] for line in result.stdout.splitlines()]


def test_help_is_worth_reading(build_dir: Path) -> None:
    for command in ("train", "gradients", "check-strategy"):
        text = meshloom(build_dir, command, "--help", COLUMNS="100").stdout
        assert "Example" in text and f"meshloom {command}" in text


def test_ranks_end_with_their_launcher(build_dir: Path, tmp_path: Path) -> None:
    """kill -9 of `meshloom train` leaves no rank behind."""
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(tmp_path / "config.yaml", steps=100_000, save_plans=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "meshloom", "train", str(config), "--ranks", "2"],
        env=running.environment(build_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + running.LIMIT
    while time.monotonic() < deadline and not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()

    def ranks() -> list[str]:
        mine = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(config) in text and int(entry.parent.name) != os.getpid():
                mine.append(text)
        return mine

    deadline = time.monotonic() + 30
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks()


def test_offloaded_activations_leave_nothing_behind(build_dir: Path, tmp_path: Path) -> None:
    """kill -9 of a run with activations in a file: its folder is as empty as it was while it ran."""
    write_corpus(tmp_path / "corpus.jsonl")
    spill = tmp_path / "spill"
    spill.mkdir()
    config = write_config(
        tmp_path / "config.yaml", steps=100_000, save_plans=False, global_batch_tokens=900,
        capacity_tokens=150, data={"max_document_tokens": 290},
        offload={"enabled": True, "resident_layers": 1, "folder": str(spill)},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "meshloom", "train", str(config)],
        env=running.environment(build_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "run"
    deadline = time.monotonic() + running.LIMIT
    moved = 0.0
    while time.monotonic() < deadline and moved == 0.0:
        assert process.poll() is None
        time.sleep(0.05)
        if (folder / "metrics.jsonl").exists():
            whole_lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
            moved = sum(json.loads(line)["offload_bytes"] for line in whole_lines)
    process.kill()
    process.wait()
    assert moved > 0.0
    assert not list(spill.iterdir())


def test_offload_without_a_folder_to_write_to(build_dir: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(
        tmp_path / "config.yaml", global_batch_tokens=900, capacity_tokens=150,
        data={"max_document_tokens": 290},
        offload={"enabled": True, "resident_layers": 1, "folder": str(tmp_path / "missing")},
    )
    result = meshloom(build_dir, "train", config, good=False)
    for words in ("offloaded activations", str(tmp_path / "missing"), "No such file"):
        assert words in " ".join(result.stderr.split())


def test_quickstart_config_trains(build_dir: Path, tmp_path: Path) -> None:
    """One step of examples/quickstart.sh's run, on the headers of this repository."""
    result = meshloom(
        build_dir, "train", running.ROOT / "examples/quickstart.yaml", "--ranks", 4, "--steps", 1,
        "--data", running.ROOT / "include", "--run", tmp_path / "run",
    )
    assert "14.8 M parameters" in result.stdout
    (loss,) = losses(tmp_path / "run")
    assert 8.0 < loss < 10.0  # ln 8192 is 9.0: a fresh model knows nothing


def test_checkpoints_of_any_layout_become_folders_for_transformers(
    build_dir: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(
        tmp_path / "c.yaml", layout={"tp": 2, "pp": 2}, parallel={"pipeline": "zb_h1"}, steps=2
    )
    meshloom(build_dir, "train", config, "--ranks", 4, "--backend", "thread")
    out = tmp_path / "converted"
    meshloom(build_dir, "convert", tmp_path / "run", out, "--dtype", "float64")
    converted = load_file(out / "model.safetensors")
    expected = load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert set(converted) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
    wrong = meshloom(build_dir, "convert", tmp_path / "nothing", out, good=False)
    assert "no checkpoint" in wrong.stderr


def test_experts_move_while_training(build_dir: Path, tmp_path: Path) -> None:
    """The same losses and the same model as where they stay, `convert` included."""
    import torch
    from safetensors.torch import load_file

    write_corpus(tmp_path / "corpus.jsonl")
    models = []
    for every in (0, 1):
        config = write_config(
            tmp_path / "config.yaml",
            run=str(tmp_path / f"run-{every}"),
            model={"config": running.MODEL | {"num_experts": 6}},
            layout={"hdp": 4, "ep": 2},
            parallel={"experts": {"replan_every": every, "least_gain": 0.0}},
            clip_norm=0.0,
            deterministic=True,
        )
        meshloom(build_dir, "train", config, "--ranks", 4, "--backend", "thread")
        out = tmp_path / f"converted-{every}"
        meshloom(build_dir, "convert", tmp_path / f"run-{every}", out, "--dtype", "float64")
        models.append(load_file(out / "model.safetensors"))
    stayed, moved = (running.metrics(tmp_path / f"run-{every}") for every in (0, 1))
    assert sum(step["experts_moved"] for step in moved) > 0
    assert all("experts_moved" not in step for step in stayed)
    assert [step["loss"] for step in moved] == [step["loss"] for step in stayed]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor), name
