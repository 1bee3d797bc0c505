"""What a model answers after a context, greedily and teacher-forced.

Shape letters: B contexts, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsa_compile.model.model import HsaModel
from hsa_compile.model.state import State


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        correct: the greedily decoded tokens are exactly the answer's.
        forced: the likeliest token after each part of the right answer is its next one, at all its tokens.
        matched: at what part of them.
        got: the tokens decoded, up to the first wrong one.
    """

    correct: bool
    forced: bool
    matched: float
    got: list[int]


@torch.no_grad()
def answer(
    model: HsaModel, logits_BV: Tensor, state: State, wanted: Sequence[NDArray[np.int64]], decode: bool = True
) -> list[Answer]:
    """Answers after ``state``, whose memory is left as it was as far as it is filled.

    Args:
        logits_BV: after each context's last token.
        wanted: the right answers' token ids.
        decode: a token at a time. Else what greedy decoding gives is read off the teacher-forced tokens: up to the
            first wrong one both have the same text before them, so they differ by rounding alone.
    """
    A = max(map(len, wanted))
    right = torch.zeros(len(wanted), A, dtype=torch.int64)
    asked = torch.zeros(len(wanted), A, dtype=torch.bool)
    for b, ids in enumerate(wanted):
        right[b, : len(ids)] = torch.from_numpy(ids)
        asked[b, : len(ids)] = True
    right_BA, asked_BA = right.to(logits_BV.device), asked.to(logits_BV.device)
    forced = [logits_BV.argmax(-1)[:, None]]
    if A > 1:
        forced.append(model.step(right_BA[:, :-1], state)[0].argmax(-1))
    likeliest = torch.cat(forced, dim=1)
    matches = (likeliest == right_BA) & asked_BA
    got = _decode(model, logits_BV, state, right_BA, asked_BA) if decode else likeliest
    greedy = ((got == right_BA[:, : got.shape[1]]) | ~asked_BA[:, : got.shape[1]]).cumprod(-1)
    answers = []
    for b, ids in enumerate(wanted):
        n = len(ids)
        good = int(greedy[b, :n].sum()) if n <= got.shape[1] else int(greedy[b].sum())
        count = int(matches[b].sum())
        answers.append(Answer(good == n, count == n, count / n, got[b, : min(good + 1, n)].tolist()))
    return answers


def _decode(model: HsaModel, logits_BV: Tensor, state: State, right_BA: Tensor, asked_BA: Tensor) -> Tensor:
    """Greedy tokens [B, a], a at most A: it ends where no text can be right any more."""
    tokens: list[Tensor] = []
    alive = torch.ones_like(asked_BA[:, 0])
    for i in range(right_BA.shape[1]):
        tokens.append(logits_BV.argmax(-1))
        alive &= (tokens[-1] == right_BA[:, i]) | ~asked_BA[:, i]
        if i + 1 == right_BA.shape[1] or not bool((alive & asked_BA[:, i + 1]).any()):
            break
        step, state = model.step(tokens[-1][:, None], state)
        logits_BV = step[:, -1]
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def losses(model: HsaModel, logits_1V: Tensor, state: State, text: NDArray[np.int64]) -> float:
    """Mean cross-entropy in nats of the tokens of ``text`` after ``state``."""
    ids = torch.from_numpy(text).to(logits_1V.device)
    rest, _ = model.step(ids[None, :-1], state)
    logits = torch.cat((logits_1V, rest[0]))
    return float(torch.nn.functional.cross_entropy(logits.float(), ids))
