"""Every row of a comparison: encoders, rank decay, noise on the selection, and equal numbers of parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from hsa_compile.eager import select
from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.encoder import ChunkEncoder, Memory
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.layers import rotations
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.variants import VARIANTS, parameter_count, variant, with_parameters
from hsa_compile.noise import gumbel, noisy_chunk_select
from hsa_compile.ops import chunk_select
from kit import lively, select_inputs

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=1, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=2, ssm_state=8, ssm_head_dim=16,
)  # fmt: skip


def with_change(**change: object) -> ModelConfig:
    return dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mean", "none"])
def test_encoder_without_cls_is_its_definition(kind: str) -> None:
    encoder = lively(ChunkEncoder(with_change(encoder=kind)))
    assert not hasattr(encoder, "cls")
    assert len(encoder.layers) == (kind == "mean")
    x_CSd = torch.randn(2, 4, 32)
    memory = encoder(x_CSd[None])
    for i in range(2):
        y, mean = encoder.norm(x_CSd[i]), x_CSd[i].mean(0)
        if kind == "mean":
            y = encoder.norm(encoder.layers[0](x_CSd[i][None], *rotations(4, 8, SMALL.rope_base, y.device)))[0]
            mean = y.mean(0)
        key, value = encoder.to_kv(y).view(4, 4, 8).chunk(2, dim=1)
        landmark = encoder.landmark_norm(encoder.to_landmark(mean).view(2, 8))
        torch.testing.assert_close(memory.landmark[0, i], landmark)
        torch.testing.assert_close(memory.k[0, 4 * i : 4 * i + 4], encoder.k_norm(key))
        torch.testing.assert_close(memory.v[0, 4 * i : 4 * i + 4], value)


def test_rank_decay_starts_at_nothing_and_weighs_old_chunks_by_rank() -> None:
    plain, decayed = HsaModel(SMALL), HsaModel(with_change(rank_decay=True))
    learned = {name: p for name, p in decayed.named_parameters() if name.endswith("rank_decay")}
    assert list(learned) == ["groups.0.hsa.rank_decay", "groups.1.hsa.rank_decay"]
    assert decayed.load_state_dict(plain.state_dict(), strict=False).missing_keys == list(learned)
    ids = torch.randint(0, 50, (1, 30))
    assert torch.equal(plain.eval()(ids), decayed.eval()(ids))

    layer = lively(HsaLayer(with_change(rank_decay=True, retrieval_heads=1, hsa_kv_heads=1)))
    with torch.no_grad():
        layer.rank_decay.fill_(-0.7)
    x = torch.randn(1, 1, 32)
    memory = Memory(*torch.randn(2, 1, 20, 1, 8), torch.randn(1, 5, 1, 8))
    position, chunks = torch.tensor([20]), torch.tensor([5])
    indices, scores = layer.select(x, memory, position, chunks, 3)
    q, o = layer.q_norm(layer.to_q(x).view(4, 8)), torch.zeros(4, 8)
    decayed_scores = [math.exp(s - 0.7 * k) for k, s in enumerate(scores[0, 0, 0].tolist())]
    for i, e in zip(indices[0, 0, 0].tolist(), decayed_scores):
        rows = slice(4 * i, 4 * i + 4)
        p = (q @ memory.k[0, rows, 0].T / math.sqrt(8)).softmax(-1)
        o += e / sum(decayed_scores) * p @ memory.v[0, rows, 0]
    torch.testing.assert_close(layer.retrieve(x, memory, position, chunks)[0, 0], layer.out(o.flatten()))


def test_gumbel_noise_has_its_distribution_and_depends_on_its_counter_alone() -> None:
    seed = torch.tensor(11)
    token = torch.arange(100, 300).expand(2, 200)
    noise = gumbel(seed, token, 3, 50)
    # 60 000 draws: the standard errors are 0.005 and 0.01.
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.08)
    assert noise.isfinite().all()
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()
    assert torch.equal(gumbel(seed, token[:, 7:9], 3, 20), noise[:, 7:9, :, :20])
    assert not torch.equal(gumbel(seed + 1, token, 3, 50), noise)
    neighbours = torch.corrcoef(torch.stack((noise[:, 1:].flatten(), noise[:, :-1].flatten())))[0, 1]
    assert abs(neighbours) < 0.02


def test_noise_decides_selection_and_scores_and_leaves_gradients_clean() -> None:
    problem = with_change(retrieval_heads=2).problems()[0]
    q_r, landmark, position, chunks = select_inputs(problem, 2, 9, 12)
    landmark = landmark.nan_to_num().requires_grad_()
    q_r.requires_grad_()
    sizes, seed = (2, 4, 3, 0), torch.tensor(5)
    indices, scores = noisy_chunk_select(q_r, landmark, position, chunks, *sizes, noise=0.5, seed=seed)
    every = torch.einsum("blhd,bchd->blhc", q_r, landmark) / math.sqrt(8)
    token = position[:, None] + torch.arange(9)
    visible = torch.arange(12) < torch.minimum(token // 4, chunks[:, None])[:, :, None, None]
    spread = torch.zeros(2, 9, 2, 1)
    for b, t, h in itertools.product(range(2), range(9), range(2)):
        if visible[b, t].any():
            spread[b, t, h] = every[b, t, h, visible[b, t, 0]].detach().std(correction=0)
    noisy = every + 0.5 * spread * gumbel(seed, token, 2, 12)
    top = noisy.masked_fill(~visible, -torch.inf).topk(3)
    best = top.indices.masked_fill(top.values == -torch.inf, -1).sort(-1, descending=True).values
    assert torch.equal(indices.long(), best)
    want = torch.where(best >= 0, noisy.gather(-1, best.clamp(min=0)), 0.0)
    torch.testing.assert_close(scores, want)
    grad = torch.randn_like(scores)
    clean = torch.where(best >= 0, every.gather(-1, best.clamp(min=0)), 0.0)
    wanted = torch.autograd.grad(clean, (q_r, landmark), grad)
    torch.testing.assert_close(torch.autograd.grad(scores, (q_r, landmark), grad), wanted)

    inputs = (q_r.detach(), landmark.detach(), position, chunks)
    silent, plain = noisy_chunk_select(*inputs, *sizes, noise=torch.zeros(())), chunk_select(*inputs, *sizes)
    assert torch.equal(silent[0], plain[0])
    assert torch.equal(silent[1], select(*inputs, 2, 4, 3, 0)[1])


def test_larger_scores_do_not_escape_the_noise() -> None:
    q_r, landmark, position, chunks = select_inputs(with_change(retrieval_heads=2).problems()[0], 2, 9, 12)
    sizes, seed = (2, 4, 3, 0), torch.tensor(5)
    found = [
        noisy_chunk_select(scale * q_r, landmark, position, chunks, *sizes, noise=2.0, seed=seed) for scale in (1, 64)
    ]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(64 * found[0][1], found[1][1])


def test_noise_is_for_training_alone_and_repeats_with_the_seed() -> None:
    model = lively(HsaModel(with_change(selection_noise=3.0)))
    quiet = lively(HsaModel(SMALL))
    ids = torch.randint(0, 50, (1, 60))
    assert torch.equal(model(ids), quiet(ids))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(ids))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_without_enforced_sparsity_training_sees_every_visible_chunk() -> None:
    model = lively(HsaModel(with_change(train_top_k=10, top_k=3)))
    wider = lively(HsaModel(with_change(train_top_k=25, top_k=10)))
    ids = torch.randint(0, 50, (1, 40))
    torch.testing.assert_close(model.train()(ids), wider(ids))
    assert not torch.allclose(model.eval()(ids), wider(ids))


def test_all_variants_have_as_many_parameters_and_learn() -> None:
    small = with_change(upper_layers=1, n_groups=1)
    rows = {name: variant(small, name, length=16) for name in VARIANTS}
    wanted = parameter_count(small)
    assert rows["hsa"] == small
    assert rows["no enforced sparsity"].train_top_k == 4
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    for name, config in rows.items():
        # One unit of every MLP brings 3 * d parameters; of them at most half is missing.
        assert parameter_count(config) == pytest.approx(wanted, abs=3 * 32 * 4 / 2), name
        torch.manual_seed(0)
        model = HsaModel(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = sequence_loss(model(ids[:, :-1]), ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2, name
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing, name


def test_a_row_that_does_not_fit_is_refused_alone() -> None:
    narrow = with_change(window=SMALL.chunk_size - 1)
    refused = []
    for name in VARIANTS:
        try:
            variant(narrow, name, length=16)
        except ConfigError as error:
            refused.append(str(error))
    assert refused == [
        "variant 'window left out' does not fit this model: leave_window needs a window of at least chunk_size (4), "
        "got 3: tokens between window and chunk would be seen by neither"
    ]


def test_parameters_that_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match="hsa has at least"):
        with_parameters(SMALL, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "max"}, "encoder must be one of cls, mean, none"),
        ({"architecture": "rnn"}, "architecture must be one of hsa"),
        ({"rank_decay": True, "weights": "stick-breaking"}, "rank_decay is of softmax"),
        ({"selection_noise": -1.0}, "at least 0"),
        ({"architecture": "mamba", "ssm_head_dim": 24}, "multiple of ssm_head_dim"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_change(**change)


@pytest.mark.parametrize("off_by_one", [False, True])
def test_dense_escape_gives_the_same(off_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(HsaModel(with_change(off_by_one=off_by_one)))
    ids = torch.randint(0, 50, (2, 4 * SMALL.top_k + 2))
    results = []
    for escape in (False, True):
        for group in model.groups:
            group.hsa.dense_escape = escape
        if escape:
            monkeypatch.setattr("hsa_compile.model.hsa.chunk_attention", None)
        model.zero_grad()
        loss = sequence_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert results[0][1].abs().max() > 0
    monkeypatch.undo()
    longer = torch.randint(0, 50, (1, 40))  # more chunks than are selected: not taken
    assert model(longer).isfinite().all()
