"""BLEU and chrF of a whole corpus, from 0 to 100, by sacreBLEU, with its signature of how it counted.

    BLEU = min(1, e^(1 − r/c)) · exp(¼ Σₙ log pₙ)

pₙ is the share of the predictions' n-grams that their references have, c and r are the numbers of words of both; with
sacreBLEU's defaults (13a words, exponential smoothing). BLEU takes a text without spaces for one word. For such texts
read chrF, the F2 of n-grams of one to six characters.

Neither is a mean over examples. An example's statistics are its counts of n-grams, and the metric of any resample
follows from their sums.

Sources: K. Papineni et al., BLEU, 2002; M. Popović, chrF, 2015; M. Post, A Call for Clarity in Reporting BLEU, 2018.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nextquill.evaluation.metrics.scores import Floats, MetricScores, Texts, required


def bleu(texts: Texts) -> MetricScores:
    """BLEU, without a warning about text that looks tokenized."""
    return _corpus_scores(required("sacrebleu.metrics", "sacrebleu").BLEU(force=True), texts)


def chrf(texts: Texts) -> MetricScores:
    """The metric chrF."""
    return _corpus_scores(required("sacrebleu.metrics", "sacrebleu").CHRF(), texts)


def _corpus_scores(metric: Any, texts: Texts) -> MetricScores:
    most = max(map(len, texts.references))
    # In sacreBLEU's form: the first reference of every example, the second of every example, …; None if it has fewer.
    streams = [[each[k] if k < len(each) else None for each in texts.references] for k in range(most)]
    # These two methods are what sacreBLEU's own significance tests are built on.
    statistics = np.asarray(metric._extract_corpus_statistics(list(texts.predictions), streams), dtype=np.float64)

    def from_sums(sums: Floats) -> Floats:
        rows = sums.reshape(-1, sums.shape[-1]).tolist()
        return np.array([metric._compute_score_from_stats(row).score for row in rows]).reshape(sums.shape[:-1])

    return MetricScores(statistics, from_sums, signature=str(metric.get_signature()))
