"""Samples from a model in training, as token ids: POPI's summaries, and the responses that MIRROR learns from.

    ModelRollouts        samples in process, with the present weights
    VLLMRollouts         samples with vLLM, on the accelerator that also trains the model
    RecordingRollouts    records the samples of another one in a file
    RecordedRollouts     replays such a file, without a model

A policy gradient is unbiased only for samples from exactly the trained distribution. So a token is drawn from
softmax(logits / temperature) over the whole vocabulary, without top-p, top-k or penalties. The ids are kept, as text
that is tokenised again may give other tokens. Each prompt has its own random generator, seeded by `Prompt.seed`, so its
sample does not depend on the other prompts in the batch.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nextquill.errors import ArgumentError, BackendUnavailableError, BudgetError, CheckpointError, OutputExistsError
from nextquill.generation import GenerationOptions, Prompt, decoded, local_engine
from nextquill.generation.vllm_engine import VLLMEngine, check_installed, load_llm, lora_request, plain_lora, release
from nextquill.models.configs import base_model, context_length, is_adapter
from nextquill.models.sharded import run_in_step
from nextquill.storage.fingerprints import digest_of
from nextquill.storage.input_files import read_input
from nextquill.storage.json_files import MOST_BYTES, line_fields

_HEADER = {"format": "nextquill rollouts", "version": 1}


@dataclass(frozen=True)
class Sample:
    """A sampled text.

    Args:
        ids: the sampled tokens, with the stop token if one was sampled.
        text: the decoded tokens before the stop, without special tokens.
        ended: whether a stop token was sampled; False for a text that reached `max_new_tokens`.
    """

    ids: list[int]
    text: str
    ended: bool


class Rollouts(Protocol):
    """The interface of everything that samples."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """Return a sample for each prompt, in their order."""
        ...

    def sync(self) -> None:
        """Take note that the weights of the model have changed; by default, do nothing."""
        return

    def close(self) -> None:
        """Release all resources, after which there are no samples; by default, there are none to release."""
        return


class ModelRollouts(Rollouts):
    """Samples from a model in memory; prompts with a common beginning compute it once where the model allows it.

    Where FSDP2 divides the model over processes, each of them calls `sample` the same number of times, with as many
    prompts as it has. All then run as many forwards as the one that needs the most.

    Sampling leaves the model as it was, even after an error: training modes, generation config, gradient flags and
    adapters. The logits have the model's dtype, or that of the surrounding autocast.

    Args:
        model: a causal language model; a PEFT model uses the adapter that is active when `sample` is called.
        tokenizer: decodes the samples.
        stops: the token ids that end a sample.
        max_new_tokens: the most tokens of a sample.
        temperature: divides the logits; 0 takes the most likely tokens, which give no policy gradient.
        batch_size: the number of prompts at a time. The logits of all of them are held, in double precision too.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stops: set[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        batch_size: int = 16,
    ) -> None:
        self._options = GenerationOptions(max_new_tokens, batch_size, temperature)
        self._model, self._tokenizer, self._stops = model, tokenizer, set(stops)

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """See `Rollouts`.

        Raises:
            ArgumentError: a prompt has no tokens.
            BudgetError: a prompt leaves less than `max_new_tokens` of the model's context.
        """
        base = base_model(self._model)
        _check_prompts(prompts, self._options.max_new_tokens, context_length(base))
        found = list[Sample]()

        def run() -> None:
            with local_engine(base, self._tokenizer, self._stops, self._options) as engine:
                found.extend(_in_order(engine, prompts, self._tokenizer, self._stops))

        run_in_step(self._model, run, base)
        return found


