"""Opens a bundle's graph in ONNX Runtime, on the provider that was asked for and on no other."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from hsa_compile.export.bundle import GRAPH, LIBRARY, MANIFEST, BundleError, Manifest
from hsa_compile.export.memory import Cuda, Device, Host

log = logging.getLogger("hsa_compile")

Provider = Literal["auto", "cpu", "cuda"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64",
}  # fmt: skip

# The first with TensorScatter on the CPU, by which a step writes the chunk memory in place.
MINIMUM_RUNTIME = (1, 25)

# Tokens of a prefill segment, of all rows. An H100 reads 17 % more tokens/s by 32 768 than by 8192. Function bodies
# gather the keys and values of every token, so they take fewer.
SEGMENTS = {"cpu": 512, "cuda": 32_768}
SEGMENT_BY_FUNCTIONS = 128


@dataclass
class Runtime:
    """A graph that is ready to run.

    Attributes:
        provider: "cpu" or "cuda".
        device: where its state is kept.
        graphs: decode by CUDA graphs.
        graph_ids: numbers for them, each given once.
        least_chunks: that the encoder is run on; 1 where the provider cannot compute with empty tensors.
    """

    session: Any
    provider: str
    fused: bool
    device: Device
    manifest: Manifest
    graphs: bool = False
    graph_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    least_chunks: int = 0

    @property
    def segment(self) -> int:
        """Tokens of a prefill segment, of all rows."""
        return SEGMENTS[self.provider] if self.fused else SEGMENT_BY_FUNCTIONS

    def describe(self) -> str:
        """Which provider, kernels and schedule records are in use."""
        m = self.manifest
        lines = [f"ONNX Runtime {ort.__version__}, {PROVIDERS[self.provider]}, {m.dtype}"]
        if not self.fused:
            return f"{lines[0]}; operators by their function bodies in the graph"
        mine = [kernel for kernel in m.kernels if kernel["target"].startswith(self.provider)]
        lines += [f"{k['kernel']} for {k['target']}, schedule: {k['schedule']}" for k in mine]
        return "\n".join([*lines, "decode from CUDA graphs"] if self.graphs else lines)


def open_runtime(
    directory: Path, manifest: Manifest, provider: Provider, fused: bool, threads: int | None, host_memory: bool
) -> Runtime:
    """The bundle's graph in ONNX Runtime.

    Raises:
        BundleError: ONNX Runtime is too old, lacks the provider, or cannot open the graph with all of it there.
        DeviceError: the GPU cannot be used.
        ValueError: an option does not exist or fit.
    """
    _check_version()
    chosen = _chosen(provider, manifest, fused)
    if host_memory and chosen != "cuda":
        raise ValueError('host_memory is for provider="cuda": a CPU has its memory in the host anyway')
    device: Device = Cuda(host_memory) if chosen == "cuda" else Host()
    if chosen == "cuda":
        _find_cuda()
    graphs = chosen == "cuda" and fused
    try:
        if fused:
            manifest.check_target(chosen)
        session = _session(directory, chosen, fused, graphs, threads)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot open {directory}: {error}") from error
    if session.get_providers()[0] != PROVIDERS[chosen]:
        raise BundleError(
            f"{PROVIDERS[chosen]} did not start, ONNX Runtime fell back to {session.get_providers()[0]}: check that "
            "CUDA's and cuDNN's libraries are found (importing torch first does), or ask for the CPU"
        )
    _check_graph(session, manifest)
    runtime = Runtime(session, chosen, fused, device, manifest, graphs)
    log.info("%s: %s", directory, runtime.describe())
    return runtime


def _find_cuda() -> None:
    """Loads CUDA's and cuDNN's libraries from the packages that onnxruntime-gpu installs; PyTorch loads its own."""
    if "torch" not in sys.modules and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def _check_graph(session: Any, manifest: Manifest) -> None:
    """State is bound by its address: what the graph takes for its shape must be what is allocated."""
    specs = {f"past.{spec.name}": (spec.dtype, list(spec.shape)) for spec in manifest.state}
    inputs = {x.name: (_TYPES.get(x.type), x.shape) for x in session.get_inputs() if x.name.startswith("past.")}
    logits: list[Any] = next((x.shape for x in session.get_outputs() if x.name == "logits"), [])
    if inputs != specs or logits[-1:] != [manifest.model["vocab_size"]]:
        raise BundleError(f"{GRAPH} is not the graph that {MANIFEST} describes; export the bundle again")


def _check_version() -> None:
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < MINIMUM_RUNTIME:
        wanted = ".".join(map(str, MINIMUM_RUNTIME))
        raise BundleError(
            f"bundles need ONNX Runtime {wanted} or later, this is {ort.__version__}; pip install -U onnxruntime"
        )


def _chosen(provider: str, manifest: Manifest, fused: bool) -> str:
    if provider not in ("auto", *PROVIDERS):
        raise ValueError(f"provider must be auto, {' or '.join(PROVIDERS)}, got {provider!r}")
    has_cuda = PROVIDERS["cuda"] in ort.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise BundleError("this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu, or ask for the CPU")
    if provider == "auto":
        kernels_for_gpu = not fused or any(target.startswith("cuda:") for target in manifest.targets)
        provider = "cuda" if has_cuda and kernels_for_gpu else "cpu"
    if provider == "cpu" and manifest.dtype == "bfloat16":
        raise BundleError("ONNX Runtime multiplies no bfloat16 on a CPU; export the bundle in float32 or float16")
    return provider


def _session(directory: Path, provider: str, fused: bool, graphs: bool, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if fused:
        options.register_custom_ops_library(str(directory / LIBRARY))
    if provider == "cuda" and fused:  # function bodies compute with shapes, which the CPU does
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # TF32 would round float32 products to ten bits of mantissa.
    settings = {"cuda": {"use_tf32": "0", "enable_cuda_graph": str(int(graphs))}, "cpu": {}}
    return ort.InferenceSession(str(directory / GRAPH), options, providers=[(PROVIDERS[provider], settings[provider])])
