"""Labels out of range, noticed without waiting for the device.

A kernel that needs no row plan never reads labels on the host. It marks rows with a label out of range as NaN, and the
flag computed here is copied to the host behind the kernel; whichever call comes next and finds it arrived raises.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.ops.row_groups import check_label_range, wrong_labels


class _Event(Protocol):
    def query(self) -> bool: ...


@dataclass(frozen=True)
class _Pending:
    """(count of wrong labels, the first of them), on its way to the host, and the event that says it has arrived."""

    values: Tensor
    arrived: _Event
    message: str

    def check(self) -> None:
        count, example = self.values.tolist()
        if count:
            raise ArgumentError(self.message.format(count=count, example=example))


_pending: deque[_Pending] = deque()
_lock = threading.Lock()


def check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Check [N] labels: at once on the CPU, behind the device's work elsewhere.

    Raises:
        ArgumentError: a label here (CPU), or of an earlier call whose check has arrived, is out of range.
    """
    raise_pending()
    if labels.device.type == "cpu":
        check_label_range(labels, ignore_index, vocabulary)
    elif labels.numel():
        stream = torch.cuda.current_stream(labels.device)
        event = torch.cuda.Event()
        values = torch.empty(2, dtype=torch.long, pin_memory=True)
        values.copy_(_summary(labels, ignore_index, vocabulary), non_blocking=True)
        event.record(stream)
        defer(values, event, ignore_index, vocabulary)


def defer(values: Tensor, arrived: _Event, ignore_index: int, vocabulary: int) -> None:
    """Remember a flag that is on its way."""
    message = (
        f"labels: expected values in [0, {vocabulary}) or ignore_index={ignore_index}; "
        "an earlier call got {count} others, such as {example} (their nll was NaN)"
    )
    _pending.append(_Pending(values, arrived, message))


def raise_pending(*, wait: bool = False) -> None:
    """Raise for the earliest flag that has arrived and is set; with `wait`, after all device work has finished.

    Raises:
        ArgumentError: labels of an earlier call were out of range.
    """
    if wait and _pending and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
    while True:
        with _lock:
            if not (_pending and _pending[0].arrived.query()):
                return
            arrived = _pending.popleft()
        arrived.check()


def _summary(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """[2] on the device: how many labels are wrong, and the largest or smallest of them; no synchronisation."""
    wrong = wrong_labels(labels, ignore_index, vocabulary)
    example = torch.where(wrong, labels, 0)
    extreme = torch.where(example.amax() >= vocabulary, example.amax(), example.amin())
    return torch.stack([wrong.sum(), extreme])
