"""RULER-style tasks (Hsieh et al., arXiv 2404.06654), worded briefly, so that a few bytes carry a fact.

S-N: one needle. MK: one of six is asked for. MQ: two of six. MV: three needles of one key, among three others. VT: two
chains of three assignments, of which one chain's names are asked for. CWE: three words that come thirty times among
others that come three times. FWE: the three most frequent of words whose frequencies fall as 1/rank². ``niah`` is
S-N in the words of lm-evaluation-harness, for training. What MV, CWE and FWE ask for is a set: RULER counts which of
its members the answer contains, and takes no notice of their order.
"""

from __future__ import annotations

import random

from hsa_compile.model.tasks.problem import WORDS as KEYS
from hsa_compile.model.tasks.problem import Ask, Problem, Task, digits, distinct, invented_word

DIGITS = 7
NEEDLES, ASKED, VALUES = 6, 2, 3
CHAINS, HOPS = 2, 3
COMMON, REPEATS = 3, 30
RANKED, WORDS = 3, 50


def _key(rng: random.Random) -> str:
    return rng.choice(KEYS)


def _needle(key: str, number: str) -> bytes:
    return f" The number of {key} is {number}. ".encode()


def _needles(rng: random.Random, count: int) -> tuple[list[str], list[str], tuple[bytes, ...]]:
    keys = distinct(lambda: _key(rng), count)
    numbers = [digits(rng, DIGITS) for _ in keys]
    return keys, numbers, tuple(map(_needle, keys, numbers))


def _ask_one(key: str, number: str, fact: int) -> Ask:
    return Ask(f"\nThe number of {key} is".encode(), f" {number}".encode(), (fact,))


def _single(rng: random.Random, asks: int, room: int) -> Problem:
    keys, numbers, facts = _needles(rng, 1)
    return Problem(facts, (_ask_one(keys[0], numbers[0], 0),) * asks, names=tuple(keys))


def _multi_key(rng: random.Random, asks: int, room: int) -> Problem:
    keys, numbers, facts = _needles(rng, NEEDLES)
    asked = rng.sample(range(NEEDLES), min(asks, NEEDLES))
    return Problem(facts, tuple(_ask_one(keys[i], numbers[i], i) for i in asked), names=tuple(keys))


def _multi_query(rng: random.Random, asks: int, room: int) -> Problem:
    keys, numbers, facts = _needles(rng, NEEDLES)
    found, order = [], rng.sample(range(NEEDLES), NEEDLES)
    for first in range(0, min(asks * ASKED, NEEDLES), ASKED):
        i = order[first : first + ASKED]
        query = f"\nThe numbers of {' and '.join(keys[x] for x in i)}:"
        answer = ",".join(f" {keys[x]} is {numbers[x]}" for x in i)
        found.append(Ask(query.encode(), answer.encode(), tuple(sorted(i))))
    return Problem(facts, tuple(found), names=tuple(keys))


def _multi_value(rng: random.Random, asks: int, room: int) -> Problem:
    keys, numbers, _ = _needles(rng, NEEDLES)
    mine = sorted(rng.sample(range(NEEDLES), VALUES))
    others = iter(keys[1:])
    written = tuple(_needle(keys[0] if i in mine else next(others), numbers[i]) for i in range(NEEDLES))
    answer = "".join(f" {numbers[i]}" for i in mine).encode()
    asked = Ask(f"\nThe numbers of {keys[0]} are".encode(), answer, tuple(mine), unordered=True)
    return Problem(written, (asked,), names=tuple(keys))


def _variables(rng: random.Random, asks: int, room: int) -> Problem:
    names = distinct(lambda: _key(rng), CHAINS * HOPS)
    values = distinct(lambda: digits(rng, 5), CHAINS)
    order = rng.sample([chain for chain in range(CHAINS) for _ in range(HOPS)], CHAINS * HOPS)
    facts: list[bytes] = []
    done, told = [0] * CHAINS, [list[int]() for _ in range(CHAINS)]
    for chain in order:
        name = names[chain * HOPS + done[chain]]
        source = names[chain * HOPS + done[chain] - 1] if done[chain] else values[chain]
        told[chain].append(len(facts))
        facts.append(f" Copy {source} to {name}. ".encode())
        done[chain] += 1
    found = []
    for chain in rng.sample(range(CHAINS), min(asks, CHAINS)):
        answer = "".join(f" {name}" for name in names[chain * HOPS : (chain + 1) * HOPS])
        found.append(Ask(f"\nCopies of {values[chain]}:".encode(), answer.encode(), tuple(told[chain])))
    return Problem(tuple(facts), tuple(found), names=tuple(names))


def _common_words(rng: random.Random, asks: int, room: int) -> Problem:
    words = distinct(lambda: invented_word(rng), COMMON)
    # A third of a text that is short; at least twice what the other words have.
    times = max(6, min(REPEATS, room // (3 * COMMON * len(" badige "))))
    order = rng.sample([word for word in words for _ in range(times)], COMMON * times)
    ranked = sorted(words, key=order.index)
    answer = "".join(f" {word}" for word in ranked).encode()
    facts = tuple(f" {word} ".encode() for word in order)
    ask = Ask(b"\nThe most common words are", answer, tuple(range(len(facts))), unordered=True)
    return Problem(facts, (ask,))


def _frequent_words(rng: random.Random, asks: int, room: int) -> Problem:
    words = tuple(distinct(lambda: invented_word(rng), WORDS))
    answer = "".join(f" {word}" for word in words[:RANKED]).encode()
    return Problem((), (Ask(b"\nThe most frequent words are", answer, unordered=True),), words)


def _niah(rng: random.Random, asks: int, room: int) -> Problem:
    keys = distinct(lambda: f"{_key(rng)}-{_key(rng)}", rng.choice((1, 1, 4)))
    numbers = [digits(rng, DIGITS) for _ in keys]
    facts = tuple(
        f"One of the special magic numbers for {key} is: {number}.\n".encode() for key, number in zip(keys, numbers)
    )
    found = []
    for i in rng.sample(range(len(keys)), min(asks, len(keys))):
        query = f"\nThe special magic number for {keys[i]} mentioned in the provided text is"
        found.append(Ask(query.encode(), f" {numbers[i]}".encode(), (i,)))
    return Problem(facts, tuple(found))


TASKS = (
    Task("s-n", _single),
    Task("mk", _multi_key),
    Task("mq", _multi_query),
    Task("mv", _multi_value),
    Task("vt", _variables),
    Task("cwe", _common_words, hay="words"),
    Task("fwe", _frequent_words, hay="frequent"),
    Task("niah", _niah),
)
