"""Inputs, comparisons and probes for the tests of operators and losses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

FLOAT32_RELATIVE = 1e-5
FLOAT64_RELATIVE = 1e-12


@dataclass
class HeadCase:
    """The inputs of one operator call; `labels` contain `ignore_index` -100."""

    factual: Tensor
    counterfactual: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {
            "factual": self.factual,
            "counterfactual": self.counterfactual,
            "weight": self.weight,
            "bias": self.bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def pair_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.factual, self.counterfactual, self.weight, self.labels

    def leaves(self, *names: str, dtype: torch.dtype | None = None) -> HeadCase:
        """Fresh leaves with the same values, in `dtype` if given. The named ones require gradients, by default all."""
        names = names or tuple(self.tensors)
        new = {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(name in names)
            for name, tensor in self.tensors.items()
        }
        return replace(self, **new)

    def double(self) -> HeadCase:
        return self.leaves(dtype=torch.float64)

    def view(self, *leading: int) -> HeadCase:
        """Hidden states as [*leading, D] and labels as [*leading]."""
        return replace(
            self,
            factual=self.factual.view(*leading, -1),
            counterfactual=self.counterfactual.view(*leading, -1),
            labels=self.labels.view(*leading),
        )

    def take(self, rows: Tensor) -> HeadCase:
        return replace(
            self,
            factual=self.factual[rows],
            counterfactual=self.counterfactual[rows],
            labels=self.labels[rows],
        )

    def gradients(self) -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}


def make_case(
    n: int, d: int, v: int, *, dtype=torch.float32, bias=True, ignored=0.2, spread=2.0, seed=0, label_dtype=torch.int64
) -> HeadCase:
    """Two related streams whose logits have a standard deviation of about `spread`."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    factual = draw(n, d)
    labels = torch.randint(v, (n,), generator=rng)
    labels[torch.rand(n, generator=rng) < ignored] = -100
    return HeadCase(
        factual=factual.to(dtype),
        counterfactual=(0.8 * factual + 0.6 * draw(n, d)).to(dtype),
        weight=(draw(v, d) * (spread / d**0.5)).to(dtype),
        bias=draw(v).to(dtype) if bias else None,
        labels=labels.to(label_dtype),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the largest expected magnitude; infinite for NaN or another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = expected.detach().double().abs().max()
    result = float(error / scale) if scale > 0 else float(error)
    return result if result == result else float("inf")


def assert_close(actual: Tensor, expected: Tensor, relative: float = FLOAT32_RELATIVE, what: str = "value") -> None:
    error = relative_error(actual, expected)
    assert error <= relative, f"{what}: relative error {error:.2e} above {relative:.0e}"


def assert_rounds_like(actual: Tensor, plain: Tensor, truth: Tensor, terms: int, what: str = "value") -> None:
    """Assert that the error of `actual` is at most √terms times that of `plain`, or of one rounding.

    Both errors are against `truth` in float64. This is for calls that are equal only on paper. A sum of k terms is
    rounded by one unit at best (in one block, or fused). It is rounded by about √k units if its terms are added one by
    one, with errors of random sign (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8). The order of
    summation depends on processor, shape and alignment. So the errors of two correct computations differ by a factor of
    at most √k on any machine. k is the length of the longest sum in a result.
    """
    exact = truth.detach().double()
    ours, theirs = (float((t.detach().double() - exact).norm()) for t in (actual, plain))
    rounding = torch.finfo(actual.dtype).eps * float(exact.norm())
    assert ours <= terms**0.5 * max(theirs, rounding), f"{what}: error {ours:.2e}, plain PyTorch has {theirs:.2e}"


def assert_gradients_round_like(actual: HeadCase, plain: HeadCase, truth: HeadCase, terms: int) -> None:
    """Assert that the gradients are those of `truth` and no others, each within `assert_rounds_like`."""
    assert actual.gradients().keys() == truth.gradients().keys()
    for name, exact in truth.gradients().items():
        assert_rounds_like(actual.gradients()[name], plain.gradients()[name], exact, terms, f"gradient of {name}")


def assert_same_gradients(actual: HeadCase, expected: HeadCase, relative: float = FLOAT32_RELATIVE) -> None:
    """Assert that gradients have the inputs' dtypes and the expected values; a missing gradient means exactly zero."""
    got, wanted = actual.gradients(), expected.gradients()
    for name in got.keys() | wanted.keys():
        zero = torch.zeros_like(actual.tensors[name])
        gradient = got.get(name, zero)
        assert gradient.dtype == zero.dtype
        assert_close(gradient, wanted.get(name, zero), relative, f"gradient of {name}")


def named(cls: type, /, **options: Any) -> str:
    """A readable test id: the class and the options that differ from its defaults."""
    return "-".join([cls.__name__.removesuffix("Loss"), *(f"{k}={v}" for k, v in options.items())])


class ProductCounter(TorchDispatchMode):
    """Counts the multiply-adds of every matrix product that runs inside.

    torch's own FlopCounterMode does not see `addmm_`. A dispatch mode is off inside an operator, so the functions of
    our operators are run again under the mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in OPDEFS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "einsum"):
            assert name in ("mm", "addmm"), f"{name}: count me"
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def run_python(code: str, *arguments: str, timeout: float = 120, **environment: str) -> str:
    """Run `code` in a fresh interpreter and return its output."""
    command = [sys.executable, "-c", code, *arguments]
    told = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=told)
    assert done.returncode == 0, done.stderr
    return done.stdout
