"""The C++ source between compiled GPU kernels and the interface of ``host/cuda_kernel.h``.

It is apart from the kernels' own source, and embeds what that was compiled to: of nvcc's 8 seconds for a kernel and its
launcher in one file, the host's compiler took 5, for TileLang's headers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from hsa_compile.ir import AnyProblem
from hsa_compile.ir.programs import GpuProgram, Launch
from hsa_compile.schedules.glue import DIMS, DTYPE_SIZE

HEADERS = '#include "cuda_image.h"\n#include "cuda_kernel.h"\n#include "cuda_launch.h"\n'


@dataclass(frozen=True)
class TensorMap:
    """A descriptor of the bulk copy engine; all but ``name`` and ``buffer`` are C expressions in the launch's dims."""

    name: str
    buffer: str
    dtype: str
    dims: tuple[str, ...]
    strides: tuple[str, ...]
    box: tuple[str, ...]
    steps: tuple[str, ...]
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """One kernel.

    Args:
        source: CUDA C++ of the kernel.
        symbol: its C name.
        parameters: names in the kernel's order, of tensor maps, buffers or dims.
        buffers: names of the function's buffers, in the order of the launch's arguments.
        grid, block: C expressions over the launch's dims, each as ``v_<name>``.
        shared_bytes: dynamic shared memory.
        tensor_maps: by parameter name.
    """

    source: str
    symbol: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    grid: tuple[str, ...]
    block: tuple[str, ...]
    shared_bytes: int
    tensor_maps: dict[str, TensorMap]


def image_source(image: str, path: str) -> str:
    """C++ that embeds a file of compiled kernels as ``image``."""
    name = json.dumps(f'.section .rodata\n.balign 64\n{image}_bytes: .incbin "{path}"\n.previous\n')
    return f'__asm__({name});\nextern "C" const char {image}_bytes[];\nstatic hsa_image {image} = {{{image}_bytes}};\n'


def launcher_source(launch: Launch, kernel: Lowered, image: str) -> str:
    """C++ of ``<symbol>_launch(pointers, dims, scratch, stream)``, which enqueues a kernel.

    Args:
        image: what embeds it, see ``image_source``.

    Raises:
        ValueError: the launch names other buffers or dims than the kernel takes.
    """
    if len(kernel.buffers) != len(launch.arguments):
        raise ValueError(f"{launch.symbol} takes {kernel.buffers}, but the launch gives {launch.arguments}")
    where = {name: f"pointers[{i}]" for i, name in enumerate(kernel.buffers)}
    lines = [
        f"static int {kernel.symbol}_launch(void* const* pointers, const int64_t* dims, void* scratch, "
        "cudaStream_t stream) {",
        "  (void)scratch;",
    ]
    for name, expression in launch.dims.items():
        lines.append(f"  int64_t v_{name} = [&]() -> int64_t {{ {DIMS} return {expression}; }}(); (void)v_{name};")
    lines += [
        f"  const int64_t grid[3] = {{{', '.join(kernel.grid)}}}, block[3] = {{{', '.join(kernel.block)}}};",
        "  if (grid[0] * grid[1] * grid[2] == 0) return 0;",
    ]
    for tensor_map in kernel.tensor_maps.values():
        lines += _tensor_map(tensor_map, where[tensor_map.buffer])
    arguments = ", ".join(_argument(name, launch, kernel, where) for name in kernel.parameters)
    lines += [
        f"  void* arguments[] = {{{arguments}}};",
        f'  static hsa_embedded kernel = {{&{image}, "{kernel.symbol}"}};',
        f"  return hsa_launch(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), arguments, "
        f"{kernel.shared_bytes}, stream);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _argument(name: str, launch: Launch, kernel: Lowered, where: dict[str, str]) -> str:
    if name in kernel.tensor_maps:
        return f"&{name}"
    if name in where:
        return f"(void*)&{where[name]}"
    if name in launch.dims:
        return f"&v_{name}"
    raise ValueError(f"{launch.symbol} needs {name}, which the launch's dims do not give")


def _tensor_map(x: TensorMap, pointer: str) -> list[str]:
    lines = [f"  CUtensorMap {x.name};", "  {"]
    for name, values in (("dim", x.dims), ("stride", x.strides), ("box", x.box), ("step", x.steps)):
        lines.append(f"    const int64_t {name}[] = {{{', '.join(values)}}};")
    return [
        *lines,
        f"    const int error = hsa_tensor_map(&{x.name}, {x.dtype}, {len(x.dims)}, {pointer}, scratch, dim, stride, "
        f"box, step, {', '.join(x.modes)});",
        "    if (error) return error;",
        "  }",
    ]


def table_source(program: GpuProgram, problem: AnyProblem, pass_name: str, symbols: list[str]) -> tuple[str, str]:
    """Returns the C symbol of the ``hsa_cuda_kernel`` and the C++ source that defines it, to follow the launchers.

    Args:
        symbols: of the kernels, in the order of the launches.
    """
    symbol = f"hsa_cuda_kernel_{problem.digest}_{pass_name}"
    text = json.dumps(json.dumps(problem.to_dict(), sort_keys=True))
    sizes = [f"up(INT64_C({DTYPE_SIZE[r.dtype]}) * ({r.elements}))" for r in program.scratch]
    lines = [
        "[[maybe_unused]] static int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }",
        f"static int64_t scratch_bytes(const int64_t* dims) {{ {DIMS} return {' + '.join(['INT64_C(0)', *sizes])}; }}",
        "static int32_t run(void* const* tensors, const int64_t* dims, void* scratch, void* stream) {",
        f"  {DIMS}",
    ]
    previous, size = "(char*)scratch", "0"
    for region, bytes_ in zip(program.scratch, sizes):
        lines.append(f"  [[maybe_unused]] void* {region.name}_ = {previous} + {size};")
        previous, size = f"(char*){region.name}_", bytes_
    where = {name: f"tensors[{i}]" for i, name in enumerate(program.tensors)}
    where |= {region.name: f"{region.name}_" for region in program.scratch}
    for launch, name in zip(program.launches, symbols, strict=True):
        pointers = ", ".join(where[a] for a in launch.arguments)
        lines += [
            f"  {{ void* const pointers[] = {{{pointers}}};",
            f"    const int error = {name}_launch(pointers, dims, scratch, (cudaStream_t)stream);",
            "    if (error) return error; }",
        ]
    lines += [
        "  return 0;",
        "}",
        "static const char* message(int32_t error) {",
        '  if (error == HSA_NO_TENSOR_MAP) return "the driver has no tensor maps; it must support CUDA 12";',
        '  if (error == HSA_BAD_TENSOR_MAP) return "no tensor map fits; tensors must be aligned to 16 bytes";',
        "  return cudaGetErrorString((cudaError_t)error);",
        "}",
        f'extern "C" const hsa_cuda_kernel {symbol};',
        f'const hsa_cuda_kernel {symbol} = {{HSA_CUDA_KERNEL_ABI, {text}, "{pass_name}", '
        f"{len(program.tensors)}, scratch_bytes, run, message}};",
    ]
    return symbol, "\n".join(lines) + "\n"
