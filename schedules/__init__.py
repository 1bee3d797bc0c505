"""Schedules: how a program is tuned and lowered for a target, and the cache of what was built.

The names below load their module when they are first used: running a bundle needs to know of targets alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsa_compile.schedules.builder import Artifact, BuildError, build, cache_directory, find
    from hsa_compile.schedules.choice import Choice, ScheduleError, bucket, choose
    from hsa_compile.schedules.target import CpuTarget, GpuTarget, TargetError, gpu_target, missing_features, resolve

__all__ = [
    "Artifact",
    "BuildError",
    "Choice",
    "CpuTarget",
    "GpuTarget",
    "ScheduleError",
    "TargetError",
    "bucket",
    "build",
    "cache_directory",
    "choose",
    "find",
    "gpu_target",
    "missing_features",
    "resolve",
]

_MODULES = {
    **dict.fromkeys(("Artifact", "BuildError", "build", "cache_directory", "find"), "builder"),
    **dict.fromkeys(("Choice", "ScheduleError", "bucket", "choose"), "choice"),
    **dict.fromkeys(("CpuTarget", "GpuTarget", "TargetError", "gpu_target", "missing_features", "resolve"), "target"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
