"""Our models behind lm-evaluation-harness: its tasks, its prompts, its scoring. An outside referee.

Of its RULER tasks, niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe need no download.
Their generators measure lengths in our tokens. Where tokens are bytes, ruler_vt and ruler_cwe need 16384 of them: their
examples do not fit into less, and the harness tries for ever.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from hsa_compile.model.config import ConfigError
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import SEGMENT, WINDOWED, prefill, short_prefill
from hsa_compile.model.tokenizer import ByteTokenizer

OFFLINE_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
_LARGE, LEAST = ("ruler_vt", "ruler_cwe"), 16_384


class HsaLM(TemplateLM):
    """A model whose tokens are bytes, as the harness wants it; one text at a time, of any length.

    Args:
        segment: tokens a prefill step.
        offload: keep the chunk memory in the host's.
    """

    def __init__(self, model: HsaModel, segment: int = SEGMENT, offload: bool = False) -> None:
        super().__init__()
        self.model, self.segment, self.offload = model.eval(), segment, offload
        self.bytes = ByteTokenizer()

    @property
    def eot_token_id(self) -> int:
        """What stands for nothing before a text."""
        return ByteTokenizer.EOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's bytes."""
        return self.bytes.encode(string)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        found = bytearray()
        ids = self.bytes.encode(context) or [self.eot_token_id]
        count = int(options.get("max_gen_toks", 128))
        for token in generate(self.model, ids, count, segment=self.segment, offload=self.offload):
            if int(token) >= 256:
                break
            found.append(int(token))
            if any(found.endswith(stop.encode()) for stop in stops):
                break
        text = found.decode(errors="replace")
        for stop in stops:
            text = text.split(stop)[0]
        return text

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation in nats, and whether it is the greedy one."""
        device = self.model.embedding.weight.device
        ids, wanted = torch.tensor([context]), torch.tensor(continuation, device=device)
        if self.model.config.architecture in WINDOWED:
            last, state = short_prefill(self.model, ids, self.segment, self.offload)
        else:
            last, state = prefill(self.model, ids, self.segment, offload=self.offload)
        logits = [last]
        for first in range(0, len(continuation) - 1, self.segment):
            part = wanted[None, first : min(first + self.segment, len(continuation) - 1)]
            step, state = self.model.step(part, state)
            logits.append(step[0])
        scores = torch.cat(logits).float()
        return -float(F.cross_entropy(scores, wanted, reduction="sum")), bool((scores.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats."""
        return [self._score([self.eot_token_id], self.bytes.encode(request.args[0]))[0] for request in requests]


def save_byte_tokenizer(directory: Path) -> Path:
    """A Hugging Face tokenizer whose tokens are bytes, by which RULER's generators measure lengths."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet gives each byte a character; printable ones stand for themselves, and come first.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(directory))
    return directory


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """The harness's RULER module fetches data for splitting sentences when it is imported. Only tasks whose haystack
    are essays use it, and these need a download anyway."""
    import nltk

    before = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        yield
    finally:
        nltk.download = before


def run_harness(
    model: HsaModel, tasks: Sequence[str], lengths: Sequence[int], limit: int, segment: int = SEGMENT
) -> dict[str, dict[str, float]]:
    """Scores of the harness by task and length, 0 … 1.

    Args:
        tasks: of ``OFFLINE_TASKS``, or others of the harness that need no download.
        lengths: tokens, of those that the harness's RULER knows: 4096, 8192, … 131072.
        limit: samples a task.

    Raises:
        ConfigError: at a length a task's generator would not end.
    """
    from lm_eval.evaluator import simple_evaluate

    if min(lengths) < LEAST and (large := sorted(set(tasks) & set(_LARGE))):
        raise ConfigError(f"{large[0]} needs lengths of at least {LEAST} bytes; its examples fill less")
    with tempfile.TemporaryDirectory() as folder, _without_downloads():
        tokenizer = str(save_byte_tokenizer(Path(folder)))
        found: dict[str, dict[str, float]] = {task: {} for task in tasks}
        for length in lengths:  # the first samples are all of the first length
            done = simple_evaluate(
                HsaLM(model, segment), tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False,
                metadata={"tokenizer": tokenizer, "max_seq_lengths": [length]},
            )  # fmt: skip
            for task in tasks:
                found[task][str(length)] = float(done["results"][task][f"{length},none"])
    return found
