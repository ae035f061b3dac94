"""All that `diffpatch` offers; loaded at the first use of any of it (see `diffpatch.__init__`)."""

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
    Larger,
    Linear,
    Longer,
    Method,
    MethodInfo,
    Neighborhood,
    Radial,
    SlidingTile,
    Temporal,
    Window,
    list_methods,
    make_method,
    register,
)
from diffpatch.methods.neighborhood import entropy_scale
from diffpatch.patching.api import (
    is_patched,
    patch,
    patched,
    report,
    reset,
    settled,
    summary,
    unpatch,
)
from diffpatch.patching.report import Report
from diffpatch.patching.run.idle import NothingSparse
from diffpatch.patterns.grid import PackedGrid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.info import FamilyInfo
from diffpatch.pipelines.families.table import list_families
from diffpatch.pipelines.running.loading import ModelError
from diffpatch.pipelines.running.two_stages import enlarge
from diffpatch.planning.fit import fit_kept
from diffpatch.planning.plan import Plan, plan
from diffpatch.planning.profiles import load_profile
from diffpatch.targets.settings import Settings
from diffpatch.tuning.attention_error import AttentionErrors, attention_error
from diffpatch.tuning.attention_maps import AttentionMaps, attention_maps
from diffpatch.tuning.calibration import Calibration, calibrate
from diffpatch.tuning.front import check_prompts, measure_front
from diffpatch.tuning.tune import tune
from diffpatch.tuning.tuned import tuned

__all__ = [
    "AttentionErrors",
    "AttentionMaps",
    "BackendUnavailable",
    "BadParameter",
    "BlockPattern",
    "Calibration",
    "Dense",
    "DiffpatchError",
    "Disc",
    "Dynamic",
    "FamilyInfo",
    "Larger",
    "Linear",
    "Longer",
    "Method",
    "MethodInfo",
    "ModelError",
    "Neighborhood",
    "NotPatched",
    "NothingSparse",
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
    "attention_maps",
    "calibrate",
    "check_prompts",
    "enlarge",
    "entropy_scale",
    "fit_kept",
    "is_patched",
    "list_families",
    "list_methods",
    "load_profile",
    "make_method",
    "measure_front",
    "patch",
    "patched",
    "plan",
    "register",
    "report",
    "reset",
    "settled",
    "summary",
    "tune",
    "tuned",
    "unpatch",
]
