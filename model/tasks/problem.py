"""What a question is: facts to hide in a text, and what to ask after it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Hay = Literal["text", "words", "frequent"]


@dataclass(frozen=True)
class Ask:
    """A question at the end of a text.

    Args:
        query: the text's last bytes; the answer comes right after them.
        answer: what is to be continued with.
        facts: which of the problem's facts are needed, in order; none where the text itself is asked about.
        unordered: the answer's words are right in any order: the text's, if there is one, is not to be told from facts.
    """

    query: bytes
    answer: bytes
    facts: tuple[int, ...] = ()
    unordered: bool = False

    @property
    def parts(self) -> tuple[bytes, ...]:
        """The answer, or its words with the space before each, of which any order is right."""
        return tuple(b" " + word for word in self.answer.split()) if self.unordered else (self.answer,)


@dataclass(frozen=True)
class Problem:
    """Facts to hide, in the order in which they must come, and questions about them, each of which stands alone.

    ``words`` are those of the text itself, the most frequent first, where it is one of ``frequent`` words.
    ``names`` are what the facts are about: problems that share one cannot be in one text.
    """

    facts: tuple[bytes, ...]
    asks: tuple[Ask, ...]
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A family of problems.

    Args:
        name: as in results.
        make: draws a problem with at most that many questions, all different but where there is one fact; its facts fit
            into a text of that many tokens.
        hay: what the facts are hidden in: ``text`` is prose; ``words`` are words that come three times each;
            of ``frequent`` words the most frequent are asked for, and there are no facts.
        world: tasks of one world name the same people or places: one of them, once, can be in a text.
        dense: facts are written side by side in training, and repeated, where others are woven into prose.
    """

    name: str
    make: Callable[[random.Random, int, int], Problem]
    hay: Hay = "text"
    world: str = ""
    dense: bool = False


_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


def invented_word(rng: random.Random, syllables: int = 3) -> str:
    """A word that no text has, of that many consonants and vowels: 80 to the power of ``syllables`` there are."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """``count`` different draws."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def digits(rng: random.Random, count: int) -> str:
    """A number of exactly so many digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _words(count: int) -> tuple[str, ...]:
    rng = random.Random("words")
    return tuple(distinct(lambda: invented_word(rng), count))


# What facts are about: so many that which are in a text is not known, so few that a vocabulary has a token for each.
WORDS = _words(4096)
