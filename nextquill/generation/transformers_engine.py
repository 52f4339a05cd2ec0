"""Generation by transformers' own `generate`, in left-padded batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from nextquill.generation import Engine, GenerationOptions, Prompt, token_limit, up_to_stop
from nextquill.generation.guidance import HistoryGuidance, left_padded
from nextquill.generation.sampling import sampling
from nextquill.models.cache_names import cache_of, for_generate
from nextquill.models.configs import context_length
from nextquill.models.probe import in_eval_mode, temporarily
from nextquill.models.router import without_router_loss
from nextquill.ranks import deal


@contextmanager
def transformers_engine(
    model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions
) -> Iterator[TransformersEngine]:
    """An engine around a model in eval mode, whose generation config only says where to stop.

    Generation uses a cache even if the model's own config has none, as in training with gradient checkpointing.
    """
    pad = min(stops) if stops else 0  # behind the attention mask in prompts, cut off in responses
    config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=sorted(stops) or None
    )
    with in_eval_mode(model), temporarily(model, "generation_config", config):
        yield TransformersEngine(tokenizer, stops, options, model)


@dataclass
class TransformersEngine(Engine):
    """See `Engine`; the longest prompts come first."""

    model: Any
    _keeps: bool = field(default=True, init=False)  # a cache that can be copied, until the model is found to keep none

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's index and token ids, in the order they are computed."""
        left = (each for each in self._batches(prompts) if any(prompt.index not in done for prompt in each[0]))

        def responses(batch: tuple[list[Prompt], int]) -> list[tuple[int, list[int]]]:
            found = zip(batch[0], self._respond(*batch), strict=True)
            return [(prompt.index, up_to_stop(ids, self.stops)) for prompt, ids in found]

        yield from (each for each in deal(left, responses) if each[0] not in done)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], int]]:
        """Prompts to run together, longest first, and the most tokens that each may get.

        Near the end of the model's context that number depends on a prompt's length. Only prompts with the same number
        run together, so that the length of a response depends on its own prompt alone.
        """
        context, size = context_length(self.model), self.options.batch_size

        def together(prompt: Prompt) -> tuple[bool, int]:
            return prompt.against is not None, token_limit(prompt, self.options, context)

        ordered = sorted(prompts, key=lambda prompt: (prompt.against is None, -len(prompt.ids), prompt.index))
        for (_, tokens), group in groupby(ordered, together):
            members = list(group)
            for start in range(0, len(members), size):
                yield members[start : start + size], tokens

    @torch.no_grad()
    def _respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        device, pad = next(self.model.parameters()).device, self.model.generation_config.pad_token_id
        input_ids, mask = left_padded([prompt.ids for prompt in prompts], device, pad)
        processors = sampling(self.options, [prompt.seed for prompt in prompts], device)
        against = [prompt.against for prompt in prompts if prompt.against is not None]
        if against and self.options.guidance:
            gamma, beta = self.options.guidance, self.options.plausibility
            processors.insert(0, HistoryGuidance(self.model, against, gamma, beta))
        outputs = self._generated(
            input_ids, mask, max_new_tokens, logits_processor=processors, **self._computed_once(input_ids, mask)
        )
        return list(outputs.sequences[:, input_ids.shape[1] :].tolist())

    def _computed_once(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The cache of all tokens but the last, where prompts are equal and the model keeps one; both int64 [rows, T].

        Equal prompts are computed once, and the cache is copied for each.
        """
        distinct, places = torch.unique(torch.cat([input_ids, mask], 1), dim=0, return_inverse=True)
        ids, seen = (half[:, :-1] for half in distinct.tensor_split(2, dim=1))
        if not self._keeps or len(distinct) == len(input_ids) or not seen.any(1).all():
            return {}
        cache: Any = cache_of(self._generated(ids, seen, 1))
        self._keeps = isinstance(cache, Cache) and _length(cache) == ids.shape[1]
        if not self._keeps:
            return {}
        cache.reorder_cache(places)
        return for_generate(cache)

    def _generated(self, input_ids: Tensor, mask: Tensor, max_new_tokens: int, **options: Any) -> Any:
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **options,
            **without_router_loss(self.model),
        )


def _length(cache: Cache) -> int | None:
    """The number of tokens in a cache; None if all its layers are recurrent, and no layer counts them."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None
