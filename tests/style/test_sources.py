"""Rules of the C++ sources: layers, includes, format, length."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
LAYERS = pathlib.Path(__file__).with_name("layers.txt")
MAX_LINES = 500

# What costs seconds in every file that includes it, and where it is allowed all the same.
BANNED = {
    r"torch/extension\.h": [],
    r"torch/(torch|all|python)\.h": ["examples/"],
    r"ATen/(ATen|Functions)\.h": ["examples/"],
    r"torch/nn(\.h|/)": ["examples/"],
    r"torch/csrc/distributed/.*": [
        "src/comm/backends/torch/", "python/bindings/core/", "tests/conformance/",
    ],
    r"mpi\.h": ["src/comm/", "tests/"],
    r"nccl\.h": ["src/comm/", "tests/"],
    r"iostream": ["examples/", "tests/"],
}
TORCH = re.compile(r"^(torch|ATen|c10)/")


def read_layers() -> tuple[dict[str, set[str]], set[str]]:
    allowed: dict[str, set[str]] = {}
    for line in LAYERS.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            module, names = line.split(":")
            allowed[module] = set(names.split())
    return allowed, allowed.pop("no-torch")


def module_of(path: pathlib.PurePath) -> str | None:
    """The module that a file of include/meshloom/ or src/ belongs to."""
    parts = path.parts
    if parts[0] == "include" and len(parts) > 3:
        return parts[2]
    if parts[0] == "src" and len(parts) > 2 and parts[1] != "cmake":
        return parts[1]
    return None


def included_module(include: str, modules: set[str]) -> str | None:
    parts = include.split("/")
    if parts[0] == "meshloom" and len(parts) > 2:
        return parts[1]
    return parts[0] if len(parts) > 1 and parts[0] in modules else None


def layer_violations(path: pathlib.PurePath, text: str) -> list[str]:
    allowed, no_torch = read_layers()
    module = module_of(path)
    if module is None:
        return []
    if module not in allowed:
        return [f"{path}: the module {module!r} is not in {LAYERS.name}"]
    found = []
    for include in INCLUDE.findall(text):
        target = included_module(include, set(allowed))
        if target is not None and target != module and target not in allowed[module]:
            found.append(f"{path}: {module} includes {include}, may include: {sorted(allowed[module])}")
        if module in no_torch and TORCH.match(include):
            found.append(f"{path}: {module} has no LibTorch, but includes {include}")
    return found


def banned_includes(path: pathlib.PurePath, text: str) -> list[str]:
    found = []
    for include in INCLUDE.findall(text):
        for pattern, allowed in BANNED.items():
            if re.fullmatch(pattern + ("" if pattern.endswith((r"\.h", "iostream")) else ".*"), include):
                if not any(str(path).startswith(folder) for folder in allowed):
                    found.append(f"{path}: {include} is banned here")
    return found


def test_layers_are_respected(root: pathlib.Path, sources: list[pathlib.Path]) -> None:
    problems = []
    for file in sources:
        problems += layer_violations(file.relative_to(root), file.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("src/model/x.cc", "meshloom/comm/work.h"),
        ("include/meshloom/plan/x.h", "meshloom/sim/simulator.h"),
        ("src/core/x.cc", "plan/internal/x.h"),
        ("src/plan/x.cc", "ATen/core/Tensor.h"),
        ("src/unheard_of/x.cc", "string"),
    ],
)
def test_layer_check_sees_a_planted_include(path: str, include: str) -> None:
    assert layer_violations(pathlib.PurePath(path), f"#include <{include}>\n")


def test_no_banned_includes(root: pathlib.Path, sources: list[pathlib.Path]) -> None:
    problems = []
    for file in sources:
        problems += banned_includes(file.relative_to(root), file.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("include", ["torch/extension.h", "torch/torch.h", "ATen/ATen.h", "mpi.h"])
def test_banned_check_sees_a_planted_include(include: str) -> None:
    assert banned_includes(pathlib.PurePath("src/model/x.cc"), f"#include <{include}>\n")


def test_cuda_sources_stay_clear_of_aten(root: pathlib.Path, sources: list[pathlib.Path]) -> None:
    problems = [
        f"{file.relative_to(root)}: {include}"
        for file in sources
        if file.suffix == ".cu"
        for include in INCLUDE.findall(file.read_text(encoding="utf-8"))
        if TORCH.match(include)
    ]
    assert not problems, "\n".join(problems)


def test_own_header_comes_first(root: pathlib.Path) -> None:
    """Own header first proves that it stands alone."""
    problems = []
    for file in sorted((root / "src").rglob("*.cc")):
        includes = INCLUDE.findall(file.read_text(encoding="utf-8"))
        path = file.relative_to(root / "src").with_suffix(".h")
        own = [i for i in includes if i in (f"meshloom/{path}", str(path), f"{path.parent}/internal/{path.name}")]
        if own and includes[0] != own[0]:
            problems.append(f"src/{path.with_suffix('.cc')}: first include is {includes[0]}")
    assert not problems, "\n".join(problems)


def test_clang_format(root: pathlib.Path, sources: list[pathlib.Path], clang_format: str) -> None:
    files = [str(f.relative_to(root)) for f in sources if f.suffix != ".cu"]
    result = subprocess.run(
        [clang_format, "--dry-run", "-Werror", *files], cwd=root, capture_output=True, text=True,
        check=False,
    )
    bad = sorted(set(re.findall(r"^(\S+?):\d+:\d+: error", result.stderr, re.MULTILINE)))
    assert result.returncode == 0, "clang-format-14 -i " + " ".join(bad)


def test_files_are_of_readable_length(root: pathlib.Path, sources: list[pathlib.Path]) -> None:
    files = [*sources, *(root / "python").rglob("*.py"), *(root / "src").rglob("*.cmake")]
    long = {str(f.relative_to(root)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}"


def test_sources_are_listed_in_cmake(root: pathlib.Path) -> None:
    """A source that no CMake list names is never compiled."""
    problems = []
    for file in [*(root / "src").rglob("*.cc"), *(root / "tests").rglob("*.cc")]:
        for folder in file.parents:
            lists = folder / "CMakeLists.txt"
            if lists.exists():
                if str(file.relative_to(folder)) not in lists.read_text():
                    problems.append(str(file.relative_to(root)))
                break
    assert not problems, problems


def test_public_headers_are_listed_in_cmake(root: pathlib.Path) -> None:
    """A header that is not listed is not installed."""
    problems = []
    for module in sorted((root / "include/meshloom").iterdir()):
        listed = (root / "src" / module.name / "CMakeLists.txt").read_text()
        problems += [
            str(header.relative_to(root))
            for header in sorted(module.glob("*.h"))
            if not re.search(rf"\b{re.escape(header.name)}\b", listed)
        ]
    assert not problems, problems
