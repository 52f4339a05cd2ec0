"""A small world of synthetic reviewers in which the personal tokens are known.

A user is one habit for each of eight slots: how they greet, how they intensify, what they care about, how they sign
off. Their history is three short past reviews; each shows each habit with probability 0.6, and every habit appears at
least once. A response is a review of a new item in the user's manner:

    hey , my new kettle from acme arrived . after three weeks it feels truly neat but the price stands out . it is
    teal oak , shipped from oslo , and pleases my cat . cheers <eos>

Of its tokens eight are *personal* (only the history tells them), four are *facts* of the item (the same for every user;
only training on the item tells them), and the rest is template. So it is known which tokens a history should have an
effect on, which no real data set can say.

Two things make the world useful for comparing losses. The plain word of a slot (its first) is nobody's habit: a bland
writer uses it. And the catalogue is split: items of phase C are new, so that training there has generic tokens to learn
too, and a loss that looks away from them pays for it.

Pure Python; everything comes from the `random.Random` that is passed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

SHOW_PROBABILITY = 0.6
PAST_REVIEWS = 3


def _lists(**words: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(text.split()) for name, text in words.items()}


# Slot -> its words. The first is the plain word; the other eleven are habits.
SLOTS = _lists(
    greeting="hello hi hey howdy greetings ahoy yo welcome salutations morning evening friends",
    unit="days hours weeks months nights mornings weekends lunches trips seasons commutes parties",
    intensifier="quite very really extremely insanely truly remarkably super utterly awfully seriously so",
    adjective="good great lovely superb solid charming brilliant splendid neat fantastic wicked decent",
    connector="and plus yet but though while besides meanwhile also still however because",
    topic="quality price comfort weight finish packaging sound battery smell texture design warranty",
    audience="family kids wife husband cat dog mum dad boss neighbour roommate grandma",
    sign_off="thanks cheers regards bye ciao hugs best kisses sincerely later adieu respectfully",
)
# Fact -> its possible words.
FACTS = _lists(
    maker="acme borealis cobalt dynamo everest fulcrum granite halcyon indigo juniper kestrel lumen",
    colour="red teal amber ivory navy olive coral violet beige crimson silver black",
    material="oak steel glass bamboo ceramic leather copper wool marble linen rubber cork",
    place="oslo lima cairo kyoto quito porto delhi turin accra perth leeds hanoi",
)

OLD_ITEMS, NEW_ITEMS = _lists(
    old="""
    kettle lamp chair table blanket pillow teapot skillet radio camera backpack umbrella jacket scarf mug bottle clock
    mirror rug vase basket broom bucket candle curtain desk drawer fan fork funnel grater hammer iron jar kite ladder
    mat mixer nail notebook opener paddle pan pen piano plate pot rack razor ruler saddle saw shelf shovel sofa spoon
    stool tent toaster tray
    """,
    new="""
    violin telescope sledge hammock lantern compass drone anvil easel globe harmonica keyboard loom microscope necklace
    oven printer quilt router sandal tripod ukulele visor wagon
    """,
).values()

# In braces: a slot, a fact, or the item.
_TEMPLATE = """
    {greeting} , my new {item} from {maker} arrived . after three {unit} it feels {intensifier} {adjective} {connector}
    the {topic} stands out . it is {colour} {material} , shipped from {place} , and pleases my {audience} . {sign_off}
    <eos>
"""
RESPONSE_TEMPLATE: tuple[str, ...] = tuple(_TEMPLATE.split())
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_PROMPT_WORDS = (PAD, BOS, EOS, "item", "past", "reviews", "review", "none", ":", ";")
_TEMPLATE_WORDS = (word for word in RESPONSE_TEMPLATE if not word.startswith("{"))
_WORDS = chain(_PROMPT_WORDS, _TEMPLATE_WORDS, *SLOTS.values(), *FACTS.values(), OLD_ITEMS, NEW_ITEMS)
#: Every word of the world and its token id; one token is one word. Padding is 0.
VOCABULARY = {word: index for index, word in enumerate(dict.fromkeys(_WORDS))}

#: A reviewer: one habit for each slot, in the order of `SLOTS`.
Habits = tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A thing to review and its facts, in the order of `FACTS`."""

    name: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One response with the history it was written after.

    `personal` marks the tokens of `response` that are a habit of the user: the ground truth of every effect here.
    """

    habits: Habits
    item: Item
    history: tuple[str, ...]
    response: tuple[str, ...]
    personal: tuple[bool, ...]


def encode(words: Iterable[str]) -> list[int]:
    """The words' token ids."""
    return [VOCABULARY[word] for word in words]


