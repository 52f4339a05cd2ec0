"""Progress bars and log lines of training, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from nextquill.cli.terminal import bar

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("nll_factual", "nll {:.3f}"),
    ("nll_counterfactual", "without history {:.3f}"),
    ("share_above_threshold", "personal {:.1%}"),
    ("preference_accuracy", "pairs {:.1%}"),
    ("reward", "reward {:.4f}"),
    ("summary_tokens", "summary {:.0f} tokens"),
    ("learning_rate", "lr {:.1e}"),
    ("eval_loss", "evaluation: loss {:.4f}"),
    ("eval_nll_factual", "nll {:.3f}"),
    ("eval_nll_counterfactual", "without history {:.3f}"),
    ("eval_nll_placebo", "another user's {:.3f}"),
    ("eval_accuracy", "pairs {:.1%}"),
    ("eval_accuracy_none", "without summary {:.1%}"),
    ("eval_accuracy_placebo", "another user's {:.1%}"),
)


def log_line(step: int, total: int, logs: dict[str, Any]) -> str | None:
    """One line with the main figures of a log, or None where it has fewer than two."""
    parts = [form.format(logs[name]) for name, form in _SHOWN if isinstance(logs.get(name), (int, float))]
    return f"step {step}/{total}  " + " · ".join(parts) if len(parts) > 1 else None


class TrainingProgress(ProgressCallback):
    """A bar for the training, one for each evaluation, and a line for each log."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.current_step = state.global_step
        self.training_bar = bar(total=state.max_steps, initial=self.current_step, desc="Training", disable=hidden)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.prediction_bar is None:
            hidden = args.disable_tqdm or not state.is_world_process_zero
            self.prediction_bar = bar(total=len(eval_dataloader), desc="Evaluating", leave=False, disable=hidden)
        self.prediction_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = log_line(state.global_step, state.max_steps, logs or {})
        if line is not None and state.is_world_process_zero:
            tqdm.write(line, file=sys.stderr)


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed(args):
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

    def _agreed(self, args: Any) -> bool:
        """Whether any rank was interrupted: if only one stopped, the others would wait for it forever."""
        if args.world_size == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("nextquill: finishing this step and saving; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def shown(trainer: Trainer) -> Iterator[SaveOnInterrupt]:
    """Show a trainer's progress, let Ctrl-C save a checkpoint, and print the library's log above the bar."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    interrupt, handler, logger = SaveOnInterrupt(), _AboveBar(), logging.getLogger("nextquill")
    trainer.add_callback(TrainingProgress())
    trainer.add_callback(interrupt)
    logger.addHandler(handler)
    try:
        yield interrupt
    finally:
        interrupt.restore()
        logger.removeHandler(handler)


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"nextquill: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
