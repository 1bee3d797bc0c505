"""In which order candidates are tried: at random, by the cost model, or by what was learnt from those tried so far."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hsa_compile.schedules.choice import ScheduleError, Tile

Name = Literal["learned", "model", "random"]
NAMES: tuple[Name, ...] = get_args(Name)
PRUNED = 2.5  # the model and the learner leave out what is estimated this many times the best
EXPLORED = 4  # the learner takes one in so many at random
LEAST = 4  # trials from which there is something to learn
RIDGE = 1.0


class Strategy:
    """Proposes candidates of a list, never one twice.

    Args:
        name: "random": in any order. "model": by falling hope of the cost model, hopeless ones never. "learned": the
            model's estimates corrected by a ridge regression on the trials so far, over logarithms of the fields.
        tiles: the candidates.
        estimate: the cost model's milliseconds for each, None where there is no model.
        seed: makes proposals repeatable.
    """

    def __init__(
        self, name: str, tiles: Sequence[Tile], estimate: Callable[[Tile], float | None], seed: int = 0
    ) -> None:
        if name not in NAMES:
            raise ScheduleError(f"strategy must be one of {', '.join(NAMES)}, got {name!r}")
        self.name, self._random = name, random.Random(seed)
        estimates = {tile: estimate(tile) for tile in tiles}
        self.estimates = {tile: ms for tile, ms in estimates.items() if ms is not None}
        self._left = list(tiles)
        self._random.shuffle(self._left)
        if name != "random" and self.estimates:
            bound = PRUNED * min(self.estimates.values())
            self._left = sorted(
                (tile for tile in self._left if self.estimates.get(tile, 0) <= bound),
                key=lambda tile: self.estimates.get(tile, 0),
            )

    @property
    def left(self) -> int:
        """Candidates not yet proposed."""
        return len(self._left)

    def propose(self, count: int, scores: Mapping[Tile, float]) -> list[Tile]:
        """Up to ``count`` candidates that are not in ``scores``, which holds milliseconds (infinite: failed)."""
        self._left = [tile for tile in self._left if tile not in scores]
        measured = {tile: ms for tile, ms in scores.items() if math.isfinite(ms)}
        if self.name == "learned" and len(measured) >= LEAST and self._left:
            self._learn(measured)
        picked: list[Tile] = []
        while self._left and len(picked) < count:
            explore = self.name == "learned" and self._random.randrange(EXPLORED) == 0
            picked.append(self._left.pop(self._random.randrange(len(self._left)) if explore else 0))
        return picked

    def _learn(self, measured: Mapping[Tile, float]) -> None:
        """Sorts what is left by the fitted model."""
        tiles = [*measured, *self._left]
        x = _features(tiles)
        prior = np.log([self.estimates.get(tile, 1.0) for tile in tiles])
        n = len(measured)
        target = np.log(list(measured.values())) - prior[:n]
        mean = target.mean()
        a = x[:n]
        weights = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ (target - mean))
        predicted = prior[n:] + x[n:] @ weights
        self._left = [self._left[i] for i in np.argsort(predicted, kind="stable")]


def _features(tiles: Sequence[Tile]) -> NDArray:
    """[tiles, features]: logarithms of the numeric fields that vary, their squares and products; names as 0 and 1.
    Tiles of different kinds share none of them: each is 0 for the others."""
    kinds = list(dict.fromkeys(map(type, tiles)))
    columns: list[NDArray] = []
    for kind in kinds:
        where = np.array([type(tile) is kind for tile in tiles])
        if len(kinds) > 1:
            columns.append(where.astype(float))
        for column in _columns([tile for tile in tiles if type(tile) is kind]):
            columns.append(np.zeros(len(tiles)))
            columns[-1][where] = column
    products = [a * b for i, a in enumerate(columns) for b in columns[i:]]
    return np.stack([*columns, *products], axis=1) if columns else np.zeros((len(tiles), 1))


def _columns(tiles: Sequence[Tile]) -> Iterator[NDArray]:
    """Those of tiles of one kind, one by one."""
    for name in vars(tiles[0]):
        values = [getattr(tile, name) for tile in tiles]
        distinct = sorted(set(values), key=str)
        if len(distinct) < 2:
            continue
        if all(isinstance(value, int | float) and value > 0 for value in distinct):
            column = np.log2(np.array(values, dtype=float))
            yield (column - column.mean()) / column.std()
        else:
            yield from (np.array([value == one for value in values], dtype=float) for one in distinct)
