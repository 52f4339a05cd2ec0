"""Summaries sampled by vLLM on the accelerator that also trains the inference model.

vLLM holds a second copy of the weights, which follows the model in training by vLLM's own means:

    a LoRA adapter    saved to a temporary folder, and asked for as an adapter with a new number, `LoRARequest`
    whole weights     saved to a temporary folder, and read by the worker's `reload_weights(weights_path=...)`

Both go through files because vLLM may run its model in another process. Between samples it sleeps
(https://docs.vllm.ai/en/latest/features/sleep_mode/): its weights wait on the CPU and its cache is dropped, so that
training has the accelerator to itself.

**None of this has been run against a real vLLM**: it was written to vLLM's documentation, and is tested with a
module in its place. Its kernels round differently from the model's, so its samples are those of nearly the same
distribution; it draws them by random numbers of its own, so a seed gives other samples than with `ModelRollouts`.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.evaluation.generation import GenerationOptions, Prompt
from nextquill.evaluation.generation.vllm_engine import (
    VLLMEngine,
    load_llm,
    lora_request,
    plain_lora,
    release,
)
from nextquill.models.configs import context_length, is_adapter
from nextquill.popi.rollouts import Sample, check_prompts, in_order


class VLLMRollouts:
    """Samples by vLLM; see the module's own words on what is tested.

    `sync` marks the weights as changed; they are handed over when samples are next asked for.

    Args:
        model: the inference model in training: a causal language model, or a PEFT model with a plain LoRA adapter.
        tokenizer: decodes the samples.
        stops: ids that end a sample.
        max_new_tokens: bound on a sample's length.
        temperature: of the softmax that is sampled from; 0 for the most likely tokens.
        max_prompt_tokens: the longest prompt that room is made for.
        adapter: the PEFT adapter that writes summaries; by default the one that is active now.
        model_name: folder or hub name of the base weights; by default what the adapter, or the model, was loaded from.
        gpu_memory_utilization: the share of the accelerator's memory that vLLM takes while it is awake.
        sleep: whether it sleeps between samples; by default where there is a GPU.
        llm_options: any others of vLLM's `LLM`.

    Raises:
        BackendUnavailableError: vLLM is not installed, cannot load new weights, or training runs in several processes.
        ArgumentError: the adapter is no plain LoRA, the base has no name, or a value is out of range.
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
        _check_installed()
        _check_alone()
        # Where it is saved is known when it is handed over.
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
            ArgumentError: a prompt without tokens, or it was closed.
            BudgetError: a prompt of more than `max_prompt_tokens`, or than the model's context leaves.
        """
        if self._engine.llm is None:
            raise ArgumentError("rollouts: expected open ones, these were closed")
        check_prompts(prompts, self._options.max_new_tokens, self._room)
        if not prompts:
            return []
        if self._sleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what training has freed and torch keeps is room for vLLM
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
        """Bring vLLM's weights to those of the model, and drop what it has cached of prompts under the old ones."""
        self._version += 1
        folder = Path(self._folder.name) / str(self._version)
        if self._adapter is None:
            self._model.save_pretrained(folder)
            self._load_weights(folder)
            shutil.rmtree(folder)
        else:
            self._model.save_pretrained(folder, selected_adapters=[self._adapter], save_embedding_layers=False)
            # PEFT saves an adapter into a folder of its name, but for the one called "default".
            inner = folder / self._adapter
            place = inner if inner.is_dir() else folder
            self._engine.lora = lora_request(f"summaries-{self._version}", self._version, str(place))
            # vLLM reads an adapter at the first request for it, so this one stays until the next takes its place.
            shutil.rmtree(folder.with_name(str(self._version - 1)), ignore_errors=True)
        self._engine.llm.reset_prefix_cache()
        self._stale = False

    def _load_weights(self, folder: Path) -> None:
        try:
            self._engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # Versions differ in what they raise for an argument they do not know, and it may come from another process.
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackendUnavailableError(
                f"rollouts: vLLM could not load the model's weights with reload_weights(weights_path=...): {first}; "
                "train a LoRA adapter, or sample with ModelRollouts"
            ) from error


def _adapter_name(model: Any, name: str | None) -> str | None:
    """The PEFT adapter to follow, or None for whole weights.

    Raises:
        ArgumentError: no adapter of that name.
    """
    if not is_adapter(model):
        if name is not None:
            raise ArgumentError(f"adapter: expected None with a model that is no PEFT model, got {name!r}")
        return None
    chosen = str(model.active_adapter) if name is None else name
    if chosen not in model.peft_config:
        raise ArgumentError(f"adapter: expected one of {', '.join(model.peft_config)}, got {chosen!r}")
    return chosen


def _check_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError(
            "rollouts: VLLMRollouts needs vLLM, which is not installed; pip install vllm, or take ModelRollouts"
        )


def _check_alone() -> None:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if started else 1
    if processes > 1:
        raise BackendUnavailableError(
            f"rollouts: VLLMRollouts samples in a run of one process, got {processes}; take ModelRollouts"
        )
