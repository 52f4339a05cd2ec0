"""nextquill through its public names, one provider per `impl`."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.cases import Inputs, Task
from benchmarks.provider import Loss, Provider
from nextquill.errors import BackendUnavailableError


def _nextquill(x: Inputs, impl: str, detach: bool = False) -> Tensor:
    loss = nq.NextQuillLoss(detach_counterfactual=detach, softcap=x.softcap, impl=impl)
    return cast(Tensor, loss(x.h1, x.h0, x.weight, x.labels, sequence_ids=x.ids))


def _perce(x: Inputs, impl: str) -> Tensor:
    loss = nq.PerCELoss(softcap=x.softcap, impl=impl)
    return cast(Tensor, loss(x.h1, x.h0, x.weight, x.labels, sequence_ids=x.ids))


def _sft(x: Inputs, impl: str) -> Tensor:
    loss = nq.SFTLoss(softcap=x.softcap, impl=impl)
    return cast(Tensor, loss(x.h1, None, x.weight, x.labels, sequence_ids=x.ids))


def _pair_nll(x: Inputs, impl: str, chunk_bytes: int | None = None) -> tuple[Tensor, ...]:
    pair = nq.linear_pair_nll(x.h1, x.h0, x.weight, x.labels, softcap=x.softcap, impl=impl, chunk_bytes=chunk_bytes)
    return cast("tuple[Tensor, ...]", (pair.factual, pair.counterfactual, pair.effect))


def _token_nll(x: Inputs, impl: str, chunk_bytes: int | None = None) -> tuple[Tensor, ...]:
    return (nq.linear_token_nll(x.h1, x.weight, x.labels, softcap=x.softcap, impl=impl, chunk_bytes=chunk_bytes),)


@lru_cache
def missing(impl: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device: its own error on one row, or None."""
    if impl == "triton" and device.type != "cuda":
        return "needs a GPU"  # Triton's interpreter would work, but thousands of times slower
    if impl == "native" and device.type != "cpu":
        return "runs on a CPU"
    one, label = torch.zeros(1, 64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        nq.linear_token_nll(one, torch.zeros(64, 64, device=device), label, impl=impl)
    except BackendUnavailableError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - it can run but fails, which the gate reports
        return None
    return None


def forward_gradients(task: Task, inputs: Inputs) -> dict[str, int]:
    """All gradients, as the forward finishes them: for hidden states in their dtype, for W in float32."""
    sizes = {name: tensor.element_size() for name, tensor in inputs.wanted.items()}
    if "weight" in sizes:
        sizes["weight"] = max(4, sizes["weight"])
    return {f"d {name}": size * inputs.wanted[name].numel() for name, size in sizes.items()}


def _provider(impl: str) -> Provider:
    named: dict[str, Loss] = {
        "NextQuill": partial(_nextquill, impl=impl),
        "NextQuill detached": partial(_nextquill, impl=impl, detach=True),
        "PerCE": partial(_perce, impl=impl),
        "SFT": partial(_sft, impl=impl),
        "pair nll": partial(_pair_nll, impl=impl),
        "token nll": partial(_token_nll, impl=impl),
    }
    return Provider(f"ours, {impl}", named, partial(missing, impl), ours=True, forward_gradients=forward_gradients)


#: The forward of the operators with a chunk of logits in memory, which Triton's kernels avoid by default.
_CHUNKED = Provider(
    "ours, triton, in chunks",
    {
        "pair nll": partial(_pair_nll, impl="triton", chunk_bytes=5 * 2**27),
        "token nll": partial(_token_nll, impl="triton", chunk_bytes=5 * 2**27),
    },
    partial(missing, "triton"),
    ours=True,
)
PROVIDERS = (*(_provider(impl) for impl in ("torch", "native", "triton")), _CHUNKED)
