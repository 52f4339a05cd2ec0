"""An evaluation's results survive a round trip through its folder, and damage is named."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nextquill.errors import RecordError
from nextquill.evaluation.results import (
    EVALUATION_FILE,
    EXAMPLES_FILE,
    ITEM_EFFECTS_FILE,
    EvaluatedExample,
    Evaluation,
    ItemEffects,
    MetricValue,
    finite,
    read_evaluation,
    read_examples,
    read_item_effects,
)

EXAMPLE = EvaluatedExample(
    0, "ann", "q", "naïve 東", 1, 2, {"factual": "text"}, {"rouge_l": 0.5}, {"factual": [[0, 4]]},
    {"ece": {"3": 0.25, "15": 2}},
)  # fmt: skip
ITEMS = ItemEffects(0, [{"title": None, "text": "old"}], [[0.25, -0.5]], ["na", "ïve"])


def test_evaluation_is_read_as_it_was_written(tmp_path):
    metrics = {"rouge_l": MetricValue("ROUGE-L", 0.5, 0.25, None, "", True, "rouge_l")}
    evaluation = Evaluation("runs/a", "digest", 3, "lamp_4", 0.9, {"max_length": 8}, metrics)
    (tmp_path / EVALUATION_FILE).write_text(evaluation.to_json(), encoding="utf-8")
    assert read_evaluation(tmp_path) == evaluation


def test_lines_are_read_as_they_were_written(tmp_path):
    (tmp_path / EXAMPLES_FILE).write_text(json.dumps(dataclasses.asdict(EXAMPLE)) + "\n")
    (tmp_path / ITEM_EFFECTS_FILE).write_text(json.dumps(dataclasses.asdict(ITEMS)) + "\n")
    assert read_examples(tmp_path) == [EXAMPLE]
    assert read_item_effects(tmp_path) == [ITEMS]


def test_item_effects_need_not_be_there(tmp_path):
    assert read_item_effects(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (EXAMPLES_FILE, '{"index": 0}\n', "examples.jsonl line 1: not a line of an evaluation: .*user_id"),
        (EXAMPLES_FILE, json.dumps(dataclasses.asdict(EXAMPLE)) + "\n{\n", "examples.jsonl line 2: not valid JSON"),
        (
            EXAMPLES_FILE,
            json.dumps(dataclasses.asdict(EXAMPLE) | {"statistics": 1}),
            "line 1: field 'statistics': expected an obj",
        ),
        (
            EXAMPLES_FILE,
            json.dumps(dataclasses.asdict(EXAMPLE) | {"statistics": {"a": {"0": "x"}}}),
            "line 1: field 'statistics'",
        ),
        (EXAMPLES_FILE, "[]\n", "examples.jsonl line 1: expected an object, got list"),
        (EVALUATION_FILE, "{}", "evaluation.json: not an evaluation: 'metrics'"),
        (EVALUATION_FILE, '{"metrics": {"a": {"colour": 1}}}', "evaluation.json: not an evaluation: .*colour"),
        (EVALUATION_FILE, "[", "evaluation.json: not valid JSON"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        read_examples(tmp_path) if name == EXAMPLES_FILE else read_evaluation(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"evaluation.json: cannot be read: No such file"):
        read_evaluation(tmp_path)
    with pytest.raises(RecordError, match=r"examples.jsonl: cannot be read: No such file"):
        read_examples(tmp_path)


def test_json_holds_null_for_numbers_that_are_not_finite():
    assert [finite(each) for each in (1.5, None, math.inf, math.nan)] == [1.5, None, None, None]
