"""Log lines, bars, and the effect of Ctrl-C on a run."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nextquill.cli import progress, terminal

SCHEDULE = ("--max_steps", 4, "--logging_steps", 1)


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 1.5, "nll_factual": 2.0, "learning_rate": 1e-4}, "step 3/9  loss 1.500 · nll 2.000 · lr 1.0e-04"),
        ({"loss": 1.5, "share_above_threshold": 0.25}, "step 3/9  loss 1.500 · personal 25.0%"),
        ({"eval_loss": 1.0, "eval_nll_placebo": 3.0}, "step 3/9  evaluation: loss 1.000 · another user's 3.000"),
        ({"train_runtime": 3.0, "total_flos": 1.0}, None),
        ({}, None),
    ],
)
def test_log_line(logs, line):
    assert progress.log_line(3, 9, logs) == line


def test_a_log_line_ends_with_the_pace():
    logs = {"loss": 1.5, "effect_logprob": 0.25, "tokens_per_second": 1234.4}
    line = "step 3/9  loss 1.500 · effect +0.250 · 1,234 tokens/s · 3 min left"
    assert progress.log_line(3, 9, logs, 200.0) == line


LONGER = "it was planned for 6 steps, and its learning rate now follows the schedule of 9"


@pytest.mark.parametrize(
    ("before", "step", "line"),
    [
        (9, 4, "resuming from checkpoint-4, at step 4 of 9"),
        (None, 4, "resuming from checkpoint-4, at step 4 of 9"),
        (6, 4, f"resuming from checkpoint-4, at step 4 of 9; {LONGER}"),
        (9, 9, "resuming from checkpoint-9, at step 9 of 9; nothing is left to train"),
    ],
)
def test_where_a_run_resumes(before, step, line):
    assert progress.resumed(step, 9, before) == line


@pytest.mark.parametrize(
    ("step", "at", "strategy", "is_due"),
    [(0, 0, "steps", False), (8, 0, "steps", True), (0, 31, "steps", True), (0, 31, "no", False), (8, 0, "no", False)],
)
def test_a_log_is_due_at_the_last_step_and_after_half_a_minute(monkeypatch, step, at, strategy, is_due):
    shown = progress.TrainingProgress()
    monkeypatch.setattr(progress.time, "monotonic", lambda: shown._logged + at)
    args = SimpleNamespace(logging_strategy=strategy, world_size=1)
    control = SimpleNamespace(should_log=False)
    shown.on_step_begin(args, SimpleNamespace(global_step=step, max_steps=9), control)
    assert control.should_log is is_due


class Notebook:
    """The stream that a cell of a notebook writes to."""

    def isatty(self):
        return False


Notebook.__module__ = "ipykernel.iostream"


def test_bars_are_drawn_in_a_notebook(monkeypatch):
    assert not terminal.draws_bars()
    monkeypatch.setattr(terminal.sys, "stderr", Notebook())
    assert terminal.draws_bars()


def test_a_bar_draws_nothing_where_there_is_no_terminal(capsys):
    assert list(progress.bar(range(3), total=3, desc="Work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


class Trainer:
    """The parts of a trainer that `shown` needs."""

    def __init__(self):
        self.callbacks = []

    def remove_callback(self, kind):
        pass

    def add_callback(self, callback):
        self.callbacks.append(callback)


def test_the_librarys_warnings_are_shown_while_training(capsys):
    with progress.shown(Trainer()):
        logging.getLogger("nextquill.training.meter").warning("it rose to %.1f", 2.0)
    assert capsys.readouterr().err == "nextquill: warning: it rose to 2.0\n"
    assert logging.getLogger("nextquill").handlers == []


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with progress.shown(Trainer()) as interrupt:
        interrupt.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGINT) == interrupt._handle
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_stops_at_once(capsys):
    interrupt = progress.SaveOnInterrupt()
    interrupt.on_train_begin(None, None, None)
    try:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.restore()
    assert "finishing this step and saving" in capsys.readouterr().err


def test_an_interrupt_elsewhere_stops_this_rank_too(monkeypatch):
    """Ranks must stop after the same step; the interrupted one tells the others by an all-reduce."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: flag.fill_(1.0))
    interrupt, control = progress.SaveOnInterrupt(), SimpleNamespace(should_save=False, should_training_stop=False)
    interrupt.on_step_end(SimpleNamespace(world_size=2, device="cpu"), None, control)
    assert control.should_save
    assert control.should_training_stop
    assert interrupt.requested


def interrupting(step):
    """The screens of a run, and Ctrl-C at the beginning of a step; under the name that checkpoints know."""

    class TrainingProgress(progress.TrainingProgress):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == step:
                signal.raise_signal(signal.SIGINT)

    return TrainingProgress


def same_weights(one, other):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, *SCHEDULE).code == 0
    return folder


