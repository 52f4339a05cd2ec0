"""What one epoch over a million users costs, on paper: `python -m benchmarks.scale` prints the tables of docs/design.

Tokens and floating-point operations follow from the prefix trees and the models' sizes. Seconds follow from a
utilisation, which is a guess until a GPU says otherwise. Processes that wait for the slowest, and machines that fail,
are simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks.roofline import H100

USERS, TEXTS = 1_000_000, 20
#: The share of large products' rate that a whole step reaches, with bounds.
UTILISATION, BOUNDS = 0.5, (0.35, 0.65)
#: Dollars for an hour of one H100; an assumption, as prices differ threefold.
PRICE = 2.5
#: Hours of one GPU between failures that end a run: 419 in 54 days of 16,384 H100s (The Llama 3 Herd of Models, 2024).
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
#: Bytes of a GPU that a run may use: 80 GB without the context, the allocator's gaps and the collectives' buffers.
USABLE = 70e9
#: Bytes of logits, their gradient and its products by default.
HEAD_BYTES = 15 * 2**27


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers; the vocabulary's matrix is shared by both ends if `tied`."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gpus: int

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers that multiply every token."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights but those of norms and biases."""
        return self.layer_parameters + (1 if self.tied else 2) * self.vocabulary * self.hidden


#: The sizes of Qwen2.5-0.5B and -3B, Qwen3-8B and Llama-3.1-70B, and the GPUs of one run.
MODELS = (
    Model("0.5B", 24, 896, 4864, 14, 2, 64, 151_936, True, 8),
    Model("3B", 36, 2048, 11_008, 16, 2, 128, 151_936, True, 8),
    Model("8B", 36, 4096, 12_288, 32, 8, 128, 151_936, False, 64),
    Model("70B", 80, 8192, 28_672, 64, 8, 128, 128_256, False, 256),
)


@dataclass(frozen=True)
class Method:
    """A loss: which branches it runs, and its products of the head.

    Attributes:
        counterfactual: "" for none, "constant" for a forward of its own, "joint" for one with gradient.
        products: U with a trainable head.
        frozen: U with a frozen head.
    """

    name: str
    counterfactual: str
    products: int
    frozen: int


