"""The trainer's measurements: sums over an interval of training, means over an evaluation, and a watch on both.

Sums stay on the device and are reduced over ranks once per log, so that a step never waits for them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from nextquill.losses import PairLoss
from nextquill.models.branch_passes import PartScores
from nextquill.outputs import PreferenceLossOutput

logger = logging.getLogger(__name__)


class TrainingMeter:
    """Sums of a loss's diagnostics since the last log."""

    _TERMS = ("loss_factual", "loss_effect", "loss_counterfactual")
    _TOKEN_SUMS = (
        "nll_factual",
        "nll_counterfactual",
        "effect_logprob",
        "effect_prob",
        "share_above_threshold",
        "token_weight",
    )
    _COUNTS = ("num_tokens", "num_sequences")
    _WORK = ("computed", "branches")  # computed tokens, and tokens of the branches in separate rows
    _SUMS = (*_TERMS, *_TOKEN_SUMS, *_COUNTS, *_WORK)
    _UNPAIRED = ("loss_factual", "nll_factual", "token_weight", *_COUNTS)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the interval."""
        self._sums: Tensor | None = None
        self._paired = False
        self._steps = 0
        self._users: int | Tensor = 0
        self._step_users: int | Tensor | None = None  # of a step that has begun and has no part yet
        self._since = time.perf_counter()
        self._before: tuple[Tensor | None, int, int | Tensor] = (None, 0, 0)

    def begin_step(self, users: int | Tensor) -> None:
        """Start another optimiser step. A step to which nothing is added does not count.

        `users` is the number of different users in the step over all ranks, or an int64 scalar.
        """
        self._step_users = users
        self._before = (self._sums, self._steps, self._users)

    def forget_step(self) -> None:
        """Leave out the step that was begun last."""
        self._sums, self._steps, self._users = self._before

    def add(self, output: PreferenceLossOutput, computed_tokens: int, branch_tokens: int) -> Tensor:
        """Add one part: the loss's output, the tokens computed for it, and those of its branches in separate rows.

        Returns what is added, float64 [columns]; it is finite if the loss and its NLLs are.
        """
        pair, count = output.pair_nll, output.num_tokens
        if self._step_users is not None:
            self._steps, self._users, self._step_users = self._steps + 1, self._users + self._step_users, None
        self._paired = pair.counterfactual is not None
        values = torch.stack(
            [
                output.factual,
                output.effect,
                output.counterfactual,
                pair.factual.sum(),
                pair.counterfactual.sum() if pair.counterfactual is not None else output.effect.new_zeros(()),
                output.mean_effect_logprob * count,
                output.mean_effect_prob * count,
                output.share_above_threshold * count,
                output.weight_sum,
            ]
        ).detach().double()  # fmt: skip
        counts = values.new_tensor([count, output.num_sequences, computed_tokens, branch_tokens])
        values = torch.cat([values, counts])
        self._sums = values if self._sums is None else self._sums + values
        return values

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Reduce over ranks, reset, and return the interval's metrics; every rank must call it."""
        sums = torch.zeros(len(self._SUMS), dtype=torch.float64, device=device) if self._sums is None else self._sums
        total = dict(zip(self._SUMS, reduce(sums).tolist(), strict=True))
        # Without a step that was applied, a mean is NaN and not 0.
        steps, tokens, paired = self._steps or math.nan, total["num_tokens"] or math.nan, self._paired
        work = {
            "tokens_per_second": total["branches"] / max(1e-9, time.perf_counter() - self._since),
            "sharing_factor": total["branches"] / max(1.0, total["computed"]),
            "users_per_step": float(self._users) / steps,
        }
        self.reset()
        metrics = {name: total[name] / steps for name in self._TERMS}
        metrics |= {name: total[name] / tokens for name in self._TOKEN_SUMS}
        metrics |= {name: total[name] for name in self._COUNTS}
        return (metrics if paired else {name: metrics[name] for name in self._UNPAIRED}) | work


#: Columns of the per-example evaluation table. All but the last are means over the example's tokens.
EVAL_COLUMNS = (
    "loss", "nll_factual", "nll_counterfactual", "nll_placebo", "effect_prob", "share_above_threshold", "num_tokens",
)  # fmt: skip


