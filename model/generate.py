"""Text from a model: prefill in segments, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hsa_compile.model.model import HsaModel
from hsa_compile.model.state import State


def prefill(model: HsaModel, ids_BL: Tensor, segment: int = 512) -> tuple[Tensor, State]:
    """Runs prompts through the model in segments.

    Returns:
        Logits [B, V] after the last token, and the state.

    Raises:
        ValueError: a prompt is empty, or the segment length is not positive.
    """
    if ids_BL.dim() != 2 or ids_BL.shape[1] < 1:
        raise ValueError(f"prompts must be [B, L >= 1], got {list(ids_BL.shape)}; give at least one token")
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    B, L = ids_BL.shape
    state = model.start(B, capacity=L // model.config.chunk_size + 1)
    logits = torch.empty(0)
    for first in range(0, L, segment):
        logits, state = model.step(ids_BL[:, first : first + segment], state)
    return logits[:, -1], state


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
    prompt_ids: list[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    segment: int = 512,
) -> Iterator[Tensor]:
    """Continues prompts of one length, token by token.

    Args:
        prompt_ids: one prompt as a list, or int64 [B, L].
        max_new_tokens: how many tokens to give.
        temperature: 0 takes the likeliest token.
        top_p: draw only from the smallest set of tokens of this probability.
        seed: makes the draws repeatable.
        segment: tokens a prefill segment.

    Yields:
        int64 [B], the next token of every prompt, as soon as it is known.

    Raises:
        ValueError: the prompt is empty or an option is out of range.
    """
    device = model.embedding.weight.device
    ids = torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    logits, state = prefill(model, ids[None] if ids.dim() == 1 else ids, segment)
    for count in range(max_new_tokens):
        token = sample(logits, temperature, top_p, generator)
        yield token
        if count + 1 < max_new_tokens:
            step_logits, state = model.step(token[:, None], state)
            logits = step_logits[:, -1]
