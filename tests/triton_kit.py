"""Triton programs without a GPU: their numbers in the interpreter, their launches through the compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
not_interpreted = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set")
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes a block, by compute capability


def passes_in_the_interpreter(file: str) -> None:
    """The tests of a file of this folder pass in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / file)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


class Launches:
    """Stands in for every launch and compiles what would have been launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
        from triton.runtime.jit import JITFunction

        self.capability, self.compiled = capability, {}  # type: tuple[int, dict[str, Any]]
        monkeypatch.setattr(JITFunction, "run", lambda kernel, *a, grid, warmup, **k: self.compile(kernel, a, k))

    def compile(self, kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        given = dict(zip(kernel.arg_names, arguments)) | named
        assert set(given) == set(kernel.arg_names)
        types, constants, aligned = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                types[parameter.name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                name = str(value.dtype)[6:].replace("bfloat", "bf").replace("float", "fp").replace("int", "i")
                types[parameter.name], aligned[(place,)] = f"*{name}", [["tt.divisibility", 16]]
            else:
                types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if types[parameter.name] == "i32" and value % 16 == 0 and not parameter.do_not_specialize:
                    aligned[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", self.capability, 32)
        name = f"{kernel.__module__.rsplit('.')[-1]}.{kernel.__name__}"
        self.compiled[name] = triton.compile(source, target=target, options=options)
