"""The interface of an engine that generates responses, and the choice of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from nextquill.errors import UnsupportedModelError
from nextquill.generation.options import GenerationOptions, Prompt, decoded, stop_tokens
from nextquill.models.configs import base_model

if TYPE_CHECKING:
    from nextquill.data import EncodedExample


class Engine(ABC):
    """Generates responses.

    Args:
        tokenizer: the model's.
        stops: the tokens that end a response.
        options: how responses are chosen.
    """

    def __init__(self, tokenizer: Any, stops: set[int], options: GenerationOptions) -> None:
        self._tokenizer, self._stops, self._options = tokenizer, stops, options

    def generate(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, str]]:
        """Yield index and text of each response, in any order; `prompts` alone decide which are computed together.

        Args:
            prompts: the prompts to respond to.
            done: indices to leave out; an engine may compute some of them again together with others.
        """
        for index, ids in self.generate_ids(prompts, done):
            yield index, decoded(self._tokenizer, ids, self._stops)

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int]]:
        """Yield each prompt's index and next token as soon as it is known; some engines know a response as a whole."""
        for index, ids in self.generate_ids(prompts):
            yield from ((index, token) for token in ids)

    @abstractmethod
    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """As `generate`, but with token ids; the last one is a stop token if the response reached one."""


def check_engine(options: GenerationOptions, model: Any = None, model_name: str | None = None) -> None:
    """Raise, before any work, the errors of `generation_engine`; without a model, those that do not depend on it."""
    if options.engine == "vllm":
        from nextquill.generation.vllm_engine import check_installed, check_vllm

        check_installed()
        if model is not None:
            check_vllm(model, model_name)


@contextmanager
def generation_engine(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    options: GenerationOptions,
    model_name: str | None = None,
) -> Iterator[Engine]:
    """The engine that `options.engine` names, for the length of the block; the model is left as it was.

    A response ends at the token that ended the training responses, at the tokenizer's end token or one of the
    generation config's, after `max_new_tokens`, or at the end of the model's context.

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer.
        examples: encoded examples; the first one shows which token ends a response.
        options: how responses are chosen.
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
        with vllm_engine(model, tokenizer, stops, options, model_name, longest) as engine:
            yield engine
    else:
        with local_engine(base, tokenizer, stops, options) as engine:
            yield engine


@contextmanager
def local_engine(model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> Iterator[Engine]:
    """The engine "tree" or "hf" around a model in memory, not a PEFT model around one; "auto" chooses by the model.

    Raises:
        UnsupportedModelError: `engine="tree"` and the model cannot run branches in one row.
    """
    with ExitStack() as stack:
        yield _entered(stack, model, tokenizer, stops, options)


def _entered(stack: ExitStack, model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions) -> Engine:
    from nextquill.generation.transformers_engine import transformers_engine
    from nextquill.generation.tree_engine import tree_engine

    if options.engine != "hf":
        try:
            return stack.enter_context(tree_engine(model, tokenizer, stops, options))
        except UnsupportedModelError:
            if options.engine == "tree":
                raise
    return stack.enter_context(transformers_engine(model, tokenizer, stops, options))
