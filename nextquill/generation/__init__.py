"""Responses by the model itself, greedy or sampled.

    tree_engine.py           prompts with a common beginning in one row, which is computed and kept once
    transformers_engine.py   `generate` of transformers, in batches of prompts of similar length
    vllm_engine.py           vLLM, which batches by itself
    drafts.py                next tokens guessed from the prompt, so that one forward confirms several
    few_rows.py              a step on a CPU, where products of a few rows are slow
    guidance.py              decoding that strengthens the user's history
    sampling.py              the next token of each row
    writer.py                texts for a user, from queries and a history
    rollouts.py              samples from a model in training

An engine takes prompts as token ids and yields `(index, text)`, or `(index, sampled ids)`, in any order. This file has
its interface, the options, the prompts with a seed each, and where a response ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nextquill.data._checks import check_integer, check_one_of
from nextquill.data.templates import BRANCHES
from nextquill.errors import ArgumentError, UnsupportedModelError
from nextquill.models.configs import base_model
from nextquill.ranks import started
from nextquill.storage.fingerprints import seed_of

if TYPE_CHECKING:
    from nextquill.data import Branch, EncodedExample

#: "tree" computes shared prefixes once, "hf" is transformers' own `generate`; "auto": "tree" if the model allows it.
ENGINES = ("auto", "tree", "hf", "vllm")
#: With guidance, a token stays a candidate with at least this share of the largest probability.
PLAUSIBILITY = 0.1


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to.

    Args:
        index: identifies the prompt; the engine returns it with the text.
        ids: the prompt's tokens.
        seed: the seed of this prompt's samples.
        against: the tokens of the prompt that gives p0, for guidance and `best_of`, or None.
    """

    index: int
    ids: list[int]
    seed: int
    against: list[int] | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """How responses are chosen.

    The sampling and penalties of the model's own generation config are ignored. A response takes the most likely token
    at each step or, with a temperature above 0, a sample of softmax(logits / temperature) from the smallest set of
    tokens whose probabilities add up to `top_p`.

    Args:
        max_new_tokens: the most tokens of a response.
        batch_size: prompts at a time; vLLM takes as many as fit.
        temperature: 0 for greedy responses.
        top_p: in (0, 1].
        seed: the same seed and example give the same sample, on a device of the same kind.
        engine: one of `ENGINES`.
        guidance: γ of guided decoding, for prompts with `against`; see `guidance.py`. vLLM has none.
        plausibility: β of guided decoding.
        draft_tokens: the most tokens of a draft from the prompt and the text so far; see `drafts.py`. It changes no
            text, and other engines than "tree" have none.
        best_of: for prompts with `against`, draw so many responses and take the one with the largest Σ (log p1 -
            log p0) over its tokens, p as in `guidance.py`. Both come from the steps that draw the tokens. It needs a
            temperature above 0 and the engine "tree", and counts in `batch_size`.

    Raises:
        ArgumentError: a value is out of range.
    """

    max_new_tokens: int = 128
    batch_size: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    engine: str = "auto"
    guidance: float = 0.0
    plausibility: float = PLAUSIBILITY
    draft_tokens: int = 0
    best_of: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ArgumentError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p: expected a share in (0, 1], got {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise ArgumentError(f"top_p: expected a temperature above 0 with it, got top_p={self.top_p} alone")
        if self.engine not in ENGINES:
            raise ArgumentError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        check_guidance(self.guidance, self.plausibility)
        if self.guidance and self.engine == "vllm":
            raise ArgumentError(f"guidance: expected 0 with engine 'vllm', which has none, got {self.guidance}")
        for name, off in (("draft_tokens", 0), ("best_of", 1)):
            value = getattr(self, name)
            check_integer(name, value, least=off)
            if value > off and self.engine in ("hf", "vllm"):
                raise ArgumentError(
                    f"{name}: expected {off} with engine {self.engine!r}, as only 'tree' takes more, got {value}"
                )
        if self.best_of > 1 and self.temperature == 0:
            raise ArgumentError(
                f"best_of: expected a temperature above 0 with it, got best_of={self.best_of} and greedy responses"
            )

    @property
    def needs_against(self) -> bool:
        """Whether anything is done with the `against` of a prompt."""
        return self.guidance > 0 or self.best_of > 1


def check_guidance(guidance: float, plausibility: float) -> None:
    """Raise ArgumentError for a γ that is not a finite number of at least 0, or a β outside (0, 1]."""
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ArgumentError(f"guidance: expected a finite number of at least 0, got {guidance}")
    if not 0 < plausibility <= 1:
        raise ArgumentError(f"plausibility: expected a share in (0, 1], got {plausibility}")


def make_prompts(
    examples: Sequence[EncodedExample], branches: Sequence[str], seed: int, against: str | None = None
) -> list[Prompt]:
    """The prompts of some branches, branch by branch, numbered from 0.

    A prompt's seed follows from `seed`, the example's index and the branch alone. `against` is the branch that gives p0
    to the prompts of the factual branch.

    Raises:
        ArgumentError: there is no branch of that name, or an example lacks it.
    """
    prompts = list[Prompt]()
    for branch in branches:
        for example in examples:
            other = None if against is None or branch != "factual" else _prompt_ids(example, against)
            seed_here = seed_of(f"{seed} {example.index} {branch}")
            prompts.append(Prompt(len(prompts), _prompt_ids(example, branch), seed_here, other))
    return prompts


def stop_tokens(model: Any, tokenizer: Any, ends: Collection[int] = ()) -> set[int]:
    """The token ids that end a response; a chat model's end of turn is often not its tokenizer's end token.

    Args:
        model, tokenizer: their own end tokens are among them.
        ends: last tokens of responses in training; those that are special tokens are among them too.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops |= special.intersection(ends)
    return stops - {None}


def token_limit(prompt: Prompt, options: GenerationOptions, context: int | None) -> int:
    """The most tokens of a prompt's response: `max_new_tokens`, or fewer near the end of the model's context."""
    longest = max(len(prompt.ids), len(prompt.against or ()))  # both are continued by the response
    return options.max_new_tokens if context is None else max(0, min(options.max_new_tokens, context - longest))


def up_to_stop(ids: Sequence[int], stops: set[int]) -> list[int]:
    """The tokens up to and including the first stop; the rest is padding."""
    end = next((position for position, token in enumerate(ids, 1) if token in stops), len(ids))
    return list(ids[:end])


def decoded(tokenizer: Any, ids: Sequence[int], stops: set[int]) -> str:
    """The text of a response before its first stop, without special tokens."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))


@dataclass
class Engine(ABC):
    """Generates responses.

    Args:
        tokenizer: the model's.
        stops: the tokens that end a response.
        options: how responses are chosen.
    """

    tokenizer: Any
    stops: set[int]
    options: GenerationOptions

    def generate(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, str]]:
        """Yield index and text of each response, in any order; `prompts` alone decide which are computed together.

        Args:
            done: indices to leave out; an engine may compute some of them again together with others.
        """
        for index, ids in self.generate_ids(prompts, done):
            yield index, decoded(self.tokenizer, ids, self.stops)

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int]]:
        """Yield each prompt's index and next token as soon as it is known; some engines know a response as a whole."""
        for index, ids in self.generate_ids(prompts):
            yield from ((index, token) for token in ids)

    @abstractmethod
    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield token ids instead of texts; the last id is a stop token if the response reached one."""


def check_engine(options: GenerationOptions, model: Any = None, model_name: str | None = None) -> None:
    """Raise, before any work, the errors of `generation_engine`; without a model, those that do not depend on it."""
    if options.engine == "vllm":
        from nextquill.generation.vllm_engine import check_installed, check_vllm

        if started() > 1:
            raise ArgumentError(f"engine: expected one process with 'vllm', which uses several GPUs, got {started()}")
        check_installed()
        if model is not None:
            check_vllm(model, model_name)
    elif model is not None and (options.engine == "tree" or options.best_of > 1):
        with local_engine(base_model(model), None, set(), options):
            pass


def generation_engine(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    options: GenerationOptions,
    model_name: str | None = None,
) -> AbstractContextManager[Engine]:
    """The engine that `options.engine` names, for the length of the block; the model is left as it was.

    A response ends at the token that ended the training responses, at the tokenizer's end token or one of the
    generation config's, after `max_new_tokens`, or at the end of the model's context.

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer.
        examples: encoded examples; the first one shows which token ends a response.
        model_name: the folder or hub name that vLLM loads the model from.

    Raises:
        BackendUnavailableError: `engine="vllm"` and vLLM is not installed.
        ArgumentError: vLLM has no name to load the model by, or does not run its adapter.
    """
    base = base_model(model)
    stops = stop_tokens(base, tokenizer, [example.factual.response_ids[-1] for example in examples[:1]])
    if options.engine == "vllm":
        from nextquill.generation.vllm_engine import vllm_engine

        branches = [branch for each in examples for branch in (each.factual, each.counterfactual, each.placebo)]
        longest = max((branch.prompt_length for branch in branches if branch is not None), default=1)
        return vllm_engine(model, tokenizer, stops, options, model_name, longest)
    return local_engine(base, tokenizer, stops, options)


@contextmanager
def local_engine(model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> Iterator[Engine]:
    """The engine "tree" or "hf" for a model in memory, without a PEFT wrapper; "auto" chooses by the model.

    Raises:
        UnsupportedModelError: `engine="tree"` or `best_of`, and the model cannot run branches in one row.
    """
    from nextquill.generation.transformers_engine import transformers_engine
    from nextquill.generation.tree_engine import tree_engine

    engine: Engine | None = None
    with ExitStack() as stack:
        if options.engine != "hf":
            try:
                engine = stack.enter_context(tree_engine(model, tokenizer, stops, options))
            except UnsupportedModelError as error:
                if options.best_of > 1:
                    raise UnsupportedModelError(
                        f"best_of: expected a model that the engine 'tree' runs, got another: {error}"
                    ) from error
                if options.engine == "tree":
                    raise
        yield engine or stack.enter_context(transformers_engine(model, tokenizer, stops, options))


def _prompt_ids(example: EncodedExample, name: str) -> list[int]:
    check_one_of("branch", name, BRANCHES)
    branch: Branch | None = getattr(example, name)
    if branch is None:
        raise ArgumentError(
            f"branch: expected examples with a {name} branch, got none in example {example.index} (user "
            f"{example.user_id!r}); a placebo needs records of at least two users"
        )
    return branch.prompt_ids
