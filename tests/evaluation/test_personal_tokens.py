"""Personal tokens, as another evaluation marks them or as records name them, and the measures over them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nextquill.errors import RecordError
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import sum_measures
from nextquill.evaluation.personal_tokens import read_marks
from tests.evaluation.evaluation_helpers import RECORDS, contents, evaluate, lines_of, made_up_lines
from tests.models.model_helpers import tiny_model

KINDS = ("nll_personal", "nll_generic", "top1_personal", "top1_generic", "share_personal")


def copied(folder, target, change):
    """A copy of an evaluation's folder whose lines of effects are changed."""
    target.mkdir()
    for name, content in contents(folder).items():
        (target / name).write_bytes(content)
    lines = [change(line) for line in lines_of(folder)]
    (target / "effects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    return target


# ---- marked by another evaluation --------------------------------------------------------------


@pytest.fixture(scope="module")
def other():
    return tiny_model(initializer_range=0.6, seed=1)


def every_second(line):
    """A line in which every second token is likely under the own history only."""
    size = len(line["token_ids"])
    return line | {"nll_factual": [0.1 + k % 2 for k in range(size)], "nll_placebo": [1.2] * size}


@pytest.fixture(scope="module")
def marking(whole, tmp_path_factory):
    """An evaluation in which every second token is personal."""
    return copied(whole[1], tmp_path_factory.mktemp("marking") / "base", every_second)


@pytest.fixture(scope="module")
def measured(other, marking, tmp_path_factory):
    """Another model's evaluation with these marks."""
    folder = tmp_path_factory.mktemp("marked") / "out"
    return evaluate(other, folder, generate_branches=(), personal_from=marking), folder


def test_measures_over_marked_tokens_by_brute_force():
    lines, rng = made_up_lines(), np.random.default_rng(1)
    marks = [rng.random(len(line["token_ids"])) < 0.2 for line in lines]
    assert not all(each.any() for each in marks)
    measures, _ = sum_measures(lines, marked=marks)
    value = {name: measure.scores.value for name, measure in measures.items()}
    chosen, nll, top1 = (
        np.concatenate([*each])
        for each in (marks, [line["nll_factual"] for line in lines], [line["top1"] for line in lines])
    )
    for whose, those in (("personal", chosen), ("generic", ~chosen)):
        assert value[f"nll_{whose}"] == pytest.approx(nll[those].mean(), abs=1e-6)
        assert value[f"top1_{whose}"] == pytest.approx(top1[those].mean())
    assert value["share_personal"] == pytest.approx(chosen.mean())
    whole, parts = measures, [sum_measures(lines[k], marked=marks[k])[0] for k in (slice(0, 13), slice(13, None))]
    for name in KINDS:
        sums = [part[name].scores.statistics.sum(0) for part in parts]
        np.testing.assert_allclose(whole[name].scores.statistics.sum(0), sum(sums), atol=1e-9, err_msg=name)


def test_tokens_are_marked_where_the_own_history_makes_them_likelier(measured):
    evaluation, folder = measured
    lines = lines_of(folder)
    nlls = [nll for line in lines for nll in line["nll_factual"][::2]]
    assert evaluation.metrics["nll_personal"].value == pytest.approx(np.mean(nlls), abs=1e-6)
    share = len(nlls) / sum(len(line["token_ids"]) for line in lines)
    assert evaluation.metrics["share_personal"].value == pytest.approx(share)
    assert evaluation.metrics["nll_personal"].label == "nll, personal tokens"
    assert evaluation.metrics["nll_personal"].low < evaluation.metrics["nll_personal"].value


def test_only_the_marks_count_not_where_they_lie(other, marking, measured, tmp_path):
    evaluation, folder = measured
    moved = copied(marking, tmp_path / "elsewhere", lambda line: line | {"nll_placebo": [1.15] * len(line["tokens"])})
    evaluate(other, tmp_path / "out", generate_branches=(), personal_from=str(moved))
    assert contents(tmp_path / "out") == contents(folder)
    unlike = copied(marking, tmp_path / "unlike", lambda line: line | {"nll_placebo": [0.1] * len(line["tokens"])})
    changed = evaluate(other, tmp_path / "b", generate_branches=(), personal_from=unlike)
    assert changed.settings["personal_from"] != evaluation.settings["personal_from"]
    assert changed.metrics["share_personal"].value == 0
    assert "nll_personal" not in changed.metrics


def test_marked_measures_are_paired(whole, model, marking, measured, tmp_path):
    own = evaluate(model, tmp_path / "own", generate_branches=(), personal_from=marking)
    found = compare_evaluations(tmp_path / "own", measured[1])
    for name in KINDS:
        difference = own.metrics[name].value - measured[0].metrics[name].value
        assert found[name].difference == pytest.approx(difference, abs=1e-6), name
    assert found["nll_personal"].difference != 0
    assert found["share_personal"].difference == 0
    assert not set(KINDS) & compare_evaluations(tmp_path / "own", whole[1]).keys()


SPOILT = {
    "no placebo": (lambda line: line.pop("nll_placebo") and line, "field 'nll_placebo': missing; a placebo needs"),
    "short": (lambda line: line | {"nll_placebo": [1.0] * 50}, "line 1: expected 'token_ids', 'nll_factual' and"),
    "no index": (lambda line: line | {"index": "a"}, "line 1: field 'index': expected an integer"),
    "lines": (lambda line: line["index"] != 2 and line, "effects.jsonl: expected a line for each of 6 records"),
    "tokens": (
        lambda line: line | {"token_ids": [9] * len(line["token_ids"])},
        "this tokenizer's tokens, but record 0",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_marks_that_do_not_fit_are_refused_before_anything_runs(whole, model, tmp_path, what):
    change, message = SPOILT[what]
    folder = copied(whole[1], tmp_path / "base", change)
    with pytest.raises(RecordError, match=f"personal_from: .*{message}"):
        evaluate(model, tmp_path / "out", personal_from=folder)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_other_records_is_refused(whole, model, tmp_path):
    with pytest.raises(RecordError, match=r"personal_from: .* of other records \(6\) than these \(4\)"):
        evaluate(model, tmp_path / "out", RECORDS[:4], personal_from=whole[1])
    with pytest.raises(RecordError, match=r"personal_from: .*evaluation\.json: cannot be read"):
        evaluate(model, tmp_path / "out", personal_from=tmp_path)


def test_marks_are_bool_and_of_every_token(whole):
    marks = read_marks(whole[1], RECORDS)
    assert [len(each) for each in marks.personal] == [len(line["token_ids"]) for line in lines_of(whole[1])]
    assert len(marks.digest) == 16
