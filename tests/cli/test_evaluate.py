"""`nextquill evaluate`: the figures, where they come from, and where they go."""

import json

import pytest
import torch

from nextquill.cli.evaluate import summarise
from nextquill.integrations.scoring import ExampleScores


def evaluate(nextquill, model, data, *words):
    return nextquill("evaluate", "--model_name_or_path", model, "--eval_file", data / "eval.jsonl", *words)


def test_figures_equal_the_trainers_own(nextquill, trained, data, tmp_path):
    result = evaluate(nextquill, trained, data, "--generate", "false", "--output_file", tmp_path / "m.json")
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "m.json").read_text())
    own = json.loads((trained / "metrics.json").read_text())["eval"]
    for name in ("nll_factual", "nll_counterfactual", "nll_placebo", "effect_prob", "share_above_threshold"):
        assert metrics[name] == pytest.approx(own[f"eval_{name}"], rel=1e-5, abs=1e-8), name
    for name in ("effect_logprob", "effect_placebo"):  # small differences of large numbers
        assert metrics[name] == pytest.approx(own[f"eval_{name}"], abs=1e-6), name
    assert metrics["tokens"] == own["eval_num_tokens"]
    assert metrics["examples"] == 5


def test_batch_size_changes_nothing(nextquill, trained, data, tmp_path):
    for size in (1, 4):
        evaluate(nextquill, trained, data, "--generate", "false", "--batch_size", size,
                 "--output_file", tmp_path / f"{size}.json")  # fmt: skip
    one, four = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-5, abs=1e-6)


def test_a_checkpoint_is_prompted_as_its_run_was(nextquill, train, data, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--max_steps", 1, "--prompt_order", "history_first", "--system_prompt", "Be brief.").code == 0
    outputs = []
    for number, words in enumerate(([folder], [folder / "checkpoint-1"], [folder, "--prompt_order", "official"])):
        file = tmp_path / f"{number}.json"
        assert evaluate(nextquill, words[0], data, "--generate", "false", "--output_file", file, *words[1:]).code == 0
        outputs.append(json.loads(file.read_text()))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_the_table_and_rouge(nextquill, trained, data):
    result = evaluate(nextquill, trained, data, "--max_new_tokens", 4, "--generate_limit", 2, "--limit", 3)
    assert result.code == 0, result.err
    for label in ("nll with the user's history", "under another user's history", "ROUGE-L, generated without history"):
        assert label in result.out
    assert result.err == ""


def test_an_existing_output_file_is_not_replaced_unasked(nextquill, trained, data, tmp_path):
    file = tmp_path / "deep" / "m.json"
    words = ("--generate", "false", "--limit", 1, "--output_file", file)
    assert evaluate(nextquill, trained, data, *words).code == 0
    file.write_text("precious")
    refused = evaluate(nextquill, trained, data, *words)
    assert refused.code == 1
    assert refused.err == f"nextquill: --output_file: {file} exists; give another name or --overwrite\n"
    assert file.read_text() == "precious"
    assert evaluate(nextquill, trained, data, *words, "--overwrite").code == 0
    assert json.loads(file.read_text())["examples"] == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--limit", 0], 2, "--limit: expected a positive number, got 0"),
        (["--batch_size", -1], 2, "--batch_size: expected a positive number, got -1"),
        (["--generate_limit", 0], 2, "--generate_limit: expected a positive number"),
        (["--max_new_tokens", 0], 2, "--max_new_tokens: expected a positive number"),
        (["--dtype", "int8"], 2, "argument --dtype: invalid choice: 'int8'"),
        (["--max_length", 20], 1, "--eval_file: record 0 (user 'u0'): the prompt without any history takes"),
        (["--max_length", 5000], 2, "--max_length: expected at most the model's context of 4096 tokens"),
        (["--output_file", "."], 1, "--output_file: . is a folder"),
        (["--model_name_or_path", "tiny"], 1, "a new 'tiny' model can only be trained"),
        (["--model_name_or_path", "./nowhere"], 1, "there is no folder ./nowhere"),
        (["--eval_file", "nowhere.jsonl"], 1, "--eval_file: nowhere.jsonl: cannot be read: No such file"),
    ],
)
def test_mistakes_are_named(nextquill, trained, data, words, code, message):
    result = evaluate(nextquill, trained, data, *words)
    assert result.code == code, result.err
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


def test_a_run_that_has_not_finished_names_its_checkpoint(nextquill, data, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    result = evaluate(nextquill, tmp_path, data)
    assert result.code == 1
    assert f"its run has not finished, there is {tmp_path / 'checkpoint-2'}" in result.err


def test_records_of_one_user_have_no_placebo(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "one.jsonl", 3, user_id="only")
    result = nextquill("evaluate", "--model_name_or_path", trained, "--eval_file", file, "--generate", "false")
    assert result.code == 0, result.err
    assert "another" not in result.out


def test_summary_by_hand():
    def scores(factual, counterfactual, placebo):
        return ExampleScores(None, [], *(torch.tensor(x) for x in (factual, counterfactual, placebo)))

    metrics = summarise([scores([1.0, 2.0], [2.0, 2.0], [3.0, 2.0]), scores([3.0], [5.0], [4.0])])
    assert metrics["nll_factual"] == 2.0
    assert metrics["nll_counterfactual"] == 3.0
    assert metrics["effect_logprob"] == 1.0
    assert metrics["effect_placebo"] == 1.0
    assert metrics["share_above_threshold"] == pytest.approx(1 / 3)
    assert (metrics["examples"], metrics["tokens"]) == (2.0, 3.0)
