"""Stops a training at the first step whose loss, NLL or gradient norm is not finite, before the step is applied.

Every rank looks at its own values. One reduction of two flags per step makes all ranks decide alike. The same reading
replaces the one that transformers makes for each micro-batch (`logging_nan_inf_filter`), which hides such a loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from nextquill.data._checks import check_integer
from nextquill.errors import NonFiniteError
from nextquill.storage.checkpoints import found_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

#: The loss counts as risen if every log of a run's second half is this many times the first one.
_RISEN = 1.1
#: Examples that a message names.
_NAMED = 3
#: The scale of float16's losses below which an infinite gradient is not the scale's fault.
_LEAST_SCALE = 1.0


class FiniteGuard(TrainerCallback, ExportableState):
    """Says what happens to a step that is not finite, and at the end whether the loss stayed above its start.

    Args:
        max_skipped_steps: how many such steps of a run are skipped; the next one raises NonFiniteError. A skipped step
            leaves weights and optimizer as they are, and counts as a step of the schedule.
        loss_falls: whether the loss of a good run falls; the trainer sets it.

    Attributes:
        skipped: the numbers of the skipped steps.

    Raises:
        ArgumentError, ArgumentTypeError: `max_skipped_steps` is not a number of steps.
    """

    def __init__(self, max_skipped_steps: int = 0, loss_falls: bool = True) -> None:
        check_integer("max_skipped_steps", max_skipped_steps, least=0)
        self.max_skipped_steps, self.loss_falls = max_skipped_steps, loss_falls
        self.skipped: list[int] = []

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        args = {"max_skipped_steps": self.max_skipped_steps, "loss_falls": self.loss_falls}
        return {"args": args, "attributes": {"skipped": list(self.skipped)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the values of the checkpoint that the run resumes from."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.skipped = list(saved["attributes"]["skipped"]) if saved and state.global_step > 0 else []
        # transformers stores a callback's state only beside one that is there already
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of skipped steps, and of a loss above its start."""
        if not state.is_world_process_zero:
            return
        if self.skipped:
            logger.warning(
                f"steps skipped, because their loss or gradient was not finite: {len(self.skipped)} of "
                f"{state.global_step} ({_some(self.skipped)})"
            )
        logs = [log for log in state.log_history if "loss" in log]
        late = logs[len(logs) // 2 :]
        start = logs[0]["loss"] if logs and self.loss_falls else math.inf
        if len(logs) > 2 and (reason := _diverged(start, late)):
            logger.warning(f"{reason} in the second half of the run; try a learning rate below {args.learning_rate:g}")


class FiniteSteps(_Base):
    """A mixin for Trainers; it precedes the Trainer among the bases of a class.

    The class calls `_begin_step` before the first micro-batch of a step, and `_watch` in each. It defines `_suspects`
    and `_interval_metrics`. A `FiniteGuard` among the Trainer's callbacks replaces the default one.
    """

    #: Whether a loss above its start is worth a warning.
    _loss_falls = True
    _watched: list[Tensor]
    _step_loss: Tensor | float = 0.0
    # Steps, and skipped ones among them, since the last log and in this session.
    _interval, _session = (0, 0), (0, 0)

    def _suspects(self) -> list[str]:
        """The step's examples on this rank whose loss is not finite, in words; all of them if there are none."""
        raise NotImplementedError

    def _forget_step(self) -> None:
        """Take a skipped step out of the sums that will be logged."""

    def _interval_metrics(self) -> dict[str, float]:
        """The means to log over the interval since the last log; every rank calls it."""
        raise NotImplementedError

    def _start_interval(self) -> None:
        """Forget what was summed since the last log."""
        self._interval = (0, 0)

    @property
    def guard(self) -> FiniteGuard:
        """The callback, which restoring a checkpoint may have replaced."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, FiniteGuard))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Raises:
            NonFiniteError: a step is not finite, and no more may be skipped; it was not applied.
        """
        if not any(isinstance(each, FiniteGuard) for each in self.callback_handler.callbacks):
            self.add_callback(FiniteGuard())
        self.guard.loss_falls = self._loss_falls
        self.args.logging_nan_inf_filter = False
        self._session = (0, 0)
        self._start_interval()
        self._begin_step()
        return super().train(*args, **kwargs)

    def _begin_step(self) -> None:
        self._watched, self._step_loss = [], 0.0

    def _watch(self, loss: Tensor, *others: Tensor) -> Tensor:
        """Note values that must be finite; return the loss of a micro-batch for the log, 0 if it is not finite."""
        if self.is_in_train:
            self._watched += [loss.detach(), *others]
        shown = torch.where(loss.isfinite(), loss, 0.0)
        self._step_loss = self._step_loss + shown
        return shown

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm for the log; transformers asks for it just before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        loss_is_broken, norm_is_broken = self._broken(norm)
        scaler = self.accelerator.scaler
        if norm_is_broken and scaler is not None and scaler.get_scale() >= _LEAST_SCALE:
            norm_is_broken = False  # the scaler skips the step itself, and tries a smaller scale
        skip = loss_is_broken or norm_is_broken
        if skip:
            self._skip(model, "the loss" if loss_is_broken else "the gradient's norm")
        for name in ("_interval", "_session"):
            steps, skipped = getattr(self, name)
            setattr(self, name, (steps + 1, skipped + skip))
        return None if skip else norm

    def _broken(self, norm: Any) -> tuple[bool, bool]:
        """Whether a watched value, and whether the norm, is not finite on any rank."""
        device = self.args.device
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # as FSDP2 gives it
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
        watched = torch.cat([each.reshape(-1).float() for each in self._watched])
        broken = torch.stack([~watched.isfinite().all(), ~norm.isfinite()]).float()
        loss, gradient = self.accelerator.reduce(broken, reduction="sum").tolist()
        return loss > 0, gradient > 0

    def _skip(self, model: nn.Module, what: str) -> None:
        """Leave this step out, or raise NonFiniteError if no more may be."""
        guard, step = self.guard, self.state.global_step + 1
        if len(guard.skipped) >= guard.max_skipped_steps or self.is_deepspeed_enabled:  # whose engine has applied it
            raise NonFiniteError(self._explained(step, what))
        guard.skipped.append(step)
        model.zero_grad()  # no optimizer moves a parameter without a gradient
        self._tr_loss -= self._step_loss
        self._forget_step()

    def _explained(self, step: int, what: str) -> str:
        names = self._suspects()
        if self.accelerator.num_processes > 1:
            names = gather_object(names)
        found = found_checkpoints(Path(str(self.args.output_dir)))[-2:]
        kept = " and ".join(path.name for path in found)
        advice = (
            "the model gives this before any training, so check its weights and these records"
            if step == 1
            else f"try a smaller learning rate than {self.args.learning_rate:g}"
        )
        return (
            f"step {step}: {what} is not finite, with {_some(names)}; the step was not applied (last checkpoints: "
            f"{kept or 'none'}); {advice}, or skip such steps with max_skipped_steps"
        )

    # ---- logs and files ------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; logs of the training loop, which every rank makes, get the interval's metrics.

        Means of the loss are over the steps that were applied.
        """
        if "loss" in logs and start_time is not None:
            logs |= self._interval_metrics()
            logs["loss"] *= _share(*self._interval)
            self._start_interval()
            if self.guard.skipped:
                logs["skipped_steps"] = len(self.guard.skipped)
        if "train_loss" in logs:
            logs["train_loss"] *= _share(*self._session)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, or raise NonFiniteError if a trained weight is not finite.

        A weight whose square is too large for float32 counts as infinite: no forward survives it.
        """
        model: Any = self.model
        trained = [(name, _local(p)) for name, p in model.named_parameters() if p.requires_grad]
        norms = [torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32)) for _, p in trained]
        broken = [~norm.isfinite().to(self.args.device) for norm in norms]
        own = torch.stack(broken).any().float() if broken else torch.zeros((), device=self.args.device)
        if float(self.accelerator.reduce(own, reduction="sum")):
            names = [name for (name, _), wrong in zip(trained, broken, strict=True) if wrong]
            raise NonFiniteError(
                f"step {self.state.global_step}: expected finite weights to save, got {_some(names) or 'others'}; "
                f"nothing was written; try a smaller learning rate than {self.args.learning_rate:g}"
            )
        super().save_model(output_dir, _internal_call)


def _diverged(start: float, late: Sequence[Mapping[str, float]]) -> str | None:
    """What is wrong with these logs of a run whose loss began at `start`; None if nothing is.

    Weights that are far too large give every token the same probability, with a gradient of exactly 0.
    """
    least = min(log["loss"] for log in late)
    if least > _RISEN * abs(start):
        return f"the loss began at {start:.3f} and was at least {least:.3f}"
    return None if any(log.get("grad_norm") for log in late) else f"the gradient was 0, and the loss {least:.3f},"


def _share(steps: int, skipped: int) -> float:
    """The factor from a mean over all steps, which counts skipped ones as 0, to the mean over the others."""
    return 1.0 if not skipped else steps / (steps - skipped) if steps > skipped else float("nan")


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _some(items: Sequence[Any]) -> str:
    more = len(items) - _NAMED
    return ", ".join(map(str, items[:_NAMED])) + (f" and {more} more" if more > 0 else "")
