"""meshloom doctor: what was built, what was found, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from meshloom.cli import common

OK, OPTIONAL, MISSING = "ok", "optional", "missing"


@dataclass
class Finding:
    """One line of the report; `missing` things stop training, `optional` ones do not."""

    topic: str
    state: str
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Help")(doctor)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    text = (result.stdout or result.stderr).strip()
    return text.splitlines()[0] if text else f"exit code {result.returncode}"


def _package() -> list[Finding]:
    from meshloom import __version__

    build = importlib.import_module("meshloom._build_info")
    where = Path(__file__).parents[1]
    findings = [
        Finding("meshloom", OK, f"{__version__} in {where}"),
        Finding("build", OK, f"{build.BUILD_TYPE}, {build.COMPILER}, Python {platform.python_version()}"),
    ]
    try:
        importlib.import_module("meshloom._plan")
        findings.append(Finding("planning", OK, "the extension module _plan loads"))
    except ImportError as error:
        findings.append(
            Finding("planning", MISSING, f"_plan does not load: {error}", "build again: examples/setup.sh")
        )
    findings.append(_core(build.FEATURES["torch"], build.TORCH_VERSION))
    return findings


def _core(built: bool, wanted: str) -> Finding:
    if not built:
        return Finding(
            "training", MISSING, "built without LibTorch",
            f"pip install torch=={wanted or '2.11.0'}, then build again",
        )
    found = _version("torch")
    if found is None:
        return Finding("training", MISSING, "no torch in this environment", f"pip install torch=={wanted}")
    if found.split("+")[0] != wanted:
        return Finding(
            "training", MISSING, f"torch {found}, but Meshloom was built with {wanted}",
            f"pip install torch=={wanted}, or build again",
        )
    try:
        importlib.import_module("meshloom._core")
    except ImportError as error:
        return Finding("training", MISSING, f"_core does not load: {error}", "build again: examples/setup.sh")
    return Finding("training", OK, f"the extension module _core loads, torch {found}")


def _backends() -> list[Finding]:
    build = importlib.import_module("meshloom._build_info")
    features = build.FEATURES
    findings = [Finding("ranks: thread", OK if features["torch"] else OPTIONAL, "built in" if features["torch"] else "needs LibTorch")]
    mpirun = shutil.which("mpirun")
    advice = "apt-get install openmpi-bin libopenmpi-dev, then build again"
    if not features["mpi"]:
        findings.append(Finding("ranks: mpi", OPTIONAL, "built without MPI", advice))
    elif mpirun is None:
        findings.append(Finding("ranks: mpi", OPTIONAL, "built, but there is no mpirun on PATH", advice))
    else:
        findings.append(
            Finding("ranks: mpi", OK, f"built (MPI {build.MPI_VERSION}); {_first_line(mpirun, '--version')}")
        )
    findings.append(_cuda(features["cuda"], build.CUDA_VERSION))
    if features["nccl"]:
        findings.append(Finding("ranks: nccl", OK, f"built with NCCL {build.NCCL_VERSION}"))
    else:
        findings.append(
            Finding("ranks: nccl", OPTIONAL, "built without NCCL", "needed for several GPUs: the nvidia-nccl wheel beside torch serves")
        )
    return findings


def _cuda(built: bool, version: str) -> Finding:
    kernels = f"kernels built with CUDA {version}" if built else "kernels not built (no CUDA toolkit at build time)"
    if importlib.util.find_spec("torch") is None:
        return Finding("device: cuda", OPTIONAL, kernels)
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return Finding("device: cuda", OPTIONAL, f"this torch has no CUDA; {kernels}")
    if not torch.cuda.is_available():
        return Finding("device: cuda", OPTIONAL, f"no GPU is visible; {kernels}", "fine on a CPU machine; otherwise see nvidia-smi")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding("device: cuda", OK if built else OPTIONAL, f"{names}; {kernels}")


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings = [Finding("machine", OK, f"{platform.machine()}, {cores} cores, {memory:.0f} GiB of memory")]
    for package, purpose in (
        ("tokenizers", "tokenizer.json files"),
        ("tensorboard", "TensorBoard events of a run"),
        ("transformers", "the adapter for its models, and opening what was trained"),
    ):
        found = _version(package)
        findings.append(
            Finding(package, OK, found) if found
            else Finding(package, OPTIONAL, f"not here; for {purpose}", f"pip install {package}")
        )
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("MESHLOOM_")}
    if variables:
        findings.append(Finding("environment", OK, ", ".join(f"{k}={v}" for k, v in variables.items())))
    return findings


def doctor(json: common.JsonOption = False) -> None:
    """Show what was built, what was found, and how to get what is missing.

    Exit code 1 if something is missing that training needs.

    [dim]Examples[/dim]

      meshloom doctor

      meshloom doctor --json
    """
    findings = _package() + _backends() + _machine()
    missing = [finding for finding in findings if finding.state == MISSING]
    if json:
        common.print_json({"ready": not missing, "findings": [asdict(f) for f in findings]})
    else:
        _print(findings)
    if missing:
        sys.stdout.flush()
        if not json:
            print(f"error: training needs: {', '.join(f.topic for f in missing)}", file=sys.stderr)
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    colours = {OK: "green", OPTIONAL: "yellow", MISSING: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        text = escape(finding.found)
        if finding.advice:
            text += f"\n[dim]{escape(finding.advice)}[/dim]"
        colour = colours[finding.state]
        table.add_row(f"[{colour}]{finding.state}[/{colour}]", finding.topic, text)
    common.console().print(table)
