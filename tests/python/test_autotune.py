"""`meshloom autotune`: the fastest layouts that fit, on small models, without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import running

GIB = 1 << 30
RANKS = 8
LENGTHS = [812, 24_000, 40, 3_771, 9_000, 15_000, 2, 700, 700, 12_000] * 2
DENSE = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
}
MIXTURE = {
    "model_type": "qwen3_moe", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1024,
    "moe_intermediate_size": 256, "num_experts": 6, "num_experts_per_tok": 2,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "mlp_only_layers": [0],
}
SETTING: dict[str, Any] = {"ranks": RANKS, "device_memory_gib": 6.0}
# Rounding of sums over ranks and steps in another order.
ROUNDING = 1e-9


@pytest.fixture(scope="module")
def ml(build_dir: Path) -> Any:
    sys.path.insert(0, str(build_dir / "python"))
    import meshloom

    return meshloom


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder and a file of lengths."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DENSE))
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("".join(f"{length}\n" for length in LENGTHS))
    return tmp_path / "model", lengths


@pytest.fixture(scope="module")
def cli(build_dir: Path) -> Callable[..., str]:
    def call(*arguments: object, good: bool = True) -> str:
        done = running.meshloom(build_dir, "autotune", *arguments, good=good, COLUMNS="80")
        return done.stdout if good else done.stderr

    return call


def parts(one: Any) -> dict[str, Any]:
    """What a candidate or a result fixes."""
    layout = one.layout
    return {name: getattr(layout, name) for name in ("tp", "hdp", "pp", "ep", "chunks")} | {
        "zero": one.zero, "recompute": one.recompute, "pipeline": one.pipeline,
    }


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_fastest_is_that_of_an_exhaustive_simulation(ml: Any, model: dict[str, Any]) -> None:
    from meshloom._candidates import candidates
    from meshloom._model_sizes import read_model

    setting = SETTING | {"global_batch_tokens": 60_000, "steps": 2}
    found = ml.autotune(model, LENGTHS, top=3, **setting)
    assert found.left_out == 0 and found.slower > 0
    times = []
    for one in candidates(read_model(model), RANKS):
        try:
            alone = ml.autotune(model, LENGTHS, fixed=parts(one), **setting)
        except ml.InvalidArgument:
            continue
        assert [parts(result) for result in alone.layouts] == [parts(one)]
        times.append(alone.layouts[0].step_seconds)
    assert len(times) == found.simulated + found.slower
    assert [one.step_seconds for one in found.layouts] == sorted(times)[:3]



def test_sizes_of_deepseek_v3_are_the_published_ones() -> None:
    """671B parameters, 37B of them a token (arXiv 2412.19437, without its MTP module)."""
    from meshloom._model_sizes import read_model

    config = dict(
        model_type="deepseek_v3", hidden_size=7168, num_attention_heads=128, num_key_value_heads=128,
        num_hidden_layers=61, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
        num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=3, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=129280,
    )
    sizes = read_model(config)
    assert sizes.parameters == pytest.approx(671e9, rel=1e-3)
    assert sizes.active_parameters == pytest.approx(37e9, rel=0.02)
    assert sizes.parameters == sizes.forecast_sizes.parameter_count

def test_bounds_stay_below_simulated_times(ml: Any) -> None:
    from meshloom import tuning

    for model in (DENSE, MIXTURE):
        everything = ml.autotune(model, LENGTHS, top=10_000, **SETTING)
        assert everything.slower == 0
        best = everything.layouts[0].step_seconds
        assert best == ml.autotune(model, LENGTHS, top=1, **SETTING).layouts[0].step_seconds
    sizes = tuning.read_model(MIXTURE)
    pool = tuning._pool(LENGTHS)
    cluster, base, _ = tuning._read_cluster(None, sizes, None)
    setting = tuning._Setting(sizes, cluster, base, 6.0 * GIB, [pool], max(LENGTHS))
    fitting, _ = tuning._fit(setting, RANKS, {})
    assert len(fitting) > 50
    for one in fitting:
        simulated = tuning._simulate(setting, one)
        assert one.bound <= simulated.step_seconds * (1 + ROUNDING), one.candidate
        room = tuning.RESERVED * setting.device_bytes + simulated.memory_bytes
        assert room <= setting.device_bytes * (1 + ROUNDING), one.candidate


def test_result_is_what_its_plan_simulates(ml: Any) -> None:
    """A result's capacity and layout, planned and simulated by hand, hold its samples."""
    found = ml.autotune(DENSE, LENGTHS, top=5, **SETTING)
    for one in found.layouts:
        lockstep = "hdp" if one.zero > 1 else "none"
        plan = ml.plan(
            LENGTHS, layout=one.layout, capacity_tokens=one.capacity_tokens, lockstep=lockstep
        )
        ml.verify(plan, ml.compile(plan, layers=8, schedule=one.pipeline))
        assert one.step_seconds > 0 and 0 <= one.bubble < 1
        assert one.memory_bytes <= SETTING["device_memory_gib"] * GIB
        assert one.tokens_per_second == pytest.approx(sum(LENGTHS) / one.step_seconds)


