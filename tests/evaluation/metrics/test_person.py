"""Measures that look for the person: copies, the judge of 3-grams, distinct texts and their length."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.metrics import METRICS, Authors, compute
from nextquill.evaluation.metrics.authors import CANDIDATES
from nextquill.evaluation.metrics.words import phrases, word_spans

PERSONAL = [name for name, metric in METRICS.items() if metric.needs_authors]
WORDS = "the a cat dog runs sits far fast, and but. Never ALWAYS under over red blue".split()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def sentence(rng: random.Random, words: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def crowd(people: int, each: int = 3, seed: int = 0) -> Authors:
    """One example of every person."""
    rng = random.Random(seed)
    return Authors([f"p{i}" for i in range(people)], [[sentence(rng) for _ in range(each)] for _ in range(people)])


def scores(names, texts, authors, references=None):
    return compute(names, references or ["x"] * len(texts), texts, authors=authors)


# ---- copies ----------------------------------------------------------------------------------------


@given(st.lists(TEXTS, min_size=1, max_size=4), st.data())
def test_an_item_of_the_history_is_copied_whole(history, data):
    text = data.draw(st.sampled_from(history))
    share, spans = Authors(["a"], [history]).copied(0, text)
    words = word_spans(text)
    if len(words) < 3:
        assert math.isnan(share)
        assert spans == []
    else:
        assert share == 1
        assert spans == [(words[0][1][0], words[-1][1][1])]


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_copies_equal_brute_force(text, history):
    share, spans = Authors(["a"], [history]).copied(0, text)
    words = word_spans(text)
    lower = [word for word, _ in words]
    past = [[word for word, _ in word_spans(item)] for item in history]
    starts = [
        at
        for at in range(len(lower) - 2)
        if any(lower[at : at + 3] == item[k : k + 3] for item in past for k in range(len(item) - 2))
    ]
    if len(lower) >= 3:
        assert share == pytest.approx(len(starts) / (len(lower) - 2))
    marked = {at + k for at in starts for k in range(3)}
    inside = {at for at, (_, (low, high)) in enumerate(words) if any(a <= low and high <= b for a, b in spans)}
    assert inside == marked
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(spans)), "in order and apart"


def test_copies_by_hand():
    authors = Authors(["a"], [["The cat sits. Far away", "a dog"]])
    text = "I saw: the CAT, sits far but the cat runs"
    share, spans = authors.copied(0, text)
    assert (share, [text[a:b] for a, b in spans]) == (2 / 8, ["the CAT, sits far"])
    assert authors.uncopied(0, text) == "I saw:   but the cat runs"
    assert authors.uncopied(0, "the cat sits far. So long") is None, "two words are left"
    assert authors.copied(0, "sits. Far a dog")[0] == 0, "phrases do not cross items"
    assert phrases("東京に行く") == [("東", "京", "に"), ("京", "に", "行"), ("に", "行", "く")]


def test_texts_without_a_share_are_left_out():
    authors = Authors(["a", "a", "b"], [["one two three"], ["one two three"], []])
    found = scores(["copied"], ["one two three", "one two", "one two three"], authors)["copied"]
    assert found.value == 1
    assert found.defined() == [0]
    assert np.isnan(found.per_example).tolist() == [False, True, True]


# ---- the judge -------------------------------------------------------------------------------------


def brute_force(authors: Authors, index: int, text: str) -> float:
    """The judge with whole matrices over the vocabulary of all histories and the text."""

    def grams(text):
        plain = " ".join(text.lower().split())
        return [plain[k : k + 3] for k in range(len(plain) - 2)]

    own, others = authors.histories[index], [authors.chosen_from[user] for user in authors.others(index)]
    everyone = [grams(" ".join(history)) for history in authors.chosen_from.values()]
    shown = [grams(text), *(grams(" ".join(history)) for history in (own, *others))]
    vocabulary = sorted({gram for each in (*everyone, *shown) for gram in each})
    having = np.array([sum(gram in each for each in everyone) for gram in vocabulary])
    idf = np.log((1 + len(everyone)) / (1 + having)) + 1
    rows = np.array([[each.count(gram) for gram in vocabulary] for each in shown]) * idf
    norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    cosine = (rows[1:] @ rows[0]) / (norms[1:] * norms[0])
    best = np.isclose(cosine, cosine.max(), rtol=1e-12, atol=0)
    return float(best[0] / best.sum())


@pytest.mark.parametrize("people", [2, 5, 8, 19])
def test_the_judge_equals_brute_force(people):
    authors, rng = crowd(people), random.Random(1)
    texts = [sentence(rng, words) for words in (1, 3, 5, 9, 20)] + ["", "zzz", "THE  Cat\nsits"]
    for index in range(people):
        for text in texts:
            assert authors.right_share(index, text) == pytest.approx(brute_force(authors, index, text)), (index, text)


def test_the_judge_knows_a_history_again_and_copies_help_it():
    authors = Authors(["a", "b"], [["cats sit on the mat", "cats are nice"], ["dogs run in the park", "dogs are loud"]])
    texts = ["cats sit on the mat, loud dogs in a big park", "dogs run in the park"]
    found = scores(PERSONAL, texts, authors)
    assert found["right_person"].per_example.tolist() == [1, 1]
    assert found["right_person_uncopied"].per_example[0] == 0, "what is left is of the other"
    assert found["right_person_uncopied"].defined() == [0]


def test_equal_histories_tie():
    authors = Authors(list("abc"), [["one two", "six"], ["one two", "six"], ["zzzz"]])
    assert authors.right_share(0, "one six") == 0.5
    assert authors.right_share(0, "") == pytest.approx(1 / 3)


def test_eight_are_chosen_from_and_the_seed_says_whom():
    authors = crowd(30)
    drawn = [authors.others(index) for index in range(30)]
    assert all(len(set(each)) == CANDIDATES - 1 == 7 for each in drawn)
    assert all(f"p{index}" not in each for index, each in enumerate(drawn))
    assert len({user for each in drawn for user in each}) == 30
    assert drawn == [crowd(30).others(index) for index in range(30)]
    other = Authors(authors.users, authors.histories, seed=1)
    assert drawn != [other.others(index) for index in range(30)]
    assert [len(crowd(5).others(index)) for index in range(5)] == [4] * 5


def test_chance_is_one_eighth_for_texts_of_nobody():
    authors, rng = crowd(40), random.Random(5)
    shares = [authors.right_share(index, sentence(rng)) for index in range(40) for _ in range(20)]
    assert np.mean(shares) == pytest.approx(1 / 8, abs=3 * math.sqrt(7 / 64 / 800))


def test_people_without_a_history_are_neither_judged_nor_chosen():
    authors = Authors(list("abc"), [["one two three"], ["four five six"], []])
    assert authors.others(0) == ["b"]
    assert math.isnan(authors.right_share(2, "one two three"))
    assert scores(["right_person"], ["one two"] * 3, authors)["right_person"].defined() == [0, 1]


def test_others_may_be_people_without_an_example():
    everyone = {"a": ["one two"], "b": ["three four"], "c": []}
    authors = Authors(["a"], [["one two", "nine"]], everyone)
    assert authors.others(0) == ["b"]
    assert authors.right_share(0, "nine") == 1, "the own history is the example's"


# ---- distinct texts, length, and what all have in common --------------------------------------------


def test_distinct_texts_and_length():
    found = compute(["distinct", "length_ratio"], ["a b c d", "a b", "!", "a"], ["x y", "x y ", "z", ""])
    assert found["distinct"].value == 3 / 4
    assert found["distinct"].per_example.tolist() == [0.5, 0.5, 1, 1]
    assert found["length_ratio"].value == 5 / 7
    assert compute(["length_ratio"], [["a b", "a b c d"]], ["a"])["length_ratio"].value == 1 / 3
    assert compute(["length_ratio"], ["!"], ["a"])["length_ratio"].value == 0


def test_intervals_resample_their_sums():
    authors, rng = crowd(12), random.Random(2)
    found = scores([*PERSONAL, "distinct", "length_ratio"], [sentence(rng) for _ in range(12)], authors)
    for name, each in found.items():
        value, low, high = bootstrap_interval(each, authors.users, resamples=200)
        assert low <= value <= high, name


@pytest.mark.parametrize("name", PERSONAL)
def test_what_a_measure_lacks_is_named(name):
    with pytest.raises(ArgumentError, match=f"authors: {name} needs the examples' users and histories, got None"):
        compute([name], ["a"], ["b"])
    with pytest.raises(ArgumentError, match="authors: expected those of 1 examples, got 2"):
        compute([name], ["a"], ["b"], authors=crowd(2))
    alone = Authors(["a", "b"], [["one two three"], []])
    if name == "copied":
        assert compute([name], ["a"] * 2, ["one two three"] * 2, authors=alone)[name].value == 1
    else:
        with pytest.raises(ArgumentError, match=f"{name} .* histories of at least two people, got 1"):
            compute([name], ["a"] * 2, ["b"] * 2, authors=alone)


def test_authors_are_checked():
    with pytest.raises(ArgumentError, match="histories: expected 2, one for each user, got 1"):
        Authors(["a", "b"], [["x"]])
    with pytest.raises(ArgumentTypeError, match=r"histories\[0\]: expected a sequence of texts, got a single one"):
        Authors(["a"], ["x"])
