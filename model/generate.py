"""Text from a model: prefill in segments, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hsa_compile.model.graph import GraphDecoder, capturable
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import SEGMENT, prefill
from hsa_compile.model.state import State


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Token ids [B]: the likeliest at temperature 0, else drawn from the smallest set of probability ``top_p``.

    Raises:
        ValueError: the temperature is negative or ``top_p`` is not in (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if temperature == 0:
        return logits_BV.argmax(-1)
    p, order = (logits_BV.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # the likeliest token always stays
    drawn = torch.multinomial(p.masked_fill(before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def generate(
    model: HsaModel,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    segment: int = SEGMENT,
    offload: bool = False,
    graphs: bool = False,
) -> Iterator[Tensor]:
    """Continues prompts, token by token.

    Args:
        prompt_ids: one prompt as a list, several of any lengths as a list of lists, or int64 [L] or [B, L].
        max_new_tokens: how many tokens to give.
        temperature: 0 takes the likeliest token.
        top_p: draw only from the smallest set of tokens of this probability.
        seed: makes the draws repeatable.
        stop_ids: tokens that end a text; they and what would come after them are given as -1.
        segment: tokens a prefill segment.
        offload: keep the chunk memory in the host's, where contexts outgrow the GPU; the same tokens.
        graphs: decode from CUDA graphs as soon as windows are full: faster from the second chunk of tokens on.

    Yields:
        int64 [B], the next token of every prompt, as soon as it is known; ends when every text has.

    Raises:
        ValueError: a prompt is empty or has ids outside the vocabulary, or an option is out of range.
        ConfigError: the architecture demands prompts of one length.
    """
    device = model.embedding.weight.device
    ids, lengths = _padded(prompt_ids)
    model.check_ids(ids)  # here they still are on the host
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    logits, prompted = prefill(model, ids.to(device), segment, lengths, offload=offload)
    state: State | None = prompted
    del prompted  # a memory that grows leaves its old place to nobody
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    decoder: GraphDecoder | None = None
    for count in range(max_new_tokens):
        token = sample(logits, temperature, top_p, generator)
        if len(stop_ids):
            ended = ended | torch.isin(token, stops)
            if ended.all():
                return
        yield token.masked_fill(ended, -1)
        if count + 1 == max_new_tokens:
            return
        if graphs and state is not None and capturable(model, state):
            decoder, state = GraphDecoder(model, state), None
        if decoder is not None:
            logits = decoder.step(token[:, None])[:, -1]
        elif state is not None:
            step_logits, state = model.step(token[:, None], state)
            logits = step_logits[:, -1]


def _padded(prompt_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> tuple[Tensor, list[int] | None]:
    """int64 [B, L], padded on the right, and the prompts' lengths where they differ."""
    if isinstance(prompt_ids, Tensor) or not prompt_ids or isinstance(prompt_ids[0], int):
        ids = torch.as_tensor(prompt_ids, dtype=torch.int64)
        return (ids[None] if ids.dim() == 1 else ids), None
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompt_ids]
    lengths = [len(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, (lengths if len(set(lengths)) > 1 else None)
