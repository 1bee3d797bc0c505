"""Schedules: how a program is tuned and lowered for a target, and the cache of what was built."""

from hsa_compile.schedules.builder import Artifact, BuildError, build, cache_directory
from hsa_compile.schedules.target import CpuTarget, GpuTarget, TargetError, gpu_target, missing_features, resolve

__all__ = [
    "Artifact",
    "BuildError",
    "CpuTarget",
    "GpuTarget",
    "TargetError",
    "build",
    "cache_directory",
    "gpu_target",
    "missing_features",
    "resolve",
]
