"""Two evaluation folders, paired."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.bootstrap import paired_difference
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.metrics import MetricScores, compute
from nextquill.evaluation.results import EVALUATION_FILE, EXAMPLES_FILE, EvaluatedExample, Evaluation, MetricValue

RESPONSES = ["the cat sat on the mat", "it slept in the warm sun", "a dog ran by all day", "we saw it go home"]
USERS = ["ann", "bo", "ann", "cy"]
TEXTS = {"a": RESPONSES, "b": ["a cat", "it slept in the sun", "a dog sat", "we go"]}
METRICS = {
    "nll": MetricValue("nll", 1.0, per_example=None),
    "rouge_l": MetricValue("ROUGE-L", 0.5, per_example="rouge_l"),
    "bleu": MetricValue("BLEU", 50.0),
    "bleu_counterfactual": MetricValue("BLEU without", 50.0),
    "num_tokens": MetricValue("tokens", 24.0),
}


def save(folder, name, records="digest", metrics=METRICS, task="text", drop=()):
    folder = folder / name
    folder.mkdir()
    examples = []
    for index, (user, response, text) in enumerate(zip(USERS, RESPONSES, TEXTS[name], strict=True)):
        scores = {"nll": 1.0 / (index + len(text)), "tokens": 2.0 + index, "rouge_l": len(text) / 30}
        generated = {"factual": text}
        if index in drop:
            del scores["rouge_l"], generated["factual"]
        examples.append(EvaluatedExample(index, user, "q", response, generated=generated, scores=scores))
    random.Random(name).shuffle(examples)
    evaluation = Evaluation(name, records, len(examples), task=task, metrics=metrics)
    (folder / EVALUATION_FILE).write_text(evaluation.to_json())
    (folder / EXAMPLES_FILE).write_text("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in examples))
    return folder


def test_means_over_examples_are_paired_by_index(tmp_path):
    result = compare_evaluations(save(tmp_path, "a"), save(tmp_path, "b"), ["rouge_l"])["rouge_l"]
    sides = [[len(text) / 30 for text in TEXTS[name]] for name in "ab"]
    assert result == paired_difference(*sides, USERS)


def test_means_over_tokens_weigh_examples_by_their_tokens(tmp_path):
    result = compare_evaluations(save(tmp_path, "a"), save(tmp_path, "b"), ["nll"])["nll"]
    weights = [2.0, 3.0, 4.0, 5.0]
    sides = [
        MetricScores.ratio_of(
            [w / (i + len(text)) for i, (w, text) in enumerate(zip(weights, TEXTS[name], strict=True))], weights
        )
        for name in "ab"
    ]
    expected = paired_difference(*sides, USERS)
    assert dataclasses.astuple(result) == pytest.approx(dataclasses.astuple(expected))


def test_measures_of_a_corpus_are_computed_from_its_texts(tmp_path):
    result = compare_evaluations(save(tmp_path, "a"), save(tmp_path, "b"), ["bleu"])["bleu"]
    scores = [compute(["bleu"], RESPONSES, TEXTS[name])["bleu"] for name in "ab"]
    assert result == paired_difference(*scores, USERS)
    assert result.difference > 50


def test_f1_is_over_the_labels_of_the_task(tmp_path):
    metrics = {"f1_macro": MetricValue("F1", 0.5)}
    folders = [save(tmp_path, name, metrics=metrics, task="lamp_1") for name in "ab"]
    with pytest.raises(ArgumentError, match=r"references\[0\]: expected one of \[1\], \[2\], got 'the cat"):
        compare_evaluations(*folders)


def test_examples_that_only_one_has_are_left_out(tmp_path):
    results = compare_evaluations(save(tmp_path, "a", drop=(0,)), save(tmp_path, "b", drop=(3,)))
    assert {name: result.num for name, result in results.items()} == {"nll": 4, "rouge_l": 2, "bleu": 2}


def test_settings_reach_the_bootstrap(tmp_path):
    folders = save(tmp_path, "a"), save(tmp_path, "b")
    wide, narrow = (compare_evaluations(*folders, ["nll"], level=level)["nll"] for level in (0.95, 0.2))
    assert wide.high - wide.low > narrow.high - narrow.low


def test_other_records_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"evaluations of different records \(digest and other\) cannot be paired"):
        compare_evaluations(save(tmp_path, "a"), save(tmp_path, "b", records="other"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chrf", "metrics: .*a has no 'chrf'; it has nll, rouge_l"),
        ("bleu_counterfactual", "metrics: 'bleu_counterfactual' cannot be paired: no example has its score in both"),
        ("num_tokens", "metrics: 'num_tokens' cannot be paired"),
    ],
)
def test_measure_that_cannot_be_paired_is_named(tmp_path, name, message):
    with pytest.raises(ArgumentError, match=message):
        compare_evaluations(save(tmp_path, "a"), save(tmp_path, "b"), [name])


def test_folder_without_an_evaluation_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"evaluation.json: cannot be read"):
        compare_evaluations(tmp_path, save(tmp_path, "b"))


def test_example_that_is_missing_in_one_folder_is_left_out(tmp_path):
    a, b = save(tmp_path, "a"), save(tmp_path, "b")
    lines = (b / EXAMPLES_FILE).read_text().splitlines(keepends=True)
    (b / EXAMPLES_FILE).write_text("".join(lines[1:]))
    assert {result.num for result in compare_evaluations(a, b).values()} == {3}
