"""What kernels are compiled for."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path


class TargetError(ValueError):
    """The target's name is unknown, or this machine cannot run it."""


@dataclass(frozen=True)
class CpuTarget:
    """A CPU level: one build runs on every machine that has its features.

    Args:
        name: as written in manifests and on the command line, ``cpu:<level>``.
        mcpu: the level's name in LLVM.
        machine: ``platform.machine()`` of its instruction set.
        features: flags of ``/proc/cpuinfo`` that a machine must have.
        lanes: float32 lanes of a vector register.
        registers: vector registers.
    """

    name: str
    mcpu: str
    machine: str
    features: frozenset[str]
    lanes: int
    registers: int


@dataclass(frozen=True)
class GpuTarget:
    """An NVIDIA GPU architecture.

    Args:
        name: as written in manifests and on the command line, ``cuda:<arch>``.
        arch: its name in nvcc.
        capability: compute capability (major, minor) of the devices that run it. ``a`` architectures run on exactly
            this one, others on later minor versions as well.
    """

    name: str
    arch: str
    capability: tuple[int, int]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of that compute capability runs what is built for this target."""
        if self.arch.endswith("a"):
            return capability == self.capability
        return capability[0] == self.capability[0] and capability[1] >= self.capability[1]


# Best first.
GPU_TARGETS = (GpuTarget("cuda:sm_90a", "sm_90a", (9, 0)), GpuTarget("cuda:sm_80", "sm_80", (8, 0)))

_V2 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt", "cx16"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# Best first.
CPU_TARGETS = (
    CpuTarget("cpu:x86-64-v4", "x86-64-v4", "x86_64", _V4, lanes=16, registers=32),
    CpuTarget("cpu:x86-64-v3", "x86-64-v3", "x86_64", _V3, lanes=8, registers=16),
    CpuTarget("cpu:x86-64-v2", "x86-64-v2", "x86_64", _V2, lanes=4, registers=16),
    CpuTarget("cpu:aarch64", "generic", "aarch64", frozenset({"asimd"}), lanes=4, registers=32),
)


@functools.cache
def machine_features() -> frozenset[str]:
    """Flags that the kernel reports for this machine's CPU; empty where there is no ``/proc/cpuinfo``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        flag
        for line in lines
        if line.lower().startswith(("flags", "features"))
        for flag in line.split(":", 1)[1].split()
    )


def missing_features(target: CpuTarget) -> list[str]:
    """What this machine lacks to run the target; empty if it can."""
    if (platform.system(), platform.machine()) != ("Linux", target.machine):
        return [f"Linux on {target.machine} (this is {platform.system()} on {platform.machine()})"]
    return sorted(target.features - machine_features())


def resolve(name: str) -> CpuTarget:
    """The CPU target of that name; ``cpu:native`` is the best that this machine can run.

    Raises:
        TargetError: unknown name, or nothing fits this machine.
    """
    if name == "cpu:native":
        for target in CPU_TARGETS:
            if not missing_features(target):
                return target
        raise TargetError(f"no CPU target fits this machine ({platform.machine()}); known: {_names(CPU_TARGETS)}")
    for target in CPU_TARGETS:
        if target.name == name:
            return target
    raise TargetError(f"unknown target {name!r}; known: cpu:native, {_names(CPU_TARGETS)}")


def resolve_gpu(name: str) -> GpuTarget:
    """The GPU target of that name.

    Raises:
        TargetError: unknown name.
    """
    for target in GPU_TARGETS:
        if target.name == name:
            return target
    raise TargetError(f"unknown GPU target {name!r}; known: {_names(GPU_TARGETS)}")


def resolve_any(name: str) -> CpuTarget | GpuTarget:
    """The target of that name, ``cuda:`` or ``cpu:``.

    Raises:
        TargetError: unknown name, or cpu:native on a machine that nothing fits.
    """
    return resolve_gpu(name) if name.startswith("cuda:") else resolve(name)


def gpu_target(capability: tuple[int, int]) -> GpuTarget | None:
    """The best target for a GPU of that compute capability, None where there is none."""
    return next((target for target in GPU_TARGETS if target.runs_on(capability)), None)


def _names(targets: tuple[CpuTarget, ...] | tuple[GpuTarget, ...]) -> str:
    return ", ".join(target.name for target in targets)
