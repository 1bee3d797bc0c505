"""Schedules: how a program is tuned and lowered for a target, and the cache of what was built."""

from hsa_compile.schedules.builder import Artifact, BuildError, build, cache_directory
from hsa_compile.schedules.target import CpuTarget, TargetError, missing_features, resolve

__all__ = [
    "Artifact",
    "BuildError",
    "CpuTarget",
    "TargetError",
    "build",
    "cache_directory",
    "missing_features",
    "resolve",
]
