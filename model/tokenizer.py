"""Bytes as tokens: ids 0 … 255 are the bytes of UTF-8 text, a few ids above are special."""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class ByteTokenizer:
    """Stateless byte tokenizer. Special ids stand for no text and vanish in ``decode``."""

    PAD, BOS, EOS, SEP = 256, 257, 258, 259
    vocab_size = 260
    end_ids = frozenset({EOS})

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text; lone surrogates become ``?``."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes among ``ids``; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self._bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive a few at a time."""
        return StreamDecoder(self)

    def _bytes(self, ids: Iterable[int]) -> bytes:
        known = list(ids)
        if bad := [i for i in known if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary 0 … {self.vocab_size - 1}")
        return bytes(i for i in known if i < 256)


class StreamDecoder:
    """Gives out text as soon as its last byte has come, never half a character."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text completed by ``ids``; may be empty."""
        return self._decoder.decode(self._tokenizer._bytes(ids))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