def test_an_interrupted_run_resumes_to_the_same_weights(train, nextquill, data, uninterrupted, tmp_path, monkeypatch):
    folder, install = tmp_path / "run", progress.TrainingProgress
    monkeypatch.setattr(progress, "TrainingProgress", interrupting(1))
    result = train(folder, *SCHEDULE, "--save_strategy", "no")
    assert result.code == 130
    assert result.err.endswith("nextquill: saved checkpoint-2; resume with --resume_from_checkpoint true\n")
    assert not (folder / "model.safetensors").exists()
    words = ("--model_name_or_path", folder / "checkpoint-2", "--eval_file", data / "eval.jsonl", "--generate", "false")
    assert nextquill("evaluate", *words).code == 0, "an interrupted run's checkpoint has its prompt settings"

    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    before = state["stateful_callbacks"]["TrainingProgress"]["attributes"]
    assert before["seconds"] > 0
    before["seconds"] = 1000.0
    (folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))

    monkeypatch.setattr(progress, "TrainingProgress", install)
    resumed = train(folder, *SCHEDULE, "--logging_steps", 9, "--resume_from_checkpoint", "true")
    assert resumed.code == 0, resumed.err
    assert "nextquill: resuming from checkpoint-2, at step 2 of 4\n" in resumed.err
    assert same_weights(folder, uninterrupted)
    whole, parts = totals(uninterrupted), totals(folder)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert parts["train_samples_per_second"] / parts["train_steps_per_second"] == pytest.approx(4)
    assert parts["train_steps_per_second"] * parts["train_runtime"] == pytest.approx(4)
    assert 1000 < parts["train_runtime"] < 2000


def totals(folder):
    return json.loads((folder / "metrics.json").read_text())["log_history"][-1]


def test_totals_that_cannot_be_known_are_left_out(train, tmp_path):
    """A checkpoint from Python has no time, and none of the losses since its last log."""
    folder = tmp_path / "run"
    assert train(folder, *SCHEDULE, "--save_steps", 2).code == 0
    shutil.rmtree(folder / "checkpoint-4")
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["TrainingProgress"]
    state["log_history"] = [log for log in state["log_history"] if log["step"] != 2]
    (folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    result = train(folder, *SCHEDULE, "--save_steps", 3, "--resume_from_checkpoint", "true")
    assert result.code == 0, result.err
    assert {"train_loss", "train_runtime", "train_steps_per_second"}.isdisjoint(totals(folder))
    assert (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("strategy", "presses", "code"),
    [("no", 1, 130), ("steps", 1, 0), ("steps", 2, 130)],
    ids=["after training", "the run's own last evaluation ends first", "twice in the run's own last evaluation"],
)
def test_ctrl_c_in_the_last_evaluation_leaves_the_model(train, data, tmp_path, monkeypatch, strategy, presses, code):
    class Press(progress.TrainingProgress):
        left = presses

        def on_prediction_step(self, args, state, control, **kwargs):
            while self.left:
                self.left -= 1
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress, "TrainingProgress", Press)
    folder = tmp_path / "run"
    words = ("--eval_file", data / "eval.jsonl", "--eval_strategy", strategy, "--eval_steps", 2)
    result = train(folder, *words, "--save_strategy", "no")
    assert result.code == code, result.err
    assert (folder / "model.safetensors").exists()
    assert bool(json.loads((folder / "metrics.json").read_text())["eval"]) == (code == 0)
    assert ("interrupted in the last evaluation; the model is complete" in result.err) == (code == 130)


@pytest.mark.slow
def test_two_ranks_stop_together_and_save_once(data, tmp_path):
    """One rank is interrupted; both stop after the same step, and a resumed pair writes one complete model."""
    folder = tmp_path / "run"
    flags = ["--train_file", data / "train.jsonl", "--model_name_or_path", "tiny", "--output_dir", folder, "--use_cpu"]
    sizes = ["--per_device_train_batch_size", 2, "--learning_rate", 1e-3, *SCHEDULE]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = tmp_path / "one.py"
    script.write_text(
        "import signal, sys\n"
        "from nextquill.cli import progress\n"
        "from nextquill.cli.main import main\n"
        "class Press(progress.TrainingProgress):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 1 and args.process_index == 1 and 'resume' not in sys.argv[-2]:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "progress.TrainingProgress = Press\n"
        "code = main(sys.argv[1:])\n"
        "sys.stdout.write(f'code {code}\\n')\n"
    )
    command = [str(word) for word in [*launch, script, "train", *flags, *sizes]]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.stdout.count("code 130") == 2, first.stderr
    assert (folder / "checkpoint-2").is_dir()
    second = subprocess.run([*command, "--resume_from_checkpoint", "true"], capture_output=True, text=True)
    assert second.stdout.count("code 0") == 2, second.stderr
    assert {"model.safetensors", "metrics.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not (folder / ".incomplete").exists()


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(data, uninterrupted, tmp_path):
    """A real process and signal: the exit code, and the same weights after resuming."""
    folder = tmp_path / "run"
    flags = ["--train_file", data / "train.jsonl", "--model_name_or_path", "tiny", "--output_dir", folder]
    sizes = ["--per_device_train_batch_size", 4, "--learning_rate", 1e-3, *SCHEDULE]
    command = [str(word) for word in [sys.executable, "-m", "nextquill.cli.main", "train", *flags, *sizes]]
    seen = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step 1/4"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(seen)
    assert "resume with --resume_from_checkpoint true" in seen[-1]
    assert not (folder / "model.safetensors").exists()
    subprocess.run([*command, "--resume_from_checkpoint", "true"], check=True)
    assert same_weights(folder, uninterrupted)
