"""How a bundle turns text into ids and back: its own tokenizer, as a file beside the graph, or bytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsa_compile.export.bundle import BundleError, Manifest
from hsa_compile.model.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, TokenizerError

TOKENIZER = "tokenizer.json"


def add_tokenizer(
    directory: Path, vocab_size: int, source: Path | None = None, end_tokens: Sequence[str] = ()
) -> dict[str, Any]:
    """Puts a tokenizer into a bundle that is being made.

    Args:
        directory: the bundle.
        vocab_size: of the model.
        source: a Hugging Face ``tokenizer.json``; without one the model speaks bytes, or, where it has more tokens
            than these, ids alone.
        end_tokens: names of tokens after which a text is over, such as ``</s>``.

    Returns:
        What the manifest says of it.

    Raises:
        TokenizerError: it cannot be read, has more tokens than the model, or lacks an end token.
    """
    if source is None:
        if end_tokens:
            raise TokenizerError(f"end token {end_tokens[0]!r} needs a tokenizer that has it; give a tokenizer.json")
        return {"kind": "bytes" if vocab_size <= ByteTokenizer.vocab_size else "ids"}
    tokenizer = JsonTokenizer(source)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{source} has {tokenizer.vocab_size} tokens, the model {vocab_size}; give the one it was trained with"
        )
    ends = {token: tokenizer.id_of(token) for token in end_tokens}
    if unknown := [token for token, found in ends.items() if found is None]:
        raise TokenizerError(f"{source} has no token {unknown[0]!r}; name end tokens as the file does")
    shutil.copyfile(source, directory / TOKENIZER)
    return {"kind": "json", "file": TOKENIZER, "end_ids": list(ends.values())}


def load_tokenizer(directory: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a bundle whose manifest and files have been checked.

    Raises:
        BundleError: it has none, or one that cannot be read.
        ModuleNotFoundError: it needs the package ``tokenizers``.
    """
    about, vocab_size = manifest.tokenizer, manifest.model["vocab_size"]
    kind = about.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "ids":
        raise BundleError(f"{directory} has no tokenizer: its model takes ids; export it with its tokenizer.json")
    name = about.get("file")
    if kind != "json" or not isinstance(name, str) or name not in manifest.files:
        raise BundleError(f"{directory} has a tokenizer of kind {kind!r:.80}, which is not known; export it again")
    ends = about.get("end_ids")
    if not isinstance(ends, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ends):
        raise BundleError(f"{directory}: end_ids of the tokenizer must be token ids, got {ends!r:.80}; export it again")
    try:
        return JsonTokenizer(directory / name, ends)
    except TokenizerError as error:
        raise BundleError(str(error)) from None
