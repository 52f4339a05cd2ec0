"""Suite `head`: the loss alone at real models' head shapes, against plain PyTorch and other fused losses.

For each shape and task, every available provider is checked (`benchmarks.gate`), then timed in turns. Metrics:

    seconds            s        one call
    time               x        seconds over those of plain PyTorch, round by round
    tflops             TFLOP/s  the task's useful products (`Task.products`) over the time
    gemm_fraction      x        tflops over the device's own rate, round by round: `torch.mm` takes turns, with
                                [N, D] by [D, 32768] in the same dtype
    peak               MiB      the whole call, forward and backward, beyond its inputs (`benchmarks.memory`)
    forward_peak       MiB      the forward alone
    transient          MiB      the forward's peak minus the finished gradients that it keeps; `note` names these
    error_*, full_size x        see `benchmarks.gate`
    status                      no figure; `note` gives the reason (not installed, out of memory, refused by the gate …)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import gate
from benchmarks.cases import Inputs, Shape, Task, for_task, make_inputs, output_names, plan
from benchmarks.environment import describe
from benchmarks.measure import (
    GateError,
    Options,
    Row,
    default_device,
    make_row,
    ratios,
    synchronise,
    time_in_turns,
)
from benchmarks.memory import MIB, Request, cpu_peaks, cuda_peak
from benchmarks.provider import BASELINE, OUT_OF_MEMORY, Call, Provider, ProviderError
from benchmarks.registry import PROVIDERS

GEMM = "torch.mm"
_GEMM_COLUMNS = 32768
#: The share of a task's time for timing; the rest is for memory.
_TIMED_SHARE = 0.8


def run(options: Options, entrants: Sequence[Provider] | None = None) -> list[Row]:
    """Check every task at every shape, then measure its time and memory.

    Raises:
        GateError: an implementation of ours failed or is wrong. It is raised at the end, after all other figures are
            saved.
    """
    device = torch.device(options.device or default_device())
    suite = _Suite(options, device, tuple(entrants or PROVIDERS))
    todo = plan(device, options.quick)
    if device.type == "cuda":
        print("\n".join(describe(device)), flush=True)
    deadline = None if options.budget is None else time.perf_counter() + options.budget
    for position, step in enumerate(todo):
        part = step.weight / sum(each.weight for each in todo[position:])
        suite.measure(step.shape, step.task, None if deadline is None else part * (deadline - time.perf_counter()))
        if position + 1 == len(todo) or todo[position + 1].shape != step.shape:
            suite.weigh(step.shape)
        options.save(suite.rows)
    if suite.broken:
        raise GateError("head: not timed: " + "; ".join(suite.broken))
    return suite.rows


class _Suite:
    """The rows so far, and the inputs of the current shape."""

    def __init__(self, options: Options, device: torch.device, entrants: tuple[Provider, ...]) -> None:
        self.options, self.device, self.entrants = options, device, entrants
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows: list[Row] = []
        self.broken: list[str] = []
        self.shape: Shape | None = None
        self.inputs: Any = None
        self.slice: Any = None
        self.gemm: Any = None
        self.products = 0
        self.ran: list[tuple[Task, Provider]] = []
        self.chosen: dict[tuple[str, str, str], Mapping[str, Any]] = {}

    def measure(self, shape: Shape, task: Task, share: float | None) -> None:
        """Check and measure one task at one shape, in about `share` seconds."""
        begun = time.perf_counter()
        if share is not None and share <= 0:
            self._note(shape, task, "", "out of time")
            return
        if shape != self.shape:
            self._prepare(shape)
        entrants = self._able(shape, task)
        settings = {each.name: dict(self._choose(each, shape, task)) for each in entrants}
        entrants = self._check_slice(shape, task, entrants, settings)
        inputs = for_task(self.inputs, task)
        calls = {each.name: each.bind(task, inputs, settings[each.name]) for each in entrants}
        calls = self._check_full_size(shape, task, calls, inputs)
        if not calls:
            return
        calls[GEMM] = self.gemm
        left = None if share is None else _TIMED_SHARE * (share - (time.perf_counter() - begun))
        warmup = 1 if self.device.type == "cuda" else 0  # a second call, after the check at full size
        try:
            seconds = time_in_turns(calls, self.options.rounds, warmup, left)
        except ProviderError as failure:  # it ran before, so memory is short, and the provider is not at fault
            self._note(shape, task, "", str(failure))
            return
        self._times(shape, task, seconds, settings)
        ran = [each for each in entrants if each.name in calls]
        if self.device.type == "cuda":
            for provider in ran:
                try:
                    whole = cuda_peak(calls[provider.name])
                    forward = cuda_peak(provider.bind_forward(task, inputs, settings[provider.name]))
                    self._peak(shape, task, provider, whole, forward)
                except ProviderError as failure:
                    self._note(shape, task, provider.name, f"memory: {failure}")
        else:
            self.ran += [(task, provider) for provider in ran]

    def _prepare(self, shape: Shape) -> None:
        self.shape = None
        self.inputs = self.slice = self.gemm = None  # frees the last shape's tensors before making new ones
        _release()
        self.inputs = make_inputs(shape, self.dtype, self.device)
        self.slice = make_inputs(shape, self.dtype, self.device, min(shape.rows, gate.ROWS))
        columns = min(shape.vocabulary, _GEMM_COLUMNS)
        left, right = self.inputs.h1, self.inputs.weight[:columns].T
        self.gemm = lambda: torch.mm(left, right)
        self.products = 2 * shape.rows * shape.hidden * columns
        self.shape = shape

    def weigh(self, shape: Shape) -> None:
        """Measure, on a CPU, the peak memory of all providers that ran at a shape."""
        requests = [Request(task, provider.name, part) for part in (False, True) for task, provider in self.ran]
        peaks = cpu_peaks(shape, requests)
        for (task, provider), whole, forward in zip(
            self.ran, peaks[: len(self.ran)], peaks[len(self.ran) :], strict=True
        ):
            if whole is not None and forward is not None:
                self._peak(shape, task, provider, whole, forward)
        self.ran = []

    def _choose(self, provider: Provider, shape: Shape, task: Task) -> Mapping[str, Any]:
        """The fastest variant, found once per size and loss, as the choice takes as long as a round or two."""
        key = provider.name, str(replace(shape, sequences=1)), task.loss.removesuffix(" detached")
        if key not in self.chosen:
            self.chosen[key] = _fastest(provider, task, self.inputs)
        return self.chosen[key]

    def _able(self, shape: Shape, task: Task) -> list[Provider]:
        able = []
        for provider in self.entrants:
            reason = provider.reason_against(task, self.inputs)
            if reason is None:
                able.append(provider)
            else:
                self._note(shape, task, provider.name, reason)
        return able

    def _check_slice(
        self, shape: Shape, task: Task, entrants: list[Provider], settings: Mapping[str, Mapping[str, Any]]
    ) -> list[Provider]:
        found, refused = gate.check_slice(entrants, task, self.slice, settings)
        for name, errors in found.items():
            for output, error in errors.items():
                self._row(shape, task, name, f"error_{output}", "x", [error], "float64")
        return [each for each in entrants if not self._refuse(shape, task, each, refused)]

    def _check_full_size(self, shape: Shape, task: Task, calls: Mapping[str, Call], inputs: Inputs) -> dict[str, Call]:
        first, found, refused = gate.check_full_size(calls, output_names(inputs, task), self.dtype)
        for name, difference in found.items():
            self._row(shape, task, name, "full_size", "x", [difference], first)
        entrants = {each.name: each for each in self.entrants}
        kept = {name: call for name, call in calls.items() if not self._refuse(shape, task, entrants[name], refused)}
        _release()
        return kept

    def _refuse(self, shape: Shape, task: Task, provider: Provider, refused: Mapping[str, str]) -> bool:
        reason = refused.get(provider.name)
        if reason is None:
            return False
        self._note(shape, task, provider.name, reason)
        if reason != OUT_OF_MEMORY and (provider.ours or provider.name == BASELINE):
            self.broken.append(f"{provider.name}, {task}, {shape}: {reason}")
        return True

    def _times(
        self, shape: Shape, task: Task, seconds: dict[str, list[float]], settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        gemm = [self.products / value / 1e12 for value in seconds.pop(GEMM)]
        self._row(shape, task, GEMM, "gemm_rate", "TFLOP/s", gemm)
        work = task.products * 2 * shape.rows * shape.hidden * shape.vocabulary
        against = ratios(seconds, BASELINE) if BASELINE in seconds else {}
        for name, values in seconds.items():
            note = ", ".join(f"{key}={value}" for key, value in settings[name].items())
            self._row(shape, task, name, "seconds", "s", values, note=note)
            if against:
                self._row(shape, task, name, "time", "x", against[name], BASELINE, note=note)
            rates = [work / value / 1e12 for value in values]
            self._row(shape, task, name, "tflops", "TFLOP/s", rates, note=note)
            fractions = [rate / of for rate, of in zip(rates, gemm, strict=True)]
            self._row(shape, task, name, "gemm_fraction", "x", fractions, GEMM, note=note)

    def _peak(self, shape: Shape, task: Task, provider: Provider, whole: int, forward: int) -> None:
        kept = provider.forward_gradients(task, for_task(self.inputs, task))
        less = ", ".join(f"{name} {size / MIB:.0f}" for name, size in kept.items()) or "nothing"
        transient = max(0, forward - sum(kept.values()))
        self._row(shape, task, provider.name, "peak", "MiB", [whole / MIB])
        self._row(shape, task, provider.name, "forward_peak", "MiB", [forward / MIB])
        self._row(shape, task, provider.name, "transient", "MiB", [transient / MIB], note=f"less {less}")

    def _note(self, shape: Shape, task: Task, provider: str, note: str) -> None:
        self._row(shape, task, provider, "status", "", [], note=note)

    def _row(
        self,
        shape: Shape,
        task: Task | None,
        provider: str,
        metric: str,
        unit: str,
        values: list[float],
        baseline: str = "",
        note: str = "",
    ) -> Row:
        loss, mode, head = (task.loss, task.mode, task.head) if task else ("", "", "")
        row = make_row(
            "head", str(shape), provider, metric, unit, values, baseline,
            loss=loss, mode=mode, head=head, dtype=str(self.dtype).removeprefix("torch."), note=note,
            device=self.device.type,
        )  # fmt: skip
        self.rows.append(row)
        return row


def _fastest(provider: Provider, task: Task, inputs: Inputs) -> Mapping[str, Any]:
    """The fastest of a provider's variants at full size, after one warm-up call. A variant that fails comes last."""
    variants = provider.variants()
    if len(variants) == 1:
        return variants[0]
    seconds, warm = [], False
    for options in variants:
        call = provider.bind(task, for_task(inputs, task), options)
        try:
            if not warm:
                call()
                warm = True
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            seconds.append(time.perf_counter() - start)
        except ProviderError:
            _release()
            seconds.append(float("inf"))
    return variants[seconds.index(min(seconds))]


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
