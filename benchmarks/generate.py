"""Suite `generate`: decoding with a long history, plain and guided, and several queries of one user.

One query: the time of a token after the first, so that reading the prompt does not count. Guidance adds the prompt
without history, which is short. Several queries: the time of all responses, reading included; peers are transformers'
`generate` called once for each query, called once with all of them as a padded batch, and called for each query with
a copy of the history's keys and values, as its documentation shows. Prompts are random tokens, responses are greedy
and of one length. `--model NAME` takes a model by name; a random Llama otherwise.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from benchmarks.measure import GateError, Options, Row, default_device, make_row, ratios, time_in_turns
from nextquill.generation import GenerationOptions, Prompt, local_engine
from nextquill.generation.guidance import HistoryGuidance, guide
from nextquill.models.cache_names import for_forward, for_generate
from nextquill.models.loading import load_model
from nextquill.models.tiny_models import ScratchSize, build_model

PLAIN, GUIDED = "ours, plain", "ours, guided"
SEPARATE = "transformers, a call each"
GAMMA = 1.0
_SIZE = ScratchSize(8192, 512, 8, 8, 1408)
_QUICK_SIZE = ScratchSize(300, 64, 2, 2, 128)
#: The largest distance of a chosen token's score from the best one, in nats: the order of summation differs.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Shape:
    """Tokens of the history, of a query and of a response, and the number of queries."""

    history: int = 1500
    query: int = 40
    response: int = 64
    queries: int = 8


@dataclass
class Ours:
    """The tree engine on some prompts; keeps the responses and the seconds of a token after the first."""

    model: Any
    prompts: list[Prompt]
    length: int
    per_token: list[float] = field(default_factory=list)
    responses: dict[int, list[int]] = field(default_factory=dict)

    def __call__(self) -> None:
        guidance = 0.0 if self.prompts[0].against is None else GAMMA
        options = GenerationOptions(self.length, len(self.prompts), engine="tree", guidance=guidance)
        stamps = list[float]()
        self.responses = {prompt.index: [] for prompt in self.prompts}
        with local_engine(self.model, None, set(), options) as engine:
            for index, token in engine.stream(self.prompts):
                stamps.append(time.perf_counter())
                self.responses[index].append(token)
        self.per_token.append(_after_the_first(stamps))


@dataclass
class Transformers:
    """`generate` on some prompts: one call for all, or for each; with a copy of shared keys and values if asked."""

    model: Any
    prompts: list[Prompt]
    length: int
    at_once: bool = False
    shared: int = 0
    per_token: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        groups = [self.prompts] if self.at_once else [[prompt] for prompt in self.prompts]
        cache = self._cache() if self.shared else None
        for group in groups:
            clock = _Clock()
            against = [prompt.against for prompt in group if prompt.against is not None]
            processors: list[LogitsProcessor] = [HistoryGuidance(self.model, against, GAMMA)] if against else []
            ids = torch.tensor([prompt.ids for prompt in group], device=self.model.device)
            given = {} if cache is None else for_generate(copy.deepcopy(cache))
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.length, do_sample=False,
                logits_processor=[*processors, clock], **given,
            )  # fmt: skip
            self.per_token.append(_after_the_first(clock.stamps))

    @torch.no_grad()
    def _cache(self) -> Any:
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([self.prompts[0].ids[: self.shared]], device=self.model.device)
        self.model(ids, logits_to_keep=1, **for_forward(self.model, cache))
        return cache


class _Clock(LogitsProcessor):
    """Notes the time of every token."""

    def __init__(self) -> None:
        self.stamps = list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.stamps.append(time.perf_counter())
        return scores


def _after_the_first(stamps: Sequence[float]) -> float:
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def run(options: Options) -> list[Row]:
    """Check the responses of both ways to generate, then time them."""
    device = options.device or default_device()
    model = make_model(options).to(device).eval()
    shape = Shape(60, 8, 4, 3) if options.quick else Shape()
    of = options.model or "random Llama"
    plain, guided = make_prompts(model, shape, guided=False), make_prompts(model, shape, guided=True)
    budget = None if options.budget is None else options.budget / 2
    rows = list[Row]()

    case = f"{of}, one query, {shape.history} tokens of history"
    one: dict[str, Any] = {
        PLAIN: Ours(model, plain[:1], shape.response),
        GUIDED: Ours(model, guided[:1], shape.response),
        "transformers, plain": Transformers(model, plain[:1], shape.response),
        "transformers, guided": Transformers(model, guided[:1], shape.response),
    }
    _gate(case, one)
    for each in one.values():
        each.per_token.clear()
    time_in_turns(one, options.rounds, warmup=0, budget=budget)
    for name, values in ratios({name: each.per_token for name, each in one.items()}, PLAIN).items():
        rows.append(make_row("generate", case, name, "time a token", "x", values, PLAIN, device=device))
    options.save(rows)

    case = f"{of}, {shape.queries} queries, {shape.history} tokens of history"
    many: dict[str, Callable[[], None]] = {
        SEPARATE: Transformers(model, plain, shape.response),
        "transformers, one batch": Transformers(model, plain, shape.response, at_once=True),
        "transformers, cached history": Transformers(model, plain, shape.response, shared=shape.history),
        PLAIN: Ours(model, plain, shape.response),
        GUIDED: Ours(model, guided, shape.response),
    }
    _gate(case, many)
    for name, values in ratios(time_in_turns(many, options.rounds, warmup=0, budget=budget), SEPARATE).items():
        rows.append(make_row("generate", case, name, "time", "x", values, SEPARATE, device=device))
    return rows


def make_model(options: Options) -> Any:
    """The model, which never ends a response by itself."""
    if options.model is None:
        model = build_model(_QUICK_SIZE if options.quick else _SIZE, 0)
    else:
        model = load_model(options.model)[0]
    model.config.eos_token_id = None
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def make_prompts(model: Any, shape: Shape, *, guided: bool) -> list[Prompt]:
    """Queries after one history, with the query alone as the prompt to move away from."""
    rng, words = random.Random(0), range(10, model.config.vocab_size)
    history = rng.choices(words, k=shape.history)
    queries = [rng.choices(words, k=shape.query) for _ in range(shape.queries)]
    return [Prompt(i, history + query, i, query if guided else None) for i, query in enumerate(queries)]


def _gate(case: str, providers: dict[str, Any]) -> None:
    """Run every provider once; each of our tokens must have the best score of separate passes, but for rounding."""
    for name, provider in providers.items():
        provider()
        if isinstance(provider, Ours):
            for prompt in provider.prompts:
                gap = _gap(provider.model, prompt, provider.responses[prompt.index])
                if not gap <= _TOLERANCE:
                    raise GateError(f"generate: {case}: {name}: a token of query {prompt.index} is {gap:.2g} from best")


@torch.no_grad()
def _gap(model: Any, prompt: Prompt, response: list[int]) -> float:
    def logits(prefix: list[int]) -> Tensor:
        ids = torch.tensor([prefix + response[:-1]], device=model.device)
        return model(ids).logits[0, len(prefix) - 1 :].float()

    own = logits(prompt.ids)
    scores = own.log_softmax(-1) if prompt.against is None else guide(own, logits(prompt.against), GAMMA)
    chosen = scores[torch.arange(len(response)), torch.tensor(response)]
    return float((scores.amax(-1) - chosen).max())
