"""A judge that is a language model: its choices against separate forwards, its refusals, and a resume."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nextquill.data import Branch, ExampleEncoder
from nextquill.errors import ArgumentError, BudgetError, CheckpointError, NextQuillError
from nextquill.evaluation.judge import PersonJudge
from nextquill.evaluation.measures import place_of
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.results import read_evaluation, read_examples
from nextquill.evaluation.text_measures import authors_of
from nextquill.models.loading import PromptSettings
from tests.evaluation.evaluation_helpers import FILES, RECORDS, SETTINGS, contents, evaluate
from tests.evaluation.test_results_folder import Killed, killed_after
from tests.models.model_helpers import TEMPLATE, branch_nll, tiny_model, word_tokenizer

ORDERS = {
    order: PromptSettings(dataclasses.replace(TEMPLATE, order=order), 64) for order in ("official", "history_first")
}
BRANCHES = ("factual", "counterfactual")


def save(folder, **options):
    tiny_model(seed=5, initializer_range=0.6, **options).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of an untrained model."""
    return save(tmp_path_factory.mktemp("judge"))


def made(settings=SETTINGS, records=RECORDS, candidates=8, among=None):
    model, among = tiny_model(seed=5, initializer_range=0.6), among or records
    authors = authors_of(records, among=among)
    return PersonJudge(model, word_tokenizer(), records, among, authors, settings, candidates)


@pytest.mark.parametrize("settings", ORDERS.values(), ids=ORDERS)
def test_likelihoods_are_those_of_separate_forwards(settings):
    judge, texts = made(settings), [["w1 w2", "w1 w2 w9 w4", "", record.response] for record in RECORDS]
    encoder, seen = ExampleEncoder(word_tokenizer(), **vars(settings)), set()
    for line in judge.lines(texts, ()):
        for case, logprobs in zip(judge.groups[line["index"]], line["logprobs"], strict=True):
            seen.add((case.record, case.place))
            record = RECORDS[case.record]
            for text, logprob in zip(texts[case.record], logprobs, strict=True):
                branch = Branch(
                    encoder.renderer.prompt_ids(record.query, case.history), encoder.renderer.response_ids(text)
                )
                with torch.no_grad():
                    expected = -branch_nll(judge.model, branch).double().sum()
                assert logprob == pytest.approx(float(expected), rel=1e-4)
    assert seen == {(index, place) for index in range(len(RECORDS)) for place in range(3)}, (
        "three people, all chosen from"
    )


def test_the_author_is_first_and_a_history_is_computed_once(forwards):
    judge = made(ORDERS["history_first"])
    for cases in judge.groups:
        assert len({case.history for case in cases}) == 1
        for case in cases:
            assert (case.history == RECORDS[case.record].history) is (case.place == 0)
    list(judge.lines([[record.response] for record in RECORDS], ()))
    assert len(forwards) == len(judge.groups)
    assert {case.record for case in made(ORDERS["official"]).groups[1]} == {1}


@pytest.mark.parametrize(("candidates", "others"), [(2, 1), (3, 2), (8, 2)])
def test_fewer_candidates_are_the_first_of_all(candidates, others):
    authors = authors_of(RECORDS)
    for cases in made(candidates=candidates).groups:
        assert [case.place for case in cases] == list(range(others + 1))
    assert [len(authors.others(index)) for index in range(6)] == [2] * 6


def test_shares_of_choices():
    judge = made(ORDERS["official"])
    rows = [
        [[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]],
        [[2.0, 1.0], [2.0, 9.0], [1.0, 1.0]],
        *[[[0.0, 5.0], [1.0, 4.0], [1.0, 4.0]]] * 4,
    ]
    lines = [{"index": index, "logprobs": row} for index, row in enumerate(rows)]
    found = judge.measures(lines, {"right_person_lm": "a", "right_person_lm_reference": "b"})
    assert found["right_person_lm"].scores.per_example.tolist() == [1, 0.5, 0, 0, 0, 0]
    assert found["right_person_lm_reference"].scores.per_example.tolist() == [pytest.approx(1 / 3), 0, 1, 1, 1, 1]


@pytest.mark.parametrize("names", [["right_person_lm", "other"], ["other", "right_person_lm"]])
def test_only_texts_written_with_the_own_history_should_find_their_person(names):
    judge = made(ORDERS["official"])
    lines = [{"index": index, "logprobs": [[1.0, 2.0]] * 3} for index in range(len(judge.groups))]
    found = judge.measures(lines, dict.fromkeys(names, ""))
    assert {name: found[name].higher_is_better for name in names} == {"right_person_lm": True, "other": None}


