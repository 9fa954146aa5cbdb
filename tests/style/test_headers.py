"""Every public header compiles on its own, with the flags of the build tree."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _flags(build_dir: pathlib.Path, module: str) -> list[str]:
    """Compiler and flags of a module's sources, without input, output and dependency file."""
    for entry in json.loads((build_dir / "compile_commands.json").read_text()):
        if f"meshloom_{module}_objects" in entry["command"]:
            words = shlex.split(entry["command"])
            words = words[1:] if words[0].endswith("ccache") else words
            end = words.index("-o")
            return [w for w in words[:end] if w not in ("-MD", "-MT", "-MF", "-c") and not w.endswith((".o", ".d"))]
    raise AssertionError(f"no source of module {module} in compile_commands.json")


def test_public_headers_stand_alone(build_dir: pathlib.Path) -> None:
    headers = sorted((ROOT / "include/meshloom").rglob("*.h"))
    assert headers

    def compile_header(header: pathlib.Path) -> str:
        name = header.relative_to(ROOT / "include")
        command = [*_flags(build_dir, name.parts[1]), "-fsyntax-only", "-x", "c++", "-"]
        # twice: the guard is checked too
        text = f'#include "{name}"\n#include "{name}"\n'
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        return f"{name}:\n{result.stderr[:2000]}" if result.returncode else ""

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MESHLOOM_JOBS", "1"))) as pool:
        failures = [text for text in pool.map(compile_header, headers) if text]
    assert not failures, "\n".join(failures)
