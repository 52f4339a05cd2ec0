"""Suite `head`: the loss alone, forward and backward, against plain PyTorch over full logits; time and memory.

Peak memory is that of a fresh process that runs one provider once, less that of a process that makes the inputs only
(Linux only).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.measure import Row, make_row, ratios, time_in_turns
from benchmarks.plain import nextquill_plain, perce_plain


@dataclass(frozen=True)
class Shape:
    """N rows in 8 sequences, hidden size D, vocabulary V."""

    rows: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"N={self.rows}, D={self.hidden}, V={self.vocabulary}"


SHAPES = (Shape(1024, 256, 8192), Shape(1024, 896, 32768))
QUICK = (Shape(128, 64, 1024),)
BASELINES = {
    "NextQuill": "NextQuill (plain)",
    "NextQuill detached": "NextQuill detached (plain)",
    "PerCE": "PerCE (plain)",
}


def run(rounds: int, quick: bool = False) -> list[Row]:
    """Check, then time and weigh, every shape."""
    rows: list[Row] = []
    for shape in QUICK if quick else SHAPES:
        providers = make_providers(shape)
        gate(providers)
        seconds = time_in_turns(providers, rounds)
        for name, values in seconds.items():
            rows.append(make_row("head", str(shape), name, "seconds", "s", values))
            baseline = BASELINES[name.rsplit(" (", 1)[0]]
            rows.append(make_row("head", str(shape), name, "time", "x", ratios(seconds, baseline)[name], baseline))
        idle = peak_bytes(shape, "none")
        for name in providers:
            extra = max(0, peak_bytes(shape, name) - idle)
            rows.append(make_row("head", str(shape), name, "memory", "MiB", [extra / 2**20]))
    return rows


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h1, h0, W with gradient, labels and sequence ids; the same every time."""
    generator = torch.Generator().manual_seed(0)
    h1 = torch.randn(shape.rows, shape.hidden, generator=generator)
    h0 = h1 + 0.5 * torch.randn(shape.rows, shape.hidden, generator=generator)
    weight = 0.1 * torch.randn(shape.vocabulary, shape.hidden, generator=generator)
    labels = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator)
    ids = torch.arange(shape.rows) * 8 // shape.rows
    return h1.requires_grad_(), h0.requires_grad_(), weight.requires_grad_(), labels, ids


def make_providers(shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Callables that return the loss and the gradients of h1, h0 (where there is one) and W."""
    h1, h0, weight, labels, ids = make_inputs(shape)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(loss, (h1, h0, weight), allow_unused=True)
        return loss.detach(), *(g if g is not None else torch.zeros(()) for g in found)

    official, detached, perce = nq.NextQuillLoss(), nq.NextQuillLoss(detach_counterfactual=True), nq.PerCELoss()
    return {
        "NextQuill (ours)": lambda: gradients(official(h1, h0, weight, labels, sequence_ids=ids)),
        "NextQuill (plain)": lambda: gradients(nextquill_plain(h1, h0, weight, labels, ids)),
        "NextQuill detached (ours)": lambda: gradients(detached(h1, h0, weight, labels, sequence_ids=ids)),
        "NextQuill detached (plain)": lambda: gradients(nextquill_plain(h1, h0, weight, labels, ids, detach=True)),
        "PerCE (ours)": lambda: gradients(perce(h1, h0, weight, labels, sequence_ids=ids)),
        "PerCE (plain)": lambda: gradients(perce_plain(h1, h0, weight, labels, ids)),
    }


def gate(providers: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Refuse to time anything unless ours and plain agree."""
    for name, baseline in BASELINES.items():
        for ours, plain in zip(providers[f"{name} (ours)"](), providers[baseline](), strict=True):
            error = float((ours - plain).norm() / plain.norm().clamp(min=1e-12))
            if error > 1e-4:
                raise SystemExit(f"head: {name}: differs from plain PyTorch by {error:.1e}; not timed")


def peak_bytes(shape: Shape, provider: str) -> int:
    """Peak resident memory of a process that runs one provider once."""
    arguments = [str(shape.rows), str(shape.hidden), str(shape.vocabulary), provider]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.head", *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def _weigh(rows: str, hidden: str, vocabulary: str, provider: str) -> None:
    providers = make_providers(Shape(int(rows), int(hidden), int(vocabulary)))
    if provider != "none":
        providers[provider]()
    # Not ru_maxrss: Linux hands the parent's down to a child.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024)


if __name__ == "__main__":
    _weigh(*sys.argv[1:])
