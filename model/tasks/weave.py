"""Training samples: facts, and questions with their answers, woven into text. The loss counts text and answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsa_compile.model.data import DataError, Sample, excerpt
from hsa_compile.model.shards import Tokens
from hsa_compile.model.tasks.haystack import Codec, frequent_words, hide, other_words
from hsa_compile.model.tasks.pairs import KEYS, PAIR_BYTES, QUERY_BYTES, VALUE_DIGITS, value
from hsa_compile.model.tasks.problem import WORDS, Ask, Problem, Task, digits

ASKS = 6  # questions about one problem's facts, at most
STATED_DIGITS = 7
TRIES = 16  # of any problems, before those that fit are looked for in order
STRADDLED = 8  # last tokens of a fact, before one of which a chunk begins where it straddles: most are digits, in bytes
WORDS_LENGTH = 512  # from which on a text of words is long enough for some to be common


class _Piece(NamedTuple):
    """Tokens to write, of which ``begin`` … ``end - 1`` are an answer."""

    ids: NDArray[np.int64]
    begin: int
    end: int


@dataclass(frozen=True)
class Weaver:
    """Draws training samples of some tasks.

    Args:
        codec: turns facts into tokens of the text's vocabulary.
        text: what they are woven into.
        tasks: each with how often it is drawn.
        fill: part of a sample that is facts, questions and answers.
        answer_weight: of an answer's token in the loss; a token of text has 1.
        straddle: probability that a fact woven into text is moved so that a chunk begins within its last tokens.
        chunk_size: [S] tokens a chunk, for ``straddle``.
    """

    codec: Codec
    text: bytes | Tokens
    tasks: tuple[tuple[Task, float], ...]
    fill: float
    answer_weight: float
    straddle: float = 0.0
    chunk_size: int = 64

    def draw(self, rng: random.Random, length: int, pairs: int) -> Sample:
        """A sample of ``length`` tokens; ``pairs`` at most, where it is one of dense pairs.

        Raises:
            DataError: the facts do not fit.
        """
        task = self._task(rng, self.tasks)
        if task.hay != "text" and length < WORDS_LENGTH and self._in_text:
            task = self._task(rng, self._in_text)
        if task.dense:
            if not isinstance(self.text, bytes):
                return self._statements(rng, length, pairs)
            return pairs_sample(rng, self.text, length, pairs, self.fill, self.answer_weight)
        if task.hay != "text":
            return self._words(rng, task, length)
        return self._woven(rng, task, length)

    def _statements(self, rng: random.Random, length: int, pairs: int) -> Sample:
        """As ``pairs_sample``, of a word and a number each: at most so many statements, written over and over."""
        words = rng.sample(WORDS, rng.randint(1, min(pairs, len(WORDS))))
        texts = [(f" {word} is", f" {digits(rng, STATED_DIGITS)}.") for word in words]
        written = [self._encode("".join(text).encode()) for text in texts]
        queries = [len(self._encode(query.encode())) for query, _ in texts]
        inserts = int((length + 1) * self.fill) // max(map(len, written))
        if inserts < len(words):
            raise DataError(f"{len(words)} pairs do not fit into {self.fill:.0%} of {length} tokens; ask for fewer")
        pieces, told = list[_Piece](), set[int]()
        for i in _asking_order(rng, len(words), inserts):
            answer = (queries[i], len(written[i]) - 1) if i in told else (0, 0)
            pieces.append(_Piece(written[i], *answer))
            told.add(i)
        return self._between_text(rng, pieces, length)

    @staticmethod
    def _task(rng: random.Random, tasks: Sequence[tuple[Task, float]]) -> Task:
        names, shares = zip(*tasks)
        return names[0] if len(names) == 1 else rng.choices(names, shares)[0]

    def _words(self, rng: random.Random, task: Task, length: int) -> Sample:
        """A text of words, all of it, and one question at its end."""
        problem = task.make(rng, 1, length)
        ask, seed = problem.asks[0], rng.getrandbits(32)
        answer = self._answer(rng, ask)
        room = length + 1 - len(answer)
        if problem.words:
            words = frequent_words(self.codec, problem, room, seed)
        else:
            words = other_words(self.codec, room, seed)
        ids = np.concatenate((hide(rng, self.codec, words, problem, ask, b" ").read(0, room), answer))
        weights = np.zeros(length, np.float32)
        weights[room - 1 :] = self.answer_weight
        return Sample(ids.tolist(), weights.tolist())

    def _woven(self, rng: random.Random, task: Task, length: int) -> Sample:
        """Problems of all tasks that hide in prose, the first of this one, until they fill their part."""
        inserts: list[tuple[float, _Piece]] = []
        left, used = int((length + 1) * self.fill), set[str]()
        spare = int(left * rng.random())  # from a single problem to as many as fit
        for candidate, asks in self._candidates(rng, task, length):
            if inserts and left <= spare:
                break
            problem = candidate.make(rng, asks, length)
            if not used.isdisjoint(names := (*problem.names, *filter(None, [candidate.world]))):
                continue
            pieces = self._pieces(rng, problem, left)
            if (size := sum(len(piece.ids) for piece in pieces)) <= left:
                left -= size
                inserts += zip(sorted(rng.random() for _ in pieces), pieces)
                used.update(names)
            elif inserts:
                break
        if not inserts:
            raise DataError(f"no problem fits into {self.fill:.0%} of {length} tokens; ask for longer")
        return self._between_text(rng, [piece for _, piece in sorted(inserts, key=lambda x: x[0])], length)

    @property
    def _in_text(self) -> list[tuple[Task, float]]:
        """The tasks whose facts are woven into prose."""
        return [x for x in self.tasks if x[0].hay == "text" and not x[0].dense]

    def _candidates(self, rng: random.Random, task: Task, length: int) -> Iterator[tuple[Task, int]]:
        """What to try one after the other, and how many questions: the task that was drawn, then any; where samples are
        so short that few fit, each with one question."""
        yield task, rng.randint(1, ASKS)
        for _ in range(TRIES + length // 64):
            yield self._task(rng, self._in_text), rng.randint(1, ASKS)
        for other, _ in self._in_text * 4:
            yield other, 1

    def _pieces(self, rng: random.Random, problem: Problem, room: int) -> list[_Piece]:
        """What is written, in order: the facts, the first question, and as many of the others as have room. (Problems
        whose questions do not all fit were left out once: short samples did not follow the tasks' shares.)"""
        pieces = [_Piece(self._encode(fact), 0, 0) for fact in problem.facts]
        room -= sum(len(piece.ids) for piece in pieces)
        for i, ask in enumerate(problem.asks):
            query, answer = self._encode(ask.query), self._answer(rng, ask)
            ids = np.concatenate((query, answer, self._encode(b"\n")))
            room -= len(ids)
            if i and room < 0:
                break
            pieces.append(_Piece(ids, len(query), len(query) + len(answer)))
        return pieces

    def _between_text(self, rng: random.Random, pieces: list[_Piece], length: int) -> Sample:
        room = length + 1 - sum(len(piece.ids) for piece in pieces)
        part = excerpt(rng, self.text, room)
        text = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
        cuts = sorted(rng.randrange(room + 1) for _ in pieces)
        if self.straddle:
            cuts = self._across_chunks(rng, pieces, cuts, room)
        ids, weights, last = [], np.ones(length + 1, np.float32), 0
        written = 0
        for piece, cut in zip(pieces, cuts):
            ids += [text[last:cut], piece.ids]
            first = cut + written
            weights[first : first + len(piece.ids)] = 0
            weights[first + piece.begin : first + piece.end] = self.answer_weight
            last, written = cut, written + len(piece.ids)
        return Sample(np.concatenate([*ids, text[last:]]).tolist(), weights[1:].tolist())

    def _across_chunks(self, rng: random.Random, pieces: list[_Piece], cuts: list[int], room: int) -> list[int]:
        """The cuts, some moved so that facts lie across two chunks: each by less than a chunk, the shorter way if there
        is text for it. Later ones move along only where they would come before this one."""
        moved, last, written = list[int](), 0, 0
        for piece, cut in zip(pieces, cuts):
            last, size = max(last, cut), len(piece.ids)
            if not piece.end and size > 1 and rng.random() < self.straddle:
                border = last + written + size - rng.randint(1, min(STRADDLED, size - 1))
                ahead = -border % self.chunk_size
                moves = [x for x in (ahead, ahead - self.chunk_size) if (moved or [0])[-1] <= last + x <= room]
                last += min(moves, key=abs, default=0)
            moved.append(last)
            written += size
        return moved

    def _answer(self, rng: random.Random, ask: Ask) -> NDArray[np.int64]:
        """One of the right answers: no order is taught where none counts."""
        parts = [self._encode(part) for part in ask.parts]
        return np.concatenate(parts if len(parts) == 1 else rng.sample(parts, len(parts)))

    def _encode(self, text: bytes) -> NDArray[np.int64]:
        return self.codec.encode(text).astype(np.int64)


def pairs_sample(rng: random.Random, text: bytes, length: int, pairs: int, fill: float, answer_weight: float) -> Sample:
    """An excerpt with 1 to ``pairs`` pairs in it, repeated at uniform places until they fill ``fill`` of the sample.

    Where a pair comes again its value can be known. The loss there is ``answer_weight``; it is 1 on the text, and 0 on
    braces, keys and values that come for the first time, which cannot be foreseen.

    Raises:
        DataError: the pairs do not fit into the length.
    """
    inserts = int((length + 1) * fill) // PAIR_BYTES
    if pairs < 1 or inserts < pairs:
        raise DataError(f"{pairs} pairs do not fit into {fill:.0%} of {length} tokens; ask for fewer")
    if pairs > len(KEYS):
        raise DataError(f"{pairs} pairs in one sample, but there are only {len(KEYS)} keys; ask for fewer")
    keys = rng.sample(KEYS, rng.randint(1, pairs))
    order = _asking_order(rng, len(keys), inserts)
    values = [value(rng) for _ in keys]
    room = length + 1 - inserts * PAIR_BYTES
    hay = bytes(excerpt(rng, text, room))
    cuts = sorted(rng.randrange(room + 1) for _ in order)
    ids, weights, last = bytearray(), [], 0
    known: set[int] = set()
    for cut, i in zip(cuts, order):
        ids += hay[last:cut] + f"{{{keys[i]}:{values[i]}}}".encode()
        answer = answer_weight if i in known else 0.0
        weights += [1.0] * (cut - last) + [0.0] * QUERY_BYTES + [answer] * VALUE_DIGITS + [0.0]
        known.add(i)
        last = cut
    ids += hay[last:]
    return Sample(list(ids), (weights + [1.0] * (room - last))[1:])


def _asking_order(rng: random.Random, pairs: int, inserts: int) -> list[int]:
    """Which pair each insert writes: new ones come at random times, repeated are those that were so the least often."""
    repeats = inserts - pairs
    order, times = [0], [0]
    for is_new in rng.sample([True, False], inserts - 1, counts=[pairs - 1, repeats]):
        if is_new:
            times.append(0)
            order.append(len(times) - 1)
        else:
            least = min(times)
            order.append(rng.choice([i for i, count in enumerate(times) if count == least]))
            times[order[-1]] += 1
    return order
