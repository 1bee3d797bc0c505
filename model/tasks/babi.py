"""BABILong-style tasks (Kuratov et al., arXiv 2406.10149): facts about a small world, which is simulated here.

The questions are those of the first five bAbI tasks (Weston et al., arXiv 1502.05698): where a person is (qa1), where
an object is (qa2), where it was before (qa3), what lies in which direction (qa4), who gave what to whom (qa5).

In a text of 512 tokens or more a world has eight events, a map two facts, and three things are given. Shorter ones, of
training, have fewer: they are where finding a fact is learnt, and held none of these questions otherwise.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

from hsa_compile.model.tasks.problem import Ask, Problem, Task

PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Bill", "Fred")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk", "cake")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}
ACTORS, EVENTS, GIFTS = 4, 8, 3
EVENT_ROOM, FACT_ROOM = 64, 96  # tokens of a text for each event of a world; for each fact of a map, each gift


@dataclass
class _World:
    """Where everyone and everything is, and the sentences that said so.

    Attributes:
        told: by person and by object, the number of the fact that placed them last.
        history: the places where each object was, the last one at the end.
        brought: by object, for each of these places, the number of the fact that named it.
    """

    rng: random.Random
    facts: list[bytes] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[str]] = field(default_factory=dict)
    brought: dict[str, list[int]] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)

    def say(self, sentence: str) -> None:
        self.facts.append(f" {sentence} ".encode())

    def move(self, person: str, to: str | None = None) -> None:
        to = to or self.rng.choice([x for x in PLACES if x != self.place.get(person)])
        self.place[person] = to
        self.told[person] = len(self.facts)
        for thing in (x for x, who in self.holder.items() if who == person):
            self.history[thing].append(to)
            self.brought[thing].append(self.told[person])
        self.say(f"{person} {self.rng.choice(('moved', 'went', 'travelled'))} to the {to}.")

    def take(self, person: str, thing: str) -> None:
        """The person must be somewhere, and the object with nobody there or anywhere unknown."""
        self.holder[thing] = person
        places = self.history.setdefault(thing, [])
        if not places or places[-1] != self.place[person]:
            places.append(self.place[person])
            self.brought.setdefault(thing, []).append(self.told[person])
        self.told[thing] = len(self.facts)
        self.say(f"{person} {self.rng.choice(('took', 'grabbed', 'picked up'))} the {thing}.")

    def drop(self, thing: str) -> None:
        person = self.holder.pop(thing)
        self.say(f"{person} {self.rng.choice(('dropped', 'left'))} the {thing}.")

    def facts_of(self, thing: str, places: int) -> tuple[int, ...]:
        """Who took the object last, and what named the last ``places`` places where it was."""
        return tuple(sorted({self.told[thing], *self.brought[thing][-places:]}))

    def can_take(self, person: str, thing: str) -> bool:
        known = self.history.get(thing)
        return thing not in self.holder and person in self.place and (not known or known[-1] == self.place[person])

    def event(self, people: list[str], things: tuple[str, ...]) -> None:
        person = self.rng.choice(people)
        takable = [thing for thing in things if self.can_take(person, thing)]
        held = [thing for thing, who in self.holder.items() if who == person]
        if takable and self.rng.random() < 0.5:
            self.take(person, self.rng.choice(takable))
        elif held and self.rng.random() < 0.3:
            self.drop(self.rng.choice(held))
        else:
            self.move(person)


def _where_is_a_person(rng: random.Random, asks: int, room: int) -> Problem:
    world, people = _World(rng), rng.sample(PEOPLE, ACTORS)
    for _ in range(_events(room, 2)):
        world.move(rng.choice(people))
    asked = rng.sample(sorted(world.place), min(asks, len(world.place)))
    return Problem(
        tuple(world.facts),
        tuple(Ask(f"\nWhere is {x}? In the".encode(), f" {world.place[x]}".encode(), (world.told[x],)) for x in asked),
    )


def _events(room: int, least: int) -> int:
    return max(least, min(EVENTS, room // EVENT_ROOM))


def _carried(rng: random.Random, places: int, events: int) -> tuple[_World, list[str]]:
    """A world with objects, of which those are named that have been at that many places or more. Of ``events`` to twice
    as many: for two places one of twenty needed more, up to 45."""
    while True:
        world, people = _World(rng), rng.sample(PEOPLE, ACTORS - 1)
        while len(world.facts) < 2 * events:
            world.event(people, OBJECTS[:3])
            known = sorted(thing for thing, places_of in world.history.items() if len(places_of) >= places)
            if len(world.facts) >= events and known:
                return world, known


def _where_is_an_object(rng: random.Random, asks: int, room: int) -> Problem:
    world, known = _carried(rng, 1, _events(room, 2))
    found = []
    for thing in rng.sample(known, min(asks, len(known))):
        place = world.history[thing][-1]
        found.append(Ask(f"\nWhere is the {thing}? In the".encode(), f" {place}".encode(), world.facts_of(thing, 1)))
    return Problem(tuple(world.facts), tuple(found))


def _where_was_an_object(rng: random.Random, asks: int, room: int) -> Problem:
    world, known = _carried(rng, 2, _events(room, 3))
    found = []
    for thing in rng.sample(known, min(asks, len(known))):
        before, place = world.history[thing][-2:]
        query = f"\nWhere was the {thing} before the {place}? In the"
        found.append(Ask(query.encode(), f" {before}".encode(), world.facts_of(thing, 2)))
    return Problem(tuple(world.facts), tuple(found))


def _what_lies_where(rng: random.Random, asks: int, room: int) -> Problem:
    places = rng.sample(PLACES, 1 + max(1, min(2, room // FACT_ROOM)))
    direction = rng.choice(sorted(DIRECTIONS))
    # In a line: each but the last lies in this direction of the next.
    facts = tuple(f" The {a} is {direction} of the {b}. ".encode() for a, b in itertools.pairwise(places))
    found = []
    questions = [(i, back) for i in range(len(facts)) for back in (False, True)]
    for i, back in rng.sample(questions, min(asks, len(questions))):
        a, b = places[i], places[i + 1]
        asked, known, answer = (DIRECTIONS[direction], a, b) if back else (direction, b, a)
        found.append(Ask(f"\nWhat is {asked} of the {known}? The".encode(), f" {answer}".encode(), (i,)))
    return Problem(facts, tuple(found))


def _who_gave_what(rng: random.Random, asks: int, room: int) -> Problem:
    facts, gifts = [], []
    things = rng.sample(OBJECTS, max(1, min(GIFTS, room // FACT_ROOM)))
    for thing in things:
        giver, taker = rng.sample(PEOPLE, 2)
        gifts.append((giver, thing, taker))
        facts.append(f" {giver} {rng.choice(('gave', 'handed', 'passed'))} the {thing} to {taker}. ".encode())
    found = []
    questions = [(i, verb) for i in range(len(gifts)) for verb in ("gave", "received")]
    for i, verb in rng.sample(questions, min(asks, len(questions))):
        giver, thing, taker = gifts[i]
        answer = giver if verb == "gave" else taker
        found.append(Ask(f"\nWho {verb} the {thing}?".encode(), f" {answer}".encode(), (i,)))
    return Problem(tuple(facts), tuple(found))


TASKS = (
    Task("qa1", _where_is_a_person, world="people"),
    Task("qa2", _where_is_an_object, world="people"),
    Task("qa3", _where_was_an_object, world="people"),
    Task("qa4", _what_lies_where, world="map"),
    Task("qa5", _who_gave_what, world="gifts"),
)
