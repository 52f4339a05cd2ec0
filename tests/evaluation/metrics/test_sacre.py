"""BLEU and chrF equal sacreBLEU's, also for every resample."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.evaluation.metrics import compute

TEXTS = st.text(alphabet="ab cd.,!東é\n", max_size=30)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)
WORDS = "the cat sat on a mat and slept in warm sun all day".split()


def corpora(num, seed=0):
    """References and predictions that share some of their n-grams."""
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, 12)) for _ in range(num)]
    keep = [[word if rng.random() < 0.8 else "dog" for word in text.split()] for text in references]
    return references, [" ".join(words) for words in keep]


@settings(max_examples=80)
@given(PAIRS)
def test_values_are_sacrebleus(pairs):
    references, predictions = zip(*pairs, strict=True)
    scores = compute(["bleu", "chrf"], references, predictions)
    bleu = sacrebleu.corpus_bleu(list(predictions), [list(references)], force=True)
    assert scores["bleu"].value == pytest.approx(bleu.score, abs=1e-12)
    assert scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)


def test_several_references_are_scored_as_sacrebleu_has_them():
    references = [["the cat sat on the mat", "a cat was on a mat"], ["it slept all day"]]
    predictions = ["a cat sat on a mat", "it slept all night"]
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    scores = compute(["bleu", "chrf"], references, predictions)
    assert scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    assert scores["bleu"].signature.startswith("nrefs:var|")


@pytest.mark.parametrize("seed", range(3))
def test_resamples_have_the_scores_of_their_texts(seed):
    references, predictions = corpora(20)
    scores = compute(["bleu", "chrf"], references, predictions)
    drawn = np.random.default_rng(seed).integers(20, size=(5, 20))
    for name, whole in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        sums = np.stack([scores[name].statistics[each].sum(axis=0) for each in drawn])
        expected = [whole([predictions[i] for i in each], [[references[i] for i in each]]).score for each in drawn]
        assert scores[name].from_sums(sums).tolist() == pytest.approx(expected)


def test_signature_is_sacrebleus():
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a"], [["a"]])
    assert compute(["bleu"], ["a"], ["a"])["bleu"].signature == str(metric.get_signature())


def test_text_that_looks_tokenized_is_scored_without_a_warning(caplog):
    compute(["bleu"], ["a b ."] * 120, ["a b ."] * 120)
    assert not caplog.records
