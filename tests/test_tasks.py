"""Generated questions: right answers, by looking; facts where they should be; training samples."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import DataError
from hsa_compile.model.shards import Tokens
from hsa_compile.model.stream import Batches, length_at
from hsa_compile.model.tasks.haystack import Bytes, Circle, Context, frequent_words, hide, other_words
from hsa_compile.model.tasks.problem import Problem
from hsa_compile.model.tasks.registry import TASKS, find_tasks
from hsa_compile.model.tasks.weave import Weaver, pairs_sample
from kit import small_recipe

TEXT = bytes(range(65, 91)) * 400
PAIR = rb"\{(\w):(\d{3})\}"
LINES = np.frombuffer(b"A line of prose that goes on.\n" * 300, np.uint8)


def _text(context: Context) -> str:
    return bytes(context.read(0, context.shape[1]).astype(np.uint8)).decode()


def _problem(name: str, seed: int, asks: int = 3, room: int = 4096) -> tuple[str, Problem]:
    problem = TASKS[name].make(random.Random(seed), asks, room)
    return b"".join(problem.facts).decode(), problem


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_a_function_of_the_seed(name: str) -> None:
    (_, a), (_, b), (_, c) = (_problem(name, seed) for seed in (1, 1, 2))
    assert a == b != c
    assert 1 <= len(a.asks) <= 3
    assert len({ask.query for ask in a.asks}) == (1 if len(a.facts) == 1 else len(a.asks))
    assert all(ask.answer and ask.query for ask in a.asks)
    assert all(list(ask.facts) == sorted({*ask.facts} & {*range(len(a.facts))}) for ask in a.asks)
    assert all(bool(ask.facts) == bool(a.facts) for ask in a.asks)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["s-n", "mk", "mq", "mv", "niah"])
def test_needles_are_what_is_answered(name: str, seed: int) -> None:
    facts, problem = _problem(name, seed)
    needles = re.findall(r"(?:The number of|numbers for) (\S+) is:? (\d{7})\.", facts)
    assert len(needles) == len(problem.facts)
    for ask in problem.asks:
        asked = re.findall(r"(?:of|for|and) ([a-z-]+)", ask.query.decode())
        if name == "mv":
            want = [number for key, number in needles if key == asked[0]]
            assert len(want) == 3
        else:
            want = [dict(needles)[key] for key in asked]
        if name == "mq":
            want = [f"{key} is {number}" for key, number in zip(asked, want)]
        assert ask.answer.decode() == " " + (", " if name == "mq" else " ").join(want)
        assert ask.unordered == (name == "mv")
        assert len(ask.parts) == (3 if name == "mv" else 1)
        assert b"".join(ask.parts) == ask.answer


@pytest.mark.parametrize("seed", range(10))
def test_chains_of_variables_end_in_the_value_asked_for(seed: int) -> None:
    facts, problem = _problem("vt", seed)
    values: dict[str, str] = {}
    for source, name in re.findall(r"Copy (\w+) to (\w+)\.", facts):
        values[name] = values.get(source, source)
    for ask in problem.asks:
        asked = re.search(r"of (\d{5}):", ask.query.decode())
        assert asked is not None
        assert ask.answer.decode().split() == [name for name, value in values.items() if value == asked[1]]


@pytest.mark.parametrize("room", [128, 4096])
@pytest.mark.parametrize("seed", range(20))
def test_people_and_objects_are_where_the_last_fact_left_them(seed: int, room: int) -> None:
    for name in ("qa1", "qa2", "qa3"):
        facts, problem = _problem(name, seed, room=room)
        place: dict[str, str] = {}
        holder: dict[str, str] = {}
        history: dict[str, list[str]] = {}
        for person, verb, what in re.findall(r"(\w+) (\w+)(?: up)?(?: to)? the (\w+)\.", facts):
            if verb in ("moved", "went", "travelled"):
                place[person] = what
                for thing in (x for x, who in holder.items() if who == person):
                    history[thing].append(what)
            elif verb in ("dropped", "left"):
                assert holder.pop(what) == person
            else:
                assert what not in holder
                assert history.get(what, [place[person]])[-1] == place[person]
                holder[what] = person
                if history.setdefault(what, [])[-1:] != [place[person]]:
                    history[what].append(place[person])
        for ask in problem.asks:
            query, answer = ask.query.decode(), ask.answer.decode().strip()
            if name == "qa1":
                assert place[query.split()[2].strip("?")] == answer
            elif name == "qa2":
                assert history[query.split()[3].strip("?")][-1] == answer
            else:
                words = re.findall(r"the (\w+)", query)
                assert history[words[0]][-2:] == [answer, words[1]]


@pytest.mark.parametrize("room", [128, 4096])
@pytest.mark.parametrize("seed", range(10))
def test_directions_and_gifts(seed: int, room: int) -> None:
    facts, problem = _problem("qa4", seed, room=room)
    opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
    known = {}
    for a, direction, b in re.findall(r"The (\w+) is (\w+) of the (\w+)\.", facts):
        known[direction, b], known[opposite[direction], a] = a, b
    for ask in problem.asks:
        asked = re.search(r"What is (\w+) of the (\w+)\?", ask.query.decode())
        assert asked is not None
        assert known[asked.groups()] == ask.answer.decode().strip()  # type: ignore[index]
    facts, problem = _problem("qa5", seed, 6, room)
    assert len({ask.query for ask in problem.asks}) == min(6, 2 * len(problem.facts))
    gifts = {thing: (giver, taker) for giver, thing, taker in re.findall(r"(\w+) \w+ the (\w+) to (\w+)\.", facts)}
    for ask in problem.asks:
        asked = re.search(r"Who (gave|received) the (\w+)\?", ask.query.decode())
        assert asked is not None
        assert gifts[asked[2]][asked[1] == "received"] == ask.answer.decode().strip()


def test_worlds_are_small_in_short_texts() -> None:
    sizes = {name: [set[int]() for _ in range(3)] for name in ("qa1", "qa2", "qa3", "qa4", "qa5")}
    for name, found in sizes.items():
        for seed in range(300):
            for room, counts in zip((128, 512, 1 << 20), found):
                counts.add(len(_problem(name, seed, room=room)[1].facts))
    assert sizes["qa1"] == [{2}, {8}, {8}]
    assert sizes["qa4"] == [{1}, {2}, {2}]
    assert sizes["qa5"] == [{1}, {3}, {3}]
    for name, least in (("qa2", 2), ("qa3", 3)):
        short, *long = sizes[name]
        assert min(short) == least
        assert max(short) <= 2 * least
        assert all(min(counts) == 8 and max(counts) <= 16 for counts in long)


@pytest.mark.parametrize(("name", "length"), [("qa1", 128), ("qa2", 128), ("qa3", 256), ("qa4", 128), ("qa5", 128)])
def test_short_samples_have_worlds(name: str, length: int) -> None:
    for seed in range(20):
        sample = Weaver(Bytes(), TEXT, ((TASKS[name], 1.0),), 0.9, 5.0).draw(random.Random(seed), length, 1)
        assert re.search(rb"\nWh\w+ [^?]+\?", bytes(np.asarray(sample.ids, np.uint8)))


def test_a_problem_has_the_questions_for_which_there_is_room() -> None:
    asked = []
    for seed in range(40):
        sample = Weaver(Bytes(), TEXT, ((TASKS["mk"], 1.0),), 0.9, 5.0).draw(random.Random(seed), 330, 1)
        asked.append(bytes(np.asarray(sample.ids, np.uint8)).count(b"\nThe number of"))
    assert set(asked) == {1, 2}  # six needles of 36 bytes, questions of as many
    assert asked.count(2) > asked.count(1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", [name for name in TASKS if name != "fwe"])
def test_facts_that_are_needed_hold_the_answer(name: str, seed: int) -> None:
    _, problem = _problem(name, seed)
    for ask in problem.asks:
        told = b"".join(problem.facts[i] for i in ask.facts)
        assert all(word in told for word in re.findall(rb"\w+", ask.answer))
        if name == "qa2":
            assert all(word in told for word in re.findall(rb"the (\w+)", ask.query))
    assert {ask.facts for ask in problem.asks} != {tuple(range(len(problem.facts)))} or name in ("s-n", "cwe", "niah")


def test_common_words_are_the_most_common_of_their_text() -> None:
    task, hay = TASKS["cwe"], other_words(Bytes(), 4096, 5)
    problem = task.make(random.Random(3), 1, 4096)
    text = _text(hide(random.Random(4), Bytes(), hay, problem, problem.asks[0], b" "))
    body = text[: -len(problem.asks[0].query)]
    words = problem.asks[0].answer.decode().split()
    assert {word for word, _ in Counter(body.split()).most_common(3)} == set(words)
    assert sorted(words, key=body.index) == words


@pytest.mark.parametrize(("name", "length"), [("cwe", 512), ("cwe", 4096), ("fwe", 1024), ("fwe", 4096)])
def test_the_words_asked_for_are_more_frequent_than_any_other(name: str, length: int) -> None:
    for seed in range(60):
        problem = TASKS[name].make(random.Random(seed), 1, length)
        hay = frequent_words(Bytes(), problem, length, seed) if name == "fwe" else other_words(Bytes(), length, seed)
        text = _text(hide(random.Random(seed), Bytes(), hay, problem, problem.asks[0], b" "))
        counts = Counter(text[: -len(problem.asks[0].query)].split())
        asked = [counts.pop(part.decode().strip()) for part in problem.asks[0].parts]
        assert min(asked) > max(counts.values())


def test_words_are_written_as_often_as_they_should() -> None:
    counts = Counter(bytes(other_words(Bytes(), 30_000, 7).read(0, 30_000).astype(np.uint8)).split())
    assert len(counts) in range(30_000 // 27 - 1, 30_000 // 27 + 3)
    assert {word for word, count in counts.items() if count == 3} > set(list(counts)[:1000])
    problem = TASKS["fwe"].make(random.Random(0), 1, 1 << 18)
    text = bytes(frequent_words(Bytes(), problem, 1 << 18, 3).read(0, 1 << 18).astype(np.uint8))
    counts = Counter(text.decode().split())
    share = np.array([counts[word] for word in problem.words]) / sum(counts.values())
    assert share[:9] * np.arange(1, 10) ** 2 == pytest.approx(np.full(9, share[0]), rel=0.05)


def test_facts_keep_their_order_and_lie_at_uniform_places() -> None:
    depths = []
    for seed in range(200):
        rng = random.Random(seed)
        problem = TASKS["vt"].make(rng, 1, 4096)
        context = hide(rng, Bytes(), Circle(LINES, 4096, seed), problem, problem.asks[0])
        text = _text(context)
        assert len(text) == context.shape[1] == 4096
        assert text.endswith(problem.asks[0].query.decode())
        places = [text.index(fact.decode()) for fact in problem.facts]
        assert places == sorted(places)
        assert context.depth == places[problem.asks[0].facts[0]] / 4096
        assert [context.edits[i][0] for i in context.needed] == [places[i] for i in problem.asks[0].facts]
        if places[0] + 60 < places[1]:
            assert text[places[0] - 1] == "\n"
        problem = TASKS["s-n"].make(rng, 1, 4096)
        depths.append(hide(rng, Bytes(), Circle(LINES, 4096), problem, problem.asks[0]).depth)
    quarters = [sum(1 for depth in depths if i <= 4 * depth < i + 1) for i in range(4)]
    assert min(quarters) > 25


def test_contexts_are_read_in_any_parts() -> None:
    problem = TASKS["mk"].make(random.Random(1), 1, 3000)
    context = hide(random.Random(2), Bytes(), Circle(LINES[:777], 3000, 500), problem, problem.asks[0])
    whole = context.read(0, 3000)
    for size in (1, 7, 1000):
        parts = [context[:, first : first + size] for first in range(0, 3000, size)]
        assert np.array_equal(np.concatenate([part[0].numpy() for part in parts]), whole)
    outside = np.ones(3000, bool)
    for first, end in context.changed:
        outside[first:end] = False
    assert np.array_equal(whole[outside], Circle(LINES[:777], 3000, 500).read(0, 3000)[outside])


def test_what_does_not_fit_is_said() -> None:
    problem = TASKS["mk"].make(random.Random(1), 1, 100)
    with pytest.raises(ConfigError, match="do not fit into 100 tokens"):
        hide(random.Random(2), Bytes(), Circle(LINES, 100), problem, problem.asks[0])
    with pytest.raises(ConfigError, match="unknown task 'x'"):
        find_tasks(["mk", "x"])
    with pytest.raises(DataError, match="no problem fits into 50% of 30 tokens"):
        Weaver(Bytes(), TEXT, ((TASKS["s-n"], 1.0),), 0.5, 2.0).draw(random.Random(0), 30, 1)


WOVEN = tuple((task, 1.0) for task in TASKS.values() if task.hay == "text" and not task.dense)


@pytest.mark.parametrize("seed", range(8))
def test_woven_samples_weigh_answers_and_text(seed: int) -> None:
    sample, again = (Weaver(Bytes(), TEXT, WOVEN, 0.6, 5.0).draw(random.Random(seed), 2000, 1) for _ in range(2))
    assert np.array_equal(sample.ids, again.ids)
    assert len(sample.ids) == 2001
    assert len(sample.weights) == 2000
    ids, weights = bytes(np.asarray(sample.ids, np.uint8)), np.concatenate(([1.0], sample.weights))
    assert set(weights) == {0.0, 1.0, 5.0}
    facts = list(re.finditer(rb" The number of (\w+) is (\d{7})\. ", ids))
    for fact in facts:
        assert not weights[fact.start() : fact.end()].any()
    for ask in re.finditer(rb"\nThe number of (\w+) is( \d{7})\n", ids):
        known = [fact for fact in facts if fact[1] == ask[1]][:1]
        assert [fact[2] for fact in known] == [ask[2].strip()]
        assert known[0].end() <= ask.start()
        assert (weights[ask.start(2) : ask.end(2)] == 5.0).all()
        assert not weights[ask.start() : ask.start(2)].any()
    assert 0 < (weights != 1).sum() <= 0.6 * 2001


def test_woven_samples_have_from_one_problem_to_as_many_as_fit() -> None:
    weaver = Weaver(Bytes(), TEXT, WOVEN, 0.6, 5.0)
    parts = [np.mean(np.asarray(weaver.draw(random.Random(seed), 4000, 1).weights) != 1) for seed in range(60)]
    assert min(parts) < 0.15
    assert 0.5 < max(parts) <= 0.6


def test_facts_of_a_text_are_about_different_names() -> None:
    weaver = Weaver(Bytes(), TEXT, ((TASKS["mk"], 1.0), (TASKS["vt"], 1.0)), 0.9, 5.0)
    for seed in range(10):
        text = bytes(np.asarray(weaver.draw(random.Random(seed), 20_000, 1).ids, np.uint8))
        names = re.findall(rb" The number of (\w+) is|Copy \w+ to (\w+)\.", text)
        assert len(names) == len(set(names)) >= 6


def test_short_samples_have_what_fits() -> None:
    tasks = tuple((TASKS[name], share) for name, share in (("s-n", 0.01), ("mq", 1.0), ("cwe", 1.0), ("niah", 1.0)))
    weaver = Weaver(Bytes(), TEXT, tasks, 0.6, 5.0)
    for seed in range(20):
        sample = weaver.draw(random.Random(seed), 128, 1)
        assert bytes(np.asarray(sample.ids, np.uint8)).count(b"The number of") == 2


def test_one_world_comes_once_a_sample() -> None:
    tasks = tuple((TASKS[name], 1.0) for name in ("qa1", "qa2", "qa3"))
    sample = Weaver(Bytes(), TEXT, tasks, 0.9, 5.0).draw(random.Random(0), 4000, 1)
    assert bytes(np.asarray(sample.ids, np.uint8)).count(b"Where") in range(1, 5)


@pytest.mark.parametrize("name", ["cwe", "fwe"])
def test_samples_of_words_ask_at_their_end(name: str) -> None:
    sample = Weaver(Bytes(), TEXT, ((TASKS[name], 1.0),), 0.6, 5.0).draw(random.Random(1), 1000, 1)
    text = bytes(np.asarray(sample.ids, np.uint8))
    assert len(text) == 1001
    answer = text[text.rindex(b"words are") + len(b"words are") :]
    assert list(sample.weights) == [0.0] * (1000 - len(answer)) + [5.0] * len(answer)
    if name == "fwe":
        counted = [word for word, _ in Counter(text[: -len(answer) - 30].split()).most_common(3)]
        assert set(answer.split()) == set(counted)


@pytest.mark.parametrize("name", ["mv", "cwe", "fwe"])
def test_sets_are_taught_in_any_order_and_asked_for_in_the_texts(name: str) -> None:
    weaver, places = Weaver(Bytes(), TEXT, ((TASKS[name], 1.0),), 0.6, 5.0), set()
    for seed in range(30):
        sample = weaver.draw(random.Random(seed), 1000, 1)
        ids, weights = np.asarray(sample.ids, np.uint8), np.concatenate(([1.0], sample.weights))
        answer = bytes(ids[weights == 5.0]).split()[:3]
        rest = bytes(ids[weights != 5.0])
        assert len(set(answer)) == 3
        ranks = {word: -rest.count(word) if name == "fwe" else rest.index(word) for word in answer}
        order = sorted(answer, key=ranks.__getitem__)
        places.add(tuple(order.index(part) for part in answer))
    assert len(places) == 6
    problem = TASKS[name].make(random.Random(0), 1, 1000)
    context = hide(random.Random(1), Bytes(), other_words(Bytes(), 2000, 1), problem, problem.asks[0])
    assert [bytes(part.astype(np.uint8)) for part in context.parts] == list(problem.asks[0].parts)
    assert bytes(context.answer.astype(np.uint8)) == problem.asks[0].answer


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_asked_for_only_where_they_came_before(seed: int) -> None:
    sample, again = (pairs_sample(random.Random(seed), TEXT, 300, 8, 0.7, 4.0) for _ in range(2))
    assert sample == again
    assert len(sample.ids) == 301
    assert len(sample.weights) == 300
    ids, known, asked = bytes(sample.ids), {}, 0
    weights = [1.0, *sample.weights]
    for match in re.finditer(PAIR, ids):
        key, value = match.groups()
        answer = 4.0 if key in known else 0.0
        first = match.start()
        assert weights[first + 3 : match.end()] == [answer] * 3 + [0.0]
        assert not any(weights[max(1, first) : first + 3])
        assert known.setdefault(key, value) == value
        asked += answer > 0
    assert 1 <= len(known) <= 8
    assert len(known) + asked == 301 * 7 // 10 // 7


def test_pairs_of_other_tokens_are_words_and_numbers() -> None:
    class Twice(Bytes):  # any codec but bytes
        vocab_size = 512

    text = Tokens([np.frombuffer(TEXT, np.uint8)], 512, "text")
    weaver = Weaver(Twice(), text, ((TASKS["pairs"], 1.0),), 0.8, 5.0)
    for seed in range(5):
        sample = weaver.draw(random.Random(seed), 1500, 12)
        ids, known, asked = bytes(np.asarray(sample.ids, np.uint8)), dict[bytes, bytes](), 0
        weights = [1.0, *sample.weights]
        for match in re.finditer(rb" (\w+) is( \d{7})\.", ids):
            answer = 5.0 if match[1] in known else 0.0
            assert set(weights[match.start(2) : match.end(2)]) == {answer}
            assert not any(weights[match.start() : match.start(2)])
            assert known.setdefault(match[1], match[2]) == match[2]
            asked += answer > 0
        assert 1 <= len(known) <= 12
        assert len(known) + asked == 1501 * 8 // 10 // len(" badige is 1234567.")
    with pytest.raises(DataError, match="pairs do not fit into 80% of 20"):
        weaver.draw(random.Random(3), 20, 12)


def test_pairs_that_cannot_fit() -> None:
    rng = random.Random(0)
    with pytest.raises(DataError, match="do not fit into 50% of 60"):
        pairs_sample(rng, TEXT, 60, pairs=6, fill=0.5, answer_weight=1.0)
    with pytest.raises(DataError, match="only 26 keys"):
        pairs_sample(rng, TEXT, 20_000, pairs=27, fill=0.5, answer_weight=1.0)


def test_lengths_double(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=100, length=1024, short_length=128, short_part=0.6)
    steps, lengths = (0, 19, 20, 39, 40, 59, 60, 99), [128, 128, 256, 256, 512, 512, 1024, 1024]
    assert [length_at(recipe, step) for step in steps] == lengths
    assert length_at(dataclasses.replace(recipe, short_part=0), 0) == 1024


def test_workers_draw_the_same_batches(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=6, length=512, tasks={"s-n": 1, "vt": 2, "pairs": 1})
    here = list(Batches(recipe, TEXT).stream(2))
    there = list(Batches(dataclasses.replace(recipe, workers=2), TEXT).stream(2))
    assert len(here) == len(there) == 4
    for mine, other in zip(here, there):
        assert all(a.equal(b) for a, b in zip(mine, other))
