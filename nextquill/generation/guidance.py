"""Decoding that strengthens what the user's own history contributes (context-aware decoding).

    score(v) = log p1(v) + γ (log p1(v) - log p0(v))     where p1(v) ≥ β max p1, else -∞

p1 is the next token's probability under the user's own history, and p0 without one, or under another user's. γ = 0 is
ordinary decoding. Without the second condition, tokens that are unlikely under both prompts could win by their ratio
alone. Sources: Shi et al. 2023 (arXiv 2305.14739); the condition is from Li et al. 2022 (arXiv 2210.15097).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from nextquill.errors import ArgumentError
from nextquill.generation import PLAUSIBILITY, check_guidance
from nextquill.models.cache_names import cache_of, for_forward
from nextquill.models.configs import base_model
from nextquill.models.router import without_router_loss


def guide(own: Tensor, against: Tensor, guidance: float, plausibility: float = PLAUSIBILITY) -> Tensor:
    """The guided scores of the next token.

    Args:
        own, against: logits [..., V] under the user's own history, and under the prompt to move away from; any
            floating dtype. A constant added to a row changes nothing.
        guidance: γ, at least 0.
        plausibility: β, in (0, 1].

    Returns:
        Scores [..., V] in nats, float32 or wider, -∞ for tokens that are not plausible. The softmax of a row is the
        distribution to sample from.
    """
    scores = log_probs(own)
    implausible = scores < scores.amax(-1, keepdim=True) + math.log(plausibility)
    if guidance:  # 0 · (-∞ - -∞) would not be a number
        scores = scores + guidance * (scores - log_probs(against))
    return scores.masked_fill(implausible, -math.inf)


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] of logits in any floating dtype; float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class HistoryGuidance(LogitsProcessor):
    """Guides `model.generate` of transformers, for any causal language model; see the module's equation.

        guidance = nq.HistoryGuidance(model, prompts_without_history, guidance=1.0)
        model.generate(**left_padded_prompts, logits_processor=[guidance])

    The prompts to move away from run beside the model's own rows, with a cache of their own that is filled once and
    then grows by the generated tokens. The same object serves several calls of `generate` with the same rows. Put it
    before processors that change temperature or cut off candidates.

    Args:
        model: the model that generates, also a PEFT model.
        against: for each row of `generate`, the token ids of the prompt without history or with another user's.
        guidance: γ, at least 0; 0 costs nothing and leaves only the condition of plausibility.
        plausibility: β, in (0, 1].

    Raises:
        ArgumentError: a value is out of range, or a prompt has no tokens; when it is called, if the numbers of rows and
            prompts differ, as with beams.
    """

    def __init__(
        self, model: Any, against: Sequence[Sequence[int]], guidance: float = 1.0, plausibility: float = PLAUSIBILITY
    ) -> None:
        check_guidance(guidance, plausibility)
        if not against or not all(len(ids) for ids in against):
            raise ArgumentError("against: expected a prompt of at least one token for each row")
        self._model, self._against = base_model(model), [list(ids) for ids in against]
        self._guidance, self._plausibility = guidance, plausibility
        self._width = 0  # tokens of a row that the cache holds
        self._cache: Any = None
        self._mask = torch.empty(0)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the guided scores [rows, V] of the next token, float32 or wider.

        Args:
            input_ids: int64 [rows, T], prompts and responses so far; `generate` passes them.
            scores: logits [rows, V], any floating dtype.
        """
        if len(input_ids) != len(self._against):
            raise ArgumentError(
                f"against: expected a prompt for each of the {len(input_ids)} rows of generate, got "
                f"{len(self._against)}; beams and num_return_sequences need one for each row too"
            )
        against = self._logits(input_ids) if self._guidance else scores
        return guide(scores, against, self._guidance, self._plausibility)

    def _logits(self, input_ids: Tensor) -> Tensor:
        """The logits of the next token after the other prompts and the tokens generated so far."""
        if self._cache is None or input_ids.shape[1] != self._width + 1:  # a new call of `generate`
            self._cache = None
            new, self._mask = left_padded(self._against, input_ids.device)
        else:
            new = input_ids[:, -1:]
            self._mask = torch.cat([self._mask, torch.ones_like(new)], 1)
        self._width = input_ids.shape[1]
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        outputs = self._model(
            input_ids=new,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            **for_forward(self._model, self._cache),
            **without_router_loss(self._model),
        )
        self._cache = cache_of(outputs)
        logits: Tensor = outputs.logits[:, -1]
        return logits


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """The prompts as rows that begin with padding, and the mask of their tokens; both int64 [prompts, T]."""
    rows = [torch.tensor(ids, device=device) for ids in prompts]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left"), mask
