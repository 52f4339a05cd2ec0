"""The chunk kernels in C++ for CPUs, from the optional distribution `nextquill_ext` (folder `csrc`).

Tensors cross as DLPack capsules without a copy. One pass over the logits computes each function, where plain PyTorch
needs several. `nextquill.ops.chunk_torch` documents the arguments. Here every tensor is on the CPU with last stride 1,
floating ones are float32 and labels int64. TypeError or ValueError names an argument that does not fit;
BackendUnavailableError says that the extension is missing.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, and not in its __all__

from nextquill.errors import BackendUnavailableError

_INTERFACE_VERSION = 6


def why_not() -> str | None:
    """Why `nextquill_ext` cannot be used, or None if it is installed and fits this version."""
    return _load()[1]


def token_stats(logits: Tensor, labels: Tensor, out: Tensor) -> None:
    """Compute as `chunk_torch.token_stats` does, in float32."""
    if len(logits) > 0:
        _kernels().token_stats(*map(_dlpack, (logits, labels, out)), torch.get_num_threads())


def pair_stats(logits: tuple[Tensor, Tensor], labels: Tensor, out: Tensor) -> None:
    """Compute as `chunk_torch.pair_stats` does, in float32; reads the logits of each stream once."""
    if len(logits[0]) > 0:
        _kernels().pair_stats(*map(_dlpack, (*logits, labels, out)), torch.get_num_threads())


def token_grad(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad_nll: Tensor,
    out: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute as `chunk_torch.token_grad` does."""
    if len(logits) > 0:
        tensors = map(_dlpack, (logits, labels, stats, grad_nll))
        _kernels().token_grad_(*tensors, softcap, logit_scale, torch.get_num_threads())
    _deliver(logits, out)


def pair_grad(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad_nlls: tuple[Tensor, Tensor | None, Tensor],
    outs: tuple[Tensor, Tensor | None],
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute as `chunk_torch.pair_grad` does."""
    if len(logits[0]) > 0:
        tensors = map(_dlpack, (*logits, labels, stats, *grad_nlls))
        _kernels().pair_grad_(*tensors, softcap, logit_scale, outs[1] is None, torch.get_num_threads())
    for own, out in zip(logits, outs, strict=True):
        if out is not None:
            _deliver(own, out)


def jsd_stats(logits: tuple[Tensor, Tensor], out: Tensor, beta: float, normalised: bool = False) -> None:
    """Compute as `chunk_torch.jsd_stats` does, in float32; reads each row twice, or once if it is `normalised`."""
    if len(logits[0]) > 0:
        _kernels().jsd_stats(*map(_dlpack, (*logits, out)), beta, normalised, torch.get_num_threads())


def jsd_grad(
    logits: tuple[Tensor, Tensor],
    stats: Tensor,
    grad_jsd: Tensor,
    out: Tensor,
    beta: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute as `chunk_torch.jsd_grad` does."""
    if len(logits[0]) > 0:
        tensors = map(_dlpack, (*logits, stats, grad_jsd))
        _kernels().jsd_grad_(*tensors, beta, softcap, logit_scale, torch.get_num_threads())
    _deliver(logits[0], out)


def _deliver(gradient: Tensor, out: Tensor) -> None:
    """Copy a gradient that was written over its logits, unless `out` is these logits."""
    if out.data_ptr() != gradient.data_ptr():
        out.copy_(gradient)


def _dlpack(tensor: Tensor | None) -> Any:
    # `to_dlpack` takes 0.2 us; `Tensor.__dlpack__`, which the extension would call, is Python code and takes 2 us.
    return None if tensor is None else to_dlpack(tensor.detach() if tensor.requires_grad else tensor)


def _kernels() -> Any:
    module, problem = _load()
    if module is None:
        raise BackendUnavailableError(f"impl: 'native' cannot run here: {problem}")
    return module


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Return the extension and None, or None and the reason why it cannot be used."""
    try:
        module = importlib.import_module("nextquill_ext")
    except ImportError as error:
        if error.name == "nextquill_ext":
            return None, "nextquill_ext is not installed; `pip install ./csrc` in nextquill's source tree builds it"
        return None, f"nextquill_ext cannot be imported: {error}"
    found = getattr(module, "INTERFACE_VERSION", None)
    if found != _INTERFACE_VERSION:
        return None, f"nextquill_ext has interface {found}, expected {_INTERFACE_VERSION}; rebuild it"
    if (path := _openmp_of_torch()) is not None:
        module.use_openmp(path)
    return module, None


def _openmp_of_torch() -> str | None:
    """Return the path of the OpenMP library that torch uses, or None if it cannot be determined."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    folder = str(Path(torch.__file__).parent)
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "omp" in line}
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    # Two such libraries may be loaded; torch's wheels ship their own, so prefer that one.
    return min(runtimes, key=lambda path: (not path.startswith(folder), path), default=None)
