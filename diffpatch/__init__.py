"""diffpatch: faster diffusion transformers by cheaper attention, in one line.

>>> diffpatch.patch(pipe, method="radial")    # in place; pipe is any supported diffusers pipeline
>>> print(diffpatch.report(pipe))             # after a run: what was computed
>>> diffpatch.unpatch(pipe)                   # bit for bit what it was
"""

from __future__ import annotations

from diffpatch.errors import (
    BackendUnavailable,
    BadParameter,
    DiffpatchError,
    NotPatched,
    UnknownFamily,
    UnknownMethod,
)
from diffpatch.functional import attention
from diffpatch.methods import (
    Dense,
    Disc,
    Dynamic,
    Linear,
    Longer,
    Method,
    Neighborhood,
    Radial,
    SlidingTile,
    Temporal,
    Window,
    list_methods,
    make_method,
    register,
)
from diffpatch.patching.api import patch, patched, report, reset, unpatch
from diffpatch.patching.report import Report
from diffpatch.patterns.grid import PackedGrid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.table import list_families
from diffpatch.planning.plan import Plan, plan
from diffpatch.targets.settings import Settings
from diffpatch.tuning.attention_error import AttentionErrors, attention_error
from diffpatch.tuning.calibration import Calibration, calibrate
from diffpatch.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "AttentionErrors",
    "BackendUnavailable",
    "BadParameter",
    "BlockPattern",
    "Calibration",
    "Dense",
    "DiffpatchError",
    "Disc",
    "Dynamic",
    "Linear",
    "Longer",
    "Method",
    "Neighborhood",
    "NotPatched",
    "PackedGrid",
    "Plan",
    "Radial",
    "Report",
    "Settings",
    "SlidingTile",
    "Temporal",
    "TokenGrid",
    "UnknownFamily",
    "UnknownMethod",
    "Window",
    "attention",
    "attention_error",
    "calibrate",
    "list_families",
    "list_methods",
    "make_method",
    "patch",
    "patched",
    "plan",
    "register",
    "report",
    "reset",
    "tune",
    "unpatch",
]
