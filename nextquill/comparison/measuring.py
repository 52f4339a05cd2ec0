"""Measures a run's time and memory, and the order of its examples, which shows that all runs saw the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from nextquill.storage.fingerprints import fingerprint
from nextquill.training.trainer import NextQuillTrainer

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class RunMeter(TrainerCallback, ExportableState):
    """Time, examples, memory and order of a run, kept in its checkpoints.

    The time covers the training steps and the making of their batches, without evaluations, logs and checkpoints.
    The first step of a process counts as the mean of the others: kernels are compiled and memory is allocated in it,
    which later runs in the process do not repeat. Steps lost with a killed process are not counted twice.

    Args:
        order_after: the order covers the first so many optimiser steps; None for all.
        processes: the number of processes that train at the same time; the most is kept.
        clock: returns seconds. `time.process_time` leaves out what other programs take from a CPU.
    """

    def __init__(
        self, order_after: int | None = None, clock: Callable[[], float] = time.perf_counter, processes: int = 1
    ) -> None:
        self.order_after, self.processes, self._clock = order_after, processes, clock
        self.first_seconds = 0.0  # in the first steps of all sessions
        self.later_seconds, self.later_steps = 0.0, 0
        self.examples = self.steps = 0
        self.peak_memory: int | None = None
        self.order = ""
        self.sessions = 0
        self._since = 0.0
        self._is_first = True

    @property
    def seconds(self) -> float:
        """Seconds of all steps, at the pace of those that were not the first of their process, if there are any."""
        return self.later_seconds / self.later_steps * self.steps if self.later_steps else self.first_seconds

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        self.peak_memory = max(filter(None, (self.peak_memory, peak_memory())), default=None)
        noted = {name: value for name, value in vars(self).items() if name != "order_after" and name[0] != "_"}
        return {"args": {"order_after": self.order_after}, "attributes": noted}

    def see(self, batches: list[Any]) -> None:
        """Note the examples of the next step."""
        indices = [index for batch in batches for index in batch["example_index"].tolist()]
        self.examples += len(indices)
        self.steps += 1
        if self.order_after is None or self.steps <= self.order_after:
            self.order = fingerprint([f"{self.order} {indices}"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint."""
        saved, processes = state.stateful_callbacks.get(type(self).__name__), self.processes
        if saved and state.global_step > 0:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
            self.processes = max(processes, self.processes)
        self.sessions += 1
        reset_peak_memory()
        self._since, self._is_first = self._clock(), True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        turns = (control.should_save, control.should_evaluate, control.should_log, control.should_training_stop)
        if (self._is_first or any(turns)) and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # queued work is this step's, and must not count as the evaluation's
        now = self._clock()
        if self._is_first:
            self.first_seconds += now - self._since
        else:
            self.later_seconds += now - self._since
            self.later_steps += 1
        self._since, self._is_first = now, False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the time since the last step."""
        self._since = self._clock()

    on_evaluate = on_save = on_log

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the peak memory."""
        self.peak_memory = max(filter(None, (self.peak_memory, peak_memory())), default=None)


class ComparedTrainer(NextQuillTrainer):
    """A `NextQuillTrainer` that shows its `RunMeter` every step's examples."""

    @property
    def run_meter(self) -> RunMeter:
        """The callback, which restoring a checkpoint may have replaced."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, RunMeter))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Get batches as the Trainer does, with a float32 scalar or None; the meter sees the batches."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.run_meter.see(batches)
        return batches, items


def reset_peak_memory() -> None:
    """Start measuring a new peak."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or a sandbox that forbids it; then the peak is that of the whole process
            _CLEAR_REFS.write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """The most bytes since `reset_peak_memory`: allocated on the accelerator or, without one, by the whole process.

    None if the system does not say.
    """
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def machine() -> Mapping[str, Any]:
    """The machine that times depend on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    device = "cpu" if accelerator is None else accelerator.type
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
