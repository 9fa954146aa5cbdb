"""Meshloom: training of large language models on data whose samples differ wildly in length.

Everything here is loaded on first use: planning, verifying and simulating never import torch.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from meshloom import _build_info
from meshloom._build_info import VERSION
from meshloom._errors import (
    CommError,
    DataError,
    Error,
    InvalidArgument,
    IoError,
    NotSupported,
    PlanError,
    Timeout,
)

__version__: str = VERSION

_MODULES = ("data", "launch", "planning", "training")

# name -> where it lives. Nothing is imported before it is asked for.
_LAZY: dict[str, str] = {
    **dict.fromkeys(("plan", "register_strategy", "strategy_names", "verify"), "meshloom.planning"),
    **dict.fromkeys(
        (
            "BalanceStrategy",
            "CostModel",
            "Layout",
            "MemoryModel",
            "PlanProblem",
            "Program",
            "SampleInfo",
            "Slot",
            "StepPlan",
            "Unit",
            "check_plan",
            "check_programs",
            "compile",
            "make_plan",
        ),
        "meshloom._plan",
    ),
    **dict.fromkeys(
        (
            "AdamWOptions",
            "CheckpointSection",
            "Communicator",
            "DataSection",
            "GradientsOptions",
            "GradientsResult",
            "GroupOptions",
            "ModelConfig",
            "ModelSection",
            "ParameterRule",
            "ScheduleOptions",
            "StepMetrics",
            "TrainConfig",
            "Trainer",
            "gradients",
            "make_trainer",
            "make_world",
            "run_thread_ranks",
        ),
        "meshloom.training",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"meshloom.{name}")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'meshloom' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def get_cmake_prefix_path() -> str:
    """Where CMake finds the C++ half of this package: for CMAKE_PREFIX_PATH."""
    package = pathlib.Path(__file__).parent
    if (package / "lib/cmake/meshloom").is_dir():
        return str(package)
    # A package inside a build tree: the build tree is the CMake package. `_build_info` is the one
    # file that is no link to the sources there.
    return str(pathlib.Path(_build_info.__file__).parents[2])


def get_include() -> str:
    """The folder of the public C++ headers."""
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "include"
    return str(installed if installed.is_dir() else package.parents[1] / "include")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
