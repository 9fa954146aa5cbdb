"""Loss and every gradient against transformers, for every supported family."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import transformers_oracle as oracle
from parity_cases import CASES, VOCABULARY, reference_program, settings_of
from safetensors.torch import load_file

# Both sides sum in fp64 in different orders; a wrong term is off by far more.
TOLERANCE = 1e-9
# What a sum of some hundred terms that cancel leaves in fp64, relative to its terms.
ROUNDING = 1e-14
# fp32 sums over some hundred to thousand terms.
SINGLE_TOLERANCE = 1e-5
BF16_EPSILON = 2.0**-8
# Two independent roundings of one computation differ in their errors by chance, not by twice.
HALF_FACTOR = 1.5

LENGTHS = [1, 2, 13, 29, 47]
# Gradients that are zero for a reason: the one expert that is chosen weighs 1 whatever the router
# says, so the router learns nothing.
VANISHING = {"qwen3_moe_top_one": "mlp.gate.weight"}
BALANCED = ["mixtral", "qwen3_moe", "qwen3_moe_dense_layers"]
BALANCE_FORMS = {
    "global": oracle.global_balance,
    "sequence": oracle.sequence_balance,
    "global_lagged": oracle.lagged_balance,
}
SINGLE = [
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "llama_rope_yarn_scales",
    "deepseek_v3", "deepseek_v3_biased_yarn",
]
# No routing among these that rounding could flip: dense, or every expert chosen.
HALF = ["llama_tied", "qwen2", "qwen3_windows", "mixtral_windows"]


def ours(folder: Path, documents: list[dict], out: Path, **options) -> dict[str, torch.Tensor]:
    sequences = out.with_suffix(".jsonl")
    oracle.write_documents(sequences, documents)
    flags = [
        str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)
    ]
    command = [reference_program(), "step", folder, sequences, out, *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return load_file(out)


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


def compare(
    loss: float,
    expected: dict[str, torch.Tensor],
    mine: dict[str, torch.Tensor],
    tolerance: float = TOLERANCE,
    zero: str = "",
) -> None:
    """Every tensor within `tolerance` of its own largest element, with no floor below it.

    Gradients whose names end with `zero` vanish identically, so that both sides hold rounding
    errors only: they are measured against the largest gradient of the model, by one rounding step.
    """
    mine = dict(mine)
    assert mine.pop("loss").item() == pytest.approx(loss, rel=tolerance, abs=0)
    assert set(mine) == set(expected)
    model_scale = max(map(largest, expected.values()))
    vanishing = 0
    for name, gradient in expected.items():
        assert mine[name].shape == gradient.shape, name
        if zero and name.endswith(zero):
            vanishing += 1
            assert largest(gradient) <= ROUNDING * model_scale, f"{name} does not vanish"
            assert largest(mine[name]) <= ROUNDING * model_scale, f"{name} does not vanish here"
            continue
        scale = largest(gradient)
        assert scale > ROUNDING * model_scale, f"{name}: the oracle's gradient vanishes"
        error = largest(mine[name].to(gradient.dtype) - gradient)
        assert error <= tolerance * scale, f"{name}: {error / scale}"
    assert vanishing > 0 or not zero


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_transformers(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    loss, model = oracle.gradients(model, documents)
    mine = ours(tmp_path / "model", documents, tmp_path / "ours.safetensors")
    expected = oracle.checkpoint_gradients(model, tmp_path / "gradients")
    compare(loss, expected, mine, zero=VANISHING.get(case, ""))


@pytest.mark.parametrize("case", BALANCED)
@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_balance_and_z_losses_are_the_written_out_ones(case, form, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    weights = {"balance": 0.3, "z_loss": 0.02}  # large enough that a slip shows
    plain, model = oracle.gradients(model, documents)
    loss, model = oracle.gradients(model, documents, balance_loss=BALANCE_FORMS[form], **weights)
    assert loss > plain * (1 + 0.01)
    # The lagged form takes its frequencies from the step before, here the same one.
    steps = 2 if form == "global_lagged" else 1
    out = tmp_path / "ours.safetensors"
    mine = ours(tmp_path / "model", documents, out, balance_form=form, steps=steps, **weights)
    compare(loss, oracle.checkpoint_gradients(model, tmp_path / "gradients"), mine)


def test_sequence_balance_of_sigmoid_routers_is_deepseeks(tmp_path):
    family, settings = settings_of("deepseek_v3")
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    loss, model = oracle.gradients(
        model, documents, balance=0.3, balance_loss=oracle.deepseek_sequence_balance
    )
    out = tmp_path / "ours.safetensors"
    mine = ours(tmp_path / "model", documents, out, balance_form="sequence", balance=0.3)
    compare(loss, oracle.checkpoint_gradients(model, tmp_path / "gradients"), mine)


def test_first_step_of_the_lagged_balance_loss_has_none(tmp_path):
    family, settings = settings_of("qwen3_moe")
    oracle.make_model(family, **settings).save_pretrained(tmp_path / "model")
    documents = oracle.random_documents([9, 17], VOCABULARY)
    plain = ours(tmp_path / "model", documents, tmp_path / "plain.safetensors")
    first = ours(
        tmp_path / "model", documents, tmp_path / "first.safetensors",
        balance=0.3, balance_form="global_lagged",
    )
    assert all(torch.equal(plain[name], first[name]) for name in plain)


@pytest.mark.parametrize("case", SINGLE)
def test_fp32_is_transformers_fp32(case, tmp_path):
    """Weights alike, both in fp32, each with its own order of sums."""
    family, settings = settings_of(case)
    oracle.make_model(family, **settings).save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    loss, model = oracle.gradients(
        oracle.load_model(tmp_path / "model", torch.float32), documents, fp64=False
    )
    mine = ours(tmp_path / "model", documents, tmp_path / "ours.safetensors", dtype="float32")
    assert {gradient.dtype for name, gradient in mine.items() if name != "loss"} == {torch.float32}
    compare(loss, oracle.checkpoint_gradients(model, tmp_path / "gradients"), mine, SINGLE_TOLERANCE)


def test_fp32_takes_its_rope_angles_in_fp32_as_transformers_does(tmp_path):
    """Sharp attention far from the start, where fp32 angles make another model than fp64 angles."""
    family, settings = settings_of("llama")
    model = oracle.make_model(family, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents([29, 1201], VOCABULARY)
    _, model = oracle.gradients(
        oracle.load_model(tmp_path / "model", torch.float32), documents, fp64=False
    )
    theirs = oracle.checkpoint_gradients(model, tmp_path / "gradients")
    single = ours(tmp_path / "model", documents, tmp_path / "single.safetensors", dtype="float32")
    double = ours(tmp_path / "model", documents, tmp_path / "double.safetensors")

    def distance(one: dict, other: dict) -> float:
        return max(largest(one[n] - other[n]) / largest(other[n]) for n in theirs)

    # Apart from the angles both are as far from each other as roundings take them.
    assert distance(single, double) > 3 * distance(single, theirs)


@pytest.mark.parametrize("case", HALF)
def test_bf16_is_no_farther_from_fp64_than_transformers_bf16(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    loss, model = oracle.gradients(model, documents)
    exact = oracle.checkpoint_gradients(model, tmp_path / "exact")
    their_loss, model = oracle.gradients(
        oracle.load_model(tmp_path / "model", torch.bfloat16), documents, fp64=False
    )
    theirs = oracle.checkpoint_gradients(model, tmp_path / "theirs")
    mine = ours(tmp_path / "model", documents, tmp_path / "ours.safetensors", dtype="bfloat16")
    assert abs(mine.pop("loss").item() - loss) <= HALF_FACTOR * max(
        abs(their_loss - loss), BF16_EPSILON * loss
    )
    assert {gradient.dtype for gradient in mine.values()} == {torch.float32}
    for name, gradient in exact.items():
        their_error = (theirs[name].double() - gradient).norm() / gradient.norm()
        my_error = (mine[name].double() - gradient).norm() / gradient.norm()
        assert my_error <= HALF_FACTOR * their_error, f"{name}: {my_error} against {their_error}"


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_fused_checkpoints_are_read_and_answered_in_kind(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    documents = oracle.random_documents([9, 17], VOCABULARY)
    hub = ours(tmp_path / "hub", documents, tmp_path / "hub.safetensors")
    fused = ours(tmp_path / "fused", documents, tmp_path / "fused.safetensors")
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {
        name: t.shape for name, t in fused.items() if name != "loss"
    }
    assert fused["loss"] == hub["loss"]
    inner = fused["model.layers.1.mlp.experts.gate_up_proj"].shape[1] // 2
    up = "block_sparse_moe.experts.3.w3" if case == "mixtral" else "mlp.experts.3.up_proj"
    hub_up = "model.layers.1." + up.replace(".3.", ".2.") + ".weight"
    assert torch.equal(
        fused["model.layers.1.mlp.experts.gate_up_proj"][2, inner:], hub[hub_up]
    )
