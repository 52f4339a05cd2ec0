"""Training: exact with accumulation, logs, precision, workers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from nextquill import NextQuillLoss, SFTLoss
from nextquill.data import EncodedDataset
from nextquill.tree import build_prefix_tree
from tests.models.model_helpers import (
    assert_same_tensors,
    branch_nll,
    gradients,
    logs_of,
    loss_cases,
    make_records,
    make_trainer,
    parameters,
    reference_loss,
    tiny_model,
)

UNPAIRED = {"loss_factual", "nll_factual", "token_weight", "num_tokens", "num_sequences", "users_per_step"}
PAIRED = UNPAIRED | {
    "loss_effect", "loss_counterfactual", "nll_counterfactual", "effect_logprob", "effect_prob",
    "share_above_threshold", "token_weight",
}  # fmt: skip
OWN = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("loss_name", ["sft", "perce", "detached", "official"])
def test_accumulation_changes_nothing(tmp_path: Path, loss_name: str, reduction: str) -> None:
    """12 records of different lengths in windows of 8 give two optimiser steps, the last with a partial window."""

    def run(batch_size: int, accumulation: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        trainer = make_trainer(
            tmp_path,
            loss_cases(reduction=reduction)[loss_name].loss,
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # Adam divides by the gradient's size, so that rounding could flip an update
            learning_rate=0.3,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        logs = logs_of(trainer)[:2]
        for log in logs:
            del log["epoch"]  # counted in batches
        return parameters(trainer), logs

    whole, whole_logs = run(8, 1)
    start = tiny_model().state_dict()
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-2, "nothing was trained"
    for split in ((1, 8), (4, 2)):
        got, logs = run(*split)
        for name, expected in whole.items():
            difference = float((got[name] - expected).abs().max())
            assert difference <= 1e-6, f"{split[0]} x {split[1]}: {name} differs by {difference:.1e} from 8 x 1"
        for log, expected_log in zip(logs, whole_logs, strict=True):
            assert log == pytest.approx(expected_log, rel=1e-4, abs=1e-6), f"log of {split[0]} x {split[1]}"


@pytest.mark.parametrize("loss_name", ["perce", "anchored", "paper"])
def test_logged_metrics_equal_independent_values(tmp_path: Path, loss_name: str) -> None:
    case = loss_cases()[loss_name]
    trainer = make_trainer(
        tmp_path, case.loss, train_dataset=make_records(4), learning_rate=0.0, logging_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    trainer.train()
    model, examples = trainer.model.eval(), trainer.train_dataset.examples
    log = logs_of(trainer)[0]
    assert log.keys() == PAIRED | OWN
    nll_f = torch.cat([branch_nll(model, example.factual) for example in examples]).detach()
    nll_c = torch.cat([branch_nll(model, example.counterfactual) for example in examples]).detach()
    effect_prob = (-nll_f).exp() - (-nll_c).exp()
    pair = type("Pair", (), {"factual": nll_f, "counterfactual": nll_c})
    expected = {
        "loss": float(reference_loss(case, model, examples).detach()),
        "nll_factual": nll_f.mean(),
        "nll_counterfactual": nll_c.mean(),
        "effect_logprob": (nll_c - nll_f).mean(),
        "effect_prob": effect_prob.mean(),
        "share_above_threshold": (effect_prob > case.loss.threshold).float().mean(),
        "token_weight": case.weights(pair).mean(),
        "num_tokens": 2 * len(nll_f),
        "num_sequences": 2 * 4,
        "users_per_step": 4,
    }
    for name, value in expected.items():
        assert log[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), f"logged {name}"
    alpha, anchor = case.options.get("alpha", 0.0), case.options.get("anchor", 0.0)
    parts = log["loss_factual"] + alpha * log["loss_effect"] + anchor * log["loss_counterfactual"]
    assert parts == pytest.approx(log["loss"], rel=1e-4), "the logged terms do not add up to the loss"


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_sft_runs_and_logs_one_stream(tmp_path: Path, attention: str) -> None:
    trainer = make_trainer(tmp_path, SFTLoss(), logging_steps=1, attention=attention)
    trainer.train()
    (part,) = next(iter(trainer.get_train_dataloader()))["parts"]
    assert [list(forward["rows"]) for forward in part["forwards"]] == [["factual"]]
    assert logs_of(trainer)[0].keys() == UNPAIRED | OWN


def test_log_holds_no_nan_and_evaluation_logs_no_training_metrics(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=make_records(5, seed=2), eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.evaluate()
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, float)), log
        assert "eval_loss" not in log or not PAIRED & log.keys(), "training metrics in an evaluation's log"
    assert [log["num_sequences"] for log in trainer.state.log_history if "loss" in log] == [4, 4]


def test_a_second_training_starts_a_new_interval(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=2, max_steps=3)
    trainer.train()  # the third step is in no log
    trainer.train()
    assert trainer.state.log_history[0]["num_sequences"] == 8, "sequences of the interval's two steps"


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["auto", "mask", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_bf16_autocast_trains(tmp_path: Path, kind: str, attention: str) -> None:
    trainer = make_trainer(
        tmp_path,
        None,
        tiny_model(kind),
        bf16=True,
        eval_dataset=make_records(4),
        learning_rate=0.0,
        attention=attention,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact = make_trainer(tmp_path, None, tiny_model(kind), eval_dataset=make_records(4)).evaluate()
    for name in ("eval_loss", "eval_nll_factual", "eval_nll_placebo"):
        assert metrics[name] == pytest.approx(exact[name], rel=3e-2), f"{name} under autocast"
        assert metrics[name] != exact[name], "autocast was not on"


def test_a_model_trained_under_autocast_can_be_trained_again(tmp_path: Path) -> None:
    model = tiny_model()
    for _ in range(2):
        make_trainer(tmp_path, None, model, bf16=True, max_steps=1).train()


@pytest.mark.parametrize("loss_name", ["official", "detached"])
def test_bf16_weights_train(tmp_path: Path, loss_name: str) -> None:
    trainer = make_trainer(tmp_path, loss_cases()[loss_name].loss, tiny_model(dtype=torch.bfloat16), max_steps=3)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


@pytest.mark.slow
def test_dataloader_workers_change_nothing(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 1):
        trainer = make_trainer(tmp_path, dataloader_num_workers=workers, eval_dataset=make_records(5))
        trainer.train()
        runs.append((parameters(trainer), trainer.evaluate()["eval_loss"]))
    assert_same_tensors(runs[1][0], runs[0][0], 0.0, "parameters with a worker")
    assert runs[0][1] == runs[1][1]


@pytest.mark.skipif(not hasattr(Trainer, "_track_num_input_tokens"), reason="this transformers counts in its loop")
@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_counts_of_tokens_and_operations_cover_the_branches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, attention: str
) -> None:
    """Counts computed tokens: those of trees, or of padded rows without the padding."""
    trainer = make_trainer(
        tmp_path, include_num_input_tokens_seen="non_padding", max_steps=3, save_strategy="no", attention=attention
    )
    trainer.train()
    examples = trainer.train_dataset.examples
    branches = [branch.input_ids for example in examples for branch in (example.factual, example.counterfactual)]
    own, seen = sum(map(len, branches)), trainer.state.num_input_tokens_seen
    if attention == "padded":
        assert seen == own, "non-padding tokens of both branches"
    else:
        # The counterfactual has a forward of its own; batches share less than the whole set does.
        sets = [[e.factual.input_ids for e in examples], [e.counterfactual.input_ids for e in examples]]
        assert sum(len(build_prefix_tree(each)) for each in sets) <= seen < own
    assert trainer.state.total_flos > 6 * trainer.model.num_parameters() * seen / 3
    messages = [record.getMessage() for record in caplog.records]
    assert not [text for text in messages if "number of tokens" in text], "a warning that tokens could not be counted"


def test_compute_loss_outside_of_training(tmp_path: Path) -> None:
    """A subclass or a script gets this batch's own loss, with its diagnostics."""
    case = loss_cases()["official"]
    trainer = make_trainer(tmp_path, case.loss)
    examples = trainer.train_dataset.examples[:3]
    batch = trainer.data_collator(examples)
    loss, (output,) = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert output.num_sequences == 3
    expected = gradients(trainer.model, reference_loss(case, trainer.model, examples))
    assert_same_tensors(gradients(trainer.model, loss), expected, 1e-5, "gradient of compute_loss")


def test_encoded_examples_are_taken_as_they_are(tmp_path: Path) -> None:
    encoded = make_trainer(tmp_path).train_dataset
    assert isinstance(encoded, EncodedDataset)
    trainer = make_trainer(tmp_path, train_dataset=encoded)
    assert trainer.train_dataset is encoded


def test_saved_model_loads_and_scores_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path, NextQuillLoss(), eval_dataset=make_records(4))
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    metrics = make_trainer(tmp_path, NextQuillLoss(), again, eval_dataset=make_records(4)).evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
