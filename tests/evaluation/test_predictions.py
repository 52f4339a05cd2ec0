"""Prediction files: in the form that other scorers read, and read from any file of that form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.predictions import read_predictions, score_predictions, write_predictions
from nextquill.evaluation.tasks import TASKS

LAMP_3 = TASKS["lamp_3"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "predictions.json"


def write(path, task, **outputs):
    path.write_text(json.dumps({"task": task, "golds": [{"id": k, "output": v} for k, v in outputs.items()]}))
    return path


def test_form_is_that_of_lamp(path):
    write_predictions(path, LAMP_3, [("310", "4"), ("311", "naïve 東")])
    assert json.loads(path.read_text()) == {
        "task": "LaMP_3",
        "golds": [{"id": "310", "output": "4"}, {"id": "311", "output": "naïve 東"}],
    }
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@settings(deadline=None)  # a synchronised write takes as long as the disk does
@given(outputs=st.dictionaries(st.text() | st.integers(), st.text(st.characters())))
def test_written_predictions_are_read_back(tmp_path_factory, outputs):
    path = tmp_path_factory.mktemp("predictions") / "predictions.json"
    write_predictions(path, LAMP_3, outputs.items())
    assert read_predictions(path).outputs == outputs


@pytest.mark.parametrize(
    ("predictions", "error", "message"),
    [
        ([("a", "x"), ("a", "y")], ArgumentError, r"predictions\[1\]: id 'a' comes twice"),
        ([(1.5, "x")], ArgumentTypeError, r"predictions\[0\]: expected a string or an integer as id, got 1.5"),
        ([("a", None)], ArgumentTypeError, r"predictions\[0\]: expected a string as text, got NoneType"),
    ],
)
def test_predictions_that_a_scorer_would_refuse_are_not_written(path, predictions, error, message):
    path.write_text("before")
    with pytest.raises(error, match=message):
        write_predictions(path, LAMP_3, predictions)
    assert path.read_text() == "before"
    assert len(list(path.parent.iterdir())) == 1


def test_task_without_files_is_named(path):
    with pytest.raises(ArgumentError, match="task: text has no prediction file of its own"):
        write_predictions(path, TASKS["text"], [])


def test_any_file_is_scored_as_its_task(tmp_path):
    golds = write(tmp_path / "golds.json", "LaMP_3", a="4", b="1", c="3")
    given = write(tmp_path / "given.json", "LaMP_3", c="3", b="nonsense", a="5")
    scores = score_predictions(given, golds)
    assert scores["mae"].per_example.tolist() == [1, 4, 0]
    without_histories = [name for name in TASKS["text"].metrics if not METRICS[name].needs_authors]
    assert list(score_predictions(given, golds, TASKS["text"])) == without_histories


def test_ratings_written_as_numbers_are_read(tmp_path):
    golds, given = write(tmp_path / "g.json", "LaMP_3", a=4), write(tmp_path / "p.json", "LaMP_3", a=4.0)
    assert score_predictions(given, golds)["mae"].value == 0


def entries(*golds):
    return json.dumps({"task": "LaMP_3", "golds": list(golds)})


DAMAGED = {
    "no-json": ("{", "not valid JSON"),
    "no-utf-8": (b"\xff", "not valid JSON"),
    "a-list": ("[]", "expected an object, got list"),
    "no-task": ('{"golds": []}', "expected an object with a string 'task' and a list 'golds'"),
    "no-golds": ('{"task": "LaMP_3"}', "expected an object with a string 'task'"),
    "text-as-entry": (entries("x"), r"golds\[0\]: expected an object, got str"),
    "no-output": (entries({"id": "a", "output": "1"}, {"id": "b"}), r"golds\[1\]: field 'output' is missing"),
    "list-as-output": (entries({"id": "a", "output": []}), r"golds\[0\]: field 'output': expected a string, got list"),
    "bool-as-id": (
        entries({"id": True, "output": ""}),
        r"golds\[0\]: field 'id': expected a string or an integer, got b",
    ),
    "id-twice": (entries({"id": "a", "output": ""}, {"id": "a", "output": ""}), r"golds\[1\]: id 'a' comes twice"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_is_named(path, content, message):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecordError, match=f"predictions.json: .*{message}"):
        read_predictions(path)


def test_missing_file_is_named(path):
    with pytest.raises(RecordError, match=r"predictions.json: cannot be read: No such file"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("task", "outputs", "error", "message"),
    [
        ("LaMP_4", {"a": "4"}, RecordError, "p.json: expected predictions of 'LaMP_3' as in .*g.json, got 'LaMP_4'"),
        ("LaMP_3", {"c": "4"}, RecordError, "p.json: no prediction for id 'a' of .*g.json and 1 more"),
        ("LaMP_3", {"a": "4", "b": "4", "c": "4"}, RecordError, "p.json: id 'c' is not in .*g.json"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path, task, outputs, error, message):
    golds, given = write(tmp_path / "g.json", "LaMP_3", a="4", b="4"), write(tmp_path / "p.json", task, **outputs)
    with pytest.raises(error, match=message):
        score_predictions(given, golds)


def test_an_id_that_is_a_number_is_not_its_text(tmp_path):
    golds, given = write(tmp_path / "g.json", "LaMP_3", **{"1": "4"}), tmp_path / "p.json"
    given.write_text(entries({"id": 1, "output": "4"}))
    with pytest.raises(RecordError, match=r"p\.json: no prediction for id '1' of"):
        score_predictions(given, golds)


def test_right_answer_that_is_none_is_named(tmp_path):
    golds, given = write(tmp_path / "g.json", "LaMP_3", a="good"), write(tmp_path / "p.json", "LaMP_3", a="4")
    with pytest.raises(ArgumentError, match=r"g.json: id 'a': field 'response': lamp_3 expects a rating"):
        score_predictions(given, golds)
