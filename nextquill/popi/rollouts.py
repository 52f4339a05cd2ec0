"""Samples summaries from the inference model, as token ids for the policy gradient.

    ModelRollouts        samples with transformers' own `generate`, in process, with the present weights
    VLLMRollouts         samples with vLLM beside the model in training (rollouts_vllm.py)
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
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from nextquill.errors import ArgumentError, BudgetError, CheckpointError, OutputExistsError
from nextquill.evaluation.generation import GenerationOptions, Prompt, decoded
from nextquill.evaluation.generation.transformers_engine import transformers_engine
from nextquill.models.configs import base_model, context_length
from nextquill.storage.fingerprints import digest_of

_HEADER = {"format": "nextquill rollouts", "version": 1}


@dataclass(frozen=True)
class Sample:
    """A sampled summary.

    Args:
        ids: the sampled tokens, with the stop token if one was sampled.
        text: the decoded tokens before the stop, without special tokens.
        ended: whether a stop token was sampled; False for a summary that reached `max_new_tokens`.
    """

    ids: list[int]
    text: str
    ended: bool


class Rollouts(Protocol):
    """The interface of everything that samples summaries."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """Return a sample for each prompt, in their order."""

    def sync(self) -> None:
        """Take note that the weights of the inference model have changed."""

    def close(self) -> None:
        """Release all resources; there are no samples after this."""


class ModelRollouts:
    """Samples from a model in memory, by its own `generate`.

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
        check_prompts(prompts, self._options.max_new_tokens, context_length(base))
        with transformers_engine(base, self._tokenizer, self._stops, self._options) as engine:
            return in_order(engine, prompts, self._tokenizer, self._stops)

    def sync(self) -> None:
        """Do nothing, as the weights are the model's own."""

    def close(self) -> None:
        """Do nothing, as there is nothing to release."""


class RecordingRollouts:
    """Passes on the samples of other rollouts and appends each to a file, as a JSON line.

    Args:
        inner: the rollouts that sample; closed with this.
        path: the new file; its folder is made.

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


class RecordedRollouts:
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
        keys, asked = [_key(prompt) for prompt in prompts], defaultdict[str, int](int)
        for prompt, key in zip(prompts, keys, strict=True):
            asked[key] += 1
            if asked[key] > len(self._recorded.get(key, ())):
                what = "no further sample" if key in self._recorded else "no sample"
                raise CheckpointError(
                    f"{self._path}: {what} was recorded for prompt {prompt.index} ({len(prompt.ids)} tokens, "
                    f"seed {prompt.seed}); the recording is from another run"
                )
        return [self._recorded[key].popleft() for key in keys]

    def sync(self) -> None:
        """Do nothing, as there is no model."""

    def close(self) -> None:
        """Do nothing, as there is nothing to release."""


def in_order(engine: Any, prompts: Sequence[Prompt], tokenizer: Any, stops: set[int]) -> list[Sample]:
    """Return the samples of an engine of `evaluation.generation`, in the order of the prompts."""
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    found: dict[int, list[int]] = dict(engine.generate_ids(numbered))
    responses = [found[index] for index in range(len(numbered))]
    return [Sample(ids, decoded(tokenizer, ids, stops), bool(ids) and ids[-1] in stops) for ids in responses]


def check_prompts(prompts: Sequence[Prompt], max_new_tokens: int, room: int | None) -> None:
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
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"path: cannot read the recording {path}: {error.strerror}") from error
    if _parsed(lines[0]) != _HEADER:
        raise CheckpointError(f"{path}, line 1: expected {json.dumps(_HEADER)}, got {_shown(lines[0])}")
    # A whole file ends with a line break, so a rest after the last one is a line that was cut off.
    for number, line in enumerate(lines[1:-1] if lines[-1] == b"" else lines[1:], 2):
        entry = _parsed(line)
        fields = entry if isinstance(entry, dict) else {}
        key, ids, ended = fields.get("key"), fields.get("ids"), fields.get("ended")
        whole = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        if not (isinstance(key, str) and whole and isinstance(ended, bool) and (ids or not ended)):
            raise CheckpointError(
                f"{path}, line {number}: expected a sample with key, ids and ended, got {_shown(line)}"
            )
        yield key, ids or [], ended


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))
