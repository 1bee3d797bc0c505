"""Pairs of a letter and a number, ``{k:731}``, asked for by their beginning, ``{k:``."""

from __future__ import annotations

import random
import string

from hsa_compile.model.tasks.problem import Ask, Problem, Task

VALUE_DIGITS = 3
PAIRS = 8
PAIR_BYTES = len("{k:731}")
QUERY_BYTES = len("{k:")
KEYS = string.ascii_lowercase


def value(rng: random.Random) -> str:
    """The digits of a pair; they may start with zeros."""
    return "".join(rng.choices(string.digits, k=VALUE_DIGITS))


def _make(rng: random.Random, asks: int, room: int) -> Problem:
    keys = rng.sample(KEYS, PAIRS)
    values = [value(rng) for _ in keys]
    facts = tuple(f"{{{key}:{v}}}".encode() for key, v in zip(keys, values))
    asked = rng.sample(range(PAIRS), min(asks, PAIRS))
    return Problem(facts, tuple(Ask(f"{{{keys[i]}:".encode(), values[i].encode(), (i,)) for i in asked))


TASKS = (Task("pairs", _make, dense=True),)