METHODS = (
    Method("SFT", "", 3, 2),
    Method("PerCE, NextQuill detached", "constant", 4, 3),
    Method("NextQuill", "joint", 6, 4),
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example's parts; the default is that of suite `step`."""

    system: int = 50
    history: int = 1750
    none: int = 2
    query: int = 160
    response: int = 300

    @property
    def longest(self) -> int:
        return self.system + self.history + self.query + self.response


@dataclass(frozen=True)
class Row:
    """The tokens of a user's `shared` examples, and the keys that they attend to, summed over the tokens.

    `trained` is computed with gradient, `constant` without.
    """

    trained: int
    constant: int
    trained_keys: int
    constant_keys: int


def row(method: Method, shared: int, lengths: Lengths | None = None) -> Row:
    """The work of one user's row, history first."""
    size = lengths or Lengths()
    answer = size.query + size.response

    def keys(start: int, count: int) -> int:
        """Keys seen by `count` tokens of one path after `start` others."""
        return count * start + count * (count + 1) // 2

    own, bare = size.system + size.history, size.system + size.none
    tokens, seen = own + shared * answer, keys(0, own) + shared * keys(own, answer)
    if not method.counterfactual:
        return Row(tokens, 0, seen, 0)
    others, others_seen = shared * answer, shared * keys(bare, answer)
    if method.counterfactual == "joint":  # the system's tokens are those of the factual branch
        return Row(tokens + size.none + others, 0, seen + keys(size.system, size.none) + others_seen, 0)
    return Row(tokens, bare + others, seen, keys(0, bare) + others_seen)


def operations(model: Model, method: Method, shared: int, *, whole: bool) -> float:
    """Floating-point operations of an example, with gradient checkpointing.

    A forward with gradient counts 4 times if the whole model is trained (itself, again for the checkpoints, and two of
    the backward), and 3 times with adapters, whose own operations are left out.
    """
    work, factor = row(method, shared), 4 if whole else 3

    def forward(tokens: int, keys: int) -> float:
        return 2.0 * model.layer_parameters * tokens + 4.0 * model.layers * model.heads * model.head_dim * keys

    layers = factor * forward(work.trained, work.trained_keys) + forward(work.constant, work.constant_keys)
    units = method.products if whole else method.frozen
    head = units * 2.0 * Lengths().response * model.hidden * model.vocabulary
    return layers / shared + head


def memory(model: Model, tokens: int, *, whole: bool) -> float:
    """Bytes on each GPU of `model.gpus`: sharded weights, gradients and AdamW's state, one layer, and activations.

    bfloat16 weights; the whole model's training adds a bfloat16 gradient and a float32 copy with two moments. A
    checkpoint keeps each layer's input, and the layer that runs holds about 16 values of the hidden width and 6 of the
    intermediate one for each token.
    """
    sharded = model.parameters * ((2 + 2 + 12) if whole else 2) / model.gpus
    gathered = 2 * 2 * (model.layer_parameters / model.layers + model.vocabulary * model.hidden)
    kept = 2.0 * tokens * model.layers * model.hidden
    running = 2.0 * tokens * (16 * model.hidden + 6 * model.intermediate)
    head = 4.0 * model.vocabulary * model.hidden if whole else 0.0
    return sharded + gathered + kept + running + head + HEAD_BYTES


def longest_history(model: Model, *, whole: bool) -> int:
    """The tokens of a row that fit on each of the model's GPUs, rounded down to thousands."""
    fixed = memory(model, 0, whole=whole)
    each = memory(model, 1, whole=whole) - fixed
    return max(0, math.floor((USABLE - fixed) / each / 1000) * 1000)


def waiting(gpus: int, rows: int, spread: float, *, steps: int = 400, seed: int = 0) -> float:
    """The mean time of a step in which processes wait for the slowest, as a multiple of the mean process's.

    Args:
        gpus: processes.
        rows: rows of one process in a step.
        spread: of a row's time, the standard deviation of its logarithm.
    """
    draw = torch.Generator().manual_seed(seed)
    work = torch.exp(spread * torch.randn(steps, gpus, rows, generator=draw, dtype=torch.float64)).mean(2)
    return float((work.max(1).values / work.mean()).mean())


def failing(
    gpus: int, hours: float, *, every: float = 0.5, restart: float = 0.25, runs: int = 200, seed: int = 0
) -> float:
    """The mean time of a run of `hours`, failures included, as a multiple of a run without any.

    A failure costs `restart` hours and what was done since the last checkpoint, `every` hours apart.
    """
    draw = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(runs):
        done, spent = 0.0, 0.0
        while done < hours:
            until = float(
                torch.empty(1, dtype=torch.float64).exponential_(gpus / HOURS_BETWEEN_FAILURES, generator=draw)
            )
            if done + until >= hours:
                spent += hours - done
                break
            spent += until + restart
            done = math.floor((done + until) / every) * every
        total += spent
    return total / runs / hours


def epoch_table() -> str:
    """An epoch of each model, method and sharing, as a Markdown table."""
    columns = ["model", "method", "examples of a user together", "tokens computed, ·10⁹", "GPU hours, whole model"]
    columns += ["with adapters", "their bounds", "days", "dollars"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---" + "|--:" * (len(columns) - 2) + "|"]
    for model, method, shared in product(MODELS, METHODS, (1, 4, 20)):
        work = row(method, shared)
        tokens = USERS * TEXTS * (work.trained + work.constant) / shared
        whole, adapters = (_hours(operations(model, method, shared, whole=each)) for each in (True, False))
        bounds = "–".join(f"{adapters * UTILISATION / share:,.0f}" for share in reversed(BOUNDS))
        cells = [
            model.name,
            method.name,
            str(shared),
            f"{tokens / 1e9:.0f}",
            f"{whole:,.0f}",
            f"{adapters:,.0f}",
            bounds,
        ]
        lines.append(
            "| " + " | ".join([*cells, f"{adapters / model.gpus / 24:.1f}", f"{PRICE * adapters:,.0f}"]) + " |"
        )
    return "\n".join(lines)


def memory_table() -> str:
    """What a row takes on each GPU, and the longest row that fits."""
    columns = ["model", "GPUs", "memory at one user's row, whole model", "with adapters"]
    columns += ["longest row that fits, whole model", "with adapters"]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    tokens = row(METHODS[2], TEXTS).trained
    alone = [replace(model, gpus=1) for model in MODELS if memory(replace(model, gpus=1), 0, whole=False) < USABLE]
    for model in (*alone, *MODELS):
        sizes = [f"{memory(model, tokens, whole=whole) / 1e9:.0f} GB" for whole in (True, False)]
        longest = [f"{longest_history(model, whole=whole):,}" for whole in (True, False)]
        longest = ["none" if each == "0" else each for each in longest]
        lines.append("| " + " | ".join([model.name, str(model.gpus), *sizes, *longest]) + " |")
    return "\n".join(lines)


def waiting_table() -> str:
    """What waiting and failures add, by the number of GPUs."""
    columns = ["GPUs", "waiting, 1 row a step", "8 rows", "32 rows", "failures in a week"]
    lines = ["| " + " | ".join(columns) + " |", "|--:" * len(columns) + "|"]
    for gpus in (8, 64, 256, 1024):
        cells = [f"{waiting(gpus, rows, SPREAD):.2f}" for rows in (1, 8, 32)]
        lines.append("| " + " | ".join([str(gpus), *cells, f"{failing(gpus, 168):.3f}"]) + " |")
    return "\n".join(lines)


#: Of users' rows: how much their tokens differ, as the standard deviation of the logarithm. A choice.
SPREAD = 0.5


def _hours(operations_of_example: float) -> float:
    return USERS * TEXTS * operations_of_example / (H100.flops * UTILISATION) / 3600


if __name__ == "__main__":
    print(epoch_table(), memory_table(), waiting_table(), sep="\n\n")