class VLLMRollouts(Rollouts):
    """Samples with vLLM.

    **This has not been run with a real vLLM**: it follows vLLM's documentation, and is tested with a module in vLLM's
    place. vLLM holds a second copy of the weights. `sync` marks them as changed, and the next call of `sample` updates
    them through a temporary folder, because vLLM may run its model in another process:

        a LoRA adapter    is requested as an adapter with a new number, `LoRARequest`
        whole weights     are read by the worker's `reload_weights(weights_path=...)`

    Between samples vLLM sleeps (https://docs.vllm.ai/en/latest/features/sleep_mode/): its weights move to the CPU and
    its cache is dropped, so that training has the whole accelerator. vLLM's kernels round differently from the model's,
    so its samples come from nearly the same distribution. Its random numbers are its own, so a seed gives other samples
    than with `ModelRollouts`.

    Args:
        model: the model in training: a causal language model, or a PEFT model with a plain LoRA adapter.
        tokenizer, stops, max_new_tokens, temperature: see `ModelRollouts`.
        max_prompt_tokens: the most tokens of a prompt.
        adapter: the PEFT adapter to sample from; by default the active one.
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
        _check_prompts(prompts, self._options.max_new_tokens, self._room)
        if not prompts:
            return []
        if self._sleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # torch keeps the memory that training has freed, and vLLM needs it
            self._engine.llm.wake_up()
        try:
            if self._stale:
                self._hand_over()
            return _in_order(self._engine, prompts, self._tokenizer, self._stops)
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
            self._engine.lora = lora_request(f"rollouts-{self._version}", self._version, str(place))
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


class RecordingRollouts(Rollouts):
    """Passes on the samples of `inner` and appends each to a new file, as a JSON line; closes `inner` too.

    Raises:
        OutputExistsError: the file exists.
    """

    def __init__(self, inner: Rollouts, path: str | Path) -> None:
        self._inner, self._path = inner, Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._path.open("x").close()
        except FileExistsError as error:
            raise OutputExistsError(f"path: {path} exists; give each run's recording a file of its own") from error
        self._append([_HEADER])

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """See `Rollouts`."""
        samples = self._inner.sample(prompts)
        pairs = zip(prompts, samples, strict=True)
        self._append([{"key": _key(p), "seed": p.seed, "ids": s.ids, "ended": s.ended} for p, s in pairs])
        return samples

    def sync(self) -> None:
        """See `Rollouts`."""
        self._inner.sync()

    def close(self) -> None:
        """Close the rollouts that sample."""
        self._inner.close()

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._path.open("ab") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())


class RecordedRollouts(Rollouts):
    """Replays a recording. A prompt gets the sample for its ids and seed; asked again, it gets the next one.

    Args:
        path: the file that `RecordingRollouts` wrote.
        tokenizer: the tokenizer of the recorded run.

    Raises:
        CheckpointError: the file is missing, or one of its lines is damaged.
    """

    def __init__(self, path: str | Path, tokenizer: Any) -> None:
        self._path, self._recorded = Path(path), defaultdict[str, deque[Sample]](deque)
        for key, ids, ended in _recording(self._path):
            text = decoded(tokenizer, ids, set(ids[-1:]) if ended else set())
            self._recorded[key].append(Sample(ids, text, ended))

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """See `Rollouts`.

        Raises:
            CheckpointError: the recording has no further sample for a prompt; no sample is used up then.
        """
        keys, asked = [_key(prompt) for prompt in prompts], Counter[str]()
        for prompt, key in zip(prompts, keys, strict=True):
            asked[key] += 1
            if asked[key] > len(self._recorded.get(key, ())):
                what = "no further sample" if key in self._recorded else "no sample"
                raise CheckpointError(
                    f"{self._path}: {what} was recorded for prompt {prompt.index} ({len(prompt.ids)} tokens, "
                    f"seed {prompt.seed}); the recording is from another run"
                )
        return [self._recorded[key].popleft() for key in keys]


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


def _in_order(engine: Any, prompts: Sequence[Prompt], tokenizer: Any, stops: set[int]) -> list[Sample]:
    """Return the samples of an engine of `generation`, in the order of the prompts."""
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    found: dict[int, list[int]] = dict(engine.generate_ids(numbered))
    responses = [found[index] for index in range(len(numbered))]
    return [Sample(ids, decoded(tokenizer, ids, stops), bool(ids) and ids[-1] in stops) for ids in responses]


def _check_prompts(prompts: Sequence[Prompt], max_new_tokens: int, room: int | None) -> None:
    """Raise ArgumentError for a prompt without tokens, BudgetError for one without room for its sample."""
    for prompt in prompts:
        if not prompt.ids:
            raise ArgumentError(f"prompts: expected tokens, prompt {prompt.index} has none")
        if len(prompt.ids) + max_new_tokens > (math.inf if room is None else room):
            raise BudgetError(
                f"prompts: prompt {prompt.index} has {len(prompt.ids)} tokens, which with max_new_tokens="
                f"{max_new_tokens} are more than the {room} there is room for"
            )


def check_samples(samples: Sequence[Sample], expected: int) -> None:
    """Raise ArgumentError for a wrong number of samples, or a sample without tokens."""
    if len(samples) != expected:
        raise ArgumentError(f"rollouts: expected {expected} samples, got {len(samples)}")
    for place, sample in enumerate(samples):
        if not sample.ids:
            raise ArgumentError(f"rollouts: expected at least one token in each sample, sample {place} has none")


def _key(prompt: Prompt) -> str:
    return digest_of(json.dumps([prompt.ids, prompt.seed]), 16).hex()


def _recording(path: Path) -> Iterator[tuple[str, list[int], bool]]:
    """Yield the key, the ids and the end of each recorded sample."""
    try:
        header, *lines = read_input(path, MOST_BYTES).removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise CheckpointError(f"path: cannot read the recording {path}: {error.strerror}") from error
    if line_fields(header) != _HEADER:
        raise CheckpointError(f"{path}, line 1: expected {json.dumps(_HEADER)}, got {_shown(header)}")
    for number, line in enumerate(lines, 2):
        fields = line_fields(line)
        key, ids, ended = fields.get("key"), fields.get("ids"), fields.get("ended")
        whole = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        if not (isinstance(key, str) and whole and isinstance(ended, bool) and (ids or not ended)):
            raise CheckpointError(
                f"{path}, line {number}: expected a sample with key, ids and ended, got {_shown(line)}"
            )
        yield key, ids or [], ended


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))
