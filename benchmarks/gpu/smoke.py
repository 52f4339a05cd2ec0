"""Phase `smoke`: every public operator, forward and all gradients, against float64, one line for each case.

A case is an operator, an option of the head and a dtype. The truth is the plain twin (`nextquill.reference`) in float64
on the same rounded inputs. An error is ‖result − truth‖ / ‖truth‖, and `ERRORS` states the largest one allowed.

`python -m benchmarks.gpu.smoke --folder DIR --worker 0` is one worker (`benchmarks.gpu.shares`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.cases import Shape, make_inputs
from benchmarks.gpu import device as the_device
from benchmarks.gpu.shares import POISONED, Share
from benchmarks.measure import Row, default_device, make_row
from nextquill import reference
from nextquill.outputs import PairNLL

#: Largest error of values and of gradients, by dtype. Half-precision gradients are rounded twice, to 2^-9 each.
ERRORS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-4, 2**-7), torch.bfloat16: (1e-4, 2**-7)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "all": {"softcap": 5.0, "bias": True, "logit_scale": -0.25},
}
#: Odd sizes: V is no multiple of 16, so rows of logits are not aligned. One sequence is longer than a chunk.
SMALL = Shape("", 75, 96, 1031, sequences=5)
#: The head of a real model, with 20% of the rows ignored as in every case.
REAL = Shape("", 300, 896, 151936, sequences=3)
_CHUNK_BYTES = 10 * 2 * 1031 * 4

Results = dict[str, Tensor]
Operator = Callable[["Values", dict[str, Any], str], Results]


@dataclass(frozen=True)
class Values:
    """The tensors of a case; those with a gradient are leaves."""

    h1: Tensor
    h0: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    bias: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"h1": self.h1, "h0": self.h0, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    def exact(self) -> Values:
        """The same values in float64."""

        def wide(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

        return Values(wide(self.h1), wide(self.h0), wide(self.weight), self.labels, self.ids, wide(self.bias))


@dataclass(frozen=True)
class Case:
    """An operator with an option of the head in a dtype; `frozen` gives W no gradient."""

    operator: str
    option: str
    dtype: torch.dtype
    shape: Shape = SMALL
    frozen: bool = False

    def __str__(self) -> str:
        size = "" if self.shape is SMALL else f", V={self.shape.vocabulary}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}, {self.option}, {dtype}{', frozen head' * self.frozen}{size}"


def cases(quick: bool = False) -> list[list[Case]]:
    """All cases in blocks: what is most used first, and cases with the same kernels together.

    With `quick`, those that Triton's interpreter can run: it multiplies bfloat16 wrongly.
    """
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)
    options, operators = tuple(OPTIONS), tuple(OPERATORS)
    if quick:
        dtypes, options, operators = (torch.float32,), ("plain", "all"), ("token nll", "pair nll", "NextQuill")
    found = [Case(name, option, dtype) for dtype in dtypes for option in options for name in operators]
    blocks = [list(block) for _, block in groupby(found, lambda case: (case.option, case.dtype))]
    if not quick:
        frozen = [Case(name, "plain", torch.bfloat16, frozen=True) for name in operators if name != "pair stats"]
        real = [Case(name, "plain", torch.bfloat16, REAL) for name in ("NextQuill", "pair nll", "PerCE")]
        blocks[1:1] = [frozen, real]
    return blocks


# ---- the operators -----------------------------------------------------------------------------------


def _token_nll(x: Values, options: dict[str, Any], impl: str) -> Results:
    function = partial(nq.linear_token_nll, impl=impl) if impl else reference.linear_token_nll
    return {"nll": function(x.h1, x.weight, x.labels, bias=x.bias, **options)}


def _pair_nll(x: Values, options: dict[str, Any], impl: str) -> Results:
    function = partial(nq.linear_pair_nll, impl=impl) if impl else reference.linear_pair_nll
    return cast(Results, function(x.h1, x.h0, x.weight, x.labels, bias=x.bias, **options)._asdict())


@torch.no_grad()
def _pair_stats(x: Values, options: dict[str, Any], impl: str) -> Results:
    function = partial(nq.linear_pair_stats, impl=impl) if impl else reference.linear_pair_stats
    stats = function(x.h1, x.h0, x.weight, x.labels, bias=x.bias, **options)
    return {**stats.pair_nll._asdict(), "kl": stats.kl, "entropy": stats.entropy}


def _pair_jsd(x: Values, options: dict[str, Any], impl: str) -> Results:
    function = partial(nq.linear_pair_jsd, impl=impl) if impl else reference.linear_pair_jsd
    return {"jsd": function(x.h1, x.h0, x.weight, x.labels, bias=x.bias, **options)}


def _loss(
    make: Callable[..., nq.PairLoss],
    weighting: Callable[[PairNLL], Tensor],
    x: Values,
    options: dict[str, Any],
    impl: str,
    **terms: Any,
) -> Results:
    detached = terms.get("detach_counterfactual", False)
    if impl:
        loss = make(impl=impl, chunk_bytes=_CHUNK_BYTES if x.weight.shape[0] < 10_000 else None, **terms, **options)
        return {"loss": loss(x.h1, x.h0, x.weight, x.labels, bias=x.bias, sequence_ids=x.ids)}
    with torch.no_grad():
        pair = reference.linear_pair_nll(x.h1, x.h0, x.weight, x.labels, bias=x.bias, **options)
        weights = weighting(pair)
    terms = {"alpha": 0.1 if make is nq.NextQuillLoss else 0.0, **terms, "detach_counterfactual": detached}
    exact = reference.pair_loss(
        x.h1, x.h0, x.weight, x.labels, token_weights=weights, normalize_weights=make is nq.NextQuillLoss,
        sequence_ids=x.ids, bias=x.bias, **terms, **options,
    )  # fmt: skip
    return {"loss": exact}


_threshold = partial(reference.threshold_weights, threshold=0.05, high=0.9, low=0.1)
OPERATORS: dict[str, Operator] = {
    "NextQuill": partial(_loss, nq.NextQuillLoss, _threshold),
    "NextQuill detached": partial(_loss, nq.NextQuillLoss, _threshold, detach_counterfactual=True),
    "NextQuill weighted effect": partial(_loss, nq.NextQuillLoss, _threshold, weighted_effect=True),
    "NextQuill anchored": partial(_loss, nq.NextQuillLoss, _threshold, anchor=0.2),
    "PerCE": partial(_loss, nq.PerCELoss, partial(reference.clip_weights, minimum=0.8, maximum=5.0)),
    "LongCE": partial(_loss, nq.LongCELoss, partial(reference.exp_clip_weights, maximum=5.0)),
    "SFT": partial(_loss, nq.SFTLoss, lambda pair: torch.ones_like(pair.factual)),
    "token nll": _token_nll,
    "pair nll": _pair_nll,
    "pair stats": _pair_stats,
    "pair jsd": _pair_jsd,
}


# ---- a case ------------------------------------------------------------------------------------------


def check(case: Case, device: torch.device, impl: str) -> tuple[float, str]:
    """The largest error of a case over the one allowed (at most 1 if all is well), and what has it."""
    x, options = values_of(case, device), dict(OPTIONS[case.option])
    options.pop("bias", None)
    operator, exact = OPERATORS[case.operator], x.exact()
    found, truth = _evaluated(operator, x, options, impl), _evaluated(operator, exact, options, "")
    if found.keys() != truth.keys():
        raise AssertionError(f"expected gradients of {sorted(truth)}, got {sorted(found)}")
    of_value, of_gradient = ERRORS[case.dtype]
    worst = 0.0, ""
    for name, expected in truth.items():
        error = _error(found[name], expected) / (of_gradient if name.startswith("grad ") else of_value)
        worst = max(worst, (error, f"{name}: {error:.2f} of the allowed error"))
    return worst


def values_of(case: Case, device: torch.device) -> Values:
    """The inputs of a case: equal in every call, with 20% of the rows ignored and NaN in those."""
    inputs = make_inputs(case.shape, case.dtype, device)
    labels = inputs.labels.masked_fill(torch.arange(case.shape.rows, device=device) % 5 == 2, -100)
    generator = torch.Generator(device).manual_seed(1)
    bias = None
    if "bias" in OPTIONS[case.option]:
        bias = torch.randn(case.shape.vocabulary, device=device, generator=generator).to(case.dtype).requires_grad_()
    h1, h0 = (hidden.masked_fill((labels < 0)[:, None], torch.nan) for hidden in (inputs.h1, inputs.h0))
    weight = inputs.weight.requires_grad_(not case.frozen)
    return Values(h1.requires_grad_(), h0.requires_grad_(), weight, labels, inputs.ids, bias)


def _evaluated(operator: Operator, x: Values, options: dict[str, Any], impl: str) -> Results:
    """Outputs, and the gradients of a sum with different factors."""
    results = operator(x, options, impl)
    if not any(result.requires_grad for result in results.values()):
        return results
    total = sum(result.double().sum() * (1 + 0.3 * place) for place, result in enumerate(results.values()))
    gradients = torch.autograd.grad(cast(Tensor, total), list(x.leaves.values()), allow_unused=True)
    named = dict(zip(x.leaves, gradients, strict=True))
    return results | {f"grad {name}": g for name, g in named.items() if g is not None and bool(g.ne(0).any())}


def _error(result: Tensor, truth: Tensor) -> float:
    if result.shape != truth.shape:
        return float("inf")
    error = float((result.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-12))
    return error if error == error else float("inf")


# ---- a worker ----------------------------------------------------------------------------------------


def work(share: Share, device: torch.device, quick: bool, impl: str) -> int:
    """Do this worker's share; the exit code says whether the device has become useless."""
    blocks = cases(quick)
    by_name = {str(case): case for block in blocks for case in block}
    for name in share.interrupted():
        share.finish(name, asdict(_row(by_name[name], device, impl, "FAILED: the process ended during this case")))
    for name in share.items([[str(case) for case in block] for block in blocks]):
        share.start(name)
        try:
            error, what = check(by_name[name], device, impl)
            note = "" if error <= 1 else f"FAILED: {what}"
            row = _row(by_name[name], device, impl, note, [error])
        except Exception as failure:  # noqa: BLE001 - the other cases must still run
            row = _row(by_name[name], device, impl, f"FAILED: {the_device.one_line(failure)}")
        broken = the_device.failure()
        if broken and not row.note:
            row = _row(by_name[name], device, impl, f"FAILED: {broken}")
        share.finish(name, asdict(row))
        print(name, row.note or f"ok, {row.value:.2f} of the allowed error", flush=True)
        if broken:
            return POISONED
    share.end()
    return 0


def _row(case: Case, device: torch.device, impl: str, note: str, values: list[float] | None = None) -> Row:
    size = f"N={case.shape.rows}, D={case.shape.hidden}, V={case.shape.vocabulary}"
    return make_row(
        "smoke", f"{case}, {size}", impl, "error", "x", values or [], "allowed", loss=case.operator,
        head="frozen" if case.frozen else "trainable", dtype=str(case.dtype).removeprefix("torch."), note=note,
        device=device.type,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one worker."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder that the workers share")
    parser.add_argument("--worker", type=int, default=0, help="this worker's number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--impl", default="triton")
    options = parser.parse_args(arguments)
    return work(Share(options.folder, options.worker), torch.device(options.device), options.quick, options.impl)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a useless CUDA context raises again at a normal exit
