"""The compiled part. A tensor is anything with `__dlpack__`, or a DLPack capsule, on the CPU."""

from typing import Any, TypeAlias

_Tensor: TypeAlias = Any

def token_stats(logits: _Tensor, labels: _Tensor, out: _Tensor, threads: int = 1) -> None:
    """Write max, the sum of exp(z - max), and nll of float32 [n, V] into the rows of `out` [3, n]."""

def pair_stats(
    logits_factual: _Tensor, logits_counterfactual: _Tensor, labels: _Tensor, out: _Tensor, threads: int = 1
) -> None:
    """Write max, sum, nll of z1, of z0, of z1 - z0 into `out` [9, n]; with [11, n] also KL(p1 || p0), entropy of p1."""

def token_grad_(
    logits: _Tensor,
    labels: _Tensor,
    stats: _Tensor,
    grad_nll: _Tensor,
    softcap: float | None,
    logit_scale: float,
    threads: int = 1,
) -> None:
    """Overwrite z with the gradient of grad_nll · nll before cap and scale."""

def pair_grad_(
    logits_factual: _Tensor,
    logits_counterfactual: _Tensor,
    labels: _Tensor,
    stats: _Tensor,
    grad_factual: _Tensor,
    grad_counterfactual: _Tensor | None,
    grad_effect: _Tensor,
    softcap: float | None,
    logit_scale: float,
    detach_counterfactual: bool = False,
    threads: int = 1,
) -> None:
    """Overwrite z1, z0 with the gradients of the three nll before cap and scale."""

def available_isas() -> tuple[str, ...]:
    """The instruction sets this machine can run, best first."""

def current_isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on; ValueError if the machine cannot."""

def use_openmp(path: str) -> bool:
    """Share the threads of the OpenMP runtime loaded from `path`; False if none is, or it has no GOMP_parallel."""
