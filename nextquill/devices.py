"""What operators and batches need on a device: copies that the host does not wait for, and the tag of host readers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` (any shape and dtype) on `device`; a copy from the host to a GPU is queued, not waited for.

    Such a copy needs pinned memory, which the caching allocator keeps until the copy is done. A pinned tensor is not
    copied on the host. Any other copy is an ordinary one, and a tensor that is on the device is returned as it is.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def reads_on_host() -> dict[str, Any]:
    """Return the arguments of `torch.library.custom_op` that mark an operator which reads values on the host.

    A CUDA graph would replay what was read when it was captured. With the tag, `torch.compile(mode="reduce-overhead")`
    leaves the operator out of its graphs. Versions of torch without the tag capture no operator that synchronises.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    known = "tags" in inspect.signature(torch.library.custom_op).parameters
    return {"tags": (tag,)} if tag is not None and known else {}
