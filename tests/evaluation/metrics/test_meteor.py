"""METEOR equals nltk's, and its name tells whether synonyms count."""

from __future__ import annotations

from types import SimpleNamespace

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import word_tokenize
from nltk.translate.meteor_score import meteor_score

from nextquill.evaluation.metrics import compute, resolve
from nextquill.evaluation.metrics.meteor import has_word_data

LINE = st.text(alphabet="abcing sed,;'3é", max_size=50)


class Synonyms:
    """Replaces WordNet: words in one set are synonyms."""

    def __init__(self, *sets):
        self._sets = sets

    def synsets(self, word):
        lemmas = [
            [SimpleNamespace(name=lambda name=name: name) for name in each] for each in self._sets if word in each
        ]
        return [SimpleNamespace(lemmas=lambda each=each: each) for each in lemmas]


@pytest.fixture
def without_data(monkeypatch):
    def missing(*_):
        raise LookupError("no such resource")

    monkeypatch.setattr(nltk.corpus, "wordnet", SimpleNamespace(synsets=missing))


@pytest.fixture
def with_data(monkeypatch):
    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms({"cat", "dog"}))
    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", lambda text, language="english": text.split("\n"))


@settings(max_examples=60)
@given(st.lists(LINE, min_size=1, max_size=3), LINE)
def test_exact_stem_is_nltks_without_synonyms(references, prediction):
    tokens = [word_tokenize(text, preserve_line=True) for text in (*references, prediction)]
    expected = meteor_score(tokens[:-1], tokens[-1], wordnet=Synonyms())
    assert compute(["meteor_exact_stem"], [references], [prediction])["meteor_exact_stem"].value == expected


def test_by_hand():
    # All three words match, "cat" by its stem, in one chunk: 1 - 0.5 (1/3)³.
    scores = compute(["meteor_exact_stem"], ["the cats sat"], ["the cat sat"])
    assert scores["meteor_exact_stem"].value == pytest.approx(1 - 0.5 / 27)


def test_full_stops_within_a_text_are_no_part_of_a_word():
    # All seven words and marks match, in four chunks: "The cat sat", ".", "It slept" and ".".
    scores = compute(["meteor_exact_stem"], ["It slept. The cat sat."], ["The cat sat. It slept."])
    assert scores["meteor_exact_stem"].value == pytest.approx(1 - 0.5 * (4 / 7) ** 3)


def test_characters_are_the_words_of_scripts_without_spaces():
    same, half = (
        compute(["meteor_exact_stem"], ["東京都"], [text])["meteor_exact_stem"].value for text in ("東京都", "東京")
    )
    assert same == pytest.approx(1 - 0.5 / 27)
    assert 0.5 < half < same


def test_name_says_that_there_is_no_wordnet(without_data):
    assert not has_word_data()
    assert resolve("meteor") == "meteor_exact_stem"
    assert list(compute(["meteor", "rouge_1"], ["a cat"], ["a dog"])) == ["meteor_exact_stem", "rouge_1"]
    assert len(compute(["meteor", "meteor_exact_stem"], ["a"], ["a"])) == 1


def test_name_says_that_there_is_no_sentence_splitter(monkeypatch, with_data):
    def missing(*_):
        raise LookupError("no such resource")

    monkeypatch.setattr(nltk.tokenize, "sent_tokenize", missing)
    assert resolve("meteor") == "meteor_exact_stem"


def test_synonyms_count_where_there_is_wordnet(with_data):
    scores = compute(["meteor", "meteor_exact_stem"], ["the cat sat"], ["the dog sat"])
    assert list(scores) == ["meteor", "meteor_exact_stem"]
    assert scores["meteor"].value == pytest.approx(1 - 0.5 / 27)
    assert scores["meteor_exact_stem"].value < 0.7
