"""The warning when the no-history pass gets worse, in artificial logs and small real trainings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nextquill import NextQuillLoss, NextQuillTrainer, SFTLoss
from nextquill.training.meter import CounterfactualWatch
from tests.models.model_helpers import make_records, make_trainer

STATE = SimpleNamespace(stateful_callbacks={}, global_step=0, is_world_process_zero=True)


def watching(**options: Any) -> CounterfactualWatch:
    watch = CounterfactualWatch(**{"window": 8, **options})
    watch.on_train_begin(None, STATE, None)
    return watch


def show(watch: CounterfactualWatch, nlls: list[float], sequences: int = 4, tokens: int = 10) -> None:
    for nll in nlls:
        logs = {"nll_counterfactual": nll, "num_tokens": float(tokens), "num_sequences": float(sequences)}
        watch.on_log(None, STATE, None, logs=logs)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "without history" in record.getMessage()]


def test_warns_once_past_the_tolerance(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    show(watch, [4.0, 4.0, 4.4, 4.4])
    assert not warnings_in(caplog), "warned below the tolerance"
    show(watch, [4.6, 4.6, 5.0, 5.0, 6.0, 6.0])
    assert len(warnings_in(caplog)) == 1
    assert "(training) rose from 4.00 to 4.60" in warnings_in(caplog)[0]


def test_a_rise_counts_from_the_lowest(caplog: pytest.LogCaptureFixture) -> None:
    show(watching(), [5.0, 5.0, 4.0, 4.0, 4.7, 4.7])
    assert "rose from 4.00 to 4.70" in warnings_in(caplog)[0]


def test_single_logs_are_averaged_over_the_window(caplog: pytest.LogCaptureFixture) -> None:
    """Noise of ±1 nat around 4 between logs of 4 sequences; the window holds 8."""
    show(watching(), [3.0, 5.0] * 10)
    assert not warnings_in(caplog)


def test_windows_are_means_over_tokens(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    show(watch, [4.0, 4.0])
    show(watch, [9.0], tokens=1)
    show(watch, [4.0], tokens=99)
    assert not warnings_in(caplog)
    assert watch.lowest["training"] == 4.0


def test_evaluations_are_watched_each_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    for metrics in ({"eval_a_nll_counterfactual": 3.0}, {"eval_b_nll_counterfactual": 5.0}):
        watch.on_log(None, STATE, None, logs=metrics)
    assert not warnings_in(caplog), "two data sets were compared with each other"
    watch.on_log(None, STATE, None, logs={"eval_b_nll_counterfactual": 5.6})
    assert "(eval_b) rose from 5.00 to 5.60" in warnings_in(caplog)[0]


def test_evaluations_outside_of_training_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    watch.on_log(None, STATE, None, logs={"eval_nll_counterfactual": 3.0})
    watch.on_train_end(None, STATE, None)
    watch.on_log(None, STATE, None, logs={"eval_nll_counterfactual": 9.0})
    assert not warnings_in(caplog)


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    other = SimpleNamespace(**{**vars(STATE), "is_world_process_zero": False})
    for value in (3.0, 9.0):
        watch.on_log(None, other, None, logs={"eval_nll_counterfactual": value})
    assert watch.warned
    assert not warnings_in(caplog)


def test_advice_depends_on_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    for through in (True, False):
        show(watching(trained_through=through), [4.0, 4.0, 6.0, 6.0])
    first, second = warnings_in(caplog)
    assert "use detach_counterfactual=True" in first
    assert "detach" not in second


@pytest.mark.parametrize("as_list", [False, True], ids=["one", "list"])
def test_state_goes_through_a_checkpoint(as_list: bool, caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    show(watch, [4.0, 4.0, 4.2])
    saved = json.loads(json.dumps(watch.state()))
    again = CounterfactualWatch(window=8)
    stored = {"CounterfactualWatch": [saved] if as_list else saved}
    again.on_train_begin(None, SimpleNamespace(stateful_callbacks=stored, global_step=3), None)
    assert (again.lowest, again.pending) == (watch.lowest, watch.pending)
    show(again, [5.4])
    assert "rose from 4.00 to 4.80" in warnings_in(caplog)[0], "the half window was not kept"


# ---- real trainings --------------------------------------------------------------------------------


def run(folder: Path, loss: Any, **options: Any) -> NextQuillTrainer:
    defaults = {"max_steps": 24, "callbacks": [CounterfactualWatch(window=16)]}
    trainer = make_trainer(
        folder, loss, train_dataset=make_records(16), per_device_train_batch_size=8, learning_rate=3e-3,
        **{**defaults, **options},
    )  # fmt: skip
    trainer.train()
    return trainer


def test_official_loss_makes_the_counterfactual_worse_and_is_caught(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, NextQuillLoss(alpha=3.0))
    nlls = [log["nll_counterfactual"] for log in trainer.state.log_history if "nll_counterfactual" in log]
    assert nlls[-1] > nlls[0] + 2, "the no-history pass did not collapse, so this test shows nothing"
    assert len(warnings_in(caplog)) == 1


def test_detached_loss_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, NextQuillLoss(alpha=3.0, detach_counterfactual=True))
    nlls = [log["nll_counterfactual"] for log in trainer.state.log_history if "nll_counterfactual" in log]
    assert nlls[-1] < nlls[0] - 1
    assert not warnings_in(caplog)


def test_evaluation_alone_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, NextQuillLoss(alpha=3.0), eval_dataset=make_records(16), eval_strategy="steps", eval_steps=4,
        logging_steps=1000)  # fmt: skip
    assert len(warnings_in(caplog)) == 1
    assert "(eval)" in warnings_in(caplog)[0]


def watch_of(trainer: NextQuillTrainer) -> CounterfactualWatch:
    (found,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, CounterfactualWatch))
    return found


def test_the_watch_survives_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that stopped before the warning resumes with the lowest value so far."""
    options = {"save_strategy": "steps", "save_steps": 2, "callbacks": [CounterfactualWatch(window=16, tolerance=1.0)]}
    first = run(tmp_path, NextQuillLoss(alpha=3.0), max_steps=2, **options)
    assert not warnings_in(caplog)
    options["callbacks"] = [watch := CounterfactualWatch(window=16, tolerance=1.0)]
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(
        tmp_path, NextQuillLoss(alpha=3.0), train_dataset=make_records(16), per_device_train_batch_size=8,
        learning_rate=3e-3, max_steps=24, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert watch.lowest["training"] == watch_of(first).lowest["training"]
    assert len(warnings_in(caplog)) == 1


def test_the_default_watch_knows_the_loss(tmp_path: Path) -> None:
    expected = {SFTLoss(): False, NextQuillLoss(): True, NextQuillLoss(detach_counterfactual=True): False}
    for loss, through in expected.items():
        assert watch_of(make_trainer(tmp_path, loss)).trained_through is through


def test_a_given_watch_takes_the_place_of_the_default(tmp_path: Path) -> None:
    own = CounterfactualWatch(tolerance=2.0)
    trainer = make_trainer(tmp_path, callbacks=[own])
    assert watch_of(trainer) is own
