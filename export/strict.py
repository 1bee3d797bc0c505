"""Reads JSON that may have been damaged or made by somebody else: nothing in it is trusted to be what it should."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

MOST_BYTES = 1 << 20
LARGEST = 1 << 31  # of a size
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


def parse(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not UTF-8, not JSON, too large or too deep, or a key stands twice in an object.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, of at most {MOST_BYTES}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def seal(data: dict[str, Any]) -> str:
    """SHA-256, in hex, of an object without its ``sha256``."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in found if names.count(name) > 1)!r} stands twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def text(value: Any) -> str:
    """A string.

    Raises:
        ValueError: it is something else; so with the other checks.
    """
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r:.80}")
    return value


def size(value: Any) -> int:
    """A whole number from 1 to ``LARGEST``."""
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"expected a size from 1 to {LARGEST}, got {value!r:.80}")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r:.80}")
    return value


def items(value: Any, check: Callable[[Any], T], most: int) -> tuple[T, ...]:
    """A list of so many things at most."""
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"expected a list of at most {most}, got {value!r:.80}")
    return tuple(map(check, value))


def one_of(value: Any, known: tuple[str, ...]) -> str:
    """One of several strings."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"expected {', '.join(known)}, got {value!r:.80}")
    return value


def file_name(value: Any) -> str:
    """The name of a file in the same folder."""
    if not _FILE_NAME.fullmatch(text(value)):
        raise ValueError(f"{value!r:.80} is not a plain file name")
    return text(value)


def digest(value: Any) -> str:
    """SHA-256 in hex."""
    if not _DIGEST.fullmatch(text(value)):
        raise ValueError(f"{value!r:.80} is not a SHA-256")
    return text(value)
