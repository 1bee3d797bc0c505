"""Why answers are missed: the margins of a model's selections while it gives the right answers to an evaluation's
questions.

The contexts are those of ``eval``, read likewise. The right answer is fed to the model, and every HSA layer is watched
where the answer's tokens are predicted: at the context's last token, and at all of the answer but its last. Where a
space comes next nothing is measured: no fact is needed to tell that.

Shape letters: A tokens of the answer, a of them measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.evaluation.plan import PERPLEXITY, Plan
from hsa_compile.evaluation.reading import read, shares_haystacks
from hsa_compile.evaluation.samples import Samples
from hsa_compile.model.config import ConfigError
from hsa_compile.model.diagnose import joined
from hsa_compile.model.margin import Margin, watched_margins
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import patched
from hsa_compile.model.state import State
from hsa_compile.model.tasks.haystack import Context
from hsa_compile.model.tasks.problem import Task

Reading = AbstractContextManager[tuple[Tensor, State]]


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        task, length, index: which one.
        layers: the margins at the a tokens, an HSA layer each from bottom to top.
        right: bool [a], whether the likeliest token was the answer's.
    """

    task: str
    length: int
    index: int
    layers: list[Margin]
    right: Tensor


def _check(plan: Plan) -> None:
    without = [task.name for task in plan.questions if task.hay == "frequent"]
    without += [name for name in plan.tasks if name == PERPLEXITY]
    if without:
        raise ConfigError(f"{', '.join(without)} hides no facts whose chunks could be right ones; leave it out")


@torch.no_grad()
def ask_all(
    model: HsaModel, samples: Samples, plan: Plan, progress: Callable[[str], None] = lambda line: None
) -> Iterator[Asked]:
    """Asks the plan's questions: length after length, one context at a time.

    Args:
        model: in eval mode.
        progress: is told what is read.

    Raises:
        ConfigError: a task hides no facts, facts do not fit, or the model has no HSA layers.
    """
    _check(plan)
    for length in plan.lengths:
        if shares_haystacks(model.config, plan, length):
            yield from _patched(model, samples, plan, length, progress)
            continue
        for task in plan.questions:
            for index in range(plan.n):
                progress(f"{task.name}, {length:,} tokens, question {index + 1}")
                context = samples.draw(task, length, index)
                yield _ask(model, samples, task, index, context, _whole(model, context, plan))


@contextmanager
def _whole(model: HsaModel, context: Context, plan: Plan) -> Iterator[tuple[Tensor, State]]:
    """The context is read when the block begins."""
    yield read(model, context, plan)


def _patched(
    model: HsaModel, samples: Samples, plan: Plan, length: int, progress: Callable[[str], None]
) -> Iterator[Asked]:
    """Of questions that share haystacks."""
    for hay in dict.fromkeys(task.hay for task in plan.questions):
        for first in range(0, plan.n, samples.shared):
            progress(f"{length:,} tokens, a haystack")
            circle = samples.haystack(hay, length, first)
            _, state = read(model, circle, plan)
            for task in (task for task in plan.questions if task.hay == hay):
                for index in range(first, min(first + samples.shared, plan.n)):
                    progress(f"{task.name}, {length:,} tokens, question {index + 1}")
                    context = samples.draw(task, length, index, circle)
                    reading = patched(model, context, state, context.changed, plan.segment)
                    yield _ask(model, samples, task, index, context, reading)
            del state


def _ask(model: HsaModel, samples: Samples, task: Task, index: int, context: Context, reading: Reading) -> Asked:
    """Reads the context where it is watched, and feeds the answer."""
    L, wanted = context.shape[1], torch.from_numpy(context.answer).to(model.embedding.weight.device)
    space = samples.codec.encode(b" ")
    told = [j for j, token in enumerate(context.answer) if [token] != space.tolist()]
    facts = [context.changed[i] for i in context.needed]
    with watched_margins(model, [L - 1 + j for j in told], facts) as parts, reading as (logits_1V, state):
        logits_AV = logits_1V
        if len(wanted) > 1:
            logits_AV = torch.cat((logits_1V, model.step(wanted[None, :-1], state)[0][0]))
    right_A = logits_AV.argmax(-1) == wanted
    return Asked(task.name, L, index, [joined(layer) for layer in parts], right_A[told])
