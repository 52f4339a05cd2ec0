"""Generation in one row of prompts that share prefixes: a history that many queries share is computed and kept once.

    prefill    the prompts as a prefix tree, through the model's tree attention; its keys and values fill one cache
    a step     the last token of every response, side by side in one row; each sees its prompt's path and its own tokens

transformers' own `generate` keeps a row of keys for each prompt: eight queries over one history compute and read it
eight times. With guidance, a step has one more token for each prompt to move away from, and still reads the weights
once. The best of n samples takes n times the tokens of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from nextquill.errors import UnsupportedModelError
from nextquill.generation import Engine, GenerationOptions, Prompt, token_limit
from nextquill.generation.drafts import PromptLookup
from nextquill.generation.few_rows import faster_few_rows, keys_in_place
from nextquill.generation.guidance import guide, log_probs
from nextquill.generation.sampling import NoiseStream, warpers
from nextquill.models.attention import TreeAttention
from nextquill.models.cache_names import for_forward
from nextquill.models.configs import context_length
from nextquill.models.probe import in_eval_mode, returned_logits
from nextquill.models.router import without_router_loss
from nextquill.ranks import deal
from nextquill.storage.fingerprints import seed_of
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
    with in_eval_mode(model), faster_few_rows(model), closing(TreeEngine(model, tokenizer, stops, options)) as engine:
        yield engine


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
        self._warpers: Any = warpers(options)
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
        ordered = sorted(prompts, key=lambda prompt: (prompt.ids, prompt.index))
        for paired, samples in ((True, self.options.best_of), (False, 1)):
            group = [prompt for prompt in ordered if (prompt.against is not None) == paired]
            size = max(1, self.options.batch_size // samples)
            for start in range(0, len(group), size):
                yield group[start : start + size]

    @torch.no_grad()
    def _tokens(self, prompts: Sequence[Prompt], reuse: bool = False) -> Iterator[tuple[int, int]]:
        context = context_length(self._model)
        room = {prompt.index: token_limit(prompt, self.options, context) for prompt in prompts}
        samples = 1 if prompts[0].against is None else self.options.best_of
        alive = [sample for prompt in prompts if room[prompt.index] for sample in _samples(prompt, samples)]
        if not alive:
            return
        against = [prompt.against for prompt in alive if prompt.against is not None]
        own = [prompt.ids for prompt in alive]
        row = _Row(build_prefix_tree([*own, *against]), self._device, *(self._known(own) if reuse else ()))
        branches = 2 if against else 1
        everyone = [_Response(prompt, room[prompt.index], self.options, self._device) for prompt in alive]
        responses, logits = everyone, self._prefill(row)
        if reuse:
            self.kept = own[0], row.first_prompt()
        while True:
            counts = list[int]()
            for response, candidates, effects in zip(responses, *self._chosen(logits, responses), strict=True):
                new = response.take(candidates, effects, self.stops)
                if samples == 1:
                    yield from ((response.index, token) for token in new)
                counts.append(len(new))
            row.accept(counts * branches)
            going = [place for place, response in enumerate(responses) if response.room]
            if not going:
                break
            if len(going) < len(responses):
                row.keep([branch * len(responses) + place for branch in range(branches) for place in going])
                responses = [responses[place] for place in going]
            logits = self._step(row, [response.next for response in responses] * branches)
        if samples > 1:
            for start in range(0, len(everyone), samples):
                best = max(everyone[start : start + samples], key=lambda response: response.effect)
                yield from ((best.index, token) for token in best.tokens)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _chosen(self, logits: Tensor, responses: Sequence[_Response]) -> tuple[list[list[int]], list[list[float]]]:
        """By response, the token to choose after each of `next`, and with `best_of` its effect.

        One read from the device serves all responses: each makes the host wait for the device.
        """
        rows = [len(response.next) for response in responses]
        scores, against = (logits, None) if len(logits) == sum(rows) else logits.chunk(2)
        effects = None if against is None or self.options.best_of == 1 else log_probs(scores) - log_probs(against)
        if against is not None and self.options.guidance:
            scores = guide(scores, against, self.options.guidance, self.options.plausibility)
        scores = self._warpers(None, scores)
        if self.options.temperature > 0:
            scores = torch.stack([noise for response in responses for noise in response.noise(scores)]).add_(scores)
        tokens = scores.argmax(-1, keepdim=True)
        if effects is None:
            return _split(tokens[:, 0].tolist(), rows), [[] for _ in rows]
        both = torch.cat([tokens.to(effects.dtype), effects.gather(1, tokens)], 1).T.tolist()  # V is below 2^24
        return _split([int(token) for token in both[0]], rows), _split(both[1], rows)

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

    def _step(self, row: _Row, tokens: Sequence[Sequence[int]]) -> Tensor:
        """The logits after every one of some more tokens of each prompt, [tokens, V], prompt by prompt."""
        positions, visible = row.append([len(each) for each in tokens])
        mask = self._step_attention.masks(visible)
        inputs = {"input_ids": torch.tensor([[*chain(*tokens)]], device=self._device), "attention_mask": mask}
        return self._logits({**inputs, "position_ids": positions[None]}, row)

    def _logits(self, inputs: dict[str, Any], row: _Row) -> Tensor:
        with keys_in_place(self._device):
            outputs = self._model(**inputs, **self._extra, **for_forward(self._model, row.cache), use_cache=True)
        logits: Tensor = returned_logits(outputs)[0]
        return logits


class _Response:
    """A response under way.

    Args:
        room: the tokens that it may still get; 0 once it has ended.

    Attributes:
        next: the tokens to compute next: the last one that was chosen, and a draft of those after it. At first it
            stands for the prompt's last token.
        tokens: all that were chosen.
        effect: the sum of log p1 - log p0 over them, nats, with `best_of`.
    """

    def __init__(self, prompt: Prompt, room: int, options: GenerationOptions, device: torch.device) -> None:
        self.index, self.room, self.next = prompt.index, room, prompt.ids[-1:]
        self.tokens, self.effect = list[int](), 0.0
        self._draft_tokens = options.draft_tokens
        self._lookup = PromptLookup(prompt.ids if options.draft_tokens else ())
        self._noise = NoiseStream(prompt.seed, device)

    def noise(self, scores: Tensor) -> list[Tensor]:
        """Noise for the scores after each token of `next`, [V] each; see `NoiseStream.ahead`."""
        return self._noise.ahead(len(self.next), scores)

    def take(self, candidates: Sequence[int], effects: Sequence[float], stops: Collection[int]) -> list[int]:
        """Choose a token after `next`, and after each token of the draft that is the one chosen in its place.

        Args:
            candidates: what to choose after each token of `next`.
            effects: log p1 - log p0 of the same tokens, nats, or none.
            stops: the tokens that end a response.
        """
        new = list[int]()
        for token, proposed in zip(candidates, [*self.next[1:], None], strict=True):
            new.append(token)
            if token in stops or token != proposed:
                break
        self._noise.use(len(new))
        self.effect += sum(effects[: len(new)])
        self.tokens += new
        self.next = new[-1:]
        self.room = 0 if new[-1] in stops else self.room - len(new)
        if self._draft_tokens and self.room:
            self._lookup.extend(new)
            self.next += self._lookup.propose(min(self._draft_tokens, self.room - 1))
        return new


def _samples(prompt: Prompt, count: int) -> list[Prompt]:
    """The prompt so many times with a seed each, at first its own."""
    return [prompt, *(replace(prompt, seed=seed_of(f"{prompt.seed} {number}")) for number in range(1, count))]


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """The values in groups of so many."""
    rest = iter(values)
    return [list(islice(rest, count)) for count in counts]


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
        # What was computed last: whose token it is, its place among them, and the position of each prompt's first one.
        self._owner = self._place = torch.empty(0, dtype=torch.int64, device=device)
        self._start = tree.position_ids[ends].to(device)

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

    def accept(self, counts: Sequence[int]) -> None:
        """Of the tokens that were computed last, keep so many of each prompt; nothing sees its others any more."""
        kept, prompts = torch.tensor(counts, device=self._device), torch.arange(len(counts), device=self._device)
        own = (self._owner == prompts[:, None]) & (self._place < kept[:, None])
        self._visible = torch.cat([self._visible, own], 1)
        self._start = self._start + kept

    def keep(self, prompts: Sequence[int]) -> None:
        """Leave out all prompts but these; the others' tokens stay in the cache, and nothing sees them any more."""
        chosen = torch.tensor(prompts, device=self._device)
        self._visible, self._start = self._visible[chosen], self._start[chosen]

    def append(self, counts: Sequence[int]) -> tuple[Tensor, Any]:
        """Append so many tokens to each prompt; their positions [tokens], and what they see by window, bool.

        A token sees its prompt, the prompt's accepted tokens, and those before it: [tokens, cache].
        """
        places = [(prompt, place) for prompt, count in enumerate(counts) for place in range(count)]
        self._owner, self._place = torch.tensor(places, device=self._device).T
        own = (self._owner[:, None] == self._owner) & (self._place[:, None] >= self._place)
        visible = torch.cat([self._visible[self._owner], own], 1)
        positions = self._start[self._owner] + self._place
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
