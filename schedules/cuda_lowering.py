"""TileLang's lowering of one kernel launch, taken apart: device code, and what its launcher must pass.

Only the compiler's process imports this module: TileLang brings a TVM of its own.
"""

from __future__ import annotations

from typing import Any

from tilelang import tvm
from tilelang.backend.module import create_backend_context
from tilelang.engine.lower import lower_with_context

from hsa_compile.ir.programs import Launch
from hsa_compile.schedules.cuda_glue import Lowered, TensorMap
from hsa_compile.schedules.target import GpuTarget

_BINARY = {"Add": "+", "Sub": "-", "Mul": "*"}
# Lowered launches of this process, by what they were lowered from: tiles hardly change nine of a backward pass, and
# lowering those takes as long as nvcc does.
_LOWERED: dict[tuple[Any, ...], Lowered] = {}
_CALLS = {"FloorDiv": "hsa_floordiv", "FloorMod": "hsa_floormod", "Min": "hsa_min", "Max": "hsa_max"}


def c_expression(expr: Any) -> str:
    """An integer expression of the lowered host code as C, over 64-bit variables ``v_<name>``.

    Raises:
        ValueError: it contains something else.
    """
    if isinstance(expr, int):
        return str(expr)
    kind = type(expr).__name__
    if kind == "IntImm":
        return str(expr.value)
    if kind == "Var":
        return f"v_{expr.name}"
    if kind == "Cast":
        return c_expression(expr.value)
    if kind in _BINARY:
        return f"({c_expression(expr.a)} {_BINARY[kind]} {c_expression(expr.b)})"
    if kind in _CALLS:
        return f"{_CALLS[kind]}({c_expression(expr.a)}, {c_expression(expr.b)})"
    raise ValueError(f"the launcher cannot compute {expr} ({kind})")


def _tensor_map(name: str, args: Any) -> TensorMap:
    create, _, dtype, rank, address, *rest = args
    if create.value != "__tvm_tensormap_create_tiled":
        raise ValueError(f"tensor maps of kind {create.value} are not launched here")
    n = int(rank)
    text = [c_expression(x) for x in rest]
    dims, strides, box, steps = (tuple(text[i * n : (i + 1) * n]) for i in range(4))
    return TensorMap(name, address.name, c_expression(dtype), dims, strides, box, steps, tuple(text[4 * n : 4 * n + 4]))


def _extents(attrs: Any, axis: str) -> tuple[str, ...]:
    extents = {str(tag): extent for tag, extent in attrs["thread_extent"].items()}
    return tuple(c_expression(extents.get(f"{axis}.{letter}", 1)) for letter in "xyz")


def lower(launch: Launch, symbol: str, target: GpuTarget) -> Lowered:
    """Lowers a launch's function to CUDA C++; of compilers only TileLang runs.

    Raises:
        ValueError: the function lowers to anything but one kernel, or needs a launch that launchers do not give.
    """
    function = launch.function.with_attr("global_symbol", symbol)
    key = (tvm.ir.save_json(function), str(sorted(launch.options.items())), target.arch)
    if key not in _LOWERED:
        _LOWERED[key] = _lower(function, launch, target)
    return _LOWERED[key]


def _lower(function: Any, launch: Launch, target: GpuTarget) -> Lowered:
    context = create_backend_context({"kind": "cuda", "arch": target.arch}, None, "cython")
    with tvm.transform.PassContext(opt_level=3, config=launch.options), context.target:
        lowered = lower_with_context(function, context)
    kernels = list(lowered.device_mod.functions.values())
    hosts = list(lowered.host_mod.functions.values())
    if len(kernels) != 1 or len(hosts) != 1:
        raise ValueError(f"{launch.symbol} lowers to {len(kernels)} kernels; write one launch for each")
    attrs, host = kernels[0].attrs, hosts[0].attrs
    if "cluster_dims" in attrs or attrs.get("use_cooperative_groups"):
        raise ValueError(f"{launch.symbol} needs clusters or a cooperative launch, which launchers do not give")
    maps = dict(host["tma_descriptor_args"].items()) if "tma_descriptor_args" in host else {}
    return Lowered(
        source=lowered.kernel_source,
        symbol=str(attrs["global_symbol"]),
        parameters=tuple(p.name for p in kernels[0].params),
        buffers=tuple(function.buffer_map[p].data.name for p in function.params if p in function.buffer_map),
        grid=_extents(attrs, "blockIdx"),
        block=_extents(attrs, "threadIdx"),
        shared_bytes=int(attrs["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in attrs else 0,
        tensor_maps={var.name: _tensor_map(var.name, args) for var, args in maps.items()},
    )
