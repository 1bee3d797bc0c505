"""Text as tokens and back, whole or as it comes: bytes, or a Hugging Face ``tokenizer.json``. Needs no PyTorch."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

HELD = 32  # tokens that make no whole character, at most


class TokenizerError(ValueError):
    """A tokenizer cannot be read; the message says which file and what is needed."""


class Tokenizer(Protocol):
    """What text goes through on its way to a model and back.

    Attributes:
        vocab_size: ids lie below.
        end_ids: tokens after which a text is over.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text; lone surrogates, which no UTF-8 has, become ``?``."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special ones; what is not UTF-8 becomes U+FFFD."""
        ...

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive a few at a time."""
        ...


class StreamDecoder(Protocol):
    """Gives out text as soon as its last byte has come, never half a character."""

    def push(self, ids: Iterable[int]) -> str:
        """The text completed by ``ids``; may be empty."""
        ...

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        ...


class ByteTokenizer:
    """Ids 0 … 255 are the bytes of UTF-8 text; a few ids above are special, stand for no text and vanish in
    ``decode``."""

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
        return _ByteDecoder(self)

    def _bytes(self, ids: Iterable[int]) -> bytes:
        known = list(ids)
        if bad := [i for i in known if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary 0 … {self.vocab_size - 1}")
        return bytes(i for i in known if i < 256)


class _ByteDecoder:
    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer._bytes(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``; texts are made of its tokens without special ones.

    Args:
        path: of the file.
        end_ids: tokens after which a text is over.

    Raises:
        TokenizerError: it cannot be read.
        ModuleNotFoundError: the package ``tokenizers`` is not installed.
    """

    def __init__(self, path: str | Path, end_ids: Iterable[int] = ()) -> None:
        import tokenizers

        if not Path(path).is_file():
            raise TokenizerError(f"no such tokenizer: {path}; give a Hugging Face tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.end_ids = frozenset(end_ids)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, such as ``</s>``."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text; lone surrogates, which no UTF-8 has, become ``?``."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """As ``encode``, uint32. Line by line: in one piece, long texts take many times their size of memory."""
        lines = text.encode(errors="replace").decode().splitlines(keepends=True)
        pieces = self._tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.uint32), *(np.array(piece.ids, np.uint32) for piece in pieces)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special and unknown ones stand for no text, what is not UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive a few at a time."""
        return _JsonDecoder(self)


class _JsonDecoder:
    """What tokens mean may hang on those around them (a space before a word, bytes of one character): each piece of
    text is what the ids since the piece before the last make, less what of it was given out."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join(map(self._push, ids))

    def _push(self, token: int) -> str:
        self._held.append(token)
        text = self._new()
        if not text:  # of a special token
            self._held.pop()
        # U+FFFD at the end may be bytes of a character of which there will be more. Garbage without end is cut
        # somewhere, or every token would decode all of it.
        elif not text.endswith("\ufffd") or len(self._held) == HELD:
            self._before, self._held = self._held, []
            return text
        return ""

    def _new(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(known) :]

    def finish(self) -> str:
        rest = self._new()
        self._before, self._held = self._held, []
        return rest
