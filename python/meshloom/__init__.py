"""Meshloom: training of large language models on data whose samples differ wildly in length.

Everything here is loaded on first use: planning, verifying and simulating never import torch.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from meshloom import data as data
    from meshloom import launch as launch
    from meshloom import planning as planning
    from meshloom import training as training
    from meshloom import tuning as tuning
    from meshloom._plan import (
        BalanceStrategy as BalanceStrategy,
        Cluster as Cluster,
        CostModel as CostModel,
        CostRefiner as CostRefiner,
        Layout as Layout,
        MemoryChange as MemoryChange,
        MemoryForecast as MemoryForecast,
        MemoryModel as MemoryModel,
        MemorySetting as MemorySetting,
        ModelSizes as ModelSizes,
        PlanProblem as PlanProblem,
        Program as Program,
        SampleInfo as SampleInfo,
        Schedule as Schedule,
        Slot as Slot,
        StageAction as StageAction,
        StepLimits as StepLimits,
        StepPlan as StepPlan,
        Unit as Unit,
        UnitTiming as UnitTiming,
        Workload as Workload,
        check_memory as check_memory,
        check_plan as check_plan,
        check_programs as check_programs,
        compile as compile,
        fit_cost as fit_cost,
        forecast_memory as forecast_memory,
        make_plan as make_plan,
        memory_changes as memory_changes,
    )
    from meshloom.planning import plan as plan
    from meshloom.planning import register_strategy as register_strategy
    from meshloom.planning import strategy_names as strategy_names
    from meshloom.planning import verify as verify
    from meshloom.session import PlannedUnit as PlannedUnit
    from meshloom.session import PlanSession as PlanSession
    from meshloom.session import attention as attention
    from meshloom.simulation import simulate as simulate
    from meshloom.training import (
        AdamWOptions as AdamWOptions,
        CheckpointSection as CheckpointSection,
        Communicator as Communicator,
        DataSection as DataSection,
        ExpertsSection as ExpertsSection,
        GradientsOptions as GradientsOptions,
        GradientsResult as GradientsResult,
        GroupOptions as GroupOptions,
        ModelConfig as ModelConfig,
        ModelSection as ModelSection,
        OffloadSection as OffloadSection,
        ParallelSection as ParallelSection,
        ParameterRule as ParameterRule,
        ScheduleOptions as ScheduleOptions,
        StepMetrics as StepMetrics,
        TrainConfig as TrainConfig,
        Trainer as Trainer,
        gradients as gradients,
        make_trainer as make_trainer,
        make_world as make_world,
        run_thread_ranks as run_thread_ranks,
    )
    from meshloom.tuning import TunedLayout as TunedLayout
    from meshloom.tuning import Tuning as Tuning
    from meshloom.tuning import autotune as autotune

__version__: str = VERSION

_MODULES = ("data", "integrations", "launch", "planning", "session", "simulation", "training",
            "tuning")

# name -> where it lives. Nothing is imported before it is asked for.
_LAZY: dict[str, str] = {
    **dict.fromkeys(("plan", "register_strategy", "strategy_names", "verify"), "meshloom.planning"),
    "simulate": "meshloom.simulation",
    **dict.fromkeys(("TunedLayout", "Tuning", "autotune"), "meshloom.tuning"),
    **dict.fromkeys(
        (
            "BalanceStrategy",
            "Cluster",
            "CostModel",
            "CostRefiner",
            "Layout",
            "MemoryChange",
            "MemoryForecast",
            "MemoryModel",
            "MemorySetting",
            "ModelSizes",
            "PlanProblem",
            "Program",
            "SampleInfo",
            "Schedule",
            "Slot",
            "StageAction",
            "StepLimits",
            "StepPlan",
            "Unit",
            "UnitTiming",
            "Workload",
            "check_memory",
            "check_plan",
            "check_programs",
            "compile",
            "fit_cost",
            "forecast_memory",
            "make_plan",
            "memory_changes",
        ),
        "meshloom._plan",
    ),
    **dict.fromkeys(("PlanSession", "PlannedUnit", "attention"), "meshloom.session"),
    **dict.fromkeys(
        (
            "AdamWOptions",
            "CheckpointSection",
            "Communicator",
            "DataSection",
            "ExpertsSection",
            "GradientsOptions",
            "GradientsResult",
            "GroupOptions",
            "ModelConfig",
            "ModelSection",
            "OffloadSection",
            "ParallelSection",
            "ParameterRule",
            "ReduceOp",
            "ScheduleOptions",
            "StepMetrics",
            "TrainConfig",
            "Trainer",
            "Watchdog",
            "Work",
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
    info = importlib.import_module("meshloom._build_info").__file__
    return str(pathlib.Path(str(info)).parents[2])


def get_include() -> str:
    """The folder of the public C++ headers."""
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "include"
    return str(installed if installed.is_dir() else package.parents[1] / "include")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