def test_sizes_are_those_of_published_models(ml: Any) -> None:
    del ml
    from meshloom._model_sizes import read_model

    llama = {
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32_000,
        "num_hidden_layers": 32, "intermediate_size": 11_008, "num_key_value_heads": None,
    }
    assert read_model(llama).parameters == 6_738_415_616  # Llama 2 7B's own count
    mixtral = llama | {
        "model_type": "mixtral", "intermediate_size": 14_336, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }
    assert read_model(mixtral).parameters == 46_702_792_704  # Mixtral 8x7B's own count


def test_memory_is_that_of_the_forecast(ml: Any) -> None:
    from meshloom._layout_memory import stage_memory
    from meshloom._model_sizes import read_model

    dense = read_model(DENSE)
    assert dense.forecast_sizes.parameter_count == dense.parameters
    assert read_model(MIXTURE).forecast_sizes.parameter_count == read_model(MIXTURE).parameters

    def states(zero: int, config: dict[str, Any] = DENSE, **sizes: int) -> float:
        (stage,) = stage_memory(read_model(config), ml.Layout(**sizes), "", zero, "none")
        return float(stage.states)

    # bf16 parameters, fp32 gradients, masters and moments; beside them two layers that are whole,
    # sums on their way and a chunk of logits.
    count, layer = dense.parameters, dense.embedding
    assert count * (2 + 4 + 12 / 4) < states(1, hdp=4) < count * (2 + 4 + 16 / 4) + 8 * layer
    assert count * (2 + 16 / 4) < states(2, hdp=4) < states(1, hdp=4)
    assert count * 18 / 4 < states(3, hdp=4) < states(2, hdp=4)
    for sizes in ({}, {"hdp": 2, "tp": 2}, {"pp": 4}, {"pp": 2, "hdp": 2}):
        for zero in (1, 3):
            for recompute in ("none", "full"):
                layout = ml.Layout(**sizes)
                lines = stage_memory(dense, layout, "", zero, recompute)
                setting = ml.MemorySetting()
                setting.model, setting.layout = dense.forecast_sizes, layout
                setting.zero, setting.recompute, setting.element_bytes = zero, recompute, 2
                tokens = 50_000
                limits = ml.StepLimits(
                    capacity=tokens, global_batch=2 * layout.pp * layout.hdp * tokens
                )
                whole = [stage.total for stage in ml.forecast_memory(setting, limits)]
                assert [s.states + s.token * tokens for s in lines] == pytest.approx(whole, rel=0.01)
    # A stage holds as many micro-batches as stages follow it, and its own.
    first, second, *_ = stage_memory(dense, ml.Layout(pp=4), "1f1b", 1, "none")
    assert 1.1 < first.token / second.token < 4 / 3


def test_traffic_is_that_of_the_closed_forms(ml: Any) -> None:
    from meshloom import _layout_costs as costs
    from meshloom._candidates import Candidate
    from meshloom._model_sizes import read_model

    model = read_model(MIXTURE)
    experts = sum(model.layer_experts(i) for i in range(model.layers))
    tokens = 4 * 100
    for zero, ep in ((1, 1), (1, 2), (1, 4), (2, 2), (3, 1)):
        one = Candidate(1, 4, 1, ep, 1, "", zero, "none")
        load = costs.workload(model, one, ml.Workload.llama_7b(), 1.0)
        plan = ml.plan([100] * 4, layout=one.layout, capacity_tokens=100, lockstep=one.lockstep)
        sent = ml.simulate(plan, ml.Cluster(), workload=load).bytes_inside
        replicas = 4 // ep
        shares = (model.parameters - experts) * 3 / 4 + experts / ep * (replicas - 1) / replicas
        rows = tokens * 4 * sum(model.moe_layers) * model.experts_per_token * (ep - 1) / ep
        # One slot. ZeRO 2 scatters gradients in it, ZeRO 3 gathers parameters twice beside.
        moved = {1: 4 + 2, 2: 4 + 2, 3: 4 + 2 * 2}[zero]
        assert sent == pytest.approx(4 * shares * moved + rows * model.hidden * 2)


