"""Samples summaries with vLLM, on the accelerator that also trains the inference model.

vLLM holds a second copy of the weights. It is updated by vLLM's own means:

    a LoRA adapter    is saved to a temporary folder, and requested as an adapter with a new number, `LoRARequest`
    whole weights     are saved to a temporary folder, and read by the worker's `reload_weights(weights_path=...)`

Both use files because vLLM may run its model in another process. Between samples vLLM sleeps
(https://docs.vllm.ai/en/latest/features/sleep_mode/): its weights move to the CPU and its cache is dropped, so that
training has the whole accelerator.

**None of this has been run with a real vLLM**: it follows vLLM's documentation, and is tested with a module in its
place. vLLM's kernels round differently from the model's, so its samples come from nearly the same distribution. It uses
random numbers of its own, so a seed gives other samples than with `ModelRollouts`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.generation import GenerationOptions, Prompt
from nextquill.generation.vllm_engine import (
    VLLMEngine,
    check_installed,
    load_llm,
    lora_request,
    plain_lora,
    release,
)
from nextquill.models.configs import context_length, is_adapter
from nextquill.popi.rollouts import Sample, check_prompts, in_order


class VLLMRollouts:
    """Samples with vLLM; the module's text says how far this is tested.

    `sync` marks the weights as changed; the next call of `sample` hands them over.

    Args:
        model: the inference model in training: a causal language model, or a PEFT model with a plain LoRA adapter.
        tokenizer: decodes the samples.
        stops: the token ids that end a sample.
        max_new_tokens: the most tokens of a sample.
        temperature: divides the logits; 0 takes the most likely tokens.
        max_prompt_tokens: the most tokens of a prompt.
        adapter: the PEFT adapter that writes summaries; by default the active one.
        model_name: folder or hub name of the base weights; by default the place that the model was loaded from.
        gpu_memory_utilization: the share of the accelerator's memory that vLLM takes while it is awake.
        sleep: whether vLLM sleeps between samples; by default if there is a GPU.
        llm_options: other options of vLLM's `LLM`.

    Raises:
        BackendUnavailableError: vLLM is not installed or cannot load new weights, or training runs in several
            processes.
        ArgumentError: the adapter is not a plain LoRA, the base has no name, or a value is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stops: set[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        max_prompt_tokens: int = 2048,
        adapter: str | None = None,
        model_name: str | None = None,
        gpu_memory_utilization: float = 0.3,
        sleep: bool | None = None,
        **llm_options: Any,
    ) -> None:
        self._options = GenerationOptions(max_new_tokens, temperature=temperature, engine="vllm")
        if max_prompt_tokens < 1:
            raise ArgumentError(f"max_prompt_tokens: expected a positive number, got {max_prompt_tokens}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ArgumentError(f"gpu_memory_utilization: expected a share in (0, 1], got {gpu_memory_utilization}")
        self._model, self._tokenizer, self._stops = model, tokenizer, set(stops)
        self._adapter = _adapter_name(model, adapter)
        check_installed("rollouts: VLLMRollouts", "use ModelRollouts")
        _check_alone()
        # The folder is known only when the adapter is handed over.
        lora = None if self._adapter is None else plain_lora(model, "", self._adapter, model_name)
        name = lora.base if lora else model_name or model.name_or_path
        if not name:
            raise ArgumentError("model_name: vLLM loads the base model by its name, and this one has none")

        context, room = context_length(model), max_prompt_tokens + max_new_tokens
        self._room = room if context is None else min(context, room)
        self._sleep = torch.cuda.is_available() if sleep is None else sleep
        self._stale, self._version = True, 0
        self._folder = tempfile.TemporaryDirectory(prefix="nextquill-rollouts-")
        self._engine = VLLMEngine(tokenizer, self._stops, self._options, self._room)
        try:
            self._engine.llm = load_llm(
                name,
                dtype=model.dtype,
                max_model_len=self._room,
                max_lora_rank=None if lora is None else lora.rank,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=self._sleep,
                **llm_options,
            )
            self._hand_over()
            self._rest()
        except BaseException:
            self.close()
            raise

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """See `Rollouts`.

        Raises:
            ArgumentError: a prompt has no tokens, or these rollouts were closed.
            BudgetError: a prompt has more than `max_prompt_tokens`, or leaves no room in the model's context.
        """
        if self._engine.llm is None:
            raise ArgumentError("rollouts: expected open ones, these were closed")
        check_prompts(prompts, self._options.max_new_tokens, self._room)
        if not prompts:
            return []
        if self._sleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # torch keeps the memory that training has freed, and vLLM needs it
            self._engine.llm.wake_up()
        try:
            if self._stale:
                self._hand_over()
            return in_order(self._engine, prompts, self._tokenizer, self._stops)
        finally:
            self._rest()

    def sync(self) -> None:
        """See `Rollouts`."""
        self._stale = True

    def close(self) -> None:
        """Give back the accelerator's memory and the temporary files."""
        self._engine.llm = self._engine.lora = None
        release()
        self._folder.cleanup()

    def _rest(self) -> None:
        if self._sleep:
            self._engine.llm.sleep(level=1)  # level 2 would lose the base weights of an adapter

    def _hand_over(self) -> None:
        """Update vLLM's weights from the model, and drop its cache of prompts, which the old weights computed."""
        self._version += 1
        folder = Path(self._folder.name) / str(self._version)
        if self._adapter is None:
            self._model.save_pretrained(folder)
            self._load_weights(folder)
            shutil.rmtree(folder)
        else:
            self._model.save_pretrained(folder, selected_adapters=[self._adapter], save_embedding_layers=False)
            # PEFT saves an adapter into a subfolder of its name, except the one called "default".
            inner = folder / self._adapter
            place = inner if inner.is_dir() else folder
            self._engine.lora = lora_request(f"summaries-{self._version}", self._version, str(place))
            # vLLM reads an adapter at the first request for it, so its files stay until the next one replaces it.
            shutil.rmtree(folder.with_name(str(self._version - 1)), ignore_errors=True)
        self._engine.llm.reset_prefix_cache()
        self._stale = False

    def _load_weights(self, folder: Path) -> None:
        try:
            self._engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # For an unknown argument, versions raise different errors, which may come from another process.
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackendUnavailableError(
                f"rollouts: vLLM could not load the model's weights with reload_weights(weights_path=...): {first}; "
                "train a LoRA adapter, or sample with ModelRollouts"
            ) from error


def _adapter_name(model: Any, name: str | None) -> str | None:
    """The name of the PEFT adapter to hand over, or None for whole weights; ArgumentError if it is unknown."""
    if not is_adapter(model):
        if name is not None:
            raise ArgumentError(f"adapter: expected None with a model that is not a PEFT model, got {name!r}")
        return None
    chosen = str(model.active_adapter) if name is None else name
    if chosen not in model.peft_config:
        raise ArgumentError(f"adapter: expected one of {', '.join(model.peft_config)}, got {chosen!r}")
    return chosen


def _check_alone() -> None:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if started else 1
    if processes > 1:
        raise BackendUnavailableError(
            f"rollouts: VLLMRollouts samples in a run of one process, got {processes}; use ModelRollouts"
        )
