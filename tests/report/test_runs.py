"""Run folders are read completely, missing parts are named, and errors name file, line and field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextquill.errors import ArgumentError, RecordError
from nextquill.report.run_page import runs_page
from nextquill.report.runs import Run, labels, read_items, read_run, read_tokens
from tests.report.example_runs import write_evaluation, write_training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished and evaluated run."""
    write_training(tmp_path / "a")
    write_evaluation(tmp_path / "a/evaluation", examples=4)
    return tmp_path / "a"


def test_a_whole_run_lacks_nothing(folder: Path) -> None:
    run = read_run(folder)
    assert run.label == "a"
    assert run.training is not None
    assert run.training.is_finished
    assert run.evaluation is not None
    assert [example.index for example in run.examples] == [0, 1, 2, 3]
    assert run.missing == []


def test_an_evaluation_alone_is_a_run(folder: Path) -> None:
    run = read_run(folder / "evaluation")
    assert run.training is None
    assert len(run.examples) == 4
    assert run.missing == []


def test_a_training_alone_says_how_to_evaluate_it(tmp_path: Path) -> None:
    run = read_run(write_training(tmp_path / "a"))
    assert run.evaluation is None
    (text,) = run.missing
    assert f"nextquill evaluate --model {tmp_path / 'a'} --eval_file FILE --output_dir" in text


def test_an_unfinished_training_has_its_last_checkpoint_s_curves(folder: Path) -> None:
    state = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    (folder / "metrics.json").unlink()
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir()
        log = [entry for entry in state["log_history"] if entry["step"] <= step]
        (folder / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "checkpoint-last").mkdir()
    run = read_run(folder)
    assert run.training is not None
    assert not run.training.is_finished
    assert max(entry["step"] for entry in run.training.log) == 10
    assert "has not finished" in run.missing[0]
    assert "--resume_from_checkpoint true" in run.missing[0]


def test_a_run_that_has_only_begun_is_one(tmp_path: Path) -> None:
    (tmp_path / "nextquill_run.json").write_text("{}")
    assert len(read_run(tmp_path).missing) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("examples.jsonl", "no texts and no paired tests"),
        ("effects.jsonl", "no coloured tokens"),
        ("item_effects.jsonl", "--item_effects"),
    ],
)
def test_a_missing_part_is_said(folder: Path, name: str, said: str) -> None:
    (folder / "evaluation" / name).unlink()
    run = read_run(folder)
    assert any(said in text for text in run.missing)
    assert read_tokens(run, [0]) == {} if name == "effects.jsonl" else read_tokens(run, [0]).keys() == {0}
    assert read_items(run).keys() == (set() if name == "item_effects.jsonl" else {1})


@pytest.mark.parametrize("what", ["nothing", "file", "empty folder"])
def test_what_is_no_run_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("x")
    if what == "empty folder":
        path.mkdir()
    said = {"nothing": "x is not there", "file": "x is a file", "empty folder": "holds neither metrics.json of"}[what]
    with pytest.raises(ArgumentError, match=f"runs: .*{said}"):
        read_run(path)


def test_tokens_hold_the_probabilities_of_the_file(folder: Path) -> None:
    tokens = read_tokens(read_run(folder), [2])
    line = json.loads((folder / "evaluation/effects.jsonl").read_text(encoding="utf-8").splitlines()[2])
    assert [token.text for token in tokens[2]] == line["tokens"]
    for name, field in (("p_with", "factual"), ("p_without", "counterfactual"), ("p_placebo", "placebo")):
        expected = [math.exp(-nll) for nll in line[f"nll_{field}"]]
        assert [getattr(token, name) for token in tokens[2]] == pytest.approx(expected)


