"""What the commands share: the terminal, options that several take, and how mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Tables that go to a file or a pipe are not squeezed into 80 columns.
console = Console(width=None if Console().is_terminal else 110)

Checkpoint = Annotated[Path, typer.Argument(help="Directory that `train` wrote.", show_default=False)]
Bundle = Annotated[Path, typer.Argument(help="Directory that `export` wrote.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="cpu:native, or a level such as cpu:x86-64-v3.")]
Data = Annotated[Path | None, typer.Option(help="A text file or a directory of them. Default: a public-domain book.")]
Seed = Annotated[int, typer.Option(help="Makes the run repeatable.")]

# What users can cause and mend: told in a line, without a traceback. Looked up by name, so that the modules that
# define them are not imported to say --help.
_USER_ERRORS = {
    "BuildError", "BundleError", "CapacityError", "CheckpointError", "ConfigError", "DataError", "DeviceError",
    "EvaluationError", "GenerationError", "JournalError", "LibraryError", "MeasurementError", "ProblemError",
    "RecordError", "ScheduleError", "StepError", "TargetError", "TokenizerError", "TrainingError",
}  # fmt: skip
_EXTRAS = {
    "torch": "train", "safetensors": "train", "matplotlib": "train", "tokenizers": "tokenizers", "onnx": "export",
    "onnxscript": "export", "pydantic": "compile", "lm_eval": "harness", "nltk": "harness", "starlette": "serve",
    "uvicorn": "serve", "prometheus_client": "serve",
}  # fmt: skip


def tokens(text: str) -> int:
    """4096, 4K (4 · 1024) or 1M.

    Raises:
        typer.BadParameter: it is none of these.
    """
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no length; write 4096, 4K or 1M")
    return int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]]


@contextmanager
def friendly() -> Iterator[None]:
    """Turns errors that users can mend into one red line and exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        fail(f"this command needs {error.name}; install it with: pip install 'hsa-compile[{_EXTRAS[error.name]}]'")
    except Exception as error:
        if type(error).__name__ not in _USER_ERRORS:
            raise
        fail(str(error))


def fail(message: str) -> NoReturn:
    """One red line, and exit code 1."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a line that changes; the function it gives sets the line."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text)
        yield lambda line: bar.update(task, description=escape(f"{text}: {line}"))


def text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)
