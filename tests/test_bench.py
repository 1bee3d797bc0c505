"""What benchmarks stand on: selections with the stated overlap, the committed format, the dense peer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hsa_compile import eager
from hsa_compile.bench import verify
from hsa_compile.bench.dense import DenseModel
from hsa_compile.bench.kernels import captured_shapes, selections_of
from hsa_compile.bench.record import common_keys, timed, write_suite
from hsa_compile.bench.selections import captured_selections, synthetic_selection, union_ratio
from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.model.config import ConfigError, ModelConfig, preset
from hsa_compile.model.model import HsaModel


@pytest.mark.parametrize("kind", ["local", "random"])
def test_synthetic_selections_are_valid(kind: str) -> None:
    indices = synthetic_selection(2, 300, 2, 4, 16, kind)  # type: ignore[arg-type]
    visible = (torch.arange(300) // 16).view(1, -1, 1)
    assert torch.equal((indices >= 0).sum(-1), visible.clamp(max=4).expand(2, 300, 2))
    assert (indices < visible.unsqueeze(-1)).all()
    filled = indices[..., 1:] >= 0
    assert (indices[..., :-1] > indices[..., 1:])[filled].all(), "not newest first, or not distinct"
    assert indices.unique().tolist()[:16] == list(range(-1, 15))


def test_overlap_is_as_stated() -> None:
    local, scattered = (synthetic_selection(1, 8192, 1, 8, 64, kind) for kind in ("local", "random"))  # type: ignore[arg-type]
    assert 1.2 < union_ratio(local) < 1.6
    assert 3.0 < union_ratio(scattered) < 6.7
    same = torch.arange(4, dtype=torch.int32).expand(1, 8, 1, 4)
    assert union_ratio(same) == 1.0
    assert union_ratio(torch.arange(32, dtype=torch.int32).view(1, 8, 1, 4)) == 8.0


def test_captured_selections_are_what_each_layer_selects_over_the_whole_text() -> None:
    torch.manual_seed(0)
    model = HsaModel(preset("tiny")).eval()
    p, ids = model.config.problems()[1], torch.randint(0, 256, (700,))  # more than a segment of a prefill
    shapes = captured_shapes(model, ids)
    assert len(shapes) == len(captured_selections(model, ids)) >= 1
    for shape in shapes:
        assert (shape.L, shape.selection, shape.problem.groups, shape.chunk_size) == (
            700,
            "captured",
            p.groups,
            p.chunk_size,
        )
        indices, weights = selections_of(shape, 0)
        assert indices.shape == weights.shape == (1, 700, p.kv_heads, p.top_k)
        visible = (torch.arange(700) // p.chunk_size).view(1, -1, 1, 1)
        assert (indices < visible).all()
        assert ((indices >= 0).sum(-1)[0, -1] == p.top_k).all()
        assert not weights[indices < 0].any()
        torch.testing.assert_close(weights.sum(-1), (indices >= 0).any(-1).float())
    with pytest.raises(ConfigError, match="capturing selections"):
        captured_selections(HsaModel(replace(preset("tiny"), architecture="swa")), ids)


def test_no_chunks_no_selection() -> None:
    assert (synthetic_selection(1, 5, 1, 2, 16, "local") == -1).all()


def test_verification_tells_wrong_kernels_from_right_ones() -> None:
    p = ChunkAttention(4, 2, 16, 16, 3)
    q, grad = torch.randn(2, 1, 300, 4, 16)
    k, v = torch.randn(2, 1, 288, 2, 16)
    inputs = (q, k, v, synthetic_selection(1, 300, 2, 3, 16, "local"), torch.rand(1, 300, 2, 3))
    o = eager.attention(*inputs, 16, False)
    gradients = eager.attention_backward(grad, *inputs, 16, False)
    assert verify.attention_error(p, inputs, o) < 1e-5
    assert verify.gradients_error(p, grad, inputs, gradients) < 1e-5
    assert verify.attention_error(p, inputs, o.roll(1, 2)) > verify.TOLERANCE
    assert verify.attention_error(p, inputs, o * torch.nan) > verify.TOLERANCE
    for i, axis in enumerate((2, 1, 1, 3)):
        wrong = [x.roll(1, axis) if i == j else x for j, x in enumerate(gradients)]
        assert verify.gradients_error(p, grad, inputs, tuple(wrong)) > verify.TOLERANCE
    s = ChunkSelect(1, 1, 16, 16, 4)
    given = (torch.randn(1, 300, 1, 16), torch.randn(1, 18, 1, 16), torch.tensor([0]), torch.tensor([18]))
    indices, scores = eager.select(*given, 1, 16, 4, 0)
    assert verify.select_error(s, given, indices, scores) < 1e-5
    assert verify.select_error(s, given, indices, scores * 0.9) > verify.TOLERANCE
    assert verify.select_error(s, given, indices + 4, scores) == 1.0
    assert verify.select_error(s, given, torch.where(indices == indices.amax(-1, True), -1, indices), scores) == 1.0


def test_suites_replace_whole_files(tmp_path: Path) -> None:
    row = {**common_keys("kernels", 3), "ms": 1.0}
    for rows in ([row, row], [row]):
        path = write_suite(tmp_path / "new" / "kernels.jsonl", rows)
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert {"suite", "device", "date", "commit", "command", "versions", "seed"} <= set(row)
    assert [p.name for p in path.parent.iterdir()] == ["kernels.jsonl"]


def test_timings_have_a_spread() -> None:
    timing = timed(lambda: sum(range(1000)), seconds=0.0, least=5)
    assert 0 < timing.least <= timing.median <= timing.most


def test_dense_peer_decodes_what_it_reads_at_once() -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=32, mlp_dim=64, swa_heads=2, swa_kv_heads=1, swa_head_dim=16)
    model = DenseModel(config, capacity=20)
    ids = torch.randint(0, 260, (1, 12))
    whole = model.step(ids)
    model.reset()
    model.step(ids[:, :9])
    for i in range(9, 12):
        last = model.step(ids[:, i : i + 1])
    torch.testing.assert_close(last, whole, atol=1e-5, rtol=1e-5)
    model.reset()
    changed = F.pad(ids[:, 1:], (1, 0), value=3)
    assert (model.step(changed) - whole).abs().max() > 1e-4, "the first token must matter"
    with pytest.raises(ValueError, match="one at a time"):
        model.step(ids)
