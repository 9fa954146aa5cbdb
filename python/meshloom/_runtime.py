"""The extension module that needs torch, loaded in the right order: torch first."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from meshloom._build_info import FEATURES, TORCH_VERSION
from meshloom._errors import NotSupported


def _load() -> ModuleType:
    if not FEATURES["torch"]:
        raise NotSupported("[meshloom] this build has no LibTorch: it plans, but does not train")
    # Ranks that wait must not spin on cores that others compute on; read when libgomp is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise NotSupported(
            f"[meshloom] training needs torch {TORCH_VERSION}, which does not load: {error}"
        ) from error
    found = str(torch.__version__).split("+")[0]
    if found != TORCH_VERSION.split("+")[0]:
        raise NotSupported(
            f"[meshloom] built for torch {TORCH_VERSION}, found {found}; install that"
            " version, or build meshloom again"
        )
    return importlib.import_module("meshloom._core")


core = _load()
