"""What the trainer measures: sums over an interval of training, means over an evaluation, and a watch on both.

Sums stay on the device and are reduced over ranks once per log, so measuring never synchronises a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

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
    _SUMS = (*_TERMS, *_TOKEN_SUMS, "num_tokens", "num_sequences")

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._paired = False
        self.steps = 0

    def add_step(self) -> None:
        """Count one optimiser step."""
        self.steps += 1

    def add(self, output: PreferenceLossOutput) -> None:
        """Add one micro-batch."""
        pair, count = output.pair_nll, output.num_tokens
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
                output.loss.new_tensor(count),
                output.loss.new_tensor(output.num_sequences),
            ]
        ).detach().double()  # fmt: skip
        self._sums = values if self._sums is None else self._sums + values

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Reduce over ranks, reset, and return the interval's metrics; every rank must call it."""
        sums = self._sums if self._sums is not None else torch.zeros(len(self._SUMS), dtype=torch.float64, device=device)
        total = dict(zip(self._SUMS, reduce(sums).tolist(), strict=True))
        steps, self.steps, self._sums = max(1, self.steps), 0, None
        tokens = max(1.0, total["num_tokens"])
        metrics = {name: total[name] / steps for name in self._TERMS}
        metrics |= {name: total[name] / tokens for name in self._TOKEN_SUMS}
        metrics |= {"num_tokens": total["num_tokens"], "num_sequences": total["num_sequences"]}
        if not self._paired:
            metrics = {k: v for k, v in metrics.items() if k in ("loss_factual", "nll_factual", "num_tokens", "num_sequences")}
        return metrics


#: Columns of the per-example evaluation table, means over the example's tokens but for the last.
EVAL_COLUMNS = (
    "loss", "nll_factual", "nll_counterfactual", "nll_placebo", "effect_prob", "share_above_threshold", "num_tokens",
)  # fmt: skip


def eval_metrics(table: Tensor, *, token_mean_loss: bool) -> dict[str, float]:
    """Reduce the per-example table [examples, columns] to an evaluation's metrics.

    nll's and effects are means over tokens. `effect_placebo` is nll under another user's history minus nll under the
    user's own: unlike `effect_logprob`, no loss can raise it by making the no-history pass wrong.
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

    A loss with gradient through both passes can lower its effect term by making z0 wrong; then "effects" grow and mean
    nothing. The training nll without history is averaged over at least `window` sequences, and a rise of more than
    `tolerance` nats above its lowest average warns; so does a rise of the evaluation's above its lowest.
    """

    def __init__(self, tolerance: float = 0.5, window: int = 64) -> None:
        self.tolerance = tolerance
        self.window = window
        self.lowest: dict[str, float] = {}
        self.pending = [0.0, 0.0, 0.0]  # sum of nll over tokens, tokens, sequences
        self.warned = False

    def state(self) -> dict[str, Any]:
        return {
            "args": {"tolerance": self.tolerance, "window": self.window},
            "attributes": {"lowest": self.lowest, "pending": self.pending, "warned": self.warned},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from where a checkpoint left off."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step > 0:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name, nll, tokens, sequences in self._readings(logs or {}):
            if name == "training":
                self.pending = [self.pending[0] + nll * tokens, self.pending[1] + tokens, self.pending[2] + sequences]
                if self.pending[2] < self.window:
                    continue
                nll, self.pending = self.pending[0] / max(1.0, self.pending[1]), [0.0, 0.0, 0.0]
            self._check(name, nll, state.global_step)

    @staticmethod
    def _readings(logs: dict[str, float]) -> list[tuple[str, float, float, float]]:
        readings = []
        if "nll_counterfactual" in logs:
            readings.append(("training", logs["nll_counterfactual"], logs["num_tokens"], logs["num_sequences"]))
        for key, value in logs.items():
            if key.endswith("_nll_counterfactual"):
                readings.append((key.removesuffix("_nll_counterfactual"), value, 0.0, 0.0))
        return readings

    def _check(self, name: str, nll: float, step: int) -> None:
        lowest = min(self.lowest.get(name, nll), nll)
        self.lowest[name] = lowest
        if nll - lowest > self.tolerance and not self.warned:
            self.warned = True
            logger.warning(
                "step %d: the nll without history (%s) rose from %.2f to %.2f nats. The loss is making the no-history "
                "pass wrong, so its effects overstate what the history does. Use detach_counterfactual=True, and trust "
                "effect_placebo rather than effect_logprob.",
                step,
                name,
                lowest,
                nll,
            )
