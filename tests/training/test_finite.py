"""Steps that are not finite: they stop the run before they are applied, or are skipped and counted."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextquill import NextQuillTrainer, NonFiniteError, PerCELoss
from nextquill.training.finite import FiniteGuard
from tests.models.model_helpers import logs_of, make_records, make_trainer, parameters, tiny_model

POISON = 83  # the id of w77, which no record holds by itself


def poisoned() -> nn.Module:
    """A model that gives NaN to every row with the word w77."""
    model = tiny_model()

    def spoil(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == POISON).any(-1)[:, None, None], math.nan)

    model.get_input_embeddings().register_forward_hook(spoil)
    return model


def records_with_poison(*places: int) -> list[dict[str, Any]]:
    records = make_records()
    for place in places:
        records[place]["query"] = "w77"
    return records


def trainer_with(folder: Path, *places: int, **options: Any) -> NextQuillTrainer:
    """Records in their order, two in a step, those at `places` poisoned; a checkpoint after every step."""
    settings = {
        "attention": "padded", "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential",
        "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return make_trainer(folder, model=poisoned(), train_dataset=records_with_poison(*places), **{**settings, **options})


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_a_step_that_is_not_finite_is_not_applied(tmp_path: Path, options: dict[str, Any]) -> None:
    """The fourth batch: step 4, or step 2 of two batches each."""
    trainer = trainer_with(tmp_path, 7, **options)
    step = 2 if options.get("gradient_accumulation_steps") else 4
    with pytest.raises(NonFiniteError, match=rf"^step {step}: the loss is not finite, with example 7 \(user 'u3'\);"):
        trainer.train()
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == f"checkpoint-{step - 1}"
    assert all(math.isfinite(log["loss"]) and log["loss"] > 0 for log in logs_of(trainer))


def test_the_error_names_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"\(last checkpoints: checkpoint-2 and checkpoint-3\); try a smaller"):
        trainer_with(tmp_path, 7).train()
    with pytest.raises(NonFiniteError, match=r"\(last checkpoints: none\); the model gives this before any training"):
        trainer_with(tmp_path / "other", 1).train()


def test_an_nll_that_the_loss_does_not_show_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weighting that clips hides a counterfactual NLL that overflowed: the loss and its gradient are finite."""
    trainer = trainer_with(tmp_path)
    add = trainer.meter.add

    def overflowing(output: Any, *counts: int) -> Tensor:
        pair = output.pair_nll._replace(counterfactual=torch.full_like(output.pair_nll.factual, math.inf))
        output = SimpleNamespace(**{**vars(output), "pair_nll": pair})
        return add(output, *counts)

    monkeypatch.setattr(trainer.meter, "add", overflowing)
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite"):
        trainer.train()


def test_a_gradient_that_is_not_finite_counts_too(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    weight = trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: gradient * math.inf if trainer.state.global_step == 2 else gradient)
    message = r"step 3: the gradient's norm is not finite, with example 4 \(user 'u0'\), example 5 \(user 'u1'\);"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A step of 1e30 is finite, and its weights are; no forward survives them."""
    trainer = trainer_with(tmp_path, learning_rate=1e30, max_steps=1)
    with pytest.raises(NonFiniteError, match="step 1: expected finite weights to save, got model"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint*"))
    with pytest.raises(NonFiniteError, match="expected finite weights"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


# ---- skipped steps -----------------------------------------------------------------------------------


class Weights(FiniteGuard):
    """Notes the weights after every step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = [*getattr(self, "seen", []), kwargs["model"].lm_head.weight.detach().clone()]


