"""Measures of generated text and of effects, with intervals and paired tests; nothing here runs a model.

    metrics/       the measures: text overlap, labels, ratings, preferences; `compute` scores texts in any of them
    tasks.py       which measures a public task is reported in
    clusters.py    a user's examples added up, which is what is resampled
    bootstrap.py   intervals, and the paired difference of two runs or of two methods with several seeds
    permutation.py p-values by exchanging, and their correction for several comparisons
    predictions.py the prediction files that other scorers read
    results.py     what an evaluation's folder holds, as values
    compare.py     two such folders, paired example by example

It works on strings and numbers alone, so it may be used on any model's output.
"""

from __future__ import annotations
