"""Planning from Python: lengths in, plan out. Never imports torch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from meshloom import _plan
from meshloom._errors import InvalidArgument
