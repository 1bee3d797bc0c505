"""Our models behind lm-evaluation-harness: its RULER tasks, its prompts, its scoring. An outside referee.

niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe need no download. Their generators
measure lengths in the model's tokens. Of tokens as small as bytes ruler_cwe needs 8192, and ruler_vt's example does not
fit into the 500 that it may have.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from hsa_compile.model.config import ConfigError
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import SEGMENT, WINDOWED, prefill, short_prefill
from hsa_compile.model.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer

LENGTHS = tuple(4096 << i for i in range(6))  # that RULER's tasks have a metric for
VT_EXAMPLE, VT_ANSWER, CWE_ANSWER = 500, 30, 120  # tokens that ruler_vt gives its example, and those kept for answers


class HsaLM(TemplateLM):
    """A model as the harness wants it; one text at a time, of any length.

    Args:
        tokenizer: the model's; by default tokens are bytes.
        segment: tokens a prefill step.
        offload: keep the chunk memory in the host's.
    """

    def __init__(
        self, model: HsaModel, tokenizer: Tokenizer | None = None, segment: int = SEGMENT, offload: bool = False
    ) -> None:
        super().__init__()
        self.model, self.segment, self.offload = model.eval(), segment, offload
        self.tokenizer = tokenizer or ByteTokenizer()

    @property
    def eot_token_id(self) -> int:
        """What stands for nothing before a text: the end of another, or, where there is no token for it, of a line."""
        return min(self.tokenizer.end_ids, default=self.tokenizer.encode("\n")[-1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's tokens."""
        return self.tokenizer.encode(string)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = self.tokenizer.encode(context) or [self.eot_token_id]
        count = int(options.get("max_gen_toks", 128))
        text, decoder = "", self.tokenizer.stream()
        for token in generate(self.model, ids, count, segment=self.segment, offload=self.offload):
            # What a model has room for beyond its vocabulary stands for no text.
            if int(token) in self.tokenizer.end_ids or int(token) >= self.tokenizer.vocab_size:
                break
            text += decoder.push([int(token)])
            if any(stop in text for stop in stops):
                break
        text += decoder.finish()
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
        return [self._score([self.eot_token_id], self.tokenizer.encode(request.args[0]))[0] for request in requests]


def save_tokenizer(directory: Path, source: Path | None = None) -> Path:
    """A tokenizer in Hugging Face's format, by which RULER's generators measure lengths.

    Args:
        source: a ``tokenizer.json``; by default its tokens are bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if source is not None:
        PreTrainedTokenizerFast(tokenizer_file=str(source)).save_pretrained(str(directory))
        return directory
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


def _check_room(tokenizer: Tokenizer, tasks: Sequence[str], shortest: int) -> None:
    """Refuses what the generators would try for ever, or leave without words to ask for: their smallest text is longer
    than they allow themselves."""
    if "ruler_vt" in tasks:
        from lm_eval.tasks.ruler import vt_utils

        text, names = vt_utils.generate_input_output(5, 1, 4, is_icl=True)
        if (have := len(tokenizer.encode(f"{text} {names}")) + VT_ANSWER) > VT_EXAMPLE:
            raise ConfigError(
                f"ruler_vt has {VT_EXAMPLE} tokens for its example, which takes {have} here: leave it out"
            )
    if "ruler_cwe" in tasks:
        from lm_eval.tasks.ruler import cwe_utils

        drawn = cwe_utils.RNG.getstate()
        example, text, _ = cwe_utils.generate_input_output(10, shortest)
        cwe_utils.RNG.setstate(drawn)
        if (have := len(tokenizer.encode(f"{example}\n{text}")) + 2 * CWE_ANSWER) > shortest:
            raise ConfigError(f"ruler_cwe takes {have} of this model's tokens at least, got a length of {shortest}")


def run_harness(
    model: HsaModel,
    tasks: Sequence[str],
    lengths: Sequence[int],
    limit: int,
    tokenizer: Path | None = None,
    segment: int = SEGMENT,
) -> dict[str, dict[str, float]]:
    """Scores of the harness by task and length, 0 … 1.

    Args:
        tasks: of the harness's RULER.
        lengths: tokens, of ``LENGTHS``.
        limit: samples a task.
        tokenizer: the model's ``tokenizer.json``; by default tokens are bytes.

    Raises:
        ConfigError: RULER has no such task or length, or the task has no text so short.
        TokenizerError: the tokenizer cannot be read.
    """
    from lm_eval.evaluator import simple_evaluate

    if unknown := sorted(set(lengths) - set(LENGTHS)):
        raise ConfigError(f"RULER knows no length of {unknown[0]}; give some of {', '.join(map(str, LENGTHS))}")
    known: Tokenizer = ByteTokenizer() if tokenizer is None else JsonTokenizer(tokenizer)
    lm = HsaLM(model, known, segment)
    ruler = Path(lm_eval.tasks.__file__).with_name("ruler")  # to index all of the harness takes ten seconds
    with tempfile.TemporaryDirectory() as folder, _without_downloads():
        metadata: dict[str, Any] = {"tokenizer": str(save_tokenizer(Path(folder), tokenizer))}
        found: dict[str, dict[str, float]] = {task: {} for task in tasks}
        _check_room(known, tasks, min(lengths))
        for length in lengths:  # the first samples are all of the first length
            manager = lm_eval.tasks.TaskManager(
                include_path=ruler, include_defaults=False, metadata=metadata | {"max_seq_lengths": [length]}
            )
            if strange := [task for task in tasks if task not in manager.all_subtasks]:
                raise ConfigError(f"unknown task {strange[0]!r}; known: {', '.join(manager.all_subtasks)}")
            done = simple_evaluate(
                lm, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False, task_manager=manager
            )
            for task in tasks:
                found[task][str(length)] = float(done["results"][task][f"{length},none"])
    return found
