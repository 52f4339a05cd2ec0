"""From `nextquill score` to `nextquill train --effects_file`: one model's effects weigh the tokens of another."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextquill.data import ExampleEncoder, read_jsonl
from nextquill.models.loading import load_prompt_settings


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    """A model with the estimator's tokenizer and prompts, and other weights."""
    folder = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(trained, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def effects(nextquill, trained, data, tmp_path_factory):
    """The estimator's effects for the training records."""
    file = tmp_path_factory.mktemp("effects") / "effects.jsonl"
    words = ("--eval_file", data / "train.jsonl", "--output_file", file, "--show", 0)
    result = nextquill("score", "--model_name_or_path", trained, *words)
    assert result.code == 0, result.err
    return file


@pytest.fixture
def train_student(train, student, tmp_path):
    def call(*words, folder="run"):
        sizes = ("--max_steps", 1, "--per_device_train_batch_size", 8)
        result = train(tmp_path / folder, "--model_name_or_path", student, *sizes, *words)
        log = tmp_path / folder / "metrics.json"
        return result, json.loads(log.read_text(encoding="utf-8"))["log_history"] if log.exists() else None

    return call


def loss_by_hand(student, data, effects, weight):
    """The mean over records of the mean over tokens of w · nll, with a forward for each record."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    settings = load_prompt_settings(student)
    encoder = ExampleEncoder(tokenizer, settings.template, settings.max_length)
    lines = [json.loads(line) for line in effects.read_text(encoding="utf-8").splitlines()]
    losses, weights = [], []
    for example, line in zip(encoder.encode_all(read_jsonl(data / "train.jsonl")), lines, strict=True):
        branch = example.factual
        with torch.no_grad():
            logits = model(torch.tensor([branch.input_ids])).logits[0].double()
        targets = torch.tensor(branch.response_ids)
        start = len(branch.prompt_ids)
        nll = torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="none")
        effect = torch.tensor(line["nll_counterfactual"]) - torch.tensor(line["nll_factual"])
        weights.append(weight(effect))
        losses.append((weights[-1] * nll).mean())
    return float(torch.stack(losses).mean()), torch.cat(weights)


WEIGHTS = {
    "perce": (("--min_weight", 0.01, "--max_weight", 0.03), lambda effect: effect.clip(0.01, 0.03)),
    "longce": (("--max_weight", 1.01), lambda effect: effect.exp().clamp(max=1.01)),
}


@pytest.mark.parametrize("loss", WEIGHTS)
def test_the_loss_is_that_of_the_estimators_weights(train_student, student, data, effects, loss):
    words, weight = WEIGHTS[loss]
    expected, weights = loss_by_hand(student, data, effects, weight)
    assert weights.unique().numel() > 10, "weights that differ"
    result, log = train_student("--loss", loss, *words, "--effects_file", effects)
    assert result.code == 0, result.err
    assert log[0]["loss"] == pytest.approx(expected, rel=2e-5)
    assert "nll_counterfactual" not in log[0], "no pass without history is made"
    _, own = train_student("--loss", loss, *words, folder="own")
    assert own[0]["loss"] != pytest.approx(expected, rel=1e-3), "its own weights are others"


def test_an_effect_term_keeps_its_pass(train_student, effects):
    result, log = train_student("--loss", "nextquill_detached", "--effects_file", effects)
    assert result.code == 0, result.err
    assert log[0]["nll_counterfactual"] > 0


def test_effects_of_other_records_are_refused_by_line_and_field(train_student, effects, tmp_path):
    lines = effects.read_text(encoding="utf-8").splitlines()
    lines[2] = lines[2].replace('"token_ids": [', '"token_ids": [3, ')
    file = tmp_path / "wrong.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result, log = train_student("--loss", "perce", "--effects_file", file)
    assert result.code == 1
    assert f"nextquill: --effects_file: {file} line 3: field 'token_ids': expected the response" in result.err
    assert log is None


def test_a_file_that_is_not_there_is_refused_at_once(train_student, tmp_path):
    result, log = train_student("--loss", "perce", "--effects_file", tmp_path / "none.jsonl")
    assert (result.code, log) == (1, None)
    assert f"--effects_file: {tmp_path / 'none.jsonl'} is not a file" in result.err


def test_a_loss_without_weights_is_refused(train_student, effects):
    result, _ = train_student("--loss", "sft", "--effects_file", effects)
    assert result.code == 2
    assert "SFTLoss gives all tokens one weight" in result.err