def test_tensor_traffic_grows_with_recomputation(ml: Any) -> None:
    """docs/layouts.md: ten times the rows of others a dense layer, five times a mixture's, and twice
    for embedding and head each."""
    from meshloom import _layout_costs as costs
    from meshloom._candidates import Candidate
    from meshloom._model_sizes import read_model

    for config, layers in ((DENSE, (8, 0)), (MIXTURE, (1, 4))):
        model = read_model(config)
        for recompute, dense, mixture in (("none", 10, 5), ("selective", 11, 5), ("full", 14, 7)):
            one = Candidate(2, 1, 1, 1, 1, "", 1, recompute)
            load = costs.workload(model, one, ml.Workload.llama_7b(), 1.0)
            plan = ml.plan([100], layout=one.layout, capacity_tokens=100)
            sent = ml.simulate(plan, ml.Cluster(), workload=load).bytes_inside
            meetings = layers[0] * dense + layers[1] * mixture + 4
            # Each of two ranks sends half of the rows.
            assert sent == pytest.approx(2 * meetings * (100 / 2) * model.hidden * 2)


def test_what_is_fixed_stays(ml: Any) -> None:
    fixed = {"tp": 2, "zero": 3, "recompute": "full"}
    found = ml.autotune(DENSE, LENGTHS, fixed=fixed, top=100, **SETTING)
    assert len(found.layouts) > 3
    for one in found.layouts:
        assert fixed.items() <= parts(one).items()
        assert one.layout.world_size == RANKS
    three = ml.autotune(DENSE, LENGTHS, fixed={"chunks": 3, "pp": 2}, top=1, **SETTING).layouts[0]
    assert (three.layout.chunks, three.pipeline) == (3, "interleaved_1f1b")
    with pytest.raises(ml.InvalidArgument, match="tp=3.*divide 16 heads"):
        ml.autotune(DENSE, LENGTHS, fixed={"tp": 3}, **SETTING)


def test_same_arguments_give_the_same_result(ml: Any) -> None:
    def run(seed: int) -> list[dict[str, Any]]:
        found = ml.autotune(
            DENSE, LENGTHS, seed=seed, global_batch_tokens=40_000, steps=2, top=20, **SETTING
        )
        return [one.to_dict() for one in found.layouts]

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_more_memory_never_slows_down_much(ml: Any) -> None:
    """Everything that fits less fits more; what a planner makes of more capacity may differ."""
    less = ml.autotune(DENSE, LENGTHS, ranks=RANKS, device_memory_gib=4.0)
    more = ml.autotune(DENSE, LENGTHS, ranks=RANKS, device_memory_gib=16.0)
    assert sum(less.dropped.values()) > sum(more.dropped.values())
    assert more.layouts[0].step_seconds <= 1.05 * less.layouts[0].step_seconds


def test_model_that_does_not_fit_says_what_is_missing(ml: Any) -> None:
    with pytest.raises(ml.InvalidArgument) as caught:
        ml.autotune(DENSE, LENGTHS, ranks=RANKS, device_memory_gib=0.25)
    text = str(caught.value)
    for part in ("fits 0.25 GiB", "GiB of states", "tokens of the longest sample (24000)",
                 "GiB are missing", "device memory of", "or 32 ranks"):
        assert part in text, text
    assert "samples of at most" not in text  # there is no room for any
    needed = float(text.split("device memory of ")[1].split(" GiB")[0])
    assert ml.autotune(DENSE, LENGTHS, ranks=RANKS, device_memory_gib=needed * 1.01).layouts
    assert ml.autotune(DENSE, LENGTHS, ranks=32, device_memory_gib=0.25).layouts
    long = [*LENGTHS, 10_000_000]
    with pytest.raises(ml.InvalidArgument, match="samples of at most [0-9]+ tokens") as caught:
        ml.autotune(DENSE, long, ranks=RANKS, device_memory_gib=6.0)
    held = int(str(caught.value).split("at most ")[1].split()[0])
    assert ml.autotune(DENSE, [held], ranks=RANKS, device_memory_gib=6.0).layouts


