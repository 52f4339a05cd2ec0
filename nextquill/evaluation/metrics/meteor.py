"""METEOR, by nltk: words matched by form, by stem and, if WordNet is installed, by synonym.

    score = (1 − γ (chunks / matches)^β) · P R / (α P + (1 − α) R),   α = 0.9, β = 3, γ = 0.5

P and R are the matched shares of the prediction's and of the reference's words; chunks are runs of adjacent matches. Of
several references the one that scores highest counts. No match scores 0, and a text of n words scores 1 − 0.5 / n³
against itself.

`meteor` needs two of nltk's data sets, `wordnet` and `punkt_tab`, and then equals `evaluate.load("meteor")`. Without
them another metric is computed under another name, `meteor_exact_stem`: no synonyms, and sentences end at ".", "!" or
"?" before a space. So figures under one name agree between machines. In both, scripts without spaces between words
count by the character; nltk's tokenizer would take a sentence of them for one word.

Source: A. Lavie and A. Agarwal, Meteor: An Automatic Metric for MT Evaluation, 2007.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nextquill.evaluation.metrics.scores import MetricScores, Texts, required
from nextquill.evaluation.metrics.words import UNSPACED

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_CHARACTER = re.compile(rf"[{UNSPACED}]")


class _NoSynonyms:
    """In WordNet's place: no word has a synonym."""

    def synsets(self, word: str) -> list[object]:
        return []


def has_word_data() -> bool:
    """Whether nltk finds WordNet and its sentence splitter on this machine; nothing is downloaded."""
    nltk = required("nltk", "nltk")
    try:
        nltk.corpus.wordnet.synsets("word")
        nltk.tokenize.sent_tokenize("word")
    except LookupError:
        return False
    return True


def resolve(name: str) -> str:
    """The metric that can be computed here: "meteor" becomes "meteor_exact_stem" without nltk's data."""
    return "meteor_exact_stem" if name == "meteor" and not has_word_data() else name


def meteor(texts: Texts) -> MetricScores:
    """METEOR with synonyms, the mean of the examples' scores."""
    nltk = required("nltk", "nltk")
    return _meteor(texts, nltk.corpus.wordnet, nltk.tokenize.word_tokenize)


def meteor_exact_stem(texts: Texts) -> MetricScores:
    """METEOR without synonyms, the mean of the examples' scores."""
    return _meteor(texts, _NoSynonyms(), _words)


def _meteor(texts: Texts, synonyms: Any, words: Callable[[str], list[str]]) -> MetricScores:
    score = required("nltk.translate.meteor_score", "nltk").meteor_score
    scores = [
        float(score([words(_spaced(each)) for each in references], words(_spaced(prediction)), wordnet=synonyms))
        for references, prediction in zip(texts.references, texts.predictions, strict=True)
    ]
    return MetricScores.mean_of(scores)


def _spaced(text: str) -> str:
    return _CHARACTER.sub(r" \g<0> ", text)


def _words(text: str) -> list[str]:
    word_tokenize = required("nltk.tokenize", "nltk").word_tokenize
    return [word for line in _SENTENCE_END.split(text) for word in word_tokenize(line, preserve_line=True)]