def test_items_hold_the_effects_of_the_file(folder: Path) -> None:
    found = read_items(read_run(folder))[1]
    line = json.loads((folder / "evaluation/item_effects.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert dataclasses.asdict(found) == line


def test_labels_are_as_short_as_sets_them_apart() -> None:
    assert labels([Path("/r/a/evaluation"), Path("/r/b")]) == ["a", "b"]
    assert labels([Path("/r/a/seed-0"), Path("/r/b/seed-0")]) == ["a/seed-0", "b/seed-0"]
    assert labels([Path("/r/a")]) == ["a"]


# ---- damage -----------------------------------------------------------------------------------------


def edit(path: Path, line: int, change: Callable[[Any], Any]) -> None:
    """Change one line of a JSONL file. The change gives the new value, or the text of the line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    value = change(json.loads(lines[line - 1]))
    lines[line - 1] = value if isinstance(value, str) else json.dumps(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def all_of(run: Run) -> None:
    read_tokens(run, range(99))
    read_items(run)


DAMAGE: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "torn": ("effects.jsonl", lambda raw: '{"index": 1,', "effects.jsonl line 2: not valid JSON"),
    "list": ("examples.jsonl", lambda raw: "[]", "examples.jsonl line 2: expected an object, got list"),
    "field too many": ("examples.jsonl", lambda raw: raw | {"x": 1}, "examples.jsonl line 2: not a line of"),
    "index twice": (
        "examples.jsonl",
        lambda raw: raw | {"index": 0},
        "line 2: field 'index': expected each index once",
    ),
    "index": (
        "examples.jsonl",
        lambda raw: raw | {"index": "1"},
        "line 2: field 'index': expected an integer, got '1'",
    ),
    "query": ("examples.jsonl", lambda raw: raw | {"query": 1}, "line 2: field 'query': expected a string"),
    "generated": ("examples.jsonl", lambda raw: raw | {"generated": {"factual": 1}}, "line 2: field 'generated'"),
    "scores": (
        "examples.jsonl",
        lambda raw: raw | {"scores": [1]},
        "line 2: field 'scores': expected an object of num",
    ),
    "tokens": (
        "effects.jsonl",
        lambda raw: raw | {"tokens": [1]},
        "line 2: field 'tokens': expected a list of strings",
    ),
    "nll": ("effects.jsonl", lambda raw: raw | {"nll_factual": [1.0]}, "line 2: field 'nll_factual': expected 25 num"),
    "no nll": (
        "effects.jsonl",
        lambda raw: {key: value for key, value in raw.items() if key != "nll_counterfactual"},
        "line 2: field 'nll_counterfactual': expected 25 numbers",
    ),
    "items": ("item_effects.jsonl", lambda raw: raw | {"items": "x"}, "line 2: field 'items': expected a list"),
    "rows": ("item_effects.jsonl", lambda raw: raw | {"effects": [[]]}, "line 2: field 'effects': expected a list for"),
    "row": ("item_effects.jsonl", lambda raw: raw | {"effects": [[0.0]] * 4}, "line 2: field 'effects': expected 25"),
}


@pytest.mark.parametrize(("name", "change", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_line_is_named(tmp_path: Path, name: str, change: Callable[[Any], Any], said: str) -> None:
    write_evaluation(tmp_path, examples=4, items_of=(1, 3))
    edit(tmp_path / name, 2, change)
    with pytest.raises(RecordError, match=f"{tmp_path}.*{said}"):
        all_of(read_run(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"log_history": {}}', "field 'log_history': expected a list of objects"),
        ('{"log_history": [{"loss": 1}]}', "entry 0: expected a number 'step'"),
        ('{"log_history": [], "eval": 3}', "field 'eval': expected an object, got int"),
    ],
)
def test_a_damaged_log_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(RecordError, match=f"metrics.json: {said}|metrics.json: field 'log_history', {said}"):
        read_run(tmp_path)


def write_popi(folder: Path, **changed: Any) -> Path:
    """A run of `nextquill popi train` with the result of `popi evaluate`."""
    write_training(folder)
    (folder / "popi.json").write_text("{}")
    value = {"value": 0.6, "low": 0.5, "high": 0.7}
    difference = {"difference": 0.1, "low": 0.02, "high": 0.2, "p_value": 0.01, "num": 9}
    generator = {
        "pairs": 60,
        "users": 30,
        "contexts": {name: {"accuracy": value, "margin": value, "loss": value} for name in ("none", "summary")},
        "summary_minus": {"placebo": {"accuracy": difference, "margin": difference}},
    }
    raw = {"model": "m", "settings": {"level": 0.9}, "generator": generator | changed, "transfer": {}}
    (folder / "evaluation.json").write_text(json.dumps(raw))
    return folder


def test_a_run_of_popi_has_its_verdict_on_the_same_page(tmp_path: Path) -> None:
    run = read_run(write_popi(tmp_path / "p"))
    page = runs_page([run])
    worth = "p's own summary is worth 0.10 of accuracy [0.02, 0.20] more than another person's"
    assert page.verdict == [f"On 60 pairs of 30 people, {worth}; accuracy 0.60 [0.50, 0.70]."]
    assert [measure.rows[0].value for measure in page.measures] == [0.1, 0.6]
    assert page.measures_lead == "Dots with 90% intervals over people."
    assert page.notices == []


def test_a_damaged_evaluation_of_popi_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"evaluation\.json: not an evaluation of POPI"):
        read_run(write_popi(tmp_path / "p", users=None))


def test_a_run_of_popi_without_evaluation_names_its_own_command(tmp_path: Path) -> None:
    folder = write_popi(tmp_path / "p")
    (folder / "evaluation.json").unlink()
    assert any("nextquill popi evaluate" in text for text in read_run(folder).missing)
