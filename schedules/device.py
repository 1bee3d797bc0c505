"""Which machine this is, as tuning records name it, and the sizes of its caches."""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from hsa_compile.schedules.target import machine_features

# Flags that code generation and speed hang on; others come and go with kernels and hypervisors.
_FEATURES = re.compile(r"^(avx|amx|sse|fma|f16c|bmi|asimd|sve|bf16|fphp)")


@dataclass(frozen=True)
class Device:
    """Args:
    name: model and core count, or a GPU's product name; "" where it can't be told.
    features: what tells apart machines of one name, sorted.
    """

    name: str
    features: tuple[str, ...] = ()


def cpu_name() -> str:
    """The processor's full name and its cores."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _cpu_info(key: str) -> str:
    try:
        found = re.search(rf"^{key}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


@functools.cache
def _cpu() -> Device:
    # Virtual machines call many processors by one name: family and model tell them apart.
    model = [f"{key} {found}" for key in ("cpu family", "model") if (found := _cpu_info(key))]
    flags = [flag for flag in machine_features() if _FEATURES.match(flag)]
    return Device(cpu_name(), tuple(sorted(flags) + model))


def device_for(target: str) -> Device:
    """The device of this machine that a target's kernels run on."""
    if not target.startswith("cuda:"):
        return _cpu()
    try:
        import torch
    except ModuleNotFoundError:
        return Device("")
    if not torch.cuda.is_available():
        return Device("")
    major, minor = torch.cuda.get_device_capability()
    return Device(torch.cuda.get_device_name(), (f"compute capability {major}.{minor}",))


def cache_bytes(level: int, default: int) -> int:
    """Size of a core's level 1 (data), 2 or 3 cache in bytes; ``default`` where the system does not say."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
            if int((index / "level").read_text()) == level and kind != "Instruction":
                return int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
        except (OSError, ValueError):
            continue
    return default
