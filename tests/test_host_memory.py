"""Chunk memory in the host's memory gives the same numbers, and only what was selected is fetched."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from hsa_compile.dispatch import use_backend
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.generate import generate
from hsa_compile.model.host import HostMemory, host_zeros, put_rows
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import patch, prefill, short_prefill
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=2, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=5, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=3,
)  # fmt: skip
MODELS = {name: lively(HsaModel(dataclasses.replace(SMALL, architecture=name))) for name in ("hsa", "nsa")}  # type: ignore[arg-type]


def ids_of(B: int, L: int) -> Tensor:
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("segment", [1, 7, 64])
def test_prefill_and_decode_are_the_same_to_the_bit(name: str, segment: int) -> None:
    model, ids = MODELS[name], ids_of(2, 70)
    logits, states = zip(*(prefill(model, ids[:, :60], segment, offload=offload) for offload in (False, True)))
    assert [state.offloaded for state in states] == [False, True]
    assert torch.equal(*logits)
    here, there = states
    for i in range(60, 70):  # the memory grows on the way
        (a, here), (b, there) = (model.step(ids[:, i : i + 1], state) for state in (here, there))
        assert torch.equal(a, b)
    assert there.offloaded
    assert torch.equal(here.mem_k[:, :68], there.mem_k[:, :68])


def test_rows_of_different_lengths_generate_the_same_tokens() -> None:
    prompts = [ids_of(1, n)[0].tolist() for n in (31, 3, 12)]
    here, there = (list(generate(MODELS["hsa"], prompts, 12, offload=offload)) for offload in (False, True))
    assert torch.equal(torch.stack(here), torch.stack(there))


def test_short_prefill_and_patching_and_copies() -> None:
    model, ids = MODELS["hsa"], ids_of(2, 58)
    changed = ids.clone()
    changed[:, 20:22] = 3
    want, _ = prefill(model, changed)
    _, state = short_prefill(model, ids, 16, offload=True)
    spare = copy.deepcopy(state)
    got, _ = patch(model, changed, state, [(20, 22)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    swapped = spare.rows(torch.tensor([1, 0]))
    assert swapped.offloaded
    got, want = (model.step(x, s)[0] for x, s in ((ids[:, :1], spare), (ids.flip(0)[:, :1], swapped)))
    assert torch.equal(got, want.flip(0)), "a copy must not see what was patched"


@pytest.mark.parametrize("L", [1, 9])
@pytest.mark.parametrize(("H", "D"), [(1, 4), (3, 3)])
def test_only_what_was_selected_is_fetched(L: int, H: int, D: int) -> None:
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 40 * 4, H, D, generator=g)
    indices = torch.randint(-1, 40, (2, L, H, 5), generator=g, dtype=torch.int32)
    memory = HostMemory(k, v, torch.empty(0))
    got_k, got_v, places = memory.chosen(indices, 4)
    most = max(len(set(indices[b, :, h].flatten().tolist()) - {-1}) for b in range(2) for h in range(H))
    assert got_k.shape[1] == 4 * (5 if L == 1 else most)
    assert torch.equal(places >= 0, indices >= 0)
    for b, t, h, s in (indices >= 0).nonzero().tolist():
        there, here = (4 * int(x[b, t, h, s]) for x in (indices, places))
        assert torch.equal(got_k[b, here : here + 4, h], k[b, there : there + 4, h])
        assert torch.equal(got_v[b, here : here + 4, h], v[b, there : there + 4, h])


def test_nothing_selected_and_nothing_there() -> None:
    empty = torch.full((1, 3, 1, 2), -1, dtype=torch.int32)
    for tokens in (0, 8):
        k, _, places = HostMemory(*torch.ones(2, 1, tokens, 1, 4), torch.empty(0)).chosen(empty, 4)
        assert k.shape[1] == 0
        assert torch.equal(places, empty)


def test_rows_are_put_where_they_belong() -> None:
    x = host_zeros((2, 5, 3), torch.float16, "cpu")
    put_rows(x, torch.tensor([2]), torch.ones(2, 2, 3))
    put_rows(x, 0, torch.full((2, 1, 3), 2.0))
    assert x[1, :, 0].tolist() == [2, 0, 1, 1, 0]


@pytest.mark.needs_compiler
def test_compiled_kernels_see_what_was_fetched() -> None:
    model, ids = MODELS["hsa"], ids_of(1, 50)
    with use_backend("compiled"):
        (want, _), (got, _) = (prefill(model, ids, 16, offload=offload) for offload in (False, True))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
