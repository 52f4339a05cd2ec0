"""Every measure of texts checks its input, ignores order, and gets its value from sums."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from nextquill.evaluation.metrics import METRICS, MetricScores, compute, resolve
from nextquill.evaluation.metrics.scores import ratio

OVERLAP = ["rouge_1", "rouge_2", "rouge_l", "rouge_l_stem", "meteor_exact_stem", "bleu", "chrf"]
OF_TEXTS = [*OVERLAP, "accuracy", "f1_macro", "exact_match"]
TEXTS = st.text(alphabet="ab cd.東京é😀\n", max_size=24)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def values(scores):
    return {name: each.value for name, each in scores.items()}


@settings(max_examples=60)
@given(PAIRS, st.randoms())
def test_order_of_examples_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    one, other = (values(compute(OF_TEXTS, *zip(*each, strict=True))) for each in (pairs, shuffled))
    assert one == pytest.approx(other, abs=1e-9)


@settings(max_examples=60)
@given(PAIRS)
def test_values_are_means_of_the_examples_or_follow_from_their_sums(pairs):
    scores = compute(OF_TEXTS, *zip(*pairs, strict=True))
    for name, each in scores.items():
        assert len(each) == len(pairs)
        assert (each.per_example is not None) == METRICS[name].per_example
        assert 0 <= each.value <= (100 + 1e-9 if METRICS[name].unit == "of 100" else 1)
        if each.per_example is not None:
            assert each.value == pytest.approx(np.mean(each.per_example), abs=1e-12)
            alone = [compute([name], [reference], [text])[name].value for reference, text in pairs]
            assert alone == pytest.approx(each.per_example.tolist())


@pytest.mark.parametrize(
    "texts", [["the cat sat on the mat", "a b c d e"], ["naïve Привет мир, ещё раз"], ["東京ラーメン"]], ids=str
)
def test_identical_texts_score_full_marks(texts):
    names = [name for name in OF_TEXTS if name not in ("bleu", "meteor_exact_stem")]
    for name, value in values(compute(names, texts, texts)).items():
        assert value == pytest.approx(100 if METRICS[name].unit == "of 100" else 1), name


def test_bleu_of_identical_texts_of_four_words_is_100():
    assert compute(["bleu"], ["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"].value == pytest.approx(100)


@pytest.mark.parametrize(("reference", "prediction"), [("a cat", ""), ("", "a cat"), ("", ""), ("!?", "?!")])
def test_text_without_a_word_shares_nothing(reference, prediction):
    scores = values(compute([name for name in OVERLAP if name != "chrf"], [reference], [prediction]))
    if (reference, prediction) == ("!?", "?!"):  # to METEOR and BLEU punctuation is words
        scores = {name: value for name, value in scores.items() if name.startswith("rouge")}
    assert set(scores.values()) == {0.0}


def test_two_empty_texts_are_equal():
    assert values(compute(["exact_match", "accuracy"], [""], [" "])) == {"exact_match": 1, "accuracy": 1}


@pytest.mark.parametrize("name", [name for name in OVERLAP if name != "bleu"])
def test_best_of_several_references_counts(name):
    several = compute([name], [["something else entirely", "the cat sat down"]], ["the cat sat up"])[name].value
    assert several == pytest.approx(compute([name], ["the cat sat down"], ["the cat sat up"])[name].value)
    assert several > 0


def test_scores_come_in_the_order_asked_for():
    assert list(compute(["bleu", "rouge_l", "accuracy", "rouge_1"], ["a"], ["a"])) == [
        "bleu",
        "rouge_l",
        "accuracy",
        "rouge_1",
    ]


@pytest.mark.parametrize(
    ("names", "references", "predictions", "error", "message"),
    [
        (["rouge"], ["a"], ["a"], ArgumentError, "metrics: expected some of rouge_1, .*, got 'rouge'"),
        (["preference_accuracy"], ["a"], ["a"], ArgumentError, "metrics: preference_accuracy is computed from the sc"),
        (["bleu"], [], [], ArgumentError, "predictions: expected at least one text, got none"),
        (["bleu"], ["a", "b"], ["a"], ArgumentError, "predictions: expected 2, as many as references, got 1"),
        (["bleu"], ["a", []], ["a", "b"], ArgumentError, r"references\[1\]: expected at least one text, got none"),
        (["bleu"], ["a"], [None], ArgumentTypeError, r"predictions\[0\]: expected a string, got NoneType"),
        (["bleu"], [["a", 3]], ["a"], ArgumentTypeError, r"references\[0\]\[1\]: expected a string, got int"),
        (["bleu"], [3], ["a"], ArgumentTypeError, r"references\[0\]: expected a text or several, got int"),
        (["bleu"], "a", ["a"], ArgumentTypeError, "references: expected a sequence of texts, got a single one"),
        (["bleu"], ["a"], "a", ArgumentTypeError, "predictions: expected a sequence of texts, got a single one"),
    ],
)
def test_unusable_input_is_named(names, references, predictions, error, message):
    with pytest.raises(error, match=message):
        compute(names, references, predictions)


def test_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(BackendUnavailableError, match=r"metrics: sacrebleu is not installed .*nextquill\[cli\]"):
        compute(["bleu"], ["a"], ["a"])


def test_registry_is_keyed_by_name():
    assert all(metric.name == name and metric.label for name, metric in METRICS.items())
    assert METRICS["mae"].higher_is_better is False
    assert resolve("rouge_l") == "rouge_l"


# ---- sums --------------------------------------------------------------------------------------


def test_ratio_weighs_examples_by_their_counts():
    scores = MetricScores.ratio_of([3.0, 1.0], [1, 4])
    assert scores.value == pytest.approx(0.8)
    assert scores.per_example is None


def test_ratio_of_nothing_is_0():
    assert ratio(np.array([[1.0, 2.0], [0.0, 0.0]])).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([1.0], [1, 2], "counts: expected 1, one for each of sums, got 2"),
        ([1.0], [-1], "counts: expected none below 0 and one above it"),
        ([1.0], [0], "counts: expected none below 0 and one above it"),
        ([float("nan")], [1], r"sums\[0\]: expected a finite number, got nan"),
        ([], [], "sums: expected at least one number in a row"),
    ],
)
def test_unusable_ratio_is_named(sums, counts, message):
    with pytest.raises(ArgumentError, match=message):
        MetricScores.ratio_of(sums, counts)


def test_values_other_than_numbers_are_named():
    with pytest.raises(ArgumentTypeError, match="values: expected numbers, got"):
        MetricScores.mean_of(["a"])
