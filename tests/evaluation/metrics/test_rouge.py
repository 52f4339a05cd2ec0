"""ROUGE equals rouge_score's, and counts words of any script."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from nextquill.evaluation.metrics import compute
from nextquill.evaluation.metrics.rouge import RougeWords

TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
ASCII = st.text(alphabet="abcing sed.,!'-_3\n\t", max_size=60)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.lists(ASCII, min_size=1, max_size=3), ASCII), min_size=1, max_size=4), st.booleans())
def test_ascii_text_scores_as_rouge_score_has_it(pairs, stem):
    names = [f"{name}_stem" if stem else name for name in TYPES]
    scores = compute(names, *zip(*pairs, strict=True))
    scorer = RougeScorer(list(TYPES.values()), use_stemmer=stem)
    results = [scorer.score_multi(references, prediction) for references, prediction in pairs]
    for name, kind in zip(names, TYPES.values(), strict=True):
        assert scores[name].per_example.tolist() == [result[kind].fmeasure for result in results]


@settings(max_examples=50)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_scores_as_rouge_score_has_it_over_our_words(reference, prediction):
    scorer = RougeScorer(["rouge2", "rougeL"], tokenizer=RougeWords(stem=False))
    result = scorer.score(reference, prediction)
    scores = compute(["rouge_2", "rouge_l"], [reference], [prediction])
    assert scores["rouge_2"].value == result["rouge2"].fmeasure
    assert scores["rouge_l"].value == result["rougeL"].fmeasure


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize(
    "text", ["The soups were running cold, quickly!", "snake_case and 3.14's", "", "don't -- stop", "A\tB\nC", "!?"]
)
def test_words_of_ascii_text_are_rouge_scores_own(text, stem):
    assert RougeWords(stem).tokenize(text) == DefaultTokenizer(use_stemmer=stem).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Naïve CAFÉ", ["naïve", "café"]),
        ("東京ラーメン ok", ["東", "京", "ラ", "ー", "メ", "ン", "ok"]),
        ("Привет, мир", ["привет", "мир"]),
        ("구름 위", ["구름", "위"]),
    ],
)
def test_words_of_other_scripts(text, words):
    assert RougeWords().tokenize(text) == words


def test_rouge_by_hand():
    # The longest common subsequence of the first pair is "a c": precision 2/2, recall 2/3. No bigram is shared.
    scores = compute(["rouge_1", "rouge_2", "rouge_l"], ["a b c", "x"], ["a c", "y"])
    assert {name: each.value for name, each in scores.items()} == pytest.approx(
        {"rouge_1": 0.4, "rouge_2": 0.0, "rouge_l": 0.4}
    )


def test_stems_count_only_where_they_are_asked_for():
    scores = compute(["rouge_1", "rouge_1_stem"], ["cooking soups"], ["cooked soup"])
    assert scores["rouge_1"].value == 0
    assert scores["rouge_1_stem"].value == 1
