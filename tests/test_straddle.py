"""Training samples whose facts lie across two chunks."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest

from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import Sample
from hsa_compile.model.stream import Batches
from hsa_compile.model.tasks.haystack import Bytes
from hsa_compile.model.tasks.registry import TASKS
from hsa_compile.model.tasks.weave import Weaver
from kit import small_recipe

TEXT = bytes(range(65, 91)) * 400
FACT = rb" The number of \w+ is \d{7}\. "
NEEDLES = tuple((TASKS[name], 1.0) for name in ("s-n", "mk", "mq"))


def _draw(seed: int, straddle: float, fill: float = 0.6, chunk_size: int = 64, length: int = 2000) -> Sample:
    return Weaver(Bytes(), TEXT, NEEDLES, fill, 5.0, straddle, chunk_size).draw(random.Random(seed), length, 1)


def _text(sample: Sample) -> bytes:
    return bytes(np.asarray(sample.ids, np.uint8))


def _begun(sample: Sample, chunk_size: int) -> list[int]:
    """Of each fact, how many of its tokens lie in the chunk of its last one."""
    return [(fact.end() - 1) % chunk_size + 1 for fact in re.finditer(FACT, _text(sample))]


@pytest.mark.parametrize("chunk_size", [48, 64])
def test_facts_straddle_as_often_as_asked(chunk_size: int) -> None:
    def begun(straddle: float) -> np.ndarray:
        samples = [_draw(seed, straddle, chunk_size=chunk_size) for seed in range(40)]
        return np.concatenate([_begun(sample, chunk_size) for sample in samples])

    none, half, every = (begun(straddle) <= 8 for straddle in (0.0, 0.5, 1.0))
    assert len(none) == len(half) == len(every) > 300
    assert none.mean() < 0.3 < half.mean() < 0.7 < 0.8 < every.mean()
    assert set(range(1, 9)) <= set(begun(1.0))


@pytest.mark.parametrize("fill", [0.3, 0.95])
@pytest.mark.parametrize("seed", range(10))
def test_facts_that_straddle_change_places_alone(seed: int, fill: float) -> None:
    plain, moved = (_draw(seed, straddle, fill) for straddle in (0.0, 1.0))
    assert len(moved.ids) == 2001
    assert len(moved.weights) == 2000
    assert sorted(plain.ids) == sorted(moved.ids)
    facts, again = (re.findall(FACT, _text(sample)) for sample in (plain, moved))
    assert facts == again != []
    ids, weights = _text(moved), np.concatenate(([1.0], moved.weights))
    for fact in re.finditer(FACT, ids):
        assert not weights[fact.start() : fact.end()].any()
    for ask in re.finditer(rb"\nThe number of (\w+) is( \d{7})\n", ids):
        assert (weights[ask.start(2) : ask.end(2)] == 5.0).all()
        assert ids.index(b"of " + ask[1] + b" is") < ask.start()


def test_samples_shorter_than_a_chunk_stay() -> None:
    plain, moved = (_draw(3, straddle, chunk_size=512, length=300) for straddle in (0.0, 1.0))
    assert plain.ids == moved.ids


def test_recipes_say_how_many_straddle(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=2, length=1024, short_part=0.0, tasks={"s-n": 1, "mk": 1}, text_share=0.0)
    with pytest.raises(ConfigError, match=r"straddle must lie in 0 … 1, got 1\.5"):
        dataclasses.replace(recipe, straddle=1.5)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, chunk_size=48))
    shares = []
    for straddle in (0.0, 1.0):
        x, y, _ = Batches(dataclasses.replace(recipe, straddle=straddle), TEXT)[0]
        begun = [_begun(Sample([*map(int, a), int(b[-1])], []), 48) for a, b in zip(x, y)]
        shares.append(np.mean([count <= 8 for counts in begun for count in counts]))
    assert shares[0] < 0.4 < 0.6 < shares[1]
    plain = Batches(recipe, TEXT)
    plain.weaver = Weaver(Bytes(), TEXT, plain.weaver.tasks, recipe.fill, recipe.answer_weight)
    assert all(np.array_equal(a, b) for a, b in zip(plain[1], Batches(recipe, TEXT)[1]))
