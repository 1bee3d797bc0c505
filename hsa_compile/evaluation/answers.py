"""What a model answers after a context, greedily and teacher-forced.

Shape letters: B contexts, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, permutations
from operator import eq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsa_compile.model.model import HsaModel
from hsa_compile.model.state import State

# An answer's token ids; where they are in several parts, any order of these is right.
Parts = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        correct: the greedily decoded tokens are exactly the answer's, its parts in any order.
        forced: the likeliest token after each beginning of the right answer is its next one, at all its tokens. Of
            several parts that is one of the right answers, in the text's order: who gives them in another is correct,
            but not forced.
        matched: at what part of them. Of several parts: how many of them the decoded tokens contain, as RULER scores.
        got: the tokens decoded, up to the first wrong one; of several parts, as many as the answer has.
    """

    correct: bool
    forced: bool
    matched: float
    got: list[int]


@torch.no_grad()
def answer(
    model: HsaModel, logits_BV: Tensor, state: State, wanted: Sequence[Parts], decode: bool = True
) -> list[Answer]:
    """Answers after ``state``, whose memory is left as it was as far as it is filled.

    Args:
        logits_BV: after each context's last token.
        wanted: the right answers, in parts.
        decode: a token at a time. Else what greedy decoding gives is read off the teacher-forced tokens: up to the
            first wrong one both have the same text before them, so they differ by rounding alone. Answers of several
            parts are decoded in any case: teacher forcing shows one order only.
    """
    right = [np.concatenate(parts) for parts in wanted]
    right_BA = torch.zeros(len(right), max(map(len, right)), dtype=torch.int64)
    for b, ids in enumerate(right):
        right_BA[b, : len(ids)] = torch.from_numpy(ids)
    forced = [logits_BV.argmax(-1)[:, None]]
    if right_BA.shape[1] > 1:
        forced.append(model.step(right_BA[:, :-1].to(logits_BV.device), state)[0].argmax(-1))
    likeliest = got = torch.cat(forced, dim=1).tolist()
    if decoded := [b for b, parts in enumerate(wanted) if decode or len(parts) > 1]:
        free = _decode(model, logits_BV, state, wanted, decoded)
        got = [free[b] if b in decoded else row for b, row in enumerate(likeliest)]
    return [_judge(*row) for row in zip(wanted, likeliest, got)]


def _decode(
    model: HsaModel, logits_BV: Tensor, state: State, wanted: Sequence[Parts], rows: Sequence[int]
) -> list[list[int]]:
    """Greedy tokens of all contexts. It ends where none of ``rows`` has an answer that goes on and can still be right;
    answers of several parts go on to their end."""
    right = {b: np.concatenate(wanted[b]).tolist() for b in rows}
    got: list[list[int]] = [[] for _ in wanted]
    while True:
        token_B = logits_BV.argmax(-1)
        for tokens, token in zip(got, token_B.tolist()):
            tokens.append(token)
        n = len(got[0])
        if not any(n < len(ids) and (len(wanted[b]) > 1 or got[b] == ids[:n]) for b, ids in right.items()):
            return got
        step, state = model.step(token_B[:, None], state)
        logits_BV = step[:, -1]


def _judge(wanted: Parts, likeliest: list[int], got: list[int]) -> Answer:
    """What became of one answer; both lists may go on after its end."""
    parts = [part.tolist() for part in wanted]
    right = list(chain.from_iterable(parts))
    n, matches = len(right), sum(map(eq, likeliest, right))
    if len(parts) == 1:
        good = next((i for i, same in enumerate(map(eq, got, right)) if not same), n)
        return Answer(good == n, matches == n, matches / n, got[: min(good + 1, n)])
    got = got[:n]
    found = sum(any(got[i : i + len(part)] == part for i in range(n)) for part in parts)
    correct = any(list(chain.from_iterable(order)) == got for order in permutations(parts))
    return Answer(correct, matches == n, found / len(parts), got)


@torch.no_grad()
def losses(model: HsaModel, logits_1V: Tensor, state: State, text: NDArray[np.int64]) -> float:
    """Mean cross-entropy in nats of the tokens of ``text`` after ``state``."""
    ids = torch.from_numpy(text).to(logits_1V.device)
    rest, _ = model.step(ids[None, :-1], state)
    logits = torch.cat((logits_1V, rest[0]))
    return float(torch.nn.functional.cross_entropy(logits.float(), ids))
