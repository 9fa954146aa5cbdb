"""Rules of the tree: layout, shell scripts, types of the Python package, headers that stand alone."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import stubs

TOP_LEVEL = re.compile(
    r"\..*|CMakeLists\.txt|CMakePresets\.json|pyproject\.toml|include|src|python|tests|examples|docs"
    r"|LICENSE|README\.md|build|runs"
)


def test_top_level_layout(root: pathlib.Path) -> None:
    odd = [p.name for p in root.iterdir() if not TOP_LEVEL.fullmatch(p.name)]
    assert not odd, f"not in the layout: {odd}"


@pytest.mark.parametrize("module", stubs.MODULES)
def test_stubs_are_those_of_the_extension_modules(build_dir: pathlib.Path, module: str) -> None:
    written = stubs.path_of(module).read_text()
    assert written == stubs.generate(build_dir, module), (
        f"{stubs.path_of(module)} is out of date: python tests/style/stubs.py BUILD_DIR"
    )


def test_python_package_is_typed(root: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "python/meshloom"],
        cwd=root, capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", ["examples/setup.sh", "examples/quickstart.sh", "tests/run.sh"])
def test_shell_scripts_parse(root: pathlib.Path, script: str) -> None:
    result = subprocess.run(["bash", "-n", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_links_in_documentation_lead_somewhere(root: pathlib.Path) -> None:
    broken = []
    for page in [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "examples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken, "\n".join(broken)
