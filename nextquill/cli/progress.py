"""Progress bars and log lines of training, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback

from nextquill.cli.terminal import bar, duration, say
from nextquill.ranks import launch
from nextquill.report.text import plain

#: Seconds after which another log is due, so that a slow run is seen to be alive.
EVERY = 30.0
_SHOWN = (
    ("loss", "loss {:.3f}"),
    ("nll_factual", "nll {:.3f}"),
    ("effect_logprob", "effect {:+.3f}"),
    ("share_above_threshold", "personal {:.1%}"),
    ("preference_accuracy", "pairs {:.1%}"),
    ("reward", "reward {:.4f}"),
    ("summary_tokens", "summary {:.0f} tokens"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("learning_rate", "lr {:.1e}"),
    ("eval_loss", "evaluation: loss {:.3f}"),
    ("eval_nll_factual", "nll {:.3f}"),
    ("eval_nll_counterfactual", "without history {:.3f}"),
    ("eval_nll_placebo", "another user's {:.3f}"),
    ("eval_accuracy", "pairs {:.1%}"),
    ("eval_accuracy_none", "without summary {:.1%}"),
    ("eval_accuracy_placebo", "another user's {:.1%}"),
)


# The bar has room for these beside itself and the time left.
_ON_BAR = ("loss", "nll_factual", "effect_logprob", "preference_accuracy", "reward", "tokens_per_second")


def figures(logs: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """The main figures of a log, or those of `names` among them, as text."""
    shown = [(name, form) for name, form in _SHOWN if names is None or name in names]
    return [form.format(logs[name]) for name, form in shown if isinstance(logs.get(name), (int, float))]


def log_line(step: int, total: int, logs: dict[str, Any], seconds_left: float | None = None) -> str | None:
    """One line with the main figures of a log, or None where it has fewer than two."""
    parts = figures(logs)
    left = [] if seconds_left is None else [f"{duration(seconds_left)} left"]
    return f"step {step}/{total}  " + " · ".join(parts + left) if len(parts) > 1 else None


class TrainingProgress(ProgressCallback, ExportableState):
    """A bar for the training with the last log's figures, or a line for each log; and a bar for each evaluation.

    Besides the logs that the arguments ask for, there is one for the last step, for every checkpoint, and `EVERY`
    seconds after the last. Checkpoints hold the seconds so far, so that the totals of a resumed run cover the whole
    run.
    """

    training_bar: Any
    prediction_bar: Any

    def __init__(self) -> None:
        super().__init__()
        self.first_step = self.max_steps = 0
        self.earlier_seconds: float | None = 0.0  # of the sessions before this one; None if they are not known
        self._began = self._logged = self._stepped = time.monotonic()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        earlier = self.earlier_seconds
        seconds = None if earlier is None else earlier + time.monotonic() - self._began
        return {"args": {}, "attributes": {"seconds": seconds, "max_steps": self.max_steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.current_step = self.first_step = state.global_step
        self._began = self._logged = self._stepped = time.monotonic()
        # transformers stores a callback's state only beside one that is there already
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        state.compute_steps(args, state.max_steps)  # --save_steps and its like: else they are the checkpoint's
        if self.first_step and isinstance(saved, dict):
            before = saved.get("attributes", {})
            self.earlier_seconds = before.get("seconds")
            if state.is_world_process_zero:
                say(resumed(self.first_step, state.max_steps, before.get("max_steps")))
        self.max_steps = state.max_steps
        form = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
        self.training_bar = bar(total=state.max_steps, initial=self.current_step, bar_format=form, disable=hidden)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        due = now + (now - self._stepped) - self._logged >= EVERY  # if this step takes as long as the last one
        self._stepped = now
        if args.logging_strategy != "no" and (state.global_step + 1 >= state.max_steps or agreed(due, args)):
            control.should_log = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save and args.logging_strategy != "no"

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.prediction_bar is None:
            hidden = args.disable_tqdm or not state.is_world_process_zero
            self.prediction_bar = bar(total=len(eval_dataloader), desc="Evaluating", leave=False, disable=hidden)
        self.prediction_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs and self.first_step:
            self._count_all_sessions(state, len(kwargs["train_dataloader"].dataset))
        if "loss" in logs:
            self._logged = time.monotonic()
        if not state.is_world_process_zero:
            return
        if "loss" in logs and self.training_bar is not None and not self.training_bar.disable:
            self.training_bar.set_postfix_str(", ".join(figures(logs, _ON_BAR)))
            return
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        seconds = (time.monotonic() - self._began) / done * left if "loss" in logs and done and left else None
        line = log_line(state.global_step, state.max_steps, logs, seconds)
        if line is not None:
            tqdm.write(f"{launch().label}{line}", file=sys.stderr)

    def _count_all_sessions(self, state: Any, num_examples: int) -> None:
        """Make the last entry of the log cover the whole run; transformers computes it from this session alone.

        Totals that are not known, because the run was started without these screens, are left out.
        """
        entry = state.log_history[-1]
        losses = {log["step"]: log["loss"] for log in state.log_history if "loss" in log}
        if {self.first_step, state.global_step} <= losses.keys():
            spans = zip([0, *losses], losses.items(), strict=False)
            total = sum(loss * (step - start) for start, (step, loss) in spans)
            entry["train_loss"] = total / state.global_step
        else:
            entry.pop("train_loss", None)
        if self.earlier_seconds is None:
            for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
                entry.pop(name, None)
            return
        seconds = entry["train_runtime"] = entry["train_runtime"] + self.earlier_seconds
        entry["train_samples_per_second"] = state.epoch * num_examples / seconds
        entry["train_steps_per_second"] = state.global_step / seconds


def resumed(step: int, total: int, before: int | None) -> str:
    """A line for the user: where a run resumes, and whether it was planned for another number of steps."""
    line = f"resuming from checkpoint-{step}, at step {step} of {total}"
    if before not in (None, total):
        line += f"; it was planned for {before} steps, and its learning rate now follows the schedule of {total}"
    return line + ("; nothing is left to train" if step >= total else "")


def agreed(flag: bool, args: Any) -> bool:
    """Whether it is true on any rank: if only one saved or stopped, the others would wait for it forever."""
    if args.world_size == 1:
        return flag
    value = torch.tensor(float(flag), device=args.device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value)


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C, SIGTERM or SIGHUP finishes the step, saves a checkpoint and stops; a second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none, and `nohup` ignores it
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if agreed(self.requested, args):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def outcome(self, folder: Path, step: int) -> str:
        """A line for the user: what an interrupted run has saved."""
        if (folder / f"checkpoint-{step}").is_dir():
            return f"nextquill: saved checkpoint-{step}; resume with --resume_from_checkpoint true"
        return "nextquill: interrupted; the last steps were not saved"

    def restore(self) -> None:
        """Restore the signal handlers that were there before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        if launch().rank == 0:
            text = f"nextquill: {launch().label}finishing this step and saving; Ctrl-C again stops at once"
            tqdm.write(text, file=sys.stderr)


@contextmanager
def shown(trainer: Trainer) -> Iterator[SaveOnInterrupt]:
    """Show a trainer's progress, let Ctrl-C save a checkpoint, and print the library's log above the bar."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    interrupt, handler, logger = SaveOnInterrupt(), _AboveBar(), logging.getLogger("nextquill")
    trainer.add_callback(interrupt)  # first, as a log is due with its checkpoint
    trainer.add_callback(TrainingProgress())
    logger.addHandler(handler)
    try:
        yield interrupt
    finally:
        interrupt.restore()
        logger.removeHandler(handler)


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = f"{launch().label}{record.levelname.lower()}"
        tqdm.write(plain(f"nextquill: {level}: {record.getMessage()}"), file=sys.stderr)
