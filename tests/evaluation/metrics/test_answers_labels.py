"""Accuracy and macro-F1 of labels, as in LaMP's evaluation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics import compute

ANSWERS = st.sampled_from(["[1]", "[2]", "[3]", " [1] ", "none", ""])


def lamp(truth, answers, labels):
    """Accuracy and macro-F1 as LaMP's evaluation defines them, label by label."""
    truth, answers = [each.strip() for each in truth], [each.strip() for each in answers]
    f1 = []
    for label in labels:
        hits = sum(a == b == label for a, b in zip(truth, answers, strict=True))
        precision = hits / answers.count(label) if answers.count(label) else 0
        recall = hits / truth.count(label) if truth.count(label) else 0
        f1.append(2 * precision * recall / (precision + recall) if hits else 0)
    return sum(a == b for a, b in zip(truth, answers, strict=True)) / len(truth), sum(f1) / len(f1)


@given(st.lists(st.tuples(st.sampled_from(["[1]", "[2]", "[2]\n"]), ANSWERS), min_size=1, max_size=12))
def test_accuracy_and_f1_are_lamps(pairs):
    truth, answers = zip(*pairs, strict=True)
    labels = ["[1]", "[2]", "[3]"]
    scores = compute(["accuracy", "f1_macro"], truth, answers, labels=labels)
    assert (scores["accuracy"].value, scores["f1_macro"].value) == pytest.approx(lamp(truth, answers, labels))


def test_f1_by_scikit_learn():
    # f1_score(truth, answers, labels=[0, 1, 2], average="macro") of scikit-learn 1.9.1, unknown answers as -1.
    truth, answers = ["a", "a", "b", "b", "b", "a"], ["a", "b", "b", "?", "b", "c"]
    scores = compute(["f1_macro"], truth, answers, labels=["a", "b", "c"])
    assert scores["f1_macro"].value == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_labels_that_occur_nowhere_lower_f1():
    narrow, wide = (compute(["f1_macro"], ["a"], ["a"], labels=each)["f1_macro"].value for each in (["a"], ["a", "b"]))
    assert (narrow, wide) == (1.0, 0.5)


def test_f1_without_labels_is_over_those_of_the_references():
    assert compute(["f1_macro"], ["a", "b"], ["a", "nonsense"])["f1_macro"].value == 0.5


def test_case_counts_in_labels_and_texts():
    assert compute(["accuracy"], ["comedy"], ["Comedy"])["accuracy"].value == 0
    assert compute(["exact_match"], ["a b"], ["A b"])["exact_match"].value == 0


def test_exact_match_looks_past_spaces_and_forms_of_letters():
    assert compute(["exact_match"], ["un café"], [" un\n cafe\u0301 "])["exact_match"].value == 1


def test_any_of_several_references_is_right():
    scores = compute(["accuracy", "exact_match"], [["a", "b"], ["c"]], ["b", "a"])
    assert scores["accuracy"].per_example.tolist() == scores["exact_match"].per_example.tolist() == [1, 0]


def test_reference_other_than_a_label_is_named():
    with pytest.raises(ArgumentError, match=r"references\[1\]: expected one of a, b, got 'c'"):
        compute(["accuracy"], ["a", "c"], ["a", "a"], labels=["a", "b"])


def test_f1_of_several_references_is_refused():
    with pytest.raises(ArgumentError, match=r"references\[0\]: f1_macro takes one reference an example, got 2"):
        compute(["f1_macro"], [["a", "b"]], ["a"])
