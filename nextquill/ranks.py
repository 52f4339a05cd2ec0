"""Processes that work together: they form one group, agree in what shapes the run, and do not wait for ever.

In training, each process has examples of its own. A command that only reads its model runs `joined`: every process
runs the whole command on the same records, `deal` gives each batch to one of them and its results to all, in the order
of the batches, and the first process alone writes files. So the results are those of one process, to the last bit.
A command that has several models to train runs `apart`: each process trains some of them, as if it were alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
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
        _check_equal(everyone[0], other, rank)


def _check_equal(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> None:
    """Refuse settings of this rank that differ from the first one's."""
    if (found := different_values(first, other)) is not None:
        both = f"{found[1]!r} and, on rank {rank}, {found[2]!r}"
        raise ArgumentError(f"{found[0]}: expected the same in all processes, got {both}")


# ---- commands that read a model --------------------------------------------------------------------


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Form a group of all processes of the launcher, for the block; each takes its own accelerator, if there are any.

    Only the first process writes to the screen.

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
        with nullcontext() if is_first() else _silent():
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
def _silent() -> Iterator[None]:
    """Let nothing in the block reach the screen."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _place() -> tuple[int, int]:
    """This process's rank, and the number of processes that are joined."""
    if not _joined:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def _gathered(call: Callable[[], Any]) -> list[Any]:
    """What `call`, in which each process works alone, returns in each; the first error is raised in all of them."""
    global _joined
    _, size = _place()
    if size == 1:
        return [call()]
    import torch.distributed as dist

    own: tuple[Any, NextQuillError | None]
    _joined = False
    try:
        own = call(), None
    except NextQuillError as error:  # any other error ends this process, and so the others
        own = None, error
    finally:
        _joined = True
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own)
    for _, raised in everyone:
        if raised is not None:
            raise raised
    return [result for result, _ in everyone]


# ---- commands whose processes work apart -----------------------------------------------------------

#: What a launcher tells its processes; libraries that find it would form a group.
_TOLD = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE",
)  # fmt: skip
_TOLD_BY_TORCH = "TORCHELASTIC_"
_BEGUN, _POLL_SECONDS = "nextquill begun", 0.1


@dataclass
class Launch:
    """This process among those that work apart.

    Args:
        rank, size: its number, and the number of processes.
        timeout: seconds that it waits for the first one to begin.
        store: what all of them can read; None for one process.
        silence: ends when this process may write to the screen.
    """

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    store: Any = None
    silence: ExitStack = field(default_factory=ExitStack)

    @property
    def label(self) -> str:
        """How a line on the screen begins, where several processes write there."""
        return f"rank {self.rank}: " if self.size > 1 else ""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Let the first process, when it is ready, start the others; they wait for it, and may write from then on.

        Raises:
            ArgumentError: on a process whose settings (JSON, by name) differ from the first one's.
        """
        if self.size == 1:
            return
        text = json.dumps(dict(settings))
        if self.rank == 0:
            self.store.set(_BEGUN, text)
            return
        self.wait()
        self.silence.close()
        _check_equal(json.loads(self.store.get(_BEGUN)), json.loads(text), self.rank)

    def wait(self) -> None:
        """Wait until the first process has begun; TimeoutError if it does not."""
        deadline = time.monotonic() + self.timeout
        while not self.store.check([_BEGUN]):  # `store.wait` would not let a signal through
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 did not begin within {self.timeout:.0f} seconds")
            time.sleep(_POLL_SECONDS)


_launch = Launch()


def launch() -> Launch:
    """This process among those that work `apart`; alone outside it."""
    return _launch


@contextmanager
def apart(timeout: float) -> Iterator[None]:
    """Hide the launcher from all libraries for the block, so that this process works as if it were alone.

    Each process sees one CUDA device, its own, from then on. Until `Launch.begin`, only the first one writes to the
    screen. An error before that is most often everybody's, so the others tell theirs only if the first one begins.

    Args:
        timeout: seconds that a process waits for the first one.

    Raises:
        ArgumentError: the machine has fewer devices than processes.
    """
    global _launch
    size = started() if "LOCAL_RANK" in os.environ else 1  # a cluster may set WORLD_SIZE in every shell
    store = _store(timeout) if size > 1 else None
    told = {name: os.environ.pop(name) for name in list(os.environ) if name in _TOLD or name.startswith(_TOLD_BY_TORCH)}
    own = _launch = Launch(int(told["RANK"]) if size > 1 else 0, size, timeout, store)
    try:
        with _quiet_until_begun(own):
            if size > 1:
                index = int(told["LOCAL_RANK"])
                _take_device(index, max(int(told.get("LOCAL_WORLD_SIZE", "1")), index + 1))
            yield
    finally:
        os.environ.update(told)
        _launch = Launch()


@contextmanager
def _quiet_until_begun(own: Launch) -> Iterator[None]:
    """Let a process that is not the first write, or fail, only when the first has begun; let it stop without a word."""
    if own.rank == 0:
        yield
        return
    try:
        with own.silence:
            own.silence.enter_context(_silent())
            try:
                yield
            except Exception:
                with suppress(RuntimeError, TimeoutError):
                    own.wait()  # the launcher ends this process if the first one fails too
                raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _store(timeout: float) -> Any:
    """The store through which a launcher's processes find each other."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return store


def _take_device(index: int, processes: int) -> None:
    """Let this process see the CUDA device of this index only; without any accelerator, do nothing."""
    import torch

    # Counting CUDA's devices does not start CUDA, which reads CUDA_VISIBLE_DEVICES once.
    count = torch.cuda.device_count() or int(torch.accelerator.is_available())
    if 0 < count < processes:
        raise ArgumentError(
            f"processes: expected at most {count} on this machine, one for each accelerator, got {processes}"
        )
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index]
