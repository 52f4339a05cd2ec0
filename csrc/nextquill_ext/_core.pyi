"""The compiled part. A tensor is an object with `__dlpack__`, or a DLPack capsule, on the CPU."""

from typing import Any, TypeAlias

_Tensor: TypeAlias = Any

def token_stats(logits: _Tensor, labels: _Tensor, out: _Tensor, threads: int = 1) -> None:
    """Write the max, the sum of exp(z - max), and the NLL of float32 [n, V] into the rows of `out` [3, n]."""

def pair_stats(
    logits_factual: _Tensor, logits_counterfactual: _Tensor, labels: _Tensor, out: _Tensor, threads: int = 1
) -> None:
    """Write max, sum and NLL of z1, z0 and z1 - z0 into `out` [9, n]; [11, n] adds KL(p1 || p0) and p1's entropy."""

def token_grad_(
    logits: _Tensor,
    labels: _Tensor,
    stats: _Tensor,
    grad_nll: _Tensor,
    softcap: float | None,
    logit_scale: float,
    threads: int = 1,
) -> None:
    """Replace z by the gradient of grad_nll · nll with respect to the logits before cap and scale."""

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
    """Replace z1 and z0 by the gradients of the three NLLs with respect to the logits before cap and scale."""

def jsd_stats(
    logits_student: _Tensor,
    logits_teacher: _Tensor,
    out: _Tensor,
    beta: float,
    normalised: bool = False,
    threads: int = 1,
) -> None:
    """Write max and sum of exp(z - max) of both streams, KL(p1 || m) and the divergence into `out` [6, n].

    If `normalised`, maxima and sums are read from `out` instead.
    """

def jsd_grad_(
    logits_student: _Tensor,
    logits_teacher: _Tensor,
    stats: _Tensor,
    grad_jsd: _Tensor,
    beta: float,
    softcap: float | None,
    logit_scale: float,
    threads: int = 1,
) -> None:
    """Replace z1 by the gradient of grad_jsd · jsd with respect to the student's logits before cap and scale."""

def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first."""

def current_isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on; ValueError if this machine cannot run it."""

def use_openmp(path: str) -> bool:
    """Use the threads of the OpenMP runtime loaded from `path`; False if none is loaded or it lacks GOMP_parallel."""
