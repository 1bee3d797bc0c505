"""Export and deployment: a bundle of an ONNX graph and compiled operators, and the session that runs it.

    package.export_bundle   model (and kernels) → bundle          needs PyTorch and ONNX
    session.Session         bundle → logits and text              needs numpy and ONNX Runtime
    library.build_library   kernels → ONNX Runtime operators      needs a C++ compiler
    text.load_tokenizer     the bundle's tokenizer            needs the package tokenizers, where it is not bytes
    step, window            the model's step with static shapes, in PyTorch
    graph, fuse             its graph, and how that takes few passes over memory
    schema, functions       the operators, and their bodies in standard ONNX

The names below load their module when they are first used, so that running a bundle needs none of what made it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsa_compile.export.bundle import BundleError
    from hsa_compile.export.library import LibraryError, build_library
    from hsa_compile.export.package import export_bundle
    from hsa_compile.export.session import Session
    from hsa_compile.export.text import load_tokenizer

__all__ = ["BundleError", "LibraryError", "Session", "build_library", "export_bundle", "load_tokenizer"]

_MODULES = {
    "BundleError": "bundle",
    "LibraryError": "library",
    "Session": "session",
    "build_library": "library",
    "export_bundle": "package",
    "load_tokenizer": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
