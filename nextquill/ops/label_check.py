"""Labels out of range, noticed without waiting for the device.

A kernel that needs no row plan never reads labels on the host. It gives NaN to rows with a label out of range. The flag
computed here is copied to the host after the kernel; the first later call that finds it there raises the error.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.ops.row_groups import check_label_range, wrong_labels

# Flags on their way to the host, (number of wrong labels, one of them), there once the event is reached; and messages.
_pending: deque[tuple[Tensor, torch.cuda.Event, str]] = deque()
_lock = threading.Lock()


def check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Check labels ([N], int64): at once on the CPU; on another device, without waiting for it.

    Raises:
        ArgumentError: one of these labels (on the CPU) or of an earlier call (on a device) is out of range.
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


def defer(values: Tensor, arrived: torch.cuda.Event, ignore_index: int, vocabulary: int) -> None:
    """Remember a check whose result is on its way to the host.

    Args:
        values: [2], int64, on the host: number of wrong labels, and one of them.
        arrived: the event after which `values` can be read.
        ignore_index, vocabulary: the labels that were allowed, for the message.
    """
    message = (
        f"labels: expected values in [0, {vocabulary}) or ignore_index={ignore_index}; "
        "an earlier call got {count} others, such as {example} (their nll was NaN)"
    )
    _pending.append((values, arrived, message))


def raise_pending() -> None:
    """Raise the error of the earliest check that has arrived.

    Raises:
        ArgumentError: labels of an earlier call were out of range.
    """
    while True:
        with _lock:
            if not (_pending and _pending[0][1].query()):
                return
            values, _, message = _pending.popleft()
        count, example = values.tolist()
        if count:
            raise ArgumentError(message.format(count=count, example=example))


def _summary(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Return [2] on the device: number of wrong labels, and the largest or smallest of them; does not wait."""
    wrong = wrong_labels(labels, ignore_index, vocabulary)
    example = torch.where(wrong, labels, 0)
    extreme = torch.where(example.amax() >= vocabulary, example.amax(), example.amin())
    return torch.stack([wrong.sum(), extreme])
