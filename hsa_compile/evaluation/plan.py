"""What to evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from hsa_compile.model.config import ConfigError
from hsa_compile.model.tasks.problem import Task
from hsa_compile.model.tasks.registry import TASKS, find_tasks

PERPLEXITY = "ppl"
# What is asked where nothing is said: all but what is for training, or for models of minutes.
DEFAULT_TASKS = (*(name for name in TASKS if name not in ("pairs", "niah")), PERPLEXITY)


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Args:
        tasks: names of ``model/tasks``, and ``ppl``.
        lengths: tokens of context, evaluated in this order.
        n: questions a task and length.
        seed: draws all of them.
        segment: tokens a prefill step, and at most at once of a batch.
        batch_tokens: tokens of contexts that are read side by side.
        patch_from: from this length on, questions share a haystack that is read once, and facts are written over it;
            architectures whose layers see more than a window read every context.
        offload: keep the chunk memory in the host's.
        check: questions a task and length that are asked again of a context read whole by a full prefill, where they
            were patched.
        decoded: questions a task and length that are decoded a token at a time; of the others the greedy tokens are
            read off the teacher-forced ones (``answers.answer``), but where any order is right. None decodes all.
        seconds: what is not begun by then is left for another run of the same command; 0 is no limit.

    Raises:
        ConfigError: a name is unknown or a number is out of range.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths: tuple[int, ...] = (4096,)
    n: int = 64
    seed: int = 0
    segment: int = 8192
    batch_tokens: int = 1 << 16
    patch_from: int = 1 << 17
    offload: bool = False
    check: int = 0
    decoded: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths:
            raise ConfigError("name at least one task and one length")
        find_tasks([name for name in self.tasks if name != PERPLEXITY])
        for name in ("n", "segment", "batch_tokens", "patch_from"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.lengths) < 1 or len(set(self.lengths)) != len(self.lengths):
            raise ConfigError(f"lengths must be different and at least 1, got {', '.join(map(str, self.lengths))}")
        if self.check < 0 or self.seconds < 0 or (self.decoded or 0) < 0:
            raise ConfigError("check, decoded and seconds must be at least 0")

    def decodes(self, index: int) -> bool:
        """Whether this question is decoded a token at a time."""
        return self.decoded is None or index < self.decoded

    @property
    def questions(self) -> list[Task]:
        """The tasks that ask something."""
        return find_tasks([name for name in self.tasks if name != PERPLEXITY])
