"""`train --loss mirror` and `mirror_f`: what they write, resuming, adapters, a dry run, and what they refuse."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nextquill.cli.options import LossOptions
from nextquill.errors import ArgumentError
from nextquill.mirror import MirrorLoss

SHORT = ("--max_new_tokens", 5)


def samples(folder):
    return [json.loads(line) for line in (folder / "sampled_responses.jsonl").read_text().splitlines()]


def test_a_run_writes_its_samples_and_logs_both_terms(train, data, tmp_path):
    folder = tmp_path / "run"
    words = ("--loss", "mirror_f", *SHORT, "--num_rollouts", 2, "--eval_file", data / "eval.jsonl")
    result = train(folder, *words, "--logging_steps", 1)
    assert result.code == 0, result.err
    assert "loss mirror_f" in result.err
    lines = samples(folder)
    assert [line["step"] for line in lines] == [0] * 8 + [1] * 8
    assert all(1 <= line["tokens"] <= 5 for line in lines)
    metrics = json.loads((folder / "metrics.json").read_text())
    first = metrics["log_history"][0]
    assert first["loss"] == pytest.approx(1.0), "the first step is divided by its own terms"
    assert first["loss_factual"] > 0
    assert first["loss_effect"] > 0
    assert metrics["eval"]["eval_loss"] == pytest.approx(metrics["eval"]["eval_nll_factual"], rel=0.1)
    prompt = json.loads((folder / "nextquill_prompt.json").read_text())
    assert prompt["template"]["order"] == "history_first"


def test_a_config_file_and_flags_resume_to_the_weights_of_an_uninterrupted_run(nextquill, data, tmp_path):
    whole, halves, config = tmp_path / "whole", tmp_path / "halves", tmp_path / "c.yaml"
    config.write_text(
        f"train_file: {data / 'train.jsonl'}\nmodel_name_or_path: tiny\nmax_steps: 4\nsave_steps: 2\n"
        "per_device_train_batch_size: 4\nlearning_rate: 1e-3\nlr_scheduler_type: constant\nloss: mirror_f\nalpha: 0.3\n"
        "beta: 0.4\nmax_new_tokens: 5\nsave_strategy: steps\ntemperature: 0.8\n"
    )
    assert nextquill("train", "--config", config, "--output_dir", whole).code == 0
    assert nextquill("train", "--config", config, "--output_dir", halves, "--max_steps", 2).code == 0
    resumed = nextquill("train", "--config", config, "--output_dir", halves, "--resume_from_checkpoint")
    assert resumed.code == 0, resumed.err
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert samples(whole) == samples(halves)
    other = nextquill("train", "--config", config, "--output_dir", halves, "--resume_from_checkpoint", "--beta", 0.9)
    assert (other.code, "another loss" in other.err) == (1, True), other.err


def test_adapters(train, trained, tmp_path):
    words = ("--loss", "mirror", *SHORT, "--lora_r", 2, "--model_name_or_path", trained, "--log_samples_every", 0)
    result = train(tmp_path / "run", *words)
    assert result.code == 0, result.err
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert not (tmp_path / "run" / "sampled_responses.jsonl").exists()


def test_adapters_get_no_larger_learning_rate(nextquill, trained, data, tmp_path):
    words = ("--model", trained, "--train_file", data / "train.jsonl", "--output_dir", tmp_path / "run", "--lora_r", 2)
    result = nextquill("train", *words, "--loss", "mirror", *SHORT, "--max_steps", 1, "--logging_steps", 1)
    assert result.code == 0, result.err
    assert "learning rate" not in result.err
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).learning_rate == 5e-5


def test_a_dry_run_says_what_is_sampled(train, tmp_path):
    result = train(tmp_path / "run", "--loss", "mirror", *SHORT, "--num_rollouts", 3, "--dry_run")
    assert result.code == 0, result.err
    assert "samples " in result.out
    assert "3 an example in each step, at most 5 tokens" in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss mirror --alpha 0.1", "--alpha: --loss mirror sets it to 0.0, got 0.1; see --loss mirror_f"),
        ("--loss mirror_f --alpha 2", "--alpha: expected a number from 0 to 1, got 2.0"),
        ("--loss sft --beta 0.1", "--beta: --loss sft has no such option"),
        ("--temperature 0.5", "--temperature: --loss perce samples no responses; see --loss mirror"),
        ("--loss mirror --reference text", "--reference: expected words with {response} in them, got 'text'"),
        ("--loss mirror --max_new_tokens 0", "--max_new_tokens: expected at least 1, got 0"),
        ("--loss mirror --num_rollouts 0", "--num_rollouts: expected at least 1, got 0"),
        ("--loss mirror --temperature -1", "--temperature: expected 0 (greedy) or more, got -1.0"),
        ("--loss mirror --reduction micro_batch", "--reduction: expected 'sequence' or 'token', got 'micro_batch'"),
        ("--loss mirror --effects_file EVAL", "--effects_file: --loss mirror has no token weights; leave it out"),
    ],
)
def test_a_wrong_value_is_named_before_any_work(train, data, tmp_path, words, message):
    result = train(tmp_path / "run", *words.replace("EVAL", str(data / "eval.jsonl")).split())
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_prepared_examples_are_refused(train, nextquill, trained, data, tmp_path):
    given = ("--train_file", data / "train.jsonl", "--model_name_or_path", trained, "--output_dir", tmp_path / "p")
    assert nextquill("prepare", *given).code == 0
    words = ("--loss", "mirror", "--train_file", tmp_path / "p", "--model_name_or_path", trained)
    result = train(tmp_path / "run", *words)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "--train_file: --loss mirror reads records, as the teacher's prompt shows the user's response" in result.err


def test_losses_and_their_arguments():
    assert repr(LossOptions(loss="mirror").build()) == repr(MirrorLoss())
    assert repr(LossOptions(loss="mirror_f", beta=0.2).build()) == repr(MirrorLoss(0.2, 0.5))
    assert repr(LossOptions(loss="mirror_f", alpha=0.2).build()) == repr(MirrorLoss(0.5, 0.2))
    with pytest.raises(ArgumentError, match="min_weight: --loss mirror has no such option"):
        LossOptions(loss="mirror", min_weight=0.2).build()
