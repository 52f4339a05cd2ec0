"""The correctness gate: providers with wrong results are not timed, and errors are stored with the times.

The error of an output is ‖result − truth‖ / ‖truth‖. There are two checks:

1. On a slice of 96 rows with the full D and V, against the plain formula in float64 on the same (rounded) inputs. Ours
   may have twice the error of plain PyTorch in the same dtype, plus a slack (1e-3 in half precision, 1e-5 in float32).
   A peer's loss may have ten times plain PyTorch's error plus that slack, as a mean of half-precision losses has a
   larger error. A peer's gradients and NLLs may have an error of 5e-2 in half precision and 1e-3 in float32.
2. At full size, where results are made from several chunks, against the first provider that ran. Every output may have
   an error of 5e-2 in half precision and 1e-3 in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Inputs, Task, for_task, output_names
from benchmarks.peers import plain
from benchmarks.provider import Call, Provider, ProviderError

ROWS = 96
_HALF = (torch.float16, torch.bfloat16)

Errors = dict[str, float]


def truth(task: Task, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs of a task from the plain formula in float64."""
    return plain.PROVIDER.bind(task, for_task(inputs, task, torch.float64))()


def errors(names: Sequence[str], results: Sequence[Tensor], expected: Sequence[Tensor]) -> Errors:
    """The relative error of each output; infinite for another shape or a value that is not finite."""
    return {name: _error(*pair) for name, *pair in zip(names, results, expected, strict=True)}


def _error(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        return float("inf")
    expected = expected if expected.dtype == torch.float64 else expected.float()
    found = float(torch.linalg.vector_norm(result.to(expected.dtype) - expected))
    found /= max(float(torch.linalg.vector_norm(expected)), 1e-30)
    return found if found == found else float("inf")


def limits(names: Sequence[str], dtype: torch.dtype, ours: bool, baseline: Mapping[str, float]) -> Errors:
    """The largest error allowed for each output, given plain PyTorch's errors (empty if it did not run)."""
    half = dtype in _HALF
    slack, most = (1e-3, 5e-2) if half else (1e-5, 1e-3)
    if ours and baseline:
        return {name: 2 * baseline[name] + slack for name in names}
    allowed = dict.fromkeys(names, most)
    if "loss" in baseline:
        allowed["loss"] = 10 * baseline["loss"] + slack
    return allowed


def verdict(found: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """The first output whose error is too large, in words, or None."""
    for name, error in found.items():
        if not error <= allowed[name]:
            return f"{name} off by {error:.1e}, allowed {allowed[name]:.1e}"
    return None


def check_slice(
    entrants: Sequence[Provider], task: Task, inputs: Inputs, options: Mapping[str, Mapping[str, object]]
) -> tuple[dict[str, Errors], dict[str, str]]:
    """The errors of all entrants (the baseline first) against float64, and the reasons of those that fail."""
    mine = for_task(inputs, task)
    names, expected = output_names(mine, task), truth(task, inputs)
    found: dict[str, Errors] = {}
    refused: dict[str, str] = {}
    for provider in entrants:
        try:
            results = provider.bind(task, mine, options.get(provider.name))()
        except ProviderError as failure:
            refused[provider.name] = str(failure)
            continue
        found[provider.name] = errors(names, results, expected)
        own = limits(names, inputs.h1.dtype, provider.ours, found.get(entrants[0].name, {}))
        reason = verdict(found[provider.name], own)
        if reason is not None:
            refused[provider.name] = reason
    return found, refused


def check_full_size(
    calls: Mapping[str, Call], names: Sequence[str], dtype: torch.dtype
) -> tuple[str, dict[str, float], dict[str, str]]:
    """The first provider that ran, the largest difference of each other one from it, and the reasons of failures."""
    first, reference = "", tuple[Tensor, ...]()
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            results = call()
        except ProviderError as failure:
            refused[name] = str(failure)
            continue
        if not first:
            first, reference = name, results
            continue
        each = errors(names, results, reference)
        found[name] = max(each.values())
        reason = verdict(each, limits(names, dtype, False, {}))
        if reason is not None:
            refused[name] = f"at full size {reason}"
    return first, found, refused
