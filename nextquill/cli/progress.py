"""What a person sees while a model trains, and what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("nll_factual", "nll {:.3f}"),
    ("nll_counterfactual", "without history {:.3f}"),
    ("share_above_threshold", "personal {:.1%}"),
    ("learning_rate", "lr {:.1e}"),
    ("eval_loss", "eval loss {:.4f}"),
    ("eval_nll_factual", "nll {:.3f}"),
    ("eval_nll_counterfactual", "without history {:.3f}"),
    ("eval_nll_placebo", "another user's {:.3f}"),
)


def log_line(step: int, total: int, logs: dict[str, Any]) -> str | None:
    """One line of a log's most telling figures, or None where it has none."""
    parts = [form.format(logs[name]) for name, form in _SHOWN if isinstance(logs.get(name), (int, float))]
    return f"step {step}/{total}  " + " · ".join(parts) if len(parts) > 1 else None


class TrainingProgress(ProgressCallback):
    """The Trainer's progress bar with readable log lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = log_line(state.global_step, state.max_steps, logs or {})
        if line is None or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self.restore()
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nnextquill: finishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr)


def install(trainer: Trainer) -> SaveOnInterrupt:
    """Give a trainer the command line's progress and interruption."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(TrainingProgress())
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    return interrupt