@pytest.mark.parametrize(
    "settings", [PromptSettings(TEMPLATE, 24), PromptSettings(TEMPLATE, 64, 10)], ids=["all", "response"]
)
def test_a_text_beyond_the_budget_is_judged_by_its_beginning(settings):
    short = [dataclasses.replace(record, query="w1", response="w2 w3") for record in RECORDS]
    judge, seen = made(settings, short), []
    long = [[" ".join(["w7"] * 90), "w2"]] * len(short)

    class Scorer:
        def __call__(self, branches):
            seen.extend(branches)
            return [torch.ones(each.response_length) for each in branches]

    for cases in judge.groups:
        judge._logprobs(Scorer(), cases, long)
    assert max(len(each.input_ids) for each in seen) <= settings.max_length
    assert max(each.response_length for each in seen) > 2


def test_an_evaluation_with_a_judge(model, judge, tmp_path):
    evaluation = evaluate(model, tmp_path, judge_model=judge, generate_branches=BRANCHES, generate_limit=4)
    assert set(contents(tmp_path)) == FILES - {"item_effects.jsonl", "predictions.json"}
    assert read_evaluation(tmp_path) == evaluation
    names = ["right_person_lm", "right_person_lm_counterfactual", "right_person_lm_reference"]
    columns = ["with history", "without", "the person's own"]
    assert [place_of(name) for name in names] == [("texts", "Right person, by LM", column) for column in columns]
    examples, own = read_examples(tmp_path), made(records=RECORDS[:4], among=RECORDS)
    texts = [[*each.generated.values(), each.response] for each in examples[:4]]
    found = own.measures(list(own.lines(texts, ())), dict.fromkeys(names, ""))
    for name in names:
        assert evaluation.metrics[name].value == pytest.approx(found[name].scores.value)
        assert [name in each.scores for each in examples] == [True] * 4 + [False] * 2
    settings = evaluation.settings
    assert (settings["judge_model"], settings["judge_candidates"]) == (judge, 8)


@pytest.mark.parametrize("lines", [6, 13, 18, 19, 22])
def test_a_killed_judge_resumes_to_the_same_bytes(model, judge, tmp_path, lines):
    options = {"judge_model": judge, "prose_file": str(tmp_path / "prose.txt")}
    (tmp_path / "prose.txt").write_text("w1 w2 w3 " * 60)
    evaluate(model, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        evaluate(model, tmp_path / "out", **options, progress=killed_after(lines))
    evaluate(model, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_judge_is_another_evaluation(model, judge, tmp_path):
    with pytest.raises(Killed):
        evaluate(model, tmp_path / "out", judge_model=judge, progress=killed_after(14))
    # The same name, other weights.
    copy = save(tmp_path / "copy", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="judge_model"):
        evaluate(model, tmp_path / "out", judge_model=copy)
    with pytest.raises(CheckpointError, match="judge_candidates"):
        evaluate(model, tmp_path / "out", judge_model=judge, judge_candidates=2)


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_candidates": 1}, "judge_candidates: expected at least 2, got 1"),
        ({"judge_candidates": 9}, "judge_candidates: expected at most 8, got 9"),
        ({"judge_model": "x", "generate_branches": ()}, "judge_model: it judges generated texts, and none are"),
        ({"judge_model": "x", "task": "preferences"}, "judge_model: it judges generated texts, and none are"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        EvaluationOptions(**options)


REFUSED = {
    "missing": ({}, "./nowhere", NextQuillError, "judge_model: there is no folder ./nowhere"),
    "context": ({"settings": PromptSettings(TEMPLATE, 65)}, None, ArgumentError,
                "judge_model: expected a context of at least max_length=65 tokens, got 64"),
    "budget": ({"max_tokens": 60}, None, BudgetError, "max_tokens: expected at least max_length=64 with judge_model"),
    "one person": ({"records": [dataclasses.replace(each, history=()) for each in RECORDS]}, None, ArgumentError,
                   "judge_model: it picks a person among several.* got those of 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_judged_is_named_before_anything_runs(judge, tmp_path, what):
    options, name, error, message = REFUSED[what]
    wide = tiny_model(max_position_embeddings=128, initializer_range=0.6)
    with pytest.raises(error, match=message):
        evaluate(wide, tmp_path / "out", judge_model=name or judge, **options)
    assert not (tmp_path / "out").exists()


def test_a_query_that_does_not_fit_is_named():
    with pytest.raises(BudgetError, match="record 0: "):
        made(PromptSettings(TEMPLATE, 5))
    with pytest.raises(BudgetError, match=r"record 0: its response takes \d+ tokens, there is room for 1"):
        made(PromptSettings(TEMPLATE, 64, 1))


def test_the_lines_are_json(model, judge, tmp_path):
    with pytest.raises(Killed):
        evaluate(model, tmp_path, judge_model=judge, progress=killed_after(6 + 6 + 6 + 2))
    _, *lines = map(json.loads, (tmp_path / "judged.jsonl.partial").read_text().splitlines())
    assert [sorted(line) for line in lines] == [["index", "logprobs"]] * 2
