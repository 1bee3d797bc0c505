"""The recipes: they are read, and their tokenizer makes short work of what retrieval is trained on."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

from hsa_compile.model.recipe import read_recipe
from hsa_compile.model.tasks.problem import WORDS
from hsa_compile.model.tasks.registry import TASKS
from hsa_compile.model.tokenizer import JsonTokenizer

RECIPES = Path(__file__).parents[1] / "benchmarks" / "recipes"
TEXT = ["It is what it is; the number of lines is 3000.\n", "A line, and another one. Was it the 17th?\n"] * 40


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_read(path: Path) -> None:
    assert read_recipe(path).steps > 0


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_tokenizer", RECIPES / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_are_single_tokens_and_numbers_groups(tmp_path: Path) -> None:
    script = _script()
    for group, numbers in ((2, ["12", "34", "56", "7"]), (3, ["123", "456", "7"])):
        content = script.build(TEXT, group)
        assert content == script.build(TEXT, group)
        path = tmp_path / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        tokenizer = JsonTokenizer(path)
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(f" {WORDS[7]} is 1234567.")]
        assert pieces == [f" {WORDS[7]}", " is", " ", *numbers, "."]
        for name in ("mk", "mq", "vt", "qa3"):
            problem = TASKS[name].make(random.Random(0), 1, 4096)
            text = (b"".join(problem.facts) + problem.asks[0].query + problem.asks[0].answer).decode()
            assert tokenizer.decode(tokenizer.encode(text)) == text
