"""Behind lm-evaluation-harness: scores are the model's own, and its RULER tasks run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hsa_compile.model.config import ConfigError
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.tokenizer import ByteTokenizer
from kit import SMALL, lively

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

from hsa_compile.evaluation.harness import HsaLM, run_harness, save_byte_tokenizer

pytestmark = pytest.mark.usefixtures("light")
MODEL = lively(HsaModel(SMALL))
TEXT = "In the beginning God created the heaven and the earth."


def _requests(*arguments: object) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


def test_likelihoods_are_those_of_one_forward_pass() -> None:
    ((score, greedy),) = HsaLM(MODEL, segment=7).loglikelihood(_requests((TEXT, " And the earth")), True)
    ids = torch.tensor([list((TEXT + " And the earth").encode())])
    with torch.no_grad():
        logp = MODEL(ids).log_softmax(-1)[0, len(TEXT) - 1 : -1]
    want = logp.gather(1, ids[0, len(TEXT) :, None]).sum()
    assert score == pytest.approx(float(want), rel=1e-4)
    assert greedy == bool((logp.argmax(-1) == ids[0, len(TEXT) :]).all())
    best = bytes(int(token) for token in generate(MODEL, list(TEXT.encode()), 1)).decode("latin-1")
    if best.isascii():
        assert HsaLM(MODEL).loglikelihood(_requests((TEXT, best)), True)[0][1]
    (rolling,) = HsaLM(MODEL).loglikelihood_rolling(_requests((TEXT,)))
    ids = torch.tensor([[ByteTokenizer.EOS, *TEXT.encode()]])
    with torch.no_grad():
        want = MODEL(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum()
    assert rolling == pytest.approx(float(want), rel=1e-4)


def test_generation_ends_at_a_stop_string() -> None:
    model = HsaLM(MODEL, segment=16)
    whole, none = model.generate_until(_requests((TEXT, {"max_gen_toks": 12}), (TEXT, {"max_gen_toks": 0})))
    tokens = [int(token) for token in generate(MODEL, list(TEXT.encode()), 12)]
    want = bytes(tokens[: next((i for i, token in enumerate(tokens) if token > 255), 12)])
    assert whole == want.decode(errors="replace")
    assert none == ""
    if len(want) > 3 and want[:3].isascii():
        (cut,) = model.generate_until(_requests((TEXT, {"max_gen_toks": 12, "until": [want[1:3].decode()]})))
        assert cut == want[:1].decode()


def test_tokens_of_the_generators_are_bytes(tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(save_byte_tokenizer(tmp_path)))  # type: ignore[arg-type]
    text = "naïve\n\tünïcode 123 \x7f"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_what_would_not_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="ruler_vt needs lengths of at least 16384"):
        run_harness(MODEL, ["ruler_vt"], [4096], 1)


@pytest.mark.slow
def test_rulers_own_needle_task_runs() -> None:
    pytest.importorskip("transformers")
    found = run_harness(MODEL, ["niah_single_1"], [4096], 3)
    assert list(found) == ["niah_single_1"]
    assert 0 <= found["niah_single_1"]["4096"] <= 1
