"""Schedules: how a program is tuned and lowered for a target, and the cache of what was built."""

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
