"""Generation by vLLM (https://docs.vllm.ai), which schedules all prompts by itself and shares their prefixes.

It loads the weights from the model's folder a second time, so the model in memory waits on the CPU for the length of
the block. Its kernels and its random numbers differ from transformers': greedy texts agree up to rounding, samples do
not.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.generation import Engine, GenerationOptions, Prompt, token_limit, up_to_stop
from nextquill.models.configs import context_length, is_adapter

# Prompts handed over at once: enough to fill its batches, few enough that an interrupted run loses little.
_AT_ONCE = 512
# The ranks that vLLM has kernels for.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Settings of an adapter that vLLM refuses or silently ignores: it scales all by one lora_alpha / r.
_NOT_RUN = (
    "use_dora", "modules_to_save", "bias", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "trainable_token_indices",
)  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "none", {}, [])


class Adapter(NamedTuple):
    """A LoRA adapter, as vLLM runs it."""

    base: str
    folder: str
    rank: int


@contextmanager
def vllm_engine(
    model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions, model_name: str | None, longest: int
) -> Iterator[VLLMEngine]:
    """An engine with the weights in `model_name`, in the model's dtype; a LoRA adapter is run over its base.

    It reserves memory for prompts of up to `longest` tokens, because a whole context often does not fit beside the
    weights.
    """
    adapter = check_vllm(model, model_name)
    context, needed = context_length(model), longest + options.max_new_tokens
    name, rank = (str(model_name), None) if adapter is None else (adapter.base, adapter.rank)
    device, engine = next(model.parameters()).device, VLLMEngine(tokenizer, stops, options, context)
    model.to("cpu")
    release()
    try:
        limit = needed if context is None else min(context, needed)
        engine.llm = load_llm(name, dtype=model.dtype, max_model_len=limit, max_lora_rank=rank)
        engine.lora = None if adapter is None else lora_request("evaluated", 1, adapter.folder)
        yield engine
    finally:
        engine.llm = None  # it frees the accelerator when nothing refers to it
        release()
        model.to(device)


def load_llm(
    name: str, *, dtype: torch.dtype, max_model_len: int, max_lora_rank: int | None = None, **options: Any
) -> Any:
    """vLLM's `LLM`, with token ids in and out, without the model's own generation config.

    `name` is the folder or hub name of the weights, and `max_model_len` the tokens of a prompt and its response.
    """
    import vllm

    lora = {} if max_lora_rank is None else {"enable_lora": True, "max_lora_rank": max_lora_rank}
    return vllm.LLM(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        generation_config="vllm",  # not the model's own
        skip_tokenizer_init=True,  # token ids in, token ids out
        **{"enable_prefix_caching": True, **lora, **options},
    )


def lora_request(name: str, number: int, folder: str) -> Any:
    """vLLM's request for the adapter in a folder; it reads the folder once for each `number`, from 1 on."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, folder)


def check_installed(argument: str = "engine: 'vllm'", instead: str = "take 'hf'") -> None:
    """Raise BackendUnavailableError if vLLM is not installed; the message names the argument that needs it."""
    if importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError(f"{argument} needs vLLM, which is not installed; pip install vllm, or {instead}")


def check_vllm(model: Any, model_name: str | None) -> Adapter | None:
    """The model's adapter, if it has one; refuses a model that vLLM cannot run.

    Raises:
        BackendUnavailableError: vLLM is not installed.
        ArgumentError: there is no name to load the model by, or vLLM does not run its adapter.
    """
    check_installed()
    if model_name is None:
        raise ArgumentError("engine: 'vllm' loads the model by its name, and there is none; take 'hf'")
    return plain_lora(model, model_name) if is_adapter(model) else None


@dataclass
class VLLMEngine(Engine):
    """See `Engine`; responses come in the order of their prompts."""

    context: int | None
    llm: Any = None
    lora: Any = None

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's index and token ids, in the order they are computed."""
        wanted = [prompt for prompt in prompts if prompt.index not in done]
        for start in range(0, len(wanted), _AT_ONCE):
            batch = wanted[start : start + _AT_ONCE]
            limits = {prompt.index: token_limit(prompt, self.options, self.context) for prompt in batch}
            fitting = [prompt for prompt in batch if limits[prompt.index]]
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt.ids} for prompt in fitting],
                [self._parameters(prompt, limits[prompt.index]) for prompt in fitting],
                use_tqdm=False,
                lora_request=self.lora,
            )
            made = {prompt.index: out.outputs[0].token_ids for prompt, out in zip(fitting, outputs, strict=True)}
            for prompt in batch:
                yield prompt.index, up_to_stop(made.get(prompt.index, ()), self.stops)

    def _parameters(self, prompt: Prompt, max_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            max_tokens=max_tokens,
            seed=prompt.seed,
            stop_token_ids=sorted(self.stops),
            detokenize=False,
        )


def plain_lora(model: Any, folder: str, name: str | None = None, base: str | None = None) -> Adapter:
    """The adapter of a PEFT model that is saved in a folder, as vLLM runs it over its base.

    Args:
        model, folder: the model, and the adapter's folder.
        name: the adapter's name; by default that of the active one.
        base: folder or hub name of the base model; by default as the adapter's config says.

    Raises:
        ArgumentError: the adapter is not a plain LoRA, or does not name its base model.
    """
    config = model.peft_config[model.active_adapter if name is None else name]
    kind = getattr(config.peft_type, "value", config.peft_type)
    extras = [name for name in _NOT_RUN if getattr(config, name, None) not in _UNSET]
    if kind != "LORA" or extras:
        what = f"with {extras[0]}" if extras else f"of type {kind}"
        raise ArgumentError(f"engine: 'vllm' runs plain LoRA adapters, not one {what}; merge it, or take 'hf'")
    base = base or config.base_model_name_or_path
    if not base:
        raise ArgumentError(
            "engine: 'vllm' needs the name of the adapter's base model, and the adapter has none; take 'hf'"
        )
    rank = next((rank for rank in _LORA_RANKS if rank >= config.r), config.r)
    return Adapter(str(base), folder, rank)


def release() -> None:
    """Free the accelerator memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
