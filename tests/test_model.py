"""The model against its definition, and its cached step against one forward pass."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hsa_compile.model.config import ConfigError, ModelConfig, preset
from hsa_compile.model.encoder import ChunkEncoder, Memory
from hsa_compile.model.hsa import HsaLayer, slot_weights
from hsa_compile.model.layers import SlidingWindow, SwaLayer, attend, rotate, rotations
from hsa_compile.model.model import HsaModel
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=2, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=2,
)  # fmt: skip


VARIANTS = {
    "default": SMALL,
    "stick-breaking": dataclasses.replace(SMALL, weights="stick-breaking", retrieval_heads=1),
    "plain residual, no qk norm": dataclasses.replace(SMALL, bypass=False, qk_norm=False, tie_embeddings=False),
    "off by one, window left": dataclasses.replace(SMALL, off_by_one=True, leave_window=True, n_groups=1),
    "window of one": dataclasses.replace(SMALL, window=1, encoder_layers=2),
}


def ids_of(B: int, L: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ring", "length"), [(0, 1), (0, 7), (0, 8), (0, 40), (3, 5), (6, 1), (6, 30), (2, 15)])
def test_sliding_window_is_its_definition(ring: int, length: int) -> None:
    c = SMALL
    window = SlidingWindow(c, ring, length, torch.device("cpu"))
    q, k, v = (torch.randn(2, n, h, 8) for n, h in ((length, 4), (ring + length, 2), (ring + length, 2)))
    got = window.attend(q, k, v)
    cos, sin = rotations(ring + length, 8, c.rope_base, q.device)
    k_turned, q_turned = rotate(k, cos, sin), rotate(q, cos[ring:], sin[ring:])
    for t in range(length):
        first = max(0, ring + t - c.window + 1)
        for h in range(4):
            keys, values = k_turned[:, first : ring + t + 1, h // 2], v[:, first : ring + t + 1, h // 2]
            p = (torch.einsum("bd,bjd->bj", q_turned[:, t, h], keys) / math.sqrt(8)).softmax(-1)
            torch.testing.assert_close(got[:, t, h], torch.einsum("bj,bjd->bd", p, values), rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs_by_position() -> None:
    x = torch.randn(5, 1, 4)
    turned = rotate(x, *rotations(5, 4, 100.0, x.device))
    for t in range(5):
        for i, angle in enumerate((t * 1.0, t * 0.1)):
            pair = torch.view_as_complex(torch.stack((x[t, 0, i], x[t, 0, i + 2])))
            want = pair * torch.exp(torch.tensor(1j * angle))
            torch.testing.assert_close(turned[t, 0, i] + 1j * turned[t, 0, i + 2], want.to(torch.complex64))


def test_encoder_sees_one_chunk_and_all_of_it() -> None:
    encoder = lively(ChunkEncoder(SMALL))
    x = torch.randn(1, 3, 4, 32)
    base = encoder(x)
    changed = x.clone()
    changed[0, 1, 3] += 1.0
    other = encoder(changed)
    for before, after in ((base.k, other.k), (base.v, other.v), (base.landmark, other.landmark)):
        by_chunk = (before != after).reshape(3, -1, before.shape[-1])
        assert not by_chunk[0].any()
        assert by_chunk[1].any(-1).all()
        assert not by_chunk[2].any()


def test_encoder_is_its_definition() -> None:
    encoder = lively(ChunkEncoder(SMALL))
    assert isinstance(encoder, ChunkEncoder)
    x_CSd = torch.randn(2, 4, 32)
    memory = encoder(x_CSd[None])
    for i in range(2):
        x = torch.cat((x_CSd[i], encoder.cls[None]))[None]
        layer = encoder.layers[0]
        q, k, v = layer.attention.split(layer.norm(x))  # type: ignore[operator,union-attr]
        cos, sin = rotations(5, 8, SMALL.rope_base, x.device)
        o = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + layer.attention.merge(o)  # type: ignore[operator,union-attr]
        x = encoder.norm(x + layer.mlp(layer.mlp_norm(x)))[0]  # type: ignore[operator]
        landmark = encoder.landmark_norm(encoder.to_landmark(x[4]).view(2, 8))
        key, value = encoder.to_kv(x[:4]).view(4, 4, 8).chunk(2, dim=1)
        torch.testing.assert_close(memory.landmark[0, i], landmark)
        torch.testing.assert_close(memory.k[0, 4 * i : 4 * i + 4], encoder.k_norm(key))
        torch.testing.assert_close(memory.v[0, 4 * i : 4 * i + 4], value)


@pytest.mark.parametrize("name", VARIANTS)
def test_hsa_layer_is_its_definition(name: str) -> None:
    c = VARIANTS[name]
    layer = lively(HsaLayer(c))
    assert isinstance(layer, HsaLayer)
    B, L, C, S = 2, 20, 5, c.chunk_size
    x = torch.randn(B, L, c.d_model)
    memory = Memory(
        torch.randn(B, C * S, c.hsa_kv_heads, 8), torch.randn(B, C * S, c.hsa_kv_heads, 8),
        torch.randn(B, C, c.retrieval_heads, 8),
    )  # fmt: skip
    count = torch.full((B,), C)
    got = layer(x, memory, torch.zeros_like(count), count)
    h = layer.norm(x)
    q_r = layer.retrieval_norm(layer.to_retrieval(h).unflatten(-1, (c.retrieval_heads, 8)))
    q = layer.q_norm(layer.to_q(h).unflatten(-1, (c.hsa_heads, 8)))
    o = torch.zeros(B, L, c.hsa_heads, 8)
    lag = c.window - S if c.leave_window else 0
    for b, t, head in ((b, t, h) for b in range(B) for t in range(L) for h in range(c.hsa_heads)):
        g = head * c.hsa_kv_heads // c.hsa_heads
        visible = [i for i in range(C) if (i + 1) * S <= t - lag]
        r = min(g, c.retrieval_heads - 1)
        score = {i: (q_r[b, t, r] @ memory.landmark[b, i, r]).item() / math.sqrt(8) for i in visible}
        chosen = sorted(sorted(visible, key=lambda i: -score[i])[: c.top_k], reverse=True)
        for i, w in zip(chosen, naive_weights([score[i] for i in chosen], c.weights)):
            rows = slice(i * S, (i + 1) * S)
            e = torch.exp(memory.k[b, rows, g] @ q[b, t, head] / math.sqrt(8))
            o[b, t, head] += w * (e / (e.sum() + c.off_by_one)) @ memory.v[b, rows, g]
    middle = x + layer.out(o.flatten(2))
    want = (x if c.bypass else middle) + layer.mlp(layer.mlp_norm(middle))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def naive_weights(scores: list[float], kind: str) -> list[float]:
    if kind == "softmax":
        total = sum(math.exp(s) for s in scores)
        return [math.exp(s) / total for s in scores]
    weights, left = [], 1.0
    for s in scores:
        weights.append(left / (1 + math.exp(-s)))
        left *= 1 - 1 / (1 + math.exp(-s))
    return weights


@pytest.mark.parametrize("kind", ["softmax", "stick-breaking"])
def test_slot_weights(kind: str) -> None:
    indices = torch.tensor([[5, 2, 0], [3, -1, -1], [-1, -1, -1]], dtype=torch.int32)[None, :, None]
    scores = torch.tensor([[0.5, -1.0, 80.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]])[None, :, None].requires_grad_()
    weights = slot_weights(indices, scores, kind)  # type: ignore[arg-type]
    want = [naive_weights([0.5, -1.0, 80.0], kind), [*naive_weights([0.3], kind), 0.0, 0.0], [0.0] * 3]
    torch.testing.assert_close(weights[0, :, 0], torch.tensor(want))
    weights.square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[indices < 0] == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_step_equals_forward_over_random_splits(name: str) -> None:
    model = lively(HsaModel(VARIANTS[name]))
    ids = ids_of(2, 61)
    whole = model(ids)
    generator = torch.Generator().manual_seed(3)
    random = [1 + int(x) for x in torch.randint(0, 12, (61,), generator=generator)]
    for sizes in ([61], [1] * 61, [3, 1, 57], [4, 4, 8, 45], [2, 2, 1, 3, 53], [6, 55], random):
        state, parts, at = model.start(batch=2, capacity=1), [], 0
        for size in sizes:
            if at < 61:
                logits, state = model.step(ids[:, at : at + size], state)
                parts.append(logits)
                at += size
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        assert state.position.tolist() == [61, 61]
        assert state.chunks.tolist() == [15, 15]
        assert state.pending.shape[1] == 1
        assert state.swa_k[0].shape[1] == min(61, model.config.window - 1)


def test_rows_of_a_batch_do_not_touch() -> None:
    model = lively(HsaModel(SMALL))
    ids = ids_of(3, 30)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, rtol=1e-4, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    model = lively(HsaModel(SMALL))
    ids = ids_of(1, 40)
    changed = ids.clone()
    changed[0, 25] = (ids[0, 25] + 1) % 50
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert (difference[:25] == 0).all()
    assert (difference[25:] > 0).all()  # windows of four layers and the memory reach all that follows


def test_window_logits_do_not_depend_on_the_offset() -> None:
    """Far positions are exact: 2^25 + 1 is not a float32, and no chunk is selectable in either run."""
    model = lively(HsaModel(dataclasses.replace(SMALL, chunk_size=64)))
    ids, results = ids_of(1, 41), []
    for offset in (1, 2**25 + 1):
        _, state = model.step(ids[:, :1], model.start())
        state = dataclasses.replace(state, position=torch.tensor([offset]))
        logits, state = model.step(ids[:, 1:], state)
        results.append(logits)
        assert state.position.tolist() == [offset + 40]
    assert torch.equal(*results)


def test_gradients_reach_every_parameter() -> None:
    for config in VARIANTS.values():
        model = HsaModel(config).train()
        model(ids_of(2, 40)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            single_key = config.window == 1 and "attention.q" in name
            if not single_key and not (config.window == 1 and "attention.k_norm" in name):
                assert parameter.grad.abs().sum() > 0, name


def test_training_selects_fewer_chunks() -> None:
    model = lively(HsaModel(dataclasses.replace(SMALL, top_k=8, train_top_k=1)))
    ids = ids_of(1, 40)
    assert not torch.equal(model(ids), model.train()(ids))


def test_swa_layer_gives_unrotated_keys() -> None:
    layer = lively(SwaLayer(SMALL))
    x = torch.randn(1, 1, 32).expand(1, 6, 32)
    _, k, _ = layer(x, SlidingWindow(SMALL, 0, 6, x.device))
    torch.testing.assert_close(k, k[:, :1].expand_as(k))


def test_step_refuses_what_does_not_fit() -> None:
    model = lively(HsaModel(SMALL))
    with pytest.raises(ValueError, match=r"B=2, L >= 1"):
        model.step(ids_of(1, 3), model.start(batch=2))
    with pytest.raises(ValueError, match=r"L >= 1"):
        model.step(ids_of(1, 0), model.start())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"top_k": 0}, "top_k must be a positive"),
        ({"window": -1}, "window must be a positive"),
        ({"d_model": 12.5}, "d_model must be a positive integer"),
        ({"swa_heads": 3}, "multiple of swa_kv_heads"),
        ({"hsa_heads": 3}, "multiple of hsa_kv_heads"),
        ({"swa_head_dim": 7}, "even"),
        ({"retrieval_heads": 3}, "must be 1 or hsa_kv_heads"),
        ({"n_groups": 3}, "multiple of n_groups"),
        ({"weights": "mean"}, "softmax, stick-breaking"),
        ({"bypass": "yes"}, "true or false"),
        ({"rope_base": 0.5}, "above 1"),
        ({"leave_window": True, "window": 3}, "at least chunk_size"),
    ],
)
def test_config_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


def test_config_round_trip_and_presets() -> None:
    assert ModelConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ConfigError, match="unknown model config fields depth"):
        ModelConfig.from_dict({"depth": 3})
    with pytest.raises(ConfigError, match="known: tiny"):
        preset("huge")
    with torch.device("meta"):
        millions = {name: HsaModel(preset(name)).parameter_count() / 1e6 for name in ("25m", "60m", "240m", "345m")}
    for name, value in millions.items():
        assert value == pytest.approx(float(name[:-1]), rel=0.06), millions
