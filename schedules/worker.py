"""Processes that may crash or hang: requests and answers are JSON lines, and every request has its time.

Compilers and candidates of the tuner run in these. The parent's side is ``Worker``, the child's is ``serve``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

GRACE = 5.0  # seconds past its time after which a child ends itself, should the parent be gone


class WorkerError(RuntimeError):
    """A request got no answer. ``kind``: "crash", "hang" (out of time), or "refused" (the child says why)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A child process that answers requests, one at a time; started on the first, and anew after it has died."""

    def __init__(self, module: str, env: dict[str, str] | None = None) -> None:
        self.command = [sys.executable, "-m", module]
        self.env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A file and not a pipe: a child that writes more than a pipe holds would wait for a reader.
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            # Its own session: Ctrl-C reaches the parent alone, which then ends its children in order.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=self.env,
                bufsize=0, start_new_session=True,
            )  # fmt: skip
        return self._process

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
            WorkerError: the child died, was out of time and has been ended, or refused.
        """
        process = self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps({**message, "seconds": seconds}).encode() + b"\n")
            line = self._read(process, time.monotonic() + seconds)
        except BrokenPipeError:
            line = b""
        except BaseException:
            self.close()
            raise
        if line is None:
            self.close()
            raise WorkerError("hang", f"no answer within {seconds:g} s")
        try:
            answer = json.loads(line)
        except ValueError:
            raise WorkerError("crash", self._post_mortem(process)) from None
        if "refused" in answer:
            raise WorkerError("refused", answer["refused"])
        return answer

    @staticmethod
    def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """One line, b"" at the end of the stream, None when out of time."""
        assert process.stdout
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return b""
            line += part
        return line

    def _post_mortem(self, process: subprocess.Popen[bytes]) -> str:
        try:
            status = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            status = 0
        errors = self.errors()
        self.close()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"the process died ({how}) {errors[-1000:]}".strip()

    def errors(self) -> str:
        """What the child has written to its stderr, the end of it."""
        if self._errors is None:
            return ""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4000))
        return self._errors.read().decode(errors="replace").strip()

    def close(self) -> None:
        """Ends the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout, self._errors):
                stream.close()  # type: ignore[union-attr]
            process.wait()
            self._errors = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's loop, until its input ends. What is printed meanwhile goes to stderr; exceptions are answers."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        # Untouched by locks that a hung extension holds, and there even if the parent was killed.
        signal.setitimer(signal.ITIMER_REAL, message.pop("seconds") + GRACE)
        try:
            answer = handle(message)
        except Exception as error:
            answer = {"refused": f"{type(error).__name__}: {error}"[-2000:]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(answer).encode() + b"\n")
