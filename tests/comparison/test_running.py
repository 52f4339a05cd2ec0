"""Comparisons are fair: all arms have the same start and the same examples in the same order. Stopped runs resume."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from nextquill.comparison import running
from nextquill.comparison.arms import ARMS, BASE
from nextquill.comparison.folder import RunRecord, read_record, run_folder, write_record
from nextquill.comparison.measuring import ComparedTrainer, RunMeter
from nextquill.comparison.running import (
    PlannedRun,
    Setup,
    check_all_alike,
    finished,
    match_time,
    perform,
    remaining_seconds,
    run_arguments,
)
from nextquill.data import EncodedDataset, ExampleEncoder, HistoryItem, PromptTemplate, Record
from nextquill.errors import CheckpointError
from nextquill.models.loading import PromptSettings, load_model
from tests.report.example_runs import write_evaluation

RECORDS = [
    Record(f"u{i % 3}", f"query {i}", f"the answer of number {i}", (HistoryItem(f"a text {i}"),)) for i in range(8)
]
SETTINGS = PromptSettings(PromptTemplate(), 256)
STEPS = 3


class KilledError(Exception):
    """Stands for a process that is killed."""


@contextlib.contextmanager
def unattended(trainer):
    yield SimpleNamespace(requested=False)


def evaluate(model, tokenizer, settings, folder, name):
    """Stand in for an evaluation, and keep the model's weights for the test."""
    folder.mkdir(parents=True)
    torch.save({key: value.clone() for key, value in model.state_dict().items()}, folder / "weights.pt")
    (folder / "evaluation.json").write_text("{}")


def start(seed):
    return load_model("tiny", records=lambda: RECORDS, seed=seed)


@pytest.fixture(scope="module")
def dataset():
    return EncodedDataset(ExampleEncoder(start(0)[1], SETTINGS.template, SETTINGS.max_length).encode_all(RECORDS))


