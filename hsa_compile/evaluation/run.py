"""The evaluation of a model by length: every question's contexts are read, answered, and written to the journal.

Up to ``Plan.patch_from`` tokens, contexts are read whole, several side by side. From there on a haystack is read once
(by a short prefill, which leaves out the quadratic part), and each question's facts are written over it by patching,
which is exact; then the memory is put back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hsa_compile.bench.inference import operator_clock
from hsa_compile.evaluation.answers import Answer, answer, losses
from hsa_compile.evaluation.journal import Journal
from hsa_compile.evaluation.plan import PERPLEXITY, Plan
from hsa_compile.evaluation.reading import read, shares_haystacks
from hsa_compile.evaluation.samples import Samples
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import Ids, patched, prefill
from hsa_compile.model.state import State
from hsa_compile.model.tasks.haystack import Context
from hsa_compile.model.tasks.problem import Hay, Task

Progress = Callable[[str, int], None]
CHECK_TOLERANCE = 0.05  # of the largest logit: what rounding in half precision may do


@dataclass(frozen=True)
class Cost:
    """Of reading contexts.

    Attributes:
        seconds: of all of it; ``selection_s`` and ``attention_s`` of the operators in it.
        peak_gib: of the GPU's memory; None on a CPU.
    """

    seconds: float
    selection_s: float
    attention_s: float
    peak_gib: float | None

    def fields(self, contexts: int = 1) -> dict[str, float]:
        """For a journal's line, times a context."""
        times = {name: round(getattr(self, name) / contexts, 4) for name in ("seconds", "selection_s", "attention_s")}
        return times if self.peak_gib is None else times | {"peak_gib": round(self.peak_gib, 3)}


class _Rows:
    """Contexts of one length side by side, as ids [B, L] that are read a segment at a time."""

    def __init__(self, contexts: list[Context]) -> None:
        self.contexts = contexts
        self.shape = (len(contexts), contexts[0].shape[1])

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        return torch.cat([context[where] for context in self.contexts])