def test_a_skipped_step_moves_nothing_and_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = Weights(max_skipped_steps=2)
    trainer = trainer_with(tmp_path, 5, 7, callbacks=[guard], weight_decay=0.1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    same = [torch.equal(one, other) for one, other in zip(guard.seen, guard.seen[1:], strict=False)]
    assert same == [False, True, True, False, False]
    assert guard.skipped == [3, 4]
    assert "steps skipped, because their loss or gradient was not finite: 2 of 6 (3, 4)" in caplog.text
    assert trainer.state.log_history[-2]["skipped_steps"] == 2


def test_logged_means_leave_skipped_steps_out(tmp_path: Path) -> None:
    """Steps 2 and 4 of 6 are poisoned; the intervals are (1, 2), (3, 4) and (5, 6)."""
    options = {"learning_rate": 0.0, "save_strategy": "no"}
    each = trainer_with(tmp_path, 2, 6, callbacks=[FiniteGuard(2)], logging_steps=1, **options)
    pairs = trainer_with(tmp_path, 2, 6, callbacks=[FiniteGuard(2)], logging_steps=2, **options)
    each.train()
    pairs.train()
    single = [log for log in each.state.log_history if "loss" in log]
    for name in ("loss", "nll_factual", "effect_logprob"):
        assert [math.isnan(log[name]) for log in single] == [False, True, False, True, False, False], name
        found = [log[name] for log in pairs.state.log_history if "loss" in log]
        assert found[:2] == pytest.approx([single[0][name], single[2][name]], rel=1e-5), name
    known = [log["loss"] for log in single if not math.isnan(log["loss"])]
    assert pairs.state.log_history[-1]["train_loss"] == pytest.approx(sum(known) / len(known), rel=1e-5)


def test_skipped_steps_are_counted_over_resumes(tmp_path: Path) -> None:
    trainer_with(tmp_path, 1, 7, callbacks=[FiniteGuard(1)], max_steps=2).train()
    resumed = trainer_with(tmp_path, 1, 7, callbacks=[FiniteGuard(1)])
    with pytest.raises(NonFiniteError, match="step 4"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.guard.skipped == [1]


class Scaler:
    """Stands for the gradient scaler of float16, which needs a GPU."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (0.5, True)])
def test_an_overflow_of_float16_is_its_scalers_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, stops: bool
) -> None:
    trainer = trainer_with(tmp_path, callbacks=[FiniteGuard()])
    trainer._begin_step()
    trainer._watched = [torch.ones(())]
    monkeypatch.setattr(trainer.accelerator, "scaler", Scaler(scale))
    if stops:
        with pytest.raises(NonFiniteError, match="the gradient's norm is not finite"):
            trainer._get_grad_norm(trainer.model, torch.tensor(math.inf))
    else:
        assert trainer._get_grad_norm(trainer.model, torch.tensor(math.inf)) == math.inf


# ---- a loss above its start --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "norm", "said"),
    [
        ([2.0, 3.0, 4.0, 4.0], 1.0, "the loss began at 2.000 and was at least 4.000 in the second half of the run"),
        ([2.0, 1.9, 1.9, 1.9], 0.0, "the gradient was 0, and the loss 1.900, in the second half of the run"),
        ([2.0, 3.0, 2.5, 2.1], 1.0, ""),
        ([2.0, 2.1, 2.1, 2.1], 1.0, ""),
        ([2.0, 9.0], 1.0, ""),
        ([2.0, 9.0, 1.0, 0.5], 1.0, ""),
    ],
    ids=["stays above", "no gradient", "returns", "noise", "too short", "falls"],
)
def test_a_run_that_does_not_learn_is_said(
    losses: list[float], norm: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    logs = [{"loss": loss, "grad_norm": norm} for loss in losses]
    state = SimpleNamespace(is_world_process_zero=True, log_history=logs, global_step=9)
    FiniteGuard().on_train_end(SimpleNamespace(learning_rate=0.1), state, None)
    assert [record.getMessage()[: len(said)] for record in caplog.records] == [said] * bool(said)


def test_a_learning_rate_that_is_far_too_large_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls, from that of random weights to that of equal probabilities."""
    make_trainer(tmp_path, PerCELoss(), learning_rate=1e6, max_steps=4).train()
    assert "the gradient was 0, and the loss 3.651, in the second half of the run" in caplog.text


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, eval_dataset=records_with_poison(0), eval_strategy="steps", eval_steps=1)
    with pytest.raises(NonFiniteError, match="step 1: the evaluation's loss is nan"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
