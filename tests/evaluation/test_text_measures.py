"""Measures of texts that were written elsewhere, and the same ones in an evaluation."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nextquill.data import load_records
from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import place_of
from nextquill.evaluation.results import read_evaluation, read_examples
from nextquill.evaluation.tasks import TASKS
from nextquill.evaluation.text_measures import authors_of, text_measures
from tests.evaluation.evaluation_helpers import RECORDS, contents, evaluate, without_manifest
from tests.models.model_helpers import tiny_model

CEILINGS = {"right_person_reference", "right_person_uncopied_reference", "copied_reference"}
PERSONAL = {name.removesuffix("_reference") for name in CEILINGS}


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return evaluate(model, folder, max_new_tokens=12), folder


def test_texts_measured_elsewhere_have_the_evaluations_figures(evaluated):
    evaluation, folder = evaluated
    texts = [each.generated["factual"] for each in read_examples(folder)]
    found = text_measures(RECORDS, texts)
    assert set(found) == {*TASKS["text"].metrics, *CEILINGS}
    for name, scores in found.items():
        if name in evaluation.metrics:
            assert evaluation.metrics[name].value == pytest.approx(scores.value), name
        else:
            assert scores.defined() == [], name
    assert {"right_person", "copied", "right_person_reference", "distinct", "length_ratio"} <= set(evaluation.metrics)


def test_the_first_records_are_judged_among_all_people(model, tmp_path):
    evaluation = evaluate(model, tmp_path, generate_limit=2, max_new_tokens=12)
    texts = [each.generated["factual"] for each in read_examples(tmp_path)[:2]]
    found = text_measures(RECORDS[:2], texts, ["right_person"], among=RECORDS)
    assert evaluation.metrics["right_person"].value == pytest.approx(found["right_person"].value)
    assert len(authors_of(RECORDS[:2], among=RECORDS).others(0)) == 2


def test_the_peoples_own_texts_stand_in_a_column_of_their_own(evaluated):
    evaluation, folder = evaluated
    metric = evaluation.metrics["right_person_reference"]
    assert place_of("right_person_reference") == ("texts", "Right person", "the person's own")
    assert (metric.label, metric.higher_is_better) == ("Right person, the person's own", None)
    assert set(compare_evaluations(folder, folder)) & CEILINGS == set(), "they cannot differ"
    assert compare_evaluations(folder, folder, ["right_person"])["right_person"].difference == 0


def test_examples_say_what_is_copied(tmp_path):
    phrase = "w1 w2 w3 w4"
    histories = {"a": [f"w9 {phrase}"], "b": ["w6"]}
    shared = {"query": "w5", "response": f"w7 {phrase} w8"}
    records = load_records([{"user_id": user, **shared, "history": texts} for user, texts in histories.items()])
    evaluate(tiny_model(), tmp_path, records)
    copied, other = read_examples(tmp_path)
    assert copied.copied["reference"] == [[3, 14]]
    assert copied.response[3:14] == phrase
    assert "reference" not in other.copied


def test_fewer_than_two_people_with_a_history_have_no_judge(model, tmp_path):
    records = [RECORDS[0], dataclasses.replace(RECORDS[1], history=())]
    assert records[0].user_id != records[1].user_id
    evaluation = evaluate(model, tmp_path / "default", records)
    assert not (PERSONAL | CEILINGS) & set(evaluation.metrics)
    assert {"distinct", "length_ratio"} <= set(evaluation.metrics)
    with pytest.raises(RecordError, match=r"authors: right_person picks .* at least two people, got 1"):
        evaluate(model, tmp_path / "named", records, metrics=("right_person",))
    assert not (tmp_path / "named").exists()


def test_a_folder_of_an_older_version_is_read(evaluated, tmp_path):
    _, folder = evaluated
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["copied"]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [each.copied for each in read_examples(tmp_path)] == [{}] * len(RECORDS)
    assert read_evaluation(without_manifest(tmp_path))


@pytest.mark.parametrize(
    "copied",
    [[], {"factual": [[0, 10**6]]}, {"factual": [[2, 1]]}, {"other": [[0, 1]]}, {"reference": [[0, 2], [1, 3]]},
     {"reference": [[0.5, 1]]}, {"reference": [[True, 1]]}, {"reference": 1}, {"reference": [[-1, 1]]}],
)  # fmt: skip
def test_damaged_places_are_named(evaluated, tmp_path, copied):
    line = json.loads((evaluated[1] / "examples.jsonl").read_text().splitlines()[0])
    (tmp_path / "examples.jsonl").write_text(json.dumps(line | {"copied": copied}) + "\n")
    with pytest.raises(RecordError, match="field 'copied': expected an object of places in the texts"):
        read_examples(tmp_path)


def test_what_is_missing_is_named():
    texts = ["w1"] * len(RECORDS)
    with pytest.raises(ArgumentError, match="predictions: expected 6, as many as references, got 5"):
        text_measures(RECORDS, texts[:5])
    with pytest.raises(ArgumentError, match="task: expected one of"):
        text_measures(RECORDS, texts, task="novel")
    with pytest.raises(RecordError, match="record 0: field 'response': lamp_3 expects a rating"):
        text_measures(RECORDS, texts, task="lamp_3")
