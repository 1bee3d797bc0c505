"""Text that ends before the first of its stop strings, while it still arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on but for what may be the beginning of a stop string.

    Args:
        stops: strings, none of them empty, that end the text and are not part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """What is certain to come before any stop string; sets ``stopped`` where one is complete."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held
