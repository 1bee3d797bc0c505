"""What is carried from step to step: rows at different positions, packed documents, short prefill, patching, text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa_compile.dispatch import use_backend
from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import patch, prefill, short_prefill, upper_reach
from hsa_compile.model.rows import documents, starts_of
from hsa_compile.model.state import State
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=2, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=5, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=3, ssm_state=6, ssm_head_dim=16,
)  # fmt: skip
ROWS = ("hsa", "mamba-hsa", "nsa", "swa", "attention", "mamba")
WINDOWED = ("hsa", "nsa", "swa")
MODELS = {name: lively(HsaModel(dataclasses.replace(SMALL, architecture=name))) for name in ROWS}  # type: ignore[arg-type]
LEFT = lively(HsaModel(dataclasses.replace(SMALL, leave_window=True, weights="stick-breaking", retrieval_heads=1)))


def ids_of(B: int, L: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(seed))


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_of_any_lengths_equal_one_forward_each(name: str, data: st.DataObject) -> None:
    """Segments and single tokens, every row taking its own number of them at every step."""
    model, texts = MODELS[name], ids_of(3, 40)
    steps = data.draw(st.lists(st.tuples(*[st.integers(0, 12)] * 3).filter(any), min_size=1, max_size=7))
    with use_backend("eager"):
        whole, state, at = model(texts), model.start(3, capacity=1), [0, 0, 0]
        for taken in steps:
            lengths = [min(n, 40 - p) for n, p in zip(taken, at)]
            ids = torch.zeros(3, max(1, *lengths), dtype=torch.int64)
            for b, n in enumerate(lengths):
                ids[b, :n] = texts[b, at[b] : at[b] + n]
            logits, state = model.step(ids, state, lengths)
            for b, n in enumerate(lengths):
                assert_same(logits[b, :n], whole[b, at[b] : at[b] + n])
            at = [p + n for p, n in zip(at, lengths)]
        assert state.position.tolist() == at
        if model.config.has_memory:
            assert state.chunks.tolist() == [p // 4 for p in at]
        assert state.ragged == (len(set(at)) > 1)


def test_rows_meet_again_and_go_on_in_lock_step() -> None:
    model, texts = MODELS["hsa"], ids_of(2, 30)
    _, state = model.step(texts[:, :9], model.start(2), [9, 3])
    assert state.ragged
    _, state = model.step(torch.stack((texts[0, 9:15], texts[1, 3:9])), state, [0, 6])
    assert not state.ragged
    logits, state = model.step(texts[:, 9:], state)
    assert_same(logits, model(texts)[:, 9:])


def test_step_refuses_lengths_that_do_not_fit() -> None:
    model = MODELS["hsa"]
    for lengths in ([4, 1], [1], [-1, 2]):
        with pytest.raises(ValueError, match="2 numbers from 0 to 3"):
            model.step(ids_of(2, 3), model.start(2), lengths)


@pytest.mark.parametrize("model", [*MODELS.values(), LEFT], ids=[*MODELS, "window left"])
def test_packed_documents_have_the_numbers_they_have_alone(model: HsaModel) -> None:
    lengths = [[13, 1, 3, 20], [4, 33], [37]]
    ids, starts = ids_of(3, 37), starts_of(lengths)
    model = model.train()
    try:
        got = model(ids, starts)
        for row, first, end in documents(starts):
            assert_same(got[row, first:end], model(ids[row : row + 1, first:end])[0])
        got.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    finally:
        model.zero_grad()
        model.eval()


def test_document_starts_are_checked() -> None:
    assert starts_of([[2, 1], [3]]).tolist() == [[0, 0, 2], [0, 0, 0]]
    assert documents(starts_of([[2, 1], [3]])) == [(0, 0, 2), (0, 2, 3), (1, 0, 3)]
    for bad in ([[0, 0, 1]], [[1, 1, 1]], [[0, 2, 2]]):
        with pytest.raises(ValueError, match="place of each document's first token"):
            documents(torch.tensor(bad))
    with pytest.raises(ValueError, match="int64"):
        documents(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="same number of tokens"):
        starts_of([[1, 2], [2]])


def assert_same_state(model: HsaModel, got: State, want: State, ids: Tensor) -> None:
    """Equal in what is kept, and in what comes next."""
    assert got.position.tolist() == want.position.tolist()
    assert got.chunks.tolist() == want.chunks.tolist()
    for mine, theirs in zip((*got.swa_k, *got.swa_v, got.pending), (*want.swa_k, *want.swa_v, want.pending)):
        assert_same(mine, theirs)
    C, S = int(want.chunks[0]), model.config.chunk_size
    assert_same(got.landmark[:, :C], want.landmark[:, :C])
    assert_same(got.mem_k[:, : C * S], want.mem_k[:, : C * S])
    assert_same(got.mem_v[:, : C * S], want.mem_v[:, : C * S])
    assert_same(model.step(ids, got)[0], model.step(ids, want)[0])


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(("length", "segment"), [(3, 8), (9, 4), (10, 100), (50, 7), (51, 100)])
def test_short_prefill_is_exact(name: str, length: int, segment: int) -> None:
    model, ids = MODELS[name], ids_of(2, length + 6)
    want, full = prefill(model, ids[:, :length], 16)
    got, short = short_prefill(model, ids[:, :length], segment)
    assert_same(got, want)
    assert_same_state(model, short, full, ids[:, length:])


def test_short_prefill_runs_the_upper_half_on_its_reach_alone() -> None:
    model, seen = MODELS["hsa"], []
    hooks = [g.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for g in _hsa_layers(model)]
    short_prefill(model, ids_of(1, 60), 16)
    for hook in hooks:
        hook.remove()
    assert seen == [upper_reach(SMALL)] * 2 == [9, 9]


def _hsa_layers(model: HsaModel) -> list[torch.nn.Module]:
    return [group.hsa for group in model.groups]  # type: ignore[misc]


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 9), (30, 31), (46, 47), (56, 58), (0, 58)])
def test_patching_is_exact(name: str, start: int, end: int) -> None:
    model, ids = MODELS[name], ids_of(2, 64)
    text, now = ids[:, :58], ids[:, :58].clone()
    now[:, start:end] = (now[:, start:end] + 7) % 50
    _, state = prefill(model, text, 16)
    before = state.landmark.clone()
    got, state = patch(model, now, state, [(start, end)], segment=11)
    want, full = prefill(model, now, 16)
    assert_same(got, want)
    if model.config.has_memory:
        changed = (state.landmark != before).flatten(2).any(-1)[0].nonzero().flatten().tolist()
        complete = 58 // 4
        assert bool(changed) == (start // 4 < complete)
        assert set(changed) <= set(range(start // 4, min((end + 2 * 4 - 1) // 4 + 1, complete)))
    assert_same_state(model, state, full, ids[:, 58:])


def test_short_prefill_and_patching_refuse() -> None:
    mamba, model = MODELS["mamba-hsa"], MODELS["hsa"]
    with pytest.raises(ConfigError, match="mamba-hsa does not: use prefill"):
        short_prefill(mamba, ids_of(1, 9))
    _, state = prefill(model, ids_of(1, 9))
    for ids, start, end, message in ((ids_of(1, 9), 4, 4, "not a range"), (ids_of(1, 8), 0, 1, "has seen")):
        with pytest.raises(ValueError, match=message):
            patch(model, ids, state, [(start, end)])
    with pytest.raises(ValueError, match="1 to 9 tokens"):
        prefill(model, ids_of(2, 9), lengths=[9, 0])


@pytest.mark.parametrize("segment", [5, 512])
@pytest.mark.parametrize("name", ROWS)
def test_prompts_of_different_lengths_continue_as_alone(name: str, segment: int) -> None:
    model = MODELS[name]
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (13, 4, 1, 22)]
    together = torch.stack(list(generate(model, prompts, 9, segment=segment)), dim=1)
    for prompt, got in zip(prompts, together.tolist()):
        assert got == [int(token) for token in generate(model, prompt, 9)]


def test_sampled_text_of_a_batch_is_repeatable() -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    draws = [
        torch.stack(list(generate(MODELS["hsa"], prompts, 6, temperature=1.0, top_p=0.9, seed=seed))).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_texts_end_at_a_stop_token_each_for_itself() -> None:
    model, prompts = MODELS["hsa"], [[1, 2, 3], [4], [9, 8]]
    free = torch.stack(list(generate(model, prompts, 12)), dim=1).tolist()
    stop = free[0][3]
    got = torch.stack(list(generate(model, prompts, 12, stop_ids=[stop])), dim=1).tolist()
    for mine, theirs in zip(got, free):
        n = theirs.index(stop) if stop in theirs else 12
        assert mine == (theirs[:n] + [-1] * 12)[: len(mine)]
    assert len(list(generate(model, [[1, 2, 3]], 12, stop_ids=[stop]))) == free[0].index(stop)
