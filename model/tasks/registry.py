"""All tasks by name."""

from __future__ import annotations

from collections.abc import Sequence

from hsa_compile.model.config import ConfigError
from hsa_compile.model.tasks import babi, pairs, ruler
from hsa_compile.model.tasks.problem import Task

TASKS: dict[str, Task] = {task.name: task for task in (*pairs.TASKS, *ruler.TASKS, *babi.TASKS)}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names.

    Raises:
        ConfigError: there is none of a name, or one comes twice; the message lists them.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if len(set(names)) != len(names):
        raise ConfigError(f"a task is named twice in {', '.join(names)}; name each once")
    return [TASKS[name] for name in names]
