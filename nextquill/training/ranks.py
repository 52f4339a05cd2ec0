"""Processes that train together: they form one group, agree in what shapes the run, and do not wait for ever."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from nextquill.errors import ArgumentError
from nextquill.storage.json_files import different_values


def check_group(args: Any) -> None:
    """Refuse processes of one launcher that would train apart, and let the group keep `args.ddp_timeout`.

    Without an accelerator, Accelerate makes a group only with `use_cpu`, and then with a timeout of its own.

    Raises:
        ArgumentError: several processes were started, and they form no group that synchronises gradients.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.parallel_mode.value in ("not_parallel", "not_distributed"):
        raise ArgumentError(
            f"args.use_cpu: expected True where {started} processes train together without an accelerator, "
            f"got {args.use_cpu}"
        )
    if dist.is_available() and dist.is_initialized():
        _set_pg_timeout(args.ddp_timeout_delta)


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Refuse processes whose settings (JSON, by name) differ; every process must call it.

    Raises:
        ArgumentError: on all of them; it names the first process and setting that differ, with both values.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(settings))
    for rank, other in enumerate(everyone):
        if (found := different_values(everyone[0], other)) is not None:
            name, first, own = found
            both = f"{first!r} and, on rank {rank}, {own!r}"
            raise ArgumentError(f"{name}: expected the same in all processes, got {both}")
