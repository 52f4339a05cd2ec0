"""A small world of synthetic users in which it is known what each prefers.

An answer has three aspects: its tone, what it praises, and what it compares with. An aspect has four values, a value
three words:

    buy a kettle ?    certainly , it is snug like a pancake .        (formal, comfort, food)

A user has a hidden preference in two of the three aspects, and none in the third. Of the two answers of a pair, the
chosen one has both preferred values; the rejected one lacks one of them or both; all else is drawn at random. So no
single pair tells what a user prefers, and a few together do: what all chosen answers have in common.

There are 48 combinations of preferences. A quarter of them, every value among them, belongs to the test users alone: a
summary that fits cannot come from having seen such a user. A user's queries all differ, and so do the answers, so that
no signal gives a pair away.

Pure Python; everything comes from the `random.Random` that is passed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle, islice, product

from demos.popi.recipe import PopiRecipe
from nextquill.popi.users import Pair, User

#: Aspect -> value -> its words.
ASPECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "tone": {
        "formal": ("indeed", "certainly", "accordingly"),
        "casual": ("hey", "yeah", "sure"),
        "playful": ("woohoo", "yay", "whee"),
        "poetic": ("behold", "alas", "verily"),
    },
    "praise": {
        "price": ("cheap", "bargain", "thrifty"),
        "comfort": ("soft", "cosy", "snug"),
        "beauty": ("pretty", "elegant", "shiny"),
        "safety": ("sturdy", "harmless", "tested"),
    },
    "image": {
        "animals": ("tiger", "falcon", "otter"),
        "food": ("honey", "pancake", "mango"),
        "sports": ("goalkeeper", "sprint", "volley"),
        "music": ("violin", "chorus", "drumbeat"),
    },
}
VALUES: tuple[str, ...] = tuple(value for values in ASPECTS.values() for value in values)
#: Word -> the value it shows.
SHOWS: dict[str, str] = {word: value for values in ASPECTS.values() for value in values for word in values[value]}
ASPECT_OF: dict[str, str] = {value: aspect for aspect, values in ASPECTS.items() for value in values}

#: What fits everybody, and says nothing about anybody.
BLAND: tuple[str, str] = ("helpful", "clear")

_VERBS = ("buy", "gift", "keep", "rent")
_THINGS = "kettle lamp chair blanket radio camera backpack umbrella jacket scarf mug clock".split()
QUERIES: tuple[str, ...] = tuple(f"{verb} a {thing} ?" for verb in _VERBS for thing in _THINGS)
_TEST_SHARE = 4  # one combination in so many belongs to the test users

#: Value of each aspect that a user cares about.
Preferences = Mapping[str, str]


@dataclass(frozen=True)
class KnownUser:
    """A user, and what only the world knows: the two values the user prefers."""

    user: User
    preferences: Preferences


class PreferenceWorld:
    """Users drawn from one seed, as many and with as many pairs as the recipe says; combinations take turns."""

    def __init__(self, seed: int, recipe: PopiRecipe) -> None:
        self._rng = random.Random(f"nextquill popi demo {seed}")
        test, self.train_preferences = _split(self._rng)
        self.train = self._users(f"{seed}-train", self.train_preferences, recipe.train_users, recipe.train_pairs)
        self.test = self._users(f"{seed}-test", test, recipe.test_users, recipe.test_pairs)

    def _users(self, name: str, preferences: Sequence[Preferences], count: int, pairs: int) -> list[KnownUser]:
        return [
            KnownUser(User(f"{name}-{i}", tuple(draw_pairs(each, pairs, self._rng))), each)
            for i, each in enumerate(islice(cycle(preferences), count))
        ]


def draw_pairs(preferences: Preferences, count: int, rng: random.Random) -> list[Pair]:
    """`count` pairs of one user; no query and no answer comes twice."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for query in rng.sample(QUERIES, count):
        pair = _pair(query, preferences, rng)
        while pair.chosen in seen or pair.rejected in seen:
            pair = _pair(query, preferences, rng)
        seen |= {pair.chosen, pair.rejected}
        pairs.append(pair)
    return pairs


def write_answer(values: Preferences, rng: random.Random) -> str:
    """An answer that shows these values; an aspect without one is drawn at random."""
    tone, praise, image = (
        rng.choice(words[values[aspect] if aspect in values else rng.choice(list(words))])
        for aspect, words in ASPECTS.items()
    )
    return f"{tone} , it is {praise} like a {image} ."


def shown_values(text: str) -> Iterator[str]:
    """The values that a text's words show, one by one."""
    return (SHOWS[word] for word in text.split() if word in SHOWS)


def most_shown(texts: Sequence[str], rng: random.Random) -> list[str]:
    """The two values, of different aspects, that most of the texts show; ties are broken at random."""
    shown = [value for text in texts for value in shown_values(text)]
    most = {
        aspect: max(values, key=lambda value: (shown.count(value), rng.random())) for aspect, values in ASPECTS.items()
    }
    return sorted(most.values(), key=lambda value: (-shown.count(value), rng.random()))[:2]


def write_summary(values: Sequence[str]) -> str:
    """The words of a summary that states two values."""
    first, second = values
    return f"likes {first} and {second}"


def stated_share(summary: str, preferences: Sequence[str]) -> float:
    """The share of the user's preferences that a summary states.

    A text that lists every value would state all of them; one that names more values than the user has preferences is
    therefore counted as stating none.
    """
    named = [word for word in summary.split() if word in ASPECT_OF]
    if len(named) > len(preferences):
        return 0.0
    return sum(value in named for value in preferences) / len(preferences)


def all_texts() -> Iterator[str]:
    """Every word that users and summaries are made of, for a tokenizer."""
    yield from QUERIES
    yield from (word for values in ASPECTS.values() for words in values.values() for word in words)
    yield write_answer({}, random.Random(0))
    yield from (write_summary(pair) for pair in (BLAND, *zip(VALUES[::2], VALUES[1::2], strict=True)))


def _pair(query: str, preferences: Preferences, rng: random.Random) -> Pair:
    lacking = rng.sample(list(preferences), rng.choice((1, 1, 2)))
    others = {
        aspect: rng.choice([value for value in ASPECTS[aspect] if value != preferred])
        if aspect in lacking
        else preferred
        for aspect, preferred in preferences.items()
    }
    return Pair(query, write_answer(preferences, rng), write_answer(others, rng))


def _split(rng: random.Random) -> tuple[list[Preferences], list[Preferences]]:
    """Combinations of the test users, and of the training users; every value is among either."""
    every = [
        {first: a, second: b}
        for first, second in combinations(ASPECTS, 2)
        for a, b in product(ASPECTS[first], ASPECTS[second])
    ]
    while True:
        rng.shuffle(every)
        parts = every[: len(every) // _TEST_SHARE], every[len(every) // _TEST_SHARE :]
        if all({value for each in part for value in each.values()} == set(VALUES) for part in parts):
            return list(parts[0]), list(parts[1])
