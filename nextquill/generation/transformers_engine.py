"""Generation by transformers' own `generate`, in left-padded batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig

from nextquill.generation.engine import Engine
from nextquill.generation.guidance import HistoryGuidance
from nextquill.generation.options import GenerationOptions, Prompt, token_limit, up_to_stop
from nextquill.generation.sampling import sampling
from nextquill.models.configs import context_length
from nextquill.models.router import without_router_loss


@contextmanager
def transformers_engine(
    model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions
) -> Iterator[TransformersEngine]:
    """An engine around a model in eval mode, whose generation config only says where to stop.

    Generation uses a cache even if the model's own config has none, as in training with gradient checkpointing.
    """
    own, modes = model.generation_config, [(module, module.training) for module in model.modules()]
    pad = min(stops) if stops else 0  # behind the attention mask in prompts, cut off in responses
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=sorted(stops) or None
    )
    model.eval()
    try:
        yield TransformersEngine(model, tokenizer, stops, options)
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


class TransformersEngine(Engine):
    """See `Engine`; the longest prompts come first."""

    def __init__(self, model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> None:
        super().__init__(tokenizer, stops, options)
        self._model = model

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's index and token ids, in the order they are computed."""
        for batch, limit in self._batches(prompts):
            wanted = [prompt.index not in done for prompt in batch]
            if not any(wanted):
                continue
            for prompt, ids, want in zip(batch, self._respond(batch, limit), wanted, strict=True):
                if want:
                    yield prompt.index, up_to_stop(ids, self._stops)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], int]]:
        """Prompts to run together, longest first, and the most tokens that each may get.

        Near the end of the model's context that number depends on a prompt's length. Only prompts with the same number
        run together, so that the length of a response depends on its own prompt alone.
        """
        context, size = context_length(self._model), self._options.batch_size

        def together(prompt: Prompt) -> tuple[bool, int]:
            return prompt.against is not None, token_limit(prompt, self._options, context)

        ordered = sorted(prompts, key=lambda prompt: (prompt.against is None, -len(prompt.ids), prompt.index))
        for (_, tokens), group in groupby(ordered, together):
            members = list(group)
            for start in range(0, len(members), size):
                yield members[start : start + size], tokens

    @torch.no_grad()
    def _respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        longest = max(len(prompt.ids) for prompt in prompts)
        device, pad = next(self._model.parameters()).device, self._model.generation_config.pad_token_id
        padding = [longest - len(prompt.ids) for prompt in prompts]
        rows = [
            ([pad] * left + each.ids, [0] * left + [1] * len(each.ids))
            for left, each in zip(padding, prompts, strict=True)
        ]
        input_ids, mask = (torch.tensor(part, device=device) for part in zip(*rows, strict=True))
        processors = sampling(self._options, [prompt.seed for prompt in prompts], device)
        against = [prompt.against for prompt in prompts if prompt.against is not None]
        if against:
            processors.insert(
                0, HistoryGuidance(self._model, against, self._options.guidance, self._options.plausibility)
            )
        outputs = self._model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            logits_processor=processors,
            **without_router_loss(self._model),
        )
        responses: list[list[int]] = outputs[:, longest:].tolist()
        return responses
