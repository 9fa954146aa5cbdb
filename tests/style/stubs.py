"""The type stubs of the extension modules: python tests/style/stubs.py BUILD_DIR writes them anew."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = ("_plan", "_core")
_HEAD = "# Made from the extension module by tests/style/stubs.py; a test compares.\n"


def generate(build: pathlib.Path, module: str) -> str:
    """The stub of `meshloom.<module>` as the build tree's module says it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-c",
            "import sys\n"
            f"if {module == '_core'}: import torch\n"
            "from pybind11_stubgen import main\n"
            "main()",
            f"meshloom.{module}", "-o", folder, "--enum-class-locations", "ReduceOp:meshloom._core",
            "--ignore-invalid-expressions", "<meshloom._core.GroupOptions.*>", "--exit-code",
        ]
        environment = os.environ | {"PYTHONPATH": str(build / "python")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"pybind11-stubgen failed:\n{result.stderr}")
        return _HEAD + pathlib.Path(folder, "meshloom", f"{module}.pyi").read_text()


def path_of(module: str) -> pathlib.Path:
    return ROOT / "python/meshloom" / f"{module}.pyi"


if __name__ == "__main__":
    for name in MODULES:
        path_of(name).write_text(generate(pathlib.Path(sys.argv[1]), name))
