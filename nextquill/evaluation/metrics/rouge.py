"""ROUGE-1, ROUGE-2 and ROUGE-L, by rouge_score, over words of any script.

    F1 = 2 P R / (P + R)

P and R are the shares of the prediction's and of the reference's n-grams that the other text has too; ROUGE-L counts
the words of their longest common subsequence instead. Of several references the one that scores highest counts.
`rouge_1`, `rouge_2` and `rouge_l` do not stem, as `evaluate.load("rouge")` by default; LaMP, LongLaMP and the review
data of DPL and NextQuill are reported so. `rouge_1_stem` and so on use Porter's stemmer. `evaluate` reports the median
of bootstrapped means; here the score is the mean itself.

Source: C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.
"""

from __future__ import annotations

import re

from nextquill.evaluation.metrics.scores import MetricScores, Texts, required
from nextquill.evaluation.metrics.words import UNSPACED


class RougeWords:
    """Words of any script, for ROUGE: rouge_score's own tokenizer knows ASCII letters only and scores other text 0.

    Scripts without spaces between words count by the character. On ASCII text the words, and so the scores, equal
    rouge_score's.

    Args:
        stem: reduce ASCII words of more than three letters to their stems, as rouge_score's `use_stemmer` does.
    """

    _WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")

    def __init__(self, stem: bool = True) -> None:
        self._stemmer = required("nltk.stem.porter", "nltk").PorterStemmer() if stem else None

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case words of `text`, stemmed where asked for."""
        words = self._WORD.findall(text.lower())
        if self._stemmer is None:
            return words
        return [self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def rouge(texts: Texts, kind: str, *, stem: bool = False) -> MetricScores:
    """The mean of the examples' F1 of a kind of ROUGE, as rouge_score names it; a text without a word scores 0."""
    scorer = required("rouge_score.rouge_scorer", "rouge-score").RougeScorer([kind], tokenizer=RougeWords(stem))
    pairs = zip(texts.references, texts.predictions, strict=True)
    return MetricScores.mean_of([float(scorer.score_multi(*pair)[kind].fmeasure) for pair in pairs])