def example_table(scores: PartScores, num_examples: int, loss: PairLoss) -> Tensor:
    """One row of `EVAL_COLUMNS` per example, float32 [examples, columns]; NLLs in nats, NaN without a placebo."""
    output, ids = scores.output, scores.sequence_ids
    pair = output.pair_nll
    assert pair.counterfactual is not None

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(num_examples).index_add(0, ids, values)

    count = sums(torch.ones_like(pair.factual))
    objective = sums(output.token_loss)
    if loss.reduction == "token":
        objective = objective / count.clamp(min=1.0)
    placebo = torch.full_like(pair.factual, torch.nan) if scores.placebo_nll is None else scores.placebo_nll
    above = (pair.effect_prob > loss.threshold).to(pair.factual.dtype)
    tokens = (pair.factual, pair.counterfactual, placebo, pair.effect_prob, above)
    means = [sums(values) / count.clamp(min=1.0) for values in tokens]
    return torch.stack([objective, *means, count], dim=1).float()


def eval_metrics(table: Tensor, *, token_mean_loss: bool) -> dict[str, float]:
    """Reduce the per-example `table`, floating [examples, columns], to an evaluation's metrics.

    NLLs and effects are means over tokens, in nats except `effect_prob`. `effect_placebo` is the NLL under another
    user's history minus the NLL under the user's own history. Unlike `effect_logprob`, no loss can raise it by a worse
    no-history pass.
    """
    columns = dict(zip(EVAL_COLUMNS, table.double().unbind(1), strict=True))
    tokens = columns["num_tokens"]
    total = tokens.sum().clamp(min=1.0)
    means = {name: float((column * tokens).sum() / total) for name, column in columns.items() if name != "loss"}
    loss = (columns["loss"] * tokens).sum() / total if token_mean_loss else columns["loss"].mean()
    metrics = {
        "loss": float(loss),
        **{name: means[name] for name in EVAL_COLUMNS[1:-1]},
        "effect_logprob": means["nll_counterfactual"] - means["nll_factual"],
        "effect_placebo": means["nll_placebo"] - means["nll_factual"],
        "num_tokens": float(tokens.sum()),
    }
    return {name: value for name, value in metrics.items() if value == value or "placebo" not in name}


class CounterfactualWatch(TrainerCallback, ExportableState):
    """Warns once when the no-history pass gets worse while training.

    A loss with gradient through both passes can lower its effect term by making z0 wrong. Effects then grow and mean
    nothing. The training NLL without history is averaged over at least `window` sequences. A rise of more than
    `tolerance` nats above its lowest average gives a warning, and so does such a rise between evaluations of the run.

    Args:
        tolerance: nats.
        window: sequences.
        trained_through: whether the loss has a gradient through the counterfactual; the advice depends on it.
    """

    def __init__(self, tolerance: float = 0.5, window: int = 64, trained_through: bool = True) -> None:
        self.tolerance = tolerance
        self.window = window
        self.trained_through = trained_through
        self.lowest: dict[str, float] = {}
        self.pending = [0.0, 0.0, 0.0]  # sum of the NLL over tokens, tokens, sequences
        self.warned = False
        self._training = False

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        return {
            "args": {"tolerance": self.tolerance, "window": self.window, "trained_through": self.trained_through},
            "attributes": {"lowest": dict(self.lowest), "pending": list(self.pending), "warned": self.warned},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the values of the checkpoint that the run resumes from."""
        self._training = True
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        if saved and state.global_step > 0:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching: an evaluation outside training may use other data."""
        self._training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Check every value of the NLL without history."""
        if not self._training or not logs:
            return
        if "nll_counterfactual" in logs:
            nll, tokens, sequences = (logs[name] for name in ("nll_counterfactual", "num_tokens", "num_sequences"))
            self.pending = [self.pending[0] + nll * tokens, self.pending[1] + tokens, self.pending[2] + sequences]
            if self.pending[2] >= self.window:
                mean, self.pending = self.pending[0] / max(1.0, self.pending[1]), [0.0, 0.0, 0.0]
                self._check("training", mean, state)
        for key, value in logs.items():
            if key.endswith("_nll_counterfactual"):
                self._check(key.removesuffix("_nll_counterfactual"), value, state)

    def _check(self, name: str, nll: float, state: Any) -> None:
        lowest = self.lowest[name] = min(self.lowest.get(name, nll), nll)
        if nll - lowest <= self.tolerance or self.warned:
            return
        self.warned = True
        if not state.is_world_process_zero:
            return
        cause = (
            "The loss is making the no-history pass wrong: use detach_counterfactual=True"
            if self.trained_through
            else "The model gets worse without a history, as it may when it overfits"
        )
        logger.warning(
            f"step {state.global_step}: the nll without history ({name}) rose from {lowest:.2f} to {nll:.2f} nats, so "
            f"effects against it overstate the effect of the history. {cause}; trust effect_placebo rather than "
            "effect_logprob."
        )
