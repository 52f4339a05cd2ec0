"""The interface of what generates, and the choice of it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from nextquill.evaluation.generation.options import GenerationOptions, Prompt, stop_tokens

if TYPE_CHECKING:
    from nextquill.data import EncodedExample


class Engine(Protocol):
    """What generates responses."""

    def generate(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, str]]:
        """Yield index and text of each prompt, in any order; what is computed together follows from `prompts` alone.

        Args:
            prompts: what to respond to.
            done: indices that are not needed; what an engine computes with others' it may compute again.
        """

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """As `generate`, with the tokens themselves; the last is a stop token where the response came to one."""


def check_engine(options: GenerationOptions, model: Any = None, model_name: str | None = None) -> None:
    """Raise before any work what `generation_engine` would raise; without a model, as far as that can be told."""
    if options.engine == "vllm":
        from nextquill.evaluation.generation.vllm_engine import check_installed, check_vllm

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

    A response ends at what ended the training response, at the tokenizer's end token or at one of the generation
    config's, after `max_new_tokens`, or where the model's context does.

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer.
        examples: encoded examples, whose first says what ends a response.
        options: how responses are chosen.
        model_name: the folder or hub name that vLLM loads the model from.

    Raises:
        BackendUnavailableError: `engine="vllm"` where vLLM is not installed.
        ArgumentError: it has no name to load the model by, or does not run its adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stops = stop_tokens(base, tokenizer, examples)
    if options.engine == "vllm":
        from nextquill.evaluation.generation.vllm_engine import vllm_engine

        branches = [branch for each in examples for branch in (each.factual, each.counterfactual, each.placebo)]
        longest = max((branch.prompt_length for branch in branches if branch is not None), default=1)
        with vllm_engine(model, tokenizer, stops, options, model_name, longest) as engine:
            yield engine
    else:
        from nextquill.evaluation.generation.transformers_engine import transformers_engine

        with transformers_engine(base, tokenizer, stops, options) as engine:
            yield engine
