"""Generation in one row of prompts that share prefixes: a history that many queries share is computed and kept once.

    prefill    the prompts as a prefix tree, through the model's tree attention; its keys and values fill one cache
    a step     the last token of every response, side by side in one row; each sees its prompt's path and its own tokens

transformers' own `generate` keeps a row of keys for each prompt: eight queries over one history compute and read it
eight times. With guidance, a step has one more token for each prompt to move away from, and still reads the weights
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from nextquill.errors import UnsupportedModelError
from nextquill.generation import Engine, GenerationOptions, Prompt, token_limit
from nextquill.generation.few_rows import faster_few_rows, keys_in_place
from nextquill.generation.guidance import guide
from nextquill.generation.sampling import GumbelNoise, sampling
from nextquill.models.attention import TreeAttention
from nextquill.models.configs import context_length
from nextquill.models.probe import in_eval_mode, returned_logits
from nextquill.models.router import without_router_loss
from nextquill.ranks import deal
from nextquill.tree import PrefixTree, TreeLayout, build_prefix_tree, visibility_mask

#: Keys and values by layer, [1, H_kv, T, D] each.
Layers = Sequence[tuple[Tensor, Tensor]]
#: Tokens by which a cache grows.
_BLOCK = 256


@contextmanager
def tree_engine(model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> Iterator[TreeEngine]:
    """An engine around a model in eval mode.

    Raises:
        UnsupportedModelError: the model cannot run branches in one row, its rotary embedding depends on the longest
            branch, or it has layers with a state, which a cache of keys and values does not hold.
    """
    with in_eval_mode(model), faster_few_rows(model):
        engine = TreeEngine(model, tokenizer, stops, options)
        try:
            yield engine
        finally:
            engine.close()


class TreeEngine(Engine):
    """See `Engine`; prompts are taken in the order of their tokens, so that those with a common prefix run together."""

    def __init__(self, model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> None:
        super().__init__(tokenizer, stops, options)
        self._model = model
        self._step_attention = TreeAttention(model, "mask")
        if self._step_attention.max_depth is not None:
            raise UnsupportedModelError(f"{type(model).__name__}: its rotary embedding changes with the longest branch")
        if self._step_attention.has_state:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its layers with a state cannot continue several prompts in one row; use "
                "engine='hf'"
            )
        self._prompt_attention = TreeAttention(model)
        self._extra = without_router_loss(model)
        self.kept: tuple[list[int], Layers] | None = None
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Restore the model's own attention."""
        self._prompt_attention.close()

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's index and token ids, batch by batch."""
        left = (batch for batch in self._batches(prompts) if any(prompt.index not in done for prompt in batch))
        yield from (each for each in deal(left, self._responses) if each[0] not in done)

    def _responses(self, batch: Sequence[Prompt]) -> list[tuple[int, list[int]]]:
        found: dict[int, list[int]] = {prompt.index: [] for prompt in batch}
        for index, token in self._tokens(batch):
            found[index].append(token)
        return list(found.items())

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int]]:
        """Yield each prompt's index and next token as soon as it is chosen.

        The beginning that prompts share with the first one of an earlier batch or call is not computed again.
        """
        for batch in self._batches(prompts):
            yield from self._tokens(batch, reuse=True)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        ordered, size = sorted(prompts, key=lambda prompt: (prompt.ids, prompt.index)), self.options.batch_size
        for guided in (True, False):
            group = [prompt for prompt in ordered if (prompt.against is not None) == guided]
            for start in range(0, len(group), size):
                yield group[start : start + size]

    @torch.no_grad()
    def _tokens(self, prompts: Sequence[Prompt], reuse: bool = False) -> Iterator[tuple[int, int]]:
        context = context_length(self._model)
        room = {prompt.index: token_limit(prompt, self.options, context) for prompt in prompts}
        alive = [prompt for prompt in prompts if room[prompt.index]]
        if not alive:
            return
        against = [prompt.against for prompt in alive if prompt.against is not None]
        own = [prompt.ids for prompt in alive]
        row = _Row(build_prefix_tree([*own, *against]), self._device, *(self._known(own) if reuse else ()))
        processors: Any = sampling(self.options, [prompt.seed for prompt in alive], self._device)
        logits = self._prefill(row)
        if reuse:
            self.kept = own[0], row.first_prompt()
        while True:
            scores = processors(None, self._guided(logits, len(alive)))
            tokens: list[int] = scores.argmax(-1).tolist()
            going = list[int]()
            for place, (prompt, token) in enumerate(zip(alive, tokens, strict=True)):
                yield prompt.index, token
                room[prompt.index] -= 1
                if token not in self.stops and room[prompt.index]:
                    going.append(place)
            if not going:
                return
            if len(going) < len(alive):
                row.keep([*going, *(len(alive) + place for place in going if against)])
                alive = [alive[place] for place in going]
                for noise in processors:
                    if isinstance(noise, GumbelNoise):
                        noise.keep(going)
            chosen = [tokens[place] for place in going]
            logits = self._step(row, chosen * 2 if against else chosen)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _guided(self, logits: Tensor, prompts: int) -> Tensor:
        """The scores of the prompts' next tokens, from their own logits and those to move away from."""
        own, against = logits[:prompts], logits[prompts:]
        return guide(own, against, self.options.guidance, self.options.plausibility) if len(against) else own

    def _known(self, prompts: Sequence[list[int]]) -> tuple[int, Layers] | tuple[()]:
        """The number of the prompts' first tokens that were kept from an earlier call, and their keys and values."""
        if self.kept is None:
            return ()
        ids, layers = self.kept
        # At least the last token of a prompt is computed, for its logits.
        same = min(_common(ids, own[:-1]) for own in prompts)
        return (same, layers) if same else ()

    def _prefill(self, row: _Row) -> Tensor:
        """The logits after each prompt, [prompts, V]; fills the cache."""
        if row.known:
            inputs = row.rest()
            inputs["attention_mask"] = self._step_attention.masks(inputs.pop("visible"))
        else:
            inputs = self._prompt_attention.model_inputs(row.forward())
        if not self._selects:
            return self._logits(inputs, row)[row.ends]
        return self._logits({**inputs, "logits_to_keep": row.ends}, row)

    def _step(self, row: _Row, tokens: Sequence[int]) -> Tensor:
        """The logits after one more token of each prompt, [prompts, V]."""
        positions, visible = row.append()
        mask = self._step_attention.masks(visible)
        inputs = {"input_ids": torch.tensor([tokens], device=self._device), "attention_mask": mask}
        return self._logits({**inputs, "position_ids": positions[None]}, row)

    def _logits(self, inputs: dict[str, Any], row: _Row) -> Tensor:
        with keys_in_place(self._device):
            outputs = self._model(**inputs, **self._extra, past_key_values=row.cache, use_cache=True)
        logits: Tensor = returned_logits(outputs)[0]
        return logits


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first tokens that are the same."""
    return next(
        (place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b))
    )


class _Row:
    """A row of prompts and of the tokens after them: what each prompt's next token sees, and the keys and values.

    Args:
        tree: the prompts.
        known: the number of first tokens of the first prompt that are computed already.
        layers: their keys and values, by layer; there may be more.

    Attributes:
        ends: int64 [prompts], where each prompt's last token is among those that are computed first.
        cache: keys and values of all tokens of the row.
    """

    def __init__(self, tree: PrefixTree, device: torch.device, known: int = 0, layers: Layers = ()) -> None:
        self._tree, self._device, self.known = tree, device, known
        rows = torch.arange(len(tree))
        first = tree.branch_rows[0][:known]
        # The tree's rows in the order of the cache: known ones, then the others.
        self._order = torch.cat([first, rows[~torch.isin(rows, first)]])
        ends = torch.stack([branch[-1] for branch in tree.branch_rows])
        self.ends = (torch.argsort(self._order)[ends] - known).to(device)
        self.cache = (
            Cache([_GrowingLayer.of(*layer, known) for layer in layers])
            if known
            else Cache(layer_class_to_replicate=_GrowingLayer)
        )
        visible = (rows <= ends[:, None]) & (ends[:, None] < tree.subtree_end)
        self._visible = visible[:, self._order].to(device)
        self._positions = tree.position_ids[self._order].to(device)  # of every token in the cache
        self._next = (tree.position_ids[ends] + 1).to(device)  # of each prompt's next token

    def first_prompt(self) -> Layers:
        """The keys and values of the first prompt, by layer."""
        columns = torch.argsort(self._order)[self._tree.branch_rows[0]].to(self._device)
        layers: Any = self.cache.layers
        return [(layer.keys[..., columns, :], layer.values[..., columns, :]) for layer in layers]

    def rest(self) -> dict[str, Any]:
        """The tokens that are not known, and what they see by window, bool [tokens, cache]."""
        tree, rest = self._tree, self._order[self.known :]

        def visible(window: int | None) -> Tensor:
            return visibility_mask(tree.position_ids, tree.subtree_end, window)[rest][:, self._order].to(self._device)

        inputs = {name: getattr(tree, name)[rest][None].to(self._device) for name in ("input_ids", "position_ids")}
        return {**inputs, "visible": visible}

    def forward(self) -> dict[str, Any]:
        """The prompts as a forward of a tree batch."""
        tree = self._tree
        tensors = {name: getattr(tree, name)[None] for name in ("input_ids", "position_ids", "subtree_end")}
        moved: dict[str, Any] = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        return {**moved, "layout": TreeLayout.of_tree(tree)}

    def keep(self, prompts: Sequence[int]) -> None:
        """Leave out all prompts but these; the others' tokens stay in the cache, and nothing sees them any more."""
        chosen = torch.tensor(prompts, device=self._device)
        self._visible, self._next = self._visible[chosen], self._next[chosen]

    def append(self) -> tuple[Tensor, Any]:
        """Append a token to each prompt; its position [prompts], and what it sees by window, bool [prompts, tokens]."""
        own = torch.eye(len(self._next), dtype=torch.bool, device=self._device)
        visible = self._visible = torch.cat([self._visible, own], 1)
        positions, self._next = self._next, self._next + 1
        keys = self._positions = torch.cat([self._positions, positions])

        def seen(window: int | None) -> Tensor:
            return visible if window is None else visible & (positions[:, None] - keys < window)

        return positions, seen


class _GrowingLayer(DynamicLayer):
    """Keys and values in buffers that grow in blocks; appending to a tensor would copy all of it for each token."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, tokens: int) -> _GrowingLayer:
        """A layer that begins with a copy of some keys and values."""
        layer = cls()
        layer.update(keys[..., :tokens, :].clone(), values[..., :tokens, :].clone())
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        if not used:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states, value_states]
        grown = []
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            if needed > buffer.shape[-2]:
                larger = buffer.new_empty(*buffer.shape[:-2], needed + _BLOCK, buffer.shape[-1])
                larger[..., :used, :] = buffer[..., :used, :]
                buffer = larger
            if used:
                buffer[..., used:needed, :] = new
            grown.append(buffer)
        self._buffers = grown
        self.keys, self.values = (buffer[..., :needed, :] for buffer in grown)
        return self.keys, self.values
