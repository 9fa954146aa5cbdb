"""Meshloom: training of large language models on data whose samples differ wildly in length.

Everything here is loaded on first use: planning, verifying and simulating never import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from meshloom._build_info import VERSION as __version__
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

_LAZY: dict[str, str] = {}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'meshloom' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