@dataclass
class Evaluation:
    """One run.

    Args:
        model: in eval mode.
        samples: draws the questions.
        plan: what to do.
        journal: has what was done before, and gets what is.
        progress: is told what goes on, and how many questions are done.
    """

    model: HsaModel
    samples: Samples
    plan: Plan
    journal: Journal
    progress: Progress = lambda line, done: None
    _begun: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> int:
        """Questions of the whole plan."""
        return self.plan.n * len(self.plan.questions) * len(self.plan.lengths)

    def run(self) -> bool:
        """Does what the journal lacks; whether that is all of the plan, or time ran out."""
        self._done = {(x["task"], x["L"], x["index"]) for x in self.journal.of("sample") if x["seed"] == self.plan.seed}
        self.progress("", self.total - self._lacking_in_all())
        try:
            for length in self.plan.lengths:
                self._length(length)
        except _OutOfTimeError:
            return False
        return True

    def _length(self, length: int) -> None:
        lacking = {
            task.name: [i for i in range(self.plan.n) if (task.name, length, i) not in self._done]
            for task in self.plan.questions
        }
        shares = shares_haystacks(self.model.config, self.plan, length)
        for hay in ("text", "words"):
            tasks = [task for task in self.plan.questions if task.hay == hay and lacking[task.name]]
            ppl = hay == "text" and PERPLEXITY in self.plan.tasks and not self._has_ppl(length)
            if shares:
                self._patched(hay, tasks, lacking, length, ppl)
                continue
            if ppl:
                logits, state, _ = self._read(self.samples.haystack("text", length))
                self._perplexity(length, logits, state)
            self._whole(tasks, lacking, length)
        self._whole([task for task in self.plan.questions if task.hay == "frequent"], lacking, length)

    def _lacking_in_all(self) -> int:
        names = [task.name for task in self.plan.questions]
        wanted = itertools.product(names, self.plan.lengths, range(self.plan.n))
        return sum(key not in self._done for key in wanted)

    # Contexts that are read whole.

    def _whole(self, tasks: list[Task], lacking: dict[str, list[int]], length: int) -> None:
        batch = max(1, self.plan.batch_tokens // length)
        for first in range(0, self.plan.n, batch):  # task after task, so that all have as many when time runs out
            for task in tasks:
                indices = [i for i in lacking[task.name] if first <= i < first + batch]
                if indices:
                    self._in_time()
                    contexts = [self.samples.draw(task, length, i) for i in indices]
                    logits, state, cost = self._read(_Rows(contexts))
                    decode = any(map(self.plan.decodes, indices))
                    found = answer(self.model, logits, state, [context.parts for context in contexts], decode)
                    for i, context, got in zip(indices, contexts, found):
                        self._write(task, length, i, context, got, cost.fields(len(indices)))

    def _read(self, ids: Ids) -> tuple[Tensor, State, Cost]:
        with self._cost() as costs:
            logits, state = read(self.model, ids, self.plan)
        return logits, state, costs[0]

    # One haystack for many questions.

    def _patched(self, hay: Hay, tasks: list[Task], lacking: dict[str, list[int]], length: int, ppl: bool) -> None:
        shared = self.samples.shared
        for first in range(0, self.plan.n, shared):
            mine = [(i, task) for task in tasks for i in lacking[task.name] if first <= i < first + shared]
            if not mine and not (ppl and not first):
                continue
            self._in_time()
            self.progress(f"{length:,} tokens, reading a haystack", 0)
            circle = self.samples.haystack(hay, length, first)
            logits, state, cost = self._read(circle)
            self.journal.write({"kind": "prefill", "prefill": "short", "hay": hay, "L": length, **cost.fields()})
            if ppl and not first:
                self._perplexity(length, logits, state)
            for i, task in sorted(mine, key=lambda pair: pair[0]):
                self._in_time()
                self._ask_patched(task, length, i, self.samples.draw(task, length, i, circle), state, cost)
            del state, logits

    def _ask_patched(self, task: Task, length: int, index: int, context: Context, state: State, cost: Cost) -> None:
        began = time.perf_counter()
        with patched(self.model, context, state, context.changed, self.plan.segment) as (logits, now):
            (got,) = answer(self.model, logits, now, [context.parts], self.plan.decodes(index))
        extra: dict[str, Any] = {"patch_s": round(time.perf_counter() - began, 4)}
        if index < self.plan.check:
            extra |= self._check(context, logits, got)
        self._write(task, length, index, context, got, cost.fields() | extra)

    def _check(self, context: Context, logits: Tensor, got: Answer) -> dict[str, Any]:
        """The same question after a full prefill of the same context."""
        with self._cost() as costs:
            want, state = prefill(self.model, context, self.plan.segment, offload=self.plan.offload)
        (again,) = answer(self.model, want, state, [context.parts])
        error = float((logits.float() - want.float()).abs().max() / want.float().abs().max())
        cost = {f"full_{name}": value for name, value in costs[0].fields().items()}
        return {"check_error": error, "check_same": again == got, "check_ok": error < CHECK_TOLERANCE, **cost}

    # What both share.

    def _write(
        self, task: Task, length: int, index: int, context: Context, got: Answer, cost: dict[str, float]
    ) -> None:
        line = {
            "kind": "sample", "task": task.name, "L": length, "seed": self.plan.seed, "index": index,
            "depth": round(context.depth, 4), "correct": got.correct, "forced": got.forced,
            "matched": round(got.matched, 4), "answer": context.answer.tolist(), "got": got.got, **cost,
        }  # fmt: skip
        self.journal.write(line)
        self._done.add((task.name, length, index))
        self.progress(f"{length:,} tokens, {task.name}", 1)

    def _has_ppl(self, length: int) -> bool:
        return any(line["L"] == length and line["seed"] == self.plan.seed for line in self.journal.of("ppl"))

    def _perplexity(self, length: int, logits: Tensor, state: State) -> None:
        texts = list(self.samples.continuations())
        parts = [losses(self.model, logits, state, text) for text in texts]
        line = {"kind": "ppl", "L": length, "seed": self.plan.seed, "nats": [round(x, 5) for x in parts]}
        self.journal.write(line | {"tokens": sum(map(len, texts))})

    def _in_time(self) -> None:
        if self.plan.seconds and time.perf_counter() - self._begun > self.plan.seconds:
            raise _OutOfTimeError

    @contextmanager
    def _cost(self) -> Iterator[list[Cost]]:
        device = self.model.embedding.weight.device
        cuda, found = device.type == "cuda", list[Cost]()
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        with operator_clock(device) as clock:
            yield found
            if cuda:
                torch.cuda.synchronize(device)
        selection, attention = (clock.milliseconds(name) / 1e3 for name in ("selection", "attention"))
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
        found.append(Cost(time.perf_counter() - began, selection, attention, peak))


class _OutOfTimeError(Exception):
    """The plan's seconds are over."""