def test_command(
    build_dir: Path, cli: Callable[..., str], files: tuple[Path, Path], tmp_path: Path
) -> None:
    model, lengths = files
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{nodes: 1, ranks_per_node: 8, device_memory_gib: 6}")
    common = (model, "--lengths", lengths, "--cluster", cluster, "--layout", "tp=2", "--top", 3)
    found = json.loads(cli(*common, "--json"))
    assert len(found["layouts"]) == 3 and all(one["layout"]["tp"] == 2 for one in found["layouts"])
    best = found["layouts"][0]
    text = cli(*common)
    assert "\r" not in text
    last = text.splitlines()[-1]
    assert last.startswith("config.yaml: layout: {tp: 2, ")
    assert last.endswith(f"capacity_tokens: {best['capacity_tokens']}")
    assert f"{best['memory_bytes'] / GIB:.1f}" in text.splitlines()[1]
    running.meshloom(  # the simulator takes the same file
        build_dir, "plan", "--lengths", lengths, "--hdp", 8, "--capacity", 16_384, "--out",
        tmp_path / "plan.json",
    )
    running.meshloom(build_dir, "simulate", tmp_path / "plan.json", "--cluster", cluster)
    whole = cli(model, "--lengths", lengths, "--ranks", 8, "--device-memory-gib", 6, "--layout",
                "tp=2", "--top", 3, "--json")
    assert json.loads(whole) == found


def test_bad_input_is_one_line(
    cli: Callable[..., str], files: tuple[Path, Path], tmp_path: Path
) -> None:
    model, lengths = files
    other = tmp_path / "other.json"
    other.write_text(json.dumps(DENSE | {"model_type": "gpt2"}))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(DENSE | {"hidden_size": 0}))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("device_memory_gib: much\n")
    sized = ("--ranks", 8, "--device-memory-gib", 6)
    mix = ("--lengths", lengths)
    for arguments, expected in (
        ((model, *mix, "--ranks", 8), "how much memory has a rank"),
        ((model, *mix, "--device-memory-gib", 6), "how many ranks"),
        ((model, *mix, *sized, "--layout", "tp"), "'tp' is not one KEY=VALUE"),
        ((model, *mix, *sized, "--layout", "dp=2"), "'dp' cannot be fixed"),
        ((model, *mix, *sized, "--layout", "zero=4"), "zero is 4, expected one of: 1, 2, 3"),
        ((model, *mix, *sized, "--top", 0), "top is 0"),
        ((model, *mix, *sized, "--tflops", -1), "tflops is -1"),
        ((model, *mix, *sized, "--dtype", "int8"), "dtype is 'int8'"),
        ((model, *mix, *sized, "--global-batch-tokens", 9), "global_batch_tokens is 9"),
        ((model, *mix, "--ranks", 8, "--cluster", cluster), "device_memory_gib is 'much'"),
        ((other, *mix, *sized), 'model_type is "gpt2"; known: llama'),
        ((broken, *mix, *sized), "hidden_size is 0, expected a positive integer"),
        ((tmp_path / "none.json", *mix, *sized), "No such file"),
    ):
        error = cli(*arguments, good=False)
        assert expected in error and error.count("\n") == 1, error


def test_time_follows_the_rate_of_a_rank(ml: Any) -> None:
    """Where only computation takes time, twice the rate is half the time."""
    fast = "{bandwidth: 1e30, latency: 0}"
    cluster = ml.Cluster.from_yaml(f"{{inside: {fast}, between: {fast}}}")
    options = SETTING | {"cluster": cluster, "fixed": {"pp": 1, "tp": 1, "recompute": "none"}}
    slow, quick = (ml.autotune(DENSE, [512] * 8, tflops=rate, **options) for rate in (100.0, 200.0))
    assert (slow.tflops, quick.tflops) == pytest.approx((100.0, 200.0))
    # 3 x 2 operations a token and parameter but the look-up, and half of the pairs' 4 a dimension.
    parameters = 8 * (1024 * 1024 * 2.5 + 3 * 1024 * 2816 + 2 * 1024) + 32_000 * 1024 + 1024
    work = 3 * (2 * 512 * parameters + 8 * 512**2 / 2 * 4 * 1024)
    assert slow.layouts[0].step_seconds == pytest.approx(work / 100e12)
    assert quick.layouts[0].step_seconds == pytest.approx(work / 200e12)


def test_searching_never_imports_torch(build_dir: Path) -> None:
    code = (
        f"import sys, meshloom as ml; found = ml.autotune({DENSE}, [500] * 8, ranks=4,"
        " device_memory_gib=8); assert found.layouts and 'torch' not in sys.modules"
    )
    running.run(build_dir, [sys.executable, "-c", code])


def test_results_are_plain_data(ml: Any) -> None:
    (one,) = ml.autotune(DENSE, LENGTHS, top=1, **SETTING).layouts
    assert json.loads(json.dumps(one.to_dict()))["layout"]["hdp"] == one.layout.hdp
