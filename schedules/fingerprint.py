"""A hash of the code that a program's speed comes from: what a tuning record was measured on.

It follows the imports of the program's module and looks at the syntax tree without documentation, so that a comment or
another operator's program leaves records valid. (Built kernels are named by a stricter hash, of all sources as they
are.)
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import hsa_compile.ir.programs

_PROGRAMS = Path(str(hsa_compile.ir.programs.__file__)).parent
_PACKAGE = "hsa_compile.ir.programs"
_MODULES = {
    ("chunk_attention", "forward"): "attention",
    ("chunk_attention", "backward"): "attention_backward",
    ("chunk_select", "forward"): "select",
    ("chunk_select", "backward"): "select_backward",
}


@functools.cache
def program_digest(op: str, pass_name: str, target: str, backend: str = "") -> str:
    """Twelve hex digits of the program that computes an operator's pass on a target's class of machines.

    Args:
        backend: "triton" for its programs, else those that are compiled ahead.
    """
    family = "triton" if backend == "triton" else "gpu" if target.startswith("cuda:") else "cpu"
    digest, seen, waiting = hashlib.sha256(), set(), [f"{family}.{_MODULES[op, pass_name]}"]
    tiles = Path(__file__).with_name("triton.py") if family == "triton" else _PROGRAMS / "__init__.py"
    tree = ast.parse(tiles.read_text())
    tile = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == f"{family.title()}Tile")
    digest.update(_text(tile).encode())
    while waiting:
        name = waiting.pop()
        path = _PROGRAMS / f"{name.replace('.', '/')}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        tree = ast.parse(path.read_text())
        digest.update(name.encode() + b"\0" + _text(tree).encode())
        waiting += sorted(_imports(tree), reverse=True)
    return digest.hexdigest()[:12]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the programs' package that a module imports, without the package's name."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name.removeprefix(f"{_PACKAGE}.") for name in names if name.startswith(f"{_PACKAGE}."))


def _text(tree: ast.AST) -> str:
    """The tree without docstrings and positions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return _dump(tree)


def _dump(value: object) -> str:
    """The same text from all versions of Python.

    ``ast.dump`` names new, empty fields; ``ast.unparse`` quotes f-strings otherwise since 3.12.
    """
    if isinstance(value, list):
        return f"[{', '.join(map(_dump, value))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [f"{name}={_dump(part)}" for name, part in ast.iter_fields(value) if part is not None and part != []]
    return f"{type(value).__name__}({', '.join(fields)})"
