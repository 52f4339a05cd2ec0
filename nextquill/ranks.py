"""Processes that work together: they form one group, agree in what shapes the run, and do not wait for ever.

In training, each process has examples of its own. A command that only reads its model runs `joined`: every process
runs the whole command on the same records, `deal` gives each batch to one of them and its results to all, in the order
of the batches, and the first process alone writes files. So the results are those of one process, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nextquill.errors import ArgumentError, NextQuillError
from nextquill.storage.json_files import different_values
from nextquill.storage.resumable_jsonl import PartialFile

T = TypeVar("T")
R = TypeVar("R")
#: Whether this process is inside `joined`, with others.
_joined = False


def started() -> int:
    """The number of processes that a launcher such as torchrun has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# ---- training --------------------------------------------------------------------------------------


def check_group(args: Any) -> None:
    """Refuse processes of one launcher that would train apart, and let the group keep `args.ddp_timeout`.

    Without an accelerator, Accelerate makes a group only with `use_cpu`, and then with a timeout of its own.

    Raises:
        ArgumentError: several processes were started, and they form no group that synchronises gradients.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    if started() > 1 and args.parallel_mode.value in ("not_parallel", "not_distributed"):
        raise ArgumentError(
            f"args.use_cpu: expected True where {started()} processes train together without an accelerator, "
            f"got {args.use_cpu}"
        )
    if dist.is_available() and dist.is_initialized():
        _set_pg_timeout(args.ddp_timeout_delta)


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Refuse processes whose settings (JSON, by name) differ; every process must call it.

    Raises:
        ArgumentError: on all of them; it names the first process and setting that differ, with both values.
    """
    if started() == 1:
        return
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(settings))
    for rank, other in enumerate(everyone):
        if (found := different_values(everyone[0], other)) is not None:
            name, first, own = found
            both = f"{first!r} and, on rank {rank}, {own!r}"
            raise ArgumentError(f"{name}: expected the same in all processes, got {both}")


# ---- commands that read a model --------------------------------------------------------------------


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Form a group of all processes of the launcher, for the block; each takes its own accelerator, if there are any.

    Args:
        timeout: seconds that a process waits for the others. One that has ended is noticed at once.
    """
    global _joined
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    _joined = dist.get_world_size() > 1
    try:
        yield
    finally:
        _joined = False
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes the files of a command."""
    return _place()[0] == 0


def deal(units: Iterable[T], compute: Callable[[T], Iterable[R]]) -> Iterator[R]:
    """Yield the results of each unit, such as a batch, in the order of the units; each process computes its share.

    Args:
        units: the same in all processes.
        compute: the results of a unit; they must be picklable where processes are joined.

    Raises:
        NextQuillError: on all processes, the first one that `compute` raised on any of them.
    """
    rank, size = _place()
    if size == 1:
        for unit in units:
            yield from compute(unit)
        return
    waiting = iter(units)
    while round_ := list(islice(waiting, size)):
        own = round_[rank : rank + 1]
        everyone: list[list[R]] = _gathered(partial(_results, compute, own))
        for results in everyone:
            yield from results


def _results(compute: Callable[[T], Iterable[R]], units: Sequence[T]) -> list[R]:
    return [result for unit in units for result in compute(unit)]


def on_first(call: Callable[[], T]) -> T:
    """The result of `call`, which only the first process runs, on all; so is its error."""
    result: T = _gathered(call if is_first() else lambda: None)[0]
    return result


class FollowedFile:
    """In place of the first process's partial file: the indices of its lines."""

    def __init__(self, indices: set[int]) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, index: object) -> bool:
        return index in self._indices

    def write(self, line: Mapping[str, Any]) -> None:
        """Take note that the first process adds this line."""
        self._indices.add(line["index"])

    def finish(self, indices: Sequence[int]) -> None:
        """Do nothing: the first process writes the target."""


#: What a process holds of a partial file.
SharedFile = PartialFile | FollowedFile


@contextmanager
def partial_file(target: Path, run: Mapping[str, Any], **options: Any) -> Iterator[SharedFile]:
    """A `PartialFile` that the first process writes; the others know the indices of its lines.

    Arguments and errors are those of `PartialFile`; ArgumentError if the processes' `run` differs.
    """
    check_agreement(run)
    with ExitStack() as stack:
        held: list[PartialFile] = []

        def begin() -> set[int]:
            held.append(stack.enter_context(PartialFile(target, run, **options)))
            return held[0].indices

        indices = on_first(begin)
        yield held[0] if held else FollowedFile(indices)


@contextmanager
def _alone() -> Iterator[None]:
    """Let this process do all the work of a block, which the others are not in."""
    global _joined
    _joined, before = False, _joined
    try:
        yield
    finally:
        _joined = before


def _place() -> tuple[int, int]:
    """This process's rank, and the number of processes that are joined."""
    if not _joined:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def _gathered(call: Callable[[], Any]) -> list[Any]:
    """What `call` returns in each process; the first error is raised in all of them."""
    _, size = _place()
    if size == 1:
        return [call()]
    import torch.distributed as dist

    own: tuple[Any, NextQuillError | None]
    try:
        with _alone():
            own = call(), None
    except NextQuillError as error:  # any other error ends this process, and so the others
        own = None, error
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own)
    for _, raised in everyone:
        if raised is not None:
            raise raised
    return [result for result, _ in everyone]
