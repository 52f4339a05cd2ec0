"""People and their histories: which phrases of a text are copied, and whose history a text resembles most.

A *copied* phrase is a run of three words or more whose words all stand in word 3-grams of the person's earlier texts.

The judge compares character 3-grams, in lower case and with every run of white space as one space:

    w(g) = count(g) · idf(g),    idf(g) = log((1 + people) / (1 + people with g)) + 1
    score(text, history) = Σ_g w_text(g) · w_history(g) / ‖w_history‖

which orders histories as the cosine does, because the length of the text is the same for all of them. A person's
history is one document, and idf is fitted on the histories of all people.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.evaluation.metrics.words import PHRASE, Phrase, Span, copied, phrases, word_spans

#: The number of people that a judge chooses from, the author included.
CANDIDATES = 8
_GRAM = 3


@dataclass(frozen=True, eq=False)
class Authors:
    """Whose text each example is, and the people among whom a judge looks for the author.

    Args:
        users: each example's user.
        histories: each example's own history: the user's earlier texts, oldest first; may be empty.
        everyone: a history of every person that a judge may choose, by user; by default the longest of each user's own.
            A person without texts is not chosen.
        seed: decides, with an example's position, which seven others a judge chooses from.

    Raises:
        ArgumentError: `users` and `histories` differ in length.
        ArgumentTypeError: a history is a single text.
    """

    users: Sequence[str]
    histories: Sequence[Sequence[str]]
    everyone: Mapping[str, Sequence[str]] | None = None
    seed: int = 42
    _known_weights: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict, init=False, repr=False)
    _known_phrases: dict[tuple[str, ...], frozenset[Phrase]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.users) != len(self.histories):
            raise ArgumentError(f"histories: expected {len(self.users)}, one for each user, got {len(self.histories)}")
        for index, history in enumerate(self.histories):
            if isinstance(history, str):
                raise ArgumentTypeError(f"histories[{index}]: expected a sequence of texts, got a single one")

    @cached_property
    def chosen_from(self) -> dict[str, Sequence[str]]:
        """The histories of the people that a judge may choose, by user; none is empty."""
        if self.everyone is not None:
            return {user: history for user, history in self.everyone.items() if history}
        longest: dict[str, Sequence[str]] = {}
        for user, history in zip(self.users, self.histories, strict=True):
            if len(history) > len(longest.get(user, ())):
                longest[user] = history
        return longest

    @property
    def are_several(self) -> bool:
        """Whether at least two people have a history, so that a judge has a choice."""
        return len(self.chosen_from) > 1

    def others(self, index: int) -> list[str]:
        """The users that the judge of an example chooses from besides its own: seven, or all if there are fewer."""
        known = list(self.chosen_from)
        drawn = random.Random(f"{self.seed}/{index}").sample(known, min(CANDIDATES, len(known)))
        return [user for user in drawn if user != self.users[index]][: CANDIDATES - 1]

    def copied(self, index: int, text: str) -> tuple[float, list[Span]]:
        """The share of a text's word 3-grams that its person's history has, and where the copied phrases stand.

        The share is NaN for a text under three words, which has no 3-gram. Spans are of characters, in order.
        """
        hits, total, spans = copied(text, self._phrases(index))
        return (hits / total if total else math.nan), spans

    def uncopied(self, index: int, text: str) -> str | None:
        """A text without its copied phrases; None where under three words are left."""
        rest, at = [], 0
        for start, end in self.copied(index, text)[1]:
            rest.append(text[at:start])
            at = end
        left = " ".join([*rest, text[at:]])
        return left if len(word_spans(left)) >= PHRASE else None

    def right_share(self, index: int, text: str) -> float:
        """1 where the judge picks the example's own person, a share where several score as high, 0 otherwise.

        NaN where the person has no history, or no other person has one.
        """
        own, others = self.histories[index], self.others(index)
        if not own or not others:
            return math.nan
        counts = Counter(_grams(text))
        return share_of_first(
            [self._score(counts, tuple(each)) for each in (own, *(self.chosen_from[user] for user in others))]
        )

    def _score(self, counts: Counter[str], history: tuple[str, ...]) -> float:
        weights = self._weights(history)
        # fsum is exact, so that equal histories tie whatever their order.
        return math.fsum(count * self._idf(gram) * weights[gram] for gram, count in counts.items() if gram in weights)

    def _weights(self, history: tuple[str, ...]) -> dict[str, float]:
        if history not in self._known_weights:
            weights = {gram: count * self._idf(gram) for gram, count in Counter(_grams(" ".join(history))).items()}
            length = math.sqrt(math.fsum(weight**2 for weight in weights.values()))
            self._known_weights[history] = {gram: weight / length for gram, weight in weights.items()}
        return self._known_weights[history]

    def _idf(self, gram: str) -> float:
        return math.log((1 + len(self.chosen_from)) / (1 + self._people_with[gram])) + 1

    @cached_property
    def _people_with(self) -> Counter[str]:
        return Counter(gram for history in self.chosen_from.values() for gram in set(_grams(" ".join(history))))

    def _phrases(self, index: int) -> frozenset[Phrase]:
        history = tuple(self.histories[index])
        if history not in self._known_phrases:
            self._known_phrases[history] = frozenset(phrase for text in history for phrase in phrases(text))
        return self._known_phrases[history]


def share_of_first(scores: Sequence[float]) -> float:
    """1 where the first score is the largest, 1 / n where n are as large as it, else 0."""
    best = max(scores)
    return 1 / scores.count(best) if scores[0] == best else 0.0


def _grams(text: str) -> Iterator[str]:
    plain = " ".join(text.lower().split())
    return (plain[start : start + _GRAM] for start in range(len(plain) - _GRAM + 1))
