"""Suite `step`: whole optimiser steps of the published scheme, of a composition of fused losses, of ours, and of SFT.

For each case (`benchmarks.step_cases`), every provider (`benchmarks.step_peers`) is first compared with separate
unpadded passes in plain PyTorch: the loss and every gradient on a small model in float32, and the loss at full size.
Then zero_grad, forwards, backwards and AdamW are timed in turns on one model. A provider that is missing, fails or is
wrong gets a `status` and is not timed. If it is not another project's trainer, the suite fails at its end, with all
other figures saved. All metrics are per example, so that steps with different numbers of examples can be compared:

    seconds     s     one example's share of a step
    time        x     seconds over those of plain SFT on unpadded examples, round by round
    examples    x     examples per second over those of the published scheme, round by round
    rate        1/s   examples per second
    tokens      1/s   tokens per second; counts the branches that the loss needs, unpadded and unshared
    computed          tokens per example that go through the model
    peak, step_peak   MiB, see `benchmarks.step_memory`
    status            no figure; `note` gives the reason
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import GateError, Options, Row, default_device, make_row, time_in_turns
from benchmarks.memory import MIB
from benchmarks.provider import OUT_OF_MEMORY
from benchmarks.step_cases import Case, build_model, cases, make_examples, pretrained_case, shrunken
from benchmarks.step_memory import Peak, bind, cpu_peaks, cuda_peak, make_optimiser, short_step
from benchmarks.step_peers import (
    LOSSES,
    OFFICIAL,
    SFT,
    Micro,
    StepProvider,
    providers,
    reference,
    share_above_threshold,
    step,
)

#: Relative error allowed in a loss and in a gradient's norm, and in both if the model is in half precision.
_LOSS, _GRADIENT, _HALF = 1e-5, 1e-4, 2e-2


def run(options: Options) -> list[Row]:
    """Check every case, then measure its time and memory.

    Raises:
        GateError: a provider that is not another project's is wrong, after all other figures are saved.
        UnsupportedModelError: see `pretrained_case`.
    """
    device = torch.device(options.device or default_device())
    todo, rows = cases(device, options.quick), list[Row]()
    if options.model is not None:
        todo = (pretrained_case(options.model, device, options.quick),)
    begun, broken = time.perf_counter(), list[str]()
    gated = dict[Case, dict[str, str]]()
    for position, case in enumerate(todo):
        share = None
        if options.budget is not None:
            share = (options.budget - (time.perf_counter() - begun)) / (len(todo) - position)
        broken += measure(case, device, options, rows, share, gated)
    if broken:
        raise GateError("step: not timed: " + "; ".join(broken))
    return rows


def measure(
    case: Case,
    device: torch.device,
    options: Options,
    rows: list[Row],
    budget: float | None,
    gated: dict[Case, dict[str, str]] | None = None,
) -> list[str]:
    """Check and measure one case, append the results to `rows`, and say which providers are wrong and not others'.

    `gated` keeps what the gate found, as cases of one architecture have the same small model. The first of them has
    the losses of the others.
    """
    deadline, begun = None if budget is None else time.perf_counter() + budget, len(rows)
    small, gated = shrunken(case), {} if gated is None else gated
    key = replace(small, model=replace(small.model, name=""), losses=())
    if key not in gated:
        gated[key] = gate(small, device)
    reasons = {label: reason for label, reason in gated[key].items() if label in providers(case)}
    model = build_model(case.model, device)
    optimiser = make_optimiser(model)
    everyone, peaks = providers(case), dict[str, Peak]()
    entrants = {label: entrant for label, entrant in everyone.items() if label not in reasons}
    if device.type == "cuda":
        peaks = _cuda_peaks(model, optimiser, case, entrants, reasons)
    computed, wrong = check_full_size(model, case, entrants)
    reasons |= wrong
    entrants = {label: entrants[label] for label in computed}
    for label, reason in reasons.items():
        rows.append(_row(case, device, everyone[label], "status", "", [], note=reason))
    broken = [
        f"{label}, {case}: {reason}"
        for label, reason in reasons.items()
        if not everyone[label].is_others and reason != OUT_OF_MEMORY
    ]
    if device.type == "cuda":
        rows += _peak_rows(case, device, entrants, peaks)
        options.save(rows)
    if not entrants:
        options.save(rows)
        return broken
    calls = {label: partial(step, optimiser, bind(model, case, entrant)) for label, entrant in entrants.items()}
    left = None if deadline is None else max(0.0, deadline - time.perf_counter())
    # All providers have run forwards at this size by now, and on a GPU a step. Only AdamW's state is missing.
    short_step(model, optimiser, case, next(iter(entrants.values())))
    seconds = time_in_turns(calls, options.rounds, warmup=0, budget=left)
    rows += _time_rows(case, device, entrants, seconds, computed)
    options.save(rows)
    del model, optimiser, calls
    gc.collect()
    if device.type != "cuda":
        rows += _peak_rows(case, device, entrants, cpu_peaks(case, list(entrants)))
    places = {(entrant.loss, entrant.name): place for place, entrant in enumerate(everyone.values())}
    rows[begun:] = sorted(rows[begun:], key=lambda row: places[row.loss, row.provider])
    options.save(rows)
    return broken


def gate(case: Case, device: torch.device) -> dict[str, str]:
    """Check that every provider has the loss and the gradients of separate passes.

    Returns:
        The reason, by label, for each provider that is not timed.

    Raises:
        GateError: the examples cannot show a wrong weight, because all their tokens have one.
    """
    model, examples = build_model(case.model, device), make_examples(case)
    expected = {loss: _loss_and_gradients(model, reference(model, loss, examples)) for loss in LOSSES}
    share = share_above_threshold(model, examples)
    if not 0.02 < share < 0.98:
        raise GateError(f"step: {share:.1%} of the gate's tokens are above the threshold, which tests one weight only")
    reasons = dict[str, str]()
    for label, entrant in providers(case).items():
        try:
            loss, gradients = _loss_and_gradients(model, entrant.build(model, case, examples))
            truth, true_gradients = expected[entrant.loss]
            _check_loss(float(loss), float(truth), _LOSS)
            for name, true in true_gradients.items():
                error = float((gradients[name] - true).norm() / true.norm())
                if not error <= _GRADIENT:
                    raise GateError(f"gradient of {name} is off by {error:.1e}; not timed")
        except Exception as error:  # noqa: BLE001 - the others must still be checked
            reasons[label] = _reason(error)
    return reasons


def check_full_size(
    model: Any, case: Case, entrants: dict[str, StepProvider]
) -> tuple[dict[str, float], dict[str, str]]:
    """Check the losses at full size.

    Returns:
        The tokens per example that go through the model, for each provider with the right loss; and the reason, by
        label, for each other one.
    """
    examples, allowed = make_examples(case), _LOSS if case.model.dtype == "float32" else _HALF
    computed, count, truths = dict[str, float](), [0], dict[tuple[str, int], float]()
    reasons = dict[str, str]()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: count.append(count.pop() + inputs[0].numel())
    )
    try:
        with torch.no_grad():
            for label, entrant in entrants.items():
                size = entrant.examples_of(case)
                if (entrant.loss, size) not in truths:
                    truths[entrant.loss, size] = _total(reference(model, entrant.loss, examples[:size]))
                try:
                    micros = entrant.build(model, case, examples[:size])  # which may try the model on a few tokens
                    count[:] = [0]
                    found = _total(micros)
                    _check_loss(found, truths[entrant.loss, size], allowed)
                except Exception as error:  # noqa: BLE001 - the others must still be checked
                    reasons[label] = _reason(error)
                else:
                    computed[label] = count[0] / size
    finally:
        handle.remove()
    return computed, reasons


def _cuda_peaks(
    model: Any,
    optimiser: torch.optim.Optimizer,
    case: Case,
    entrants: dict[str, StepProvider],
    reasons: dict[str, str],
) -> dict[str, Peak]:
    """The peaks of all providers; one that fails or does not fit moves from `entrants` to `reasons`."""
    peaks = dict[str, Peak]()
    for label, entrant in list(entrants.items()):
        try:
            peaks[label] = cuda_peak(model, optimiser, case, entrant)
        except Exception as error:  # noqa: BLE001 - the others must still be measured
            del entrants[label]
            reasons[label] = _reason(error)
        optimiser.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return peaks


def _peak_rows(
    case: Case, device: torch.device, entrants: dict[str, StepProvider], peaks: dict[str, Peak]
) -> list[Row]:
    return [
        _row(case, device, entrants[label], metric, "MiB", [size / MIB])
        for label, peak in peaks.items()
        if label in entrants
        for metric, size in (("peak", peak.total), ("step_peak", peak.of_step))
    ]


def _time_rows(
    case: Case,
    device: torch.device,
    entrants: dict[str, StepProvider],
    seconds: dict[str, list[float]],
    computed: dict[str, float],
) -> list[Row]:
    each = {label: [value / entrants[label].examples_of(case) for value in seconds[label]] for label in seconds}
    rows = list[Row]()
    for label, values in each.items():
        entrant = entrants[label]
        rows.append(_row(case, device, entrant, "seconds", "s", values))
        if SFT in each:
            ratios = [own / base for own, base in zip(values, each[SFT], strict=True)]
            rows.append(_row(case, device, entrant, "time", "x", ratios, SFT))
        if OFFICIAL in each:
            ratios = [base / own for own, base in zip(values, each[OFFICIAL], strict=True)]
            rows.append(_row(case, device, entrant, "examples", "x", ratios, OFFICIAL))
        held = tokens_of(case, entrant.loss, entrant.examples)
        rows.append(_row(case, device, entrant, "rate", "1/s", [1 / value for value in values]))
        rows.append(_row(case, device, entrant, "tokens", "1/s", [held / value for value in values]))
        rows.append(_row(case, device, entrant, "computed", "", [computed[label]]))
    return rows


def tokens_of(case: Case, loss: str, count: int | None = None) -> float:
    """The mean number of tokens in the branches that an example needs for a loss, over the first `count` examples."""
    branches = [("factual",), ("factual", "counterfactual")][loss != "SFT"]
    return fmean(
        sum(len(getattr(example, branch).input_ids) for branch in branches) for example in make_examples(case)[:count]
    )


def _row(
    case: Case,
    device: torch.device,
    entrant: StepProvider,
    metric: str,
    unit: str,
    values: list[float],
    baseline: str = "",
    note: str = "",
) -> Row:
    head = "frozen" if case.model.lora else "trainable"
    return make_row(
        "step", str(case), entrant.name, metric, unit, values, baseline,
        loss=entrant.loss, mode="step", head=head, dtype=case.model.dtype, note=note, device=device.type,
    )  # fmt: skip


def _loss_and_gradients(model: Any, micros: Sequence[Micro]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of the whole step by parameter; the model's own gradients are deleted."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=model.device)
    for micro in micros:
        loss = micro()
        loss.backward()
        total += loss.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return total, gradients


def _total(micros: Sequence[Micro]) -> float:
    return sum(float(micro()) for micro in micros)


def _check_loss(found: float, true: float, allowed: float) -> None:
    if not abs(found - true) <= allowed * abs(true):
        raise GateError(f"loss {found:.7g}, separate passes have {true:.7g}; not timed")


def _reason(error: Exception) -> str:
    """Why a provider is not timed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    kind = "" if isinstance(error, (GateError, ImportError)) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:300]
