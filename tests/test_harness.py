"""Behind lm-evaluation-harness: scores are the model's own, and its RULER tasks run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hsa_compile.cli import app
from hsa_compile.model.checkpoint import save_checkpoint
from hsa_compile.model.config import ConfigError
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.tokenizer import ByteTokenizer, JsonTokenizer
from kit import SMALL, lively

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytest.importorskip("transformers")

from hsa_compile.evaluation.harness import HsaLM, run_harness, save_tokenizer

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


@pytest.fixture(scope="module", autouse=True)
def _few_words() -> Iterator[None]:
    """Of the harness's words some: it makes six million pairs of them when it is imported, and sorts these."""
    import wonderwords

    some = wonderwords.RandomWord()
    some._categories = {kind: known[:200] for kind, known in some._categories.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", lambda: some)
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 600 tokens at most, which knows RULER's phrases."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.", TEXT,
        "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR = VAR",
        "Find all variables that are assigned the value. According to the chain(s) of variable assignment",
    ]  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=600, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_checkpoints_own_tokens_are_read_and_written(words: Path) -> None:
    tokenizer = JsonTokenizer(words)
    model = lively(HsaModel(dataclasses.replace(SMALL, vocab_size=600)))
    lm = HsaLM(model, tokenizer, segment=16)
    (text,) = lm.generate_until(_requests((TEXT, {"max_gen_toks": 9})))
    ids = [int(token) for token in generate(model, tokenizer.encode(TEXT), 9)]
    known = next((i for i, token in enumerate(ids) if token >= tokenizer.vocab_size), 9)
    assert text == tokenizer.decode(ids[:known])
    assert len(tokenizer.encode(TEXT)) < len(TEXT)
    ((score, _),) = lm.loglikelihood(_requests((TEXT, " Here we go")), True)
    ids = tokenizer.encode(TEXT + " Here we go")
    before = len(tokenizer.encode(TEXT))
    with torch.no_grad():
        logp = model(torch.tensor([ids])).log_softmax(-1)[0, before - 1 : -1]
    want = logp.gather(1, torch.tensor(ids[before:])[:, None]).sum()
    assert score == pytest.approx(float(want), rel=1e-4)
    assert lm.eot_token_id == tokenizer.encode("\n")[-1]


def test_tokens_of_the_generators_are_the_models(tmp_path: Path, words: Path) -> None:
    from transformers import AutoTokenizer

    text = "naïve\n\tünïcode 123 \x7f"
    tokenizer = AutoTokenizer.from_pretrained(str(save_tokenizer(tmp_path / "bytes")))
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    tokenizer = AutoTokenizer.from_pretrained(str(save_tokenizer(tmp_path / "words", words)))
    assert tokenizer(TEXT).input_ids == JsonTokenizer(words).encode(TEXT)


@pytest.mark.parametrize(
    ("tasks", "length", "message"),
    [
        (["ruler_vt"], 16384, r"ruler_vt has 500 tokens for its example, which takes \d+ here"),
        (["ruler_cwe"], 4096, r"ruler_cwe takes \d+ of this model's tokens at least, got a length of 4096"),
        (["niah_single_1"], 4000, "no length of 4000; give some of 4096, 8192"),
        (["niah_single_1", "arc_easy"], 4096, "unknown task 'arc_easy'; known: niah_"),
    ],
)  # fmt: skip
def test_what_would_not_end_or_is_not_there_is_refused(tasks: list[str], length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_harness(MODEL, tasks, [length], 1)


def test_rulers_own_tasks_score_what_is_generated(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def look(self: HsaLM, context: str, options: dict[str, object]) -> str:
        """Half of the needles, and the first two of five variables of each chain."""
        read.append(context)
        if "magic" in context:
            number = re.findall(r"is: (\d{7})\.", context)[0]
            return f" {number}." if len(read) % 2 else " none"
        value = re.findall(r"value (\d{5})", context)[-1]
        first = re.findall(rf"VAR (\w{{5}}) = {value}", context)[-1]
        second = re.findall(rf"VAR (\w{{5}}) = VAR {first}", context)[-1]
        return f" {first} {second}"

    monkeypatch.setattr(HsaLM, "_generate", look)
    found = run_harness(MODEL, ["niah_single_1"], [8192, 4096], 2)
    assert found == {"niah_single_1": {"8192": 0.5, "4096": 0.5}}
    sizes = [len(text.encode()) for text in read]
    assert 8192 >= max(sizes[:2]) >= min(sizes[:2]) > 4096 >= max(sizes[2:]) >= min(sizes[2:]) > 2048
    read.clear()
    found = run_harness(MODEL, ["ruler_vt"], [4096], 2, words)
    assert found == {"ruler_vt": {"4096": pytest.approx(0.4)}}
    sizes = [len(JsonTokenizer(words).encode(text)) for text in read]
    assert 4096 >= max(sizes) >= min(sizes) > 2048


def test_command(tmp_path: Path, words: Path) -> None:
    model = lively(HsaModel(dataclasses.replace(SMALL, vocab_size=600)))
    save_checkpoint(model, tmp_path / "model")
    command = ["harness", str(tmp_path / "model"), "-n", "1", "--output", str(tmp_path / "out")]
    asked = CliRunner().invoke(app, command)
    assert asked.exit_code == 1
    assert "give its tokenizer.json" in asked.stderr
    (tmp_path / "model" / "tokenizer.json").write_bytes(words.read_bytes())
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "harness.jsonl").read_text().splitlines()]
    assert (row["task"], row["L"], row["n"], row["suite"]) == ("niah_single_1", 4096, 1, "harness")
    assert row["score"] in (0.0, 1.0)