@pytest.fixture
def setup(dataset, tmp_path):
    args = TrainingArguments(
        str(tmp_path / "unused"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none",
        disable_tqdm=True, save_steps=1, save_total_limit=2, logging_steps=1,
    )  # fmt: skip
    arms = [ARMS["sft"], ARMS["sft_2lr"], ARMS["nextquill_detached"]]
    return Setup(tmp_path / "out", arms, (0, 1), start, False, args, dataset, SETTINGS, evaluate, unattended)


@pytest.fixture
def seen(monkeypatch):
    """For each training, the indices of its examples and the number of tokens that each step computes."""
    trainings, see, begin = [], RunMeter.see, RunMeter.on_train_begin

    def on_train_begin(self, *args, **kwargs):
        trainings.append(([], []))
        return begin(self, *args, **kwargs)

    def spy(self, batches):
        for batch in batches:
            trainings[-1][0].append(batch["example_index"].tolist())
            trainings[-1][1].append([f["input_ids"].numel() for part in batch["parts"] for f in part["forwards"]])
        see(self, batches)

    monkeypatch.setattr(RunMeter, "on_train_begin", on_train_begin)
    monkeypatch.setattr(RunMeter, "see", spy)
    return trainings


def weights(setup, name, seed=0):
    return torch.load(run_folder(setup.folder, name, seed) / "evaluation" / "weights.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_arms_of_a_seed_begin_alike_and_see_the_same_and_other_seeds_do_not(setup, seen):
    names = (None, "sft", "sft_2lr", "nextquill_detached")
    records = [perform(setup, PlannedRun(None if name is None else ARMS[name], 0)) for name in names]
    assert len({record.start for record in records}) == 1
    assert len({record.order for record in records[1:]}) == 1
    assert seen[0][0] == seen[1][0] == seen[2][0]
    other = perform(setup, PlannedRun(ARMS["sft"], 1))
    assert other.start != records[0].start
    assert other.order != records[1].order
    assert seen[3][0] != seen[0][0]
    # Twice the rate in the run's own schedule, and other weights in the end.
    rates = [_first_rate(setup, name) for name in ("sft", "sft_2lr", "nextquill_detached")]
    assert rates == pytest.approx([1e-3, 2e-3, 1e-3])
    assert [record.learning_rate for record in records] == [None, 1e-3, 2e-3, 1e-3]
    assert not same(weights(setup, "sft"), weights(setup, "sft_2lr"))
    # SFT runs the prompts with history once; a causal loss runs both.
    lengths = {example.index: len(example.factual.input_ids) for example in setup.train_dataset.examples}
    for indices, tokens in zip(*seen[0], strict=True):
        assert sum(tokens) <= sum(lengths[index] for index in indices)
    assert all(sum(more) > sum(less) for less, more in zip(seen[0][1], seen[2][1], strict=True))


def _first_rate(setup, name):
    log = json.loads((run_folder(setup.folder, name, 0) / "metrics.json").read_text())["log_history"]
    return log[0]["learning_rate"]


def test_a_finished_run_leaves_its_files_and_no_checkpoints(setup):
    record = perform(setup, PlannedRun(ARMS["sft"], 0))
    folder = run_folder(setup.folder, "sft", 0)
    names = {path.name for path in folder.iterdir()}
    assert names == {"evaluation", "metrics.json", "nextquill_prompt.json", "nextquill_run.json", "run.json"}
    assert record == read_record(folder) == finished(setup, PlannedRun(ARMS["sft"], 0))
    assert (record.steps, record.examples, record.sessions) == (STEPS, 2 * STEPS, 1)
    assert 0 < record.seconds < record.wall_seconds
    assert record.peak_memory is None or record.peak_memory > 1e6


def test_models_are_kept_where_asked_for(setup):
    perform(dataclasses.replace(setup, save_models=True), PlannedRun(ARMS["sft"], 0))
    model, _ = load_model(str(run_folder(setup.folder, "sft", 0)))
    assert same(model.state_dict(), weights(setup, "sft"))


@pytest.mark.parametrize("step", [1, 2, STEPS])
def test_a_killed_run_goes_on_as_if_it_had_not_been(setup, seen, monkeypatch, step, tmp_path):
    planned, whole = PlannedRun(ARMS["nextquill_detached"], 0), dataclasses.replace(setup, folder=tmp_path / "whole")
    expected = perform(whole, planned)
    stop = RunMeter.on_save

    def on_save(self, args, state, control, **kwargs):
        stop(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunMeter, "on_save", on_save)
        with pytest.raises(KilledError):
            perform(setup, planned)
    assert finished(setup, planned) is None
    record = perform(setup, planned)
    assert same(weights(setup, planned.name), weights(whole, planned.name))
    assert (record.order, record.start, record.steps) == (expected.order, expected.start, expected.steps)
    assert (record.examples, record.sessions) == (expected.examples, 2)
    assert record.seconds > 0


def test_a_run_killed_while_evaluating_is_not_trained_again(setup, seen):
    def killed(*args):
        raise KilledError

    planned = PlannedRun(ARMS["sft"], 0)
    with pytest.raises(KilledError):
        perform(dataclasses.replace(setup, evaluate=killed), planned)
    record = perform(setup, planned)
    assert (len(seen[0][0]), seen[1][0]) == (STEPS, [])
    assert (record.steps, record.examples, record.sessions) == (STEPS, 2 * STEPS, 2)


def test_a_run_killed_after_its_evaluation_is_not_evaluated_again(setup, monkeypatch):
    planned = PlannedRun(ARMS["sft"], 0)
    with monkeypatch.context() as patch:
        patch.setattr(running, "write_record", lambda *args: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            perform(setup, planned)
    record = perform(setup, planned)  # `evaluate` would fail on the folder that is there
    assert finished(setup, planned) == record


def test_a_run_without_a_checkpoint_begins_again_in_an_empty_folder(setup):
    folder = run_folder(setup.folder, "sft", 0)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("left")
    (folder / "leftover").write_text("left")
    perform(setup, PlannedRun(ARMS["sft"], 0))
    assert not (folder / "leftover").exists()


def test_a_stopped_training_is_not_evaluated(setup):
    @contextlib.contextmanager
    def stopped(trainer):
        yield SimpleNamespace(requested=True)

    assert perform(dataclasses.replace(setup, attend=stopped), PlannedRun(ARMS["sft"], 0)) is None
    assert not (run_folder(setup.folder, "sft", 0) / "evaluation").exists()


def test_other_weights_or_another_order_than_the_finished_runs_are_refused(setup):
    perform(setup, PlannedRun(ARMS["sft"], 0))
    changed = dataclasses.replace(setup, start=lambda seed: start(seed + 5))
    with pytest.raises(CheckpointError, match="sft_2lr with seed 0 started from other weights than sft with seed 0"):
        perform(changed, PlannedRun(ARMS["sft_2lr"], 0))
    folder = run_folder(setup.folder, "sft", 0)
    write_record(folder, dataclasses.replace(read_record(folder), order="another"))
    with pytest.raises(CheckpointError, match="sft_2lr with seed 0 saw other examples"):
        perform(setup, PlannedRun(ARMS["sft_2lr"], 0))


def test_runs_that_two_processes_finish_at_once_are_compared_afterwards(setup):
    for name in ("sft", "sft_2lr"):
        folder = run_folder(setup.folder, name, 0)
        (folder / "evaluation").mkdir(parents=True)
        (folder / "evaluation" / "evaluation.json").write_text("{}")
        write_record(folder, RunRecord(name, 0, "start", order="same"))
    check_all_alike(setup)
    write_record(folder, RunRecord(name, 0, "start", order="another"))
    with pytest.raises(CheckpointError, match="with seed 0 saw other examples, or in another order, than"):
        check_all_alike(setup)


def test_a_resumed_run_keeps_the_most_processes_that_ran_beside_it(setup, monkeypatch):
    stop = RunMeter.on_save

    def on_save(self, args, state, control, **kwargs):
        stop(self, args, state, control, **kwargs)
        raise KilledError

    planned = PlannedRun(ARMS["sft"], 0)
    with monkeypatch.context() as patch:
        patch.setattr(RunMeter, "on_save", on_save)
        with pytest.raises(KilledError):
            perform(dataclasses.replace(setup, processes=3), planned)
    assert perform(dataclasses.replace(setup, processes=2), planned).processes == 3
    assert perform(dataclasses.replace(setup, processes=2), PlannedRun(None, 0)).processes == 2


def test_runs_in_their_order(setup):
    arms = [ARMS["sft_time"], *setup.arms]
    order = [(planned.name, planned.seed) for planned in running.planned_runs(dataclasses.replace(setup, arms=arms))]
    one = [BASE, "sft", "sft_2lr", "nextquill_detached", "sft_time"]
    assert order == [(name, seed) for seed in (0, 1) for name in one]
    shared = dataclasses.replace(setup, shares_start=True)
    assert [planned.seed for planned in running.planned_runs(shared) if planned.arm is None] == [0]


@pytest.mark.parametrize(("name", "value"), [("loss", "PerCELoss()"), ("learning_rate", 0.5), ("seed", 9)])
def test_a_finished_run_of_something_else_is_not_taken_for_this_one(setup, name, value):
    folder = run_folder(setup.folder, "sft", 0)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "evaluation.json").write_text("{}")
    fitting = RunRecord("sft", 0, "s", loss=repr(ARMS["sft"].loss()), learning_rate=1e-3)
    write_record(folder, fitting)
    assert finished(setup, PlannedRun(ARMS["sft"], 0)) == fitting
    write_record(folder, dataclasses.replace(fitting, **{name: value}))
    with pytest.raises(CheckpointError, match=f"has another {name.replace('_', ' ')}: there"):
        finished(setup, PlannedRun(ARMS["sft"], 0))


def test_a_finished_run_whose_evaluation_was_changed_is_refused(setup):
    folder = run_folder(setup.folder, "sft", 0)
    write_evaluation(folder / "evaluation")
    planned = PlannedRun(ARMS["sft"], 0)
    write_record(folder, RunRecord("sft", 0, "s", loss=repr(ARMS["sft"].loss()), learning_rate=1e-3))
    assert finished(setup, planned) is not None
    path = folder / "evaluation" / "evaluation.json"
    path.write_text(path.read_text().replace("0.05", "0.06", 1).replace('"label": "nll', '"label": "NLL', 1))
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged or was changed: .* to repeat the run"):
        finished(setup, planned)


def step(meter, seconds, clock, **turns):
    clock[0] += seconds
    usual = dict.fromkeys(("should_save", "should_evaluate", "should_log", "should_training_stop"), False)
    meter.steps += 1
    meter.on_step_end(None, None, SimpleNamespace(**usual | turns))


def test_the_first_step_of_a_process_counts_as_the_others():
    """It compiles and allocates for all later runs, which must not count as the first arm's time."""
    clock = [0.0]
    meter, state = RunMeter(clock=lambda: clock[0]), SimpleNamespace(stateful_callbacks={}, global_step=0)
    meter.on_train_begin(None, state, None)
    step(meter, 60.0, clock)
    assert meter.seconds == 60.0  # nothing else is known
    step(meter, 2.0, clock)
    step(meter, 4.0, clock, should_save=True)
    assert meter.seconds == 9.0
    clock[0] += 100.0
    meter.on_save(None, None, None)
    saved = SimpleNamespace(stateful_callbacks={"RunMeter": meter.state()}, global_step=3)
    again = RunMeter(clock=lambda: clock[0])
    again.on_train_begin(None, saved, None)
    step(again, 50.0, clock)
    assert (again.seconds, again.steps, again.sessions) == (12.0, 4, 2)
    step(again, 6.0, clock)
    assert again.seconds == 20.0


# ---- equal time ------------------------------------------------------------------------------------


def timed(setup, **seconds):
    for name, value in seconds.items():
        folder = run_folder(setup.folder, name, 0)
        (folder / "evaluation").mkdir(parents=True)
        (folder / "evaluation" / "evaluation.json").write_text("{}")
        write_record(folder, RunRecord(name, 0, "s", steps=10, seconds=value))
    return dataclasses.replace(setup, time_reference="perce")


@pytest.mark.parametrize(("reference", "steps"), [(15.0, 15), (15.1, 16), (10.0, 10), (5.0, 5), (0.01, 1)])
def test_steps_that_take_as_long(setup, reference, steps):
    matched = match_time(timed(setup, sft=10.0, perce=reference), ARMS["sft_time"], 0)
    assert matched["steps"] == steps
    assert matched["ratio"] == pytest.approx(reference / 10)
    assert (matched["reference"], matched["seconds"], matched["order_after"]) == ("perce", reference, 10)


def test_the_time_of_a_run_that_is_not_finished_cannot_be_matched(setup):
    with pytest.raises(CheckpointError, match="sft_time: expected the runs of perce and sft with seed 0"):
        match_time(timed(setup, sft=10.0), ARMS["sft_time"], 0)


@pytest.mark.parametrize(("warmup", "stretched"), [(4, 6), (0.25, 0.25), (0, 0)])
def test_the_schedule_is_stretched_and_not_cut(setup, tmp_path, warmup, stretched):
    setup.args.warmup_steps = warmup
    args = run_arguments(setup, ARMS["sft_time"], 0, tmp_path, {"steps": 15, "ratio": 1.5})
    assert (args.max_steps, args.warmup_steps) == (15, stretched)
    assert (setup.args.max_steps, setup.args.warmup_steps) == (STEPS, warmup)


def test_an_arm_of_equal_time_sees_the_same_first_and_goes_on(setup, seen, monkeypatch):
    setup = dataclasses.replace(setup, time_reference="nextquill_detached")
    sft = perform(setup, PlannedRun(ARMS["sft"], 0))
    slow = dataclasses.replace(sft, arm="nextquill_detached", seconds=1.5 * sft.seconds)
    folder = run_folder(setup.folder, "nextquill_detached", 0)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "evaluation.json").write_text("{}")
    write_record(folder, slow)
    record = perform(setup, PlannedRun(ARMS["sft_time"], 0))
    assert record.steps == 5 > sft.steps
    assert seen[1][0][:STEPS] == seen[0][0]
    assert record.order == sft.order
    assert record.matched["seconds"] == slow.seconds


# ---- time ------------------------------------------------------------------------------------------


def test_only_steps_are_timed():
    """Evaluations, logs and checkpoints between two steps do not count as training."""
    clock = iter([0.0, 2.0, 100.0, 103.0, 200.0, 204.0])
    meter, state = RunMeter(clock=lambda: next(clock)), SimpleNamespace(stateful_callbacks={}, global_step=0)
    control = SimpleNamespace(should_save=True, should_evaluate=True, should_log=True, should_training_stop=False)
    meter.on_train_begin(None, state, control)
    meter.on_step_end(None, state, control)
    meter.on_evaluate(None, state, control)
    meter.on_step_end(None, state, control)
    meter.on_save(None, state, control)
    meter.on_step_end(None, state, control)
    assert (meter.first_seconds, meter.later_seconds, meter.later_steps) == (2.0, 3.0 + 4.0, 2)


def test_the_rest_is_estimated_from_runs_of_the_same_arm():
    done = [RunRecord(BASE, 0, "", wall_seconds=1.0), RunRecord("sft", 0, "", wall_seconds=10.0)]
    left = [PlannedRun(ARMS["perce"], 0), PlannedRun(None, 1), PlannedRun(ARMS["sft"], 1)]
    assert remaining_seconds([], left) is None
    assert remaining_seconds(done[:1], left) is None
    assert remaining_seconds(done, left) == 10 + 1 + 10
    assert remaining_seconds([*done, RunRecord("perce", 0, "", wall_seconds=30.0)], left[1:]) == 1 + 10


def test_the_trainer_keeps_its_own_meter(setup):
    model, tokenizer = start(0)
    trainer = ComparedTrainer(model, setup.args, processing_class=tokenizer, callbacks=[RunMeter(5)])
    assert trainer.run_meter.order_after == 5
