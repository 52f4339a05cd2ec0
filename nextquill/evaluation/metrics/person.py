"""Whether a text sounds like its person: could somebody who knows the person's earlier texts say whose it is?

    right_person            a judge of character 3-grams picks the author's history among eight; chance is 1/8
    right_person_uncopied   the same judge, on the text without the phrases that it copies from the history
    copied                  the share of the text's word 3-grams that occur in the person's history
    distinct                the number of different texts, as a share of all
    length_ratio            words of all texts / words of all references

A judge of n-grams rewards copying, so read the first with the next two. The same three measures of the people's own
texts are the ceiling of the judge and the usual share of copies. An evaluation reports them beside a model's. With
fewer than eight people, the judge chooses from all of them. A tie counts as a share. A text is left out where a measure
is not defined: without a history, for the judge and `copied`; under three words, for `copied`; with under three words
left, for `right_person_uncopied`.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.authors import Authors
from nextquill.evaluation.metrics.scores import MetricScores, Texts, ratio
from nextquill.evaluation.metrics.words import word_spans


def copied(texts: Texts) -> MetricScores:
    """The mean of the texts' shares of copied word 3-grams."""
    authors = texts.known_authors("copied")
    return MetricScores.mean_of_defined(
        [
            authors.copied(index, text)[0] if authors.histories[index] else math.nan
            for index, text in enumerate(texts.predictions)
        ]
    )


def right_person(texts: Texts) -> MetricScores:
    """The share of texts whose author the judge picks."""
    authors = _several(texts, "right_person")
    return MetricScores.mean_of_defined(
        [authors.right_share(index, text) for index, text in enumerate(texts.predictions)]
    )


def right_person_uncopied(texts: Texts) -> MetricScores:
    """The share of texts whose author the judge picks from what is not copied."""
    authors = _several(texts, "right_person_uncopied")
    rests = [authors.uncopied(index, text) for index, text in enumerate(texts.predictions)]
    return MetricScores.mean_of_defined(
        [math.nan if rest is None else authors.right_share(index, rest) for index, rest in enumerate(rests)]
    )


def distinct(texts: Texts) -> MetricScores:
    """The mean over texts of 1 / the number of texts equal to it, without the white space around them."""
    plain = [text.strip() for text in texts.predictions]
    equal = Counter(plain)
    return MetricScores.mean_of([1 / equal[text] for text in plain])


def length_ratio(texts: Texts) -> MetricScores:
    """Words of all texts / words of all references; of several references, the mean. 0 if no reference has a word."""
    words = [len(word_spans(text)) for text in texts.predictions]
    right = [sum(len(word_spans(each)) for each in several) / len(several) for several in texts.references]
    return MetricScores(np.array([words, right], dtype=np.float64).T, ratio)


def _several(texts: Texts, metric: str) -> Authors:
    authors = texts.known_authors(metric)
    if not authors.are_several:
        raise ArgumentError(
            f"authors: {metric} picks a person among several, so it needs histories of at least two people, got "
            f"{len(authors.chosen_from)}"
        )
    return authors
