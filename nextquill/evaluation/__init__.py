"""Measures of generated text and of effects, with intervals and paired tests; nothing here runs a model.

    metrics/       one measure a family: text overlap, labels, ratings
    tasks.py       which measures a public task is reported in
    bootstrap.py   intervals, and the paired difference of two runs
    predictions.py the prediction files that other scorers read
    results.py     what an evaluation's folder holds, as values

It works on strings and numbers alone, so it may be used on any model's output.
"""

from __future__ import annotations
