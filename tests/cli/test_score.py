"""`nextquill score`: per-token effects as JSONL, and some in colour."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextquill.cli import score as command
from nextquill.data import ExampleEncoder, read_jsonl
from nextquill.integrations.loading import load_prompt_settings


@pytest.fixture(scope="module")
def score(nextquill, trained, data):
    def call(output_file, *words):
        flags = ("--model_name_or_path", trained, "--eval_file", data / "eval.jsonl", "--output_file", output_file)
        return nextquill("score", *flags, *words)

    return call


@pytest.fixture(scope="module")
def scored(score, tmp_path_factory):
    """The lines of one output file, and what was printed."""
    file = tmp_path_factory.mktemp("score") / "scores.jsonl"
    result = score(file, "--show", 2, "--batch_size", 2)
    assert result.code == 0, result.err
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], result


def test_values_are_those_of_the_model_alone(scored, trained, data):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    settings = load_prompt_settings(trained)
    examples = ExampleEncoder(tokenizer, settings.template, settings.max_length).encode_all(
        read_jsonl(data / "eval.jsonl"), placebo=True, seed=42
    )

    def nll(branch):
        with torch.no_grad():
            logits = model(torch.tensor([branch.input_ids])).logits[0].double()
        start = len(branch.prompt_ids)
        targets = torch.tensor(branch.response_ids)
        return torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="none")

    for line, example in zip(scored[0], examples, strict=True):
        factual, counterfactual, placebo = (
            nll(getattr(example, name)) for name in ("factual", "counterfactual", "placebo")
        )
        expected = {
            "nll_factual": factual,
            "nll_counterfactual": counterfactual,
            "nll_placebo": placebo,
            "effect_logprob": counterfactual - factual,
            "effect_prob": (-factual).exp() - (-counterfactual).exp(),
        }
        for name, values in expected.items():
            assert line[name] == pytest.approx(values.tolist(), abs=5e-6), name
        assert line["token_ids"] == example.factual.response_ids
        assert line["history_kept"] == example.history_kept


def test_tokens_join_to_the_response(scored, data):
    for line, record in zip(scored[0], read_jsonl(data / "eval.jsonl"), strict=True):
        assert "".join(line["tokens"]) == record.response + "<|endoftext|>"
        assert len(line["tokens"]) == len(line["nll_factual"])
        assert line["user_id"] == record.user_id
    assert [line["index"] for line in scored[0]] == list(range(5))


def test_some_responses_are_printed(scored, data):
    records = read_jsonl(data / "eval.jsonl")
    out = scored[1].out
    for record in records[:2]:
        assert f"{record.user_id}  {record.query}" in out
        assert record.response in out
    assert out.count("<|endoftext|>") == 2
    assert "history lowered p" in out


def test_markup_in_a_query_is_text(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "markup.jsonl", 1, user_id="[bold]me", query="[/red] a [link=x]b[/link]")
    words = ("--eval_file", file, "--output_file", tmp_path / "s.jsonl")
    result = nextquill("score", "--model_name_or_path", trained, *words)
    assert result.code == 0, result.err
    assert "[bold]me  [/red] a [link=x]b[/link]" in result.out


def test_nothing_is_shown_where_nothing_is_asked(score, tmp_path):
    assert score(tmp_path / "s.jsonl", "--show", 0, "--limit", 1).out == ""


def test_an_existing_file_is_not_replaced_unasked(score, tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text("precious")
    assert score(file).code == 1
    assert file.read_text() == "precious"
    assert score(file, "--overwrite", "--limit", 1).code == 0
    assert json.loads(file.read_text())["index"] == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_no_file(score, tmp_path, monkeypatch, error):
    calls = []

    def failing(scores, tokenizer):
        calls.append(scores)
        if len(calls) == 3:
            raise error
        return {}

    monkeypatch.setattr(command, "line", failing)
    if error is KeyboardInterrupt:
        assert score(tmp_path / "s.jsonl").code == 130
    else:
        with pytest.raises(RuntimeError):
            score(tmp_path / "s.jsonl")
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_effects_are_plain_numbers(scored):
    for line in scored[0]:
        assert all(math.isfinite(value) and abs(value) <= 1 for value in line["effect_prob"])