class LossWorld:
    """Users, items and reviews drawn from one seed.

    Dev and test users are drawn first, and no later user may have the same combination of habits: a good result on them
    cannot come from having seen them.
    """

    def __init__(self, seed: int, *, dev_users: int = 64, test_users: int = 200) -> None:
        self._rng = random.Random(f"nextquill demo {seed}")
        self._taken: set[Habits] = set()
        self.old_items = tuple(_draw_item(name, self._rng) for name in OLD_ITEMS)
        self.new_items = tuple(_draw_item(name, self._rng) for name in NEW_ITEMS)
        dev, test = self._reserve_users(dev_users), self._reserve_users(test_users)
        self.dev = [self._example(user, self.old_items) for user in dev]
        self.test = [self._example(user, self.new_items) for user in test]

    def training_examples(self, count: int, items: Sequence[Item], *, habit_probability: float = 1.0) -> list[Example]:
        """`count` examples of fresh users; with `habit_probability` < 1 their responses often use the plain word."""
        users = [self._new_user() for _ in range(count)]
        return [self._example(user, items, habit_probability) for user in users]

    def _reserve_users(self, count: int) -> list[Habits]:
        users = list[Habits]()
        for _ in range(count):
            users.append(self._new_user())
            self._taken.add(users[-1])
        return users

    def _new_user(self) -> Habits:
        """A user whose combination of habits no dev or test user has."""
        while True:
            user = tuple(self._rng.choice(words[1:]) for words in SLOTS.values())
            if user not in self._taken:
                return user

    def _example(self, habits: Habits, items: Sequence[Item], habit_probability: float = 1.0) -> Example:
        item = self._rng.choice(items)
        history = _draw_history(habits, self._rng)
        response, personal = _write_response(habits, item, habit_probability, self._rng)
        return Example(habits, item, history, response, personal)


def prompt_words(item: Item, history: Sequence[str] | None) -> list[str]:
    """The prompt, item first. Without a history its place holds the literal word `none`, as in the published code."""
    shown = ["none"] if history is None else history
    return [BOS, "item", ":", item.name, ".", "past", "reviews", ":", *shown, ".", "review", ":"]


def histories_of_others(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """For each example the history of the next one: the placebo. (Two users may share a habit, about 1 in 11 slots.)"""
    histories = [example.history for example in examples]
    return histories[1:] + histories[:1]


def _draw_item(name: str, rng: random.Random) -> Item:
    return Item(name, tuple(rng.choice(words) for words in FACTS.values()))


def _draw_history(habits: Habits, rng: random.Random) -> tuple[str, ...]:
    """Three past reviews, `item : habit habit … ;`, each habit in each with probability 0.6 and in at least one."""
    shown = [[rng.random() < SHOW_PROBABILITY for _ in habits] for _ in range(PAST_REVIEWS)]
    for slot in range(len(habits)):
        if not any(review[slot] for review in shown):
            rng.choice(shown)[slot] = True
    words: list[str] = []
    for review in shown:
        words += [rng.choice(OLD_ITEMS), ":"]
        words += [habit for habit, is_shown in zip(habits, review, strict=True) if is_shown]
        words.append(";")
    return tuple(words)


def _write_response(
    habits: Habits, item: Item, habit_probability: float, rng: random.Random
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    fills = {"{item}": item.name} | {f"{{{name}}}": word for name, word in zip(FACTS, item.facts, strict=True)}
    personal_fills = {}
    for (slot, words), habit in zip(SLOTS.items(), habits, strict=True):
        follows = habit_probability >= 1.0 or rng.random() < habit_probability
        personal_fills[f"{{{slot}}}"] = habit if follows else words[0]
    response = tuple(personal_fills.get(word, fills.get(word, word)) for word in RESPONSE_TEMPLATE)
    return response, tuple(word in personal_fills for word in RESPONSE_TEMPLATE)
