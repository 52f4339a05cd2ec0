"""The cases of suite `head`: head shapes of real models scaled to the machine, losses, modes and inputs.

A product U is N·D·V multiply-adds. `Task.products` counts the products that the mathematics needs: the logits of each
stream, and dh and dW for each stream with a gradient. So recomputed logits do not raise a provider's TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"
TRAINABLE, FROZEN = "trainable", "frozen"
#: At 8192 rows each sequence has 512 tokens, a typical response. The chunked engine takes whole sequences: 512 rows of
#: two streams fit its default buffer on a GPU at V = 151936.
SEQUENCES = 16
#: Tokens per sequence in an extra case, in which the logits take memory from their gradient.
LONG = 1024

#: Useful products: of the forward, and of forward and backward with a trainable and with a frozen head.
PRODUCTS = {
    "NextQuill": (2, 6, 4),
    "NextQuill detached": (2, 4, 3),
    "PerCE": (2, 4, 3),
    "SFT": (1, 3, 2),
    "pair nll": (2, 6, 4),
    "token nll": (1, 3, 2),
}
#: The per-token operators, measured as scoring: forward only.
SCORING = ("pair nll", "token nll")


@dataclass(frozen=True)
class Shape:
    """The number of supervised tokens, in equally long sequences, and the head's D, V and soft-cap."""

    name: str
    rows: int
    hidden: int
    vocabulary: int
    softcap: float | None = None
    sequences: int = SEQUENCES

    def __str__(self) -> str:
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        layout = f", {self.sequences} sequences" if self.sequences != SEQUENCES else ""
        return f"{self.name}: N={self.rows}, D={self.hidden}, V={self.vocabulary}{cap}{layout}"


#: The shape of public comparisons of fused losses (on an H100, N=8192). It comes first on a GPU, so that a stopped run
#: has it.
TARGET = Shape("Qwen3-8B", 8192, 4096, 151936)
MODELS = (
    Shape("Qwen2.5-0.5B", 8192, 896, 151936),
    Shape("Qwen2.5-3B", 8192, 2048, 151936),
    Shape("Llama-3-8B", 8192, 4096, 128256),
    Shape("Gemma-2-2B", 8192, 2304, 256000, softcap=30.0),
)


@dataclass(frozen=True)
class Task:
    """One loss in one mode. `head` says whether W has a gradient, and is empty for a forward."""

    loss: str
    mode: str
    head: str = ""

    @property
    def products(self) -> int:
        forward, trainable, frozen = PRODUCTS[self.loss]
        return forward if self.mode == FORWARD else trainable if self.head == TRAINABLE else frozen

    def __str__(self) -> str:
        return ", ".join(part for part in (self.loss, self.mode, self.head and f"{self.head} head") if part)


@dataclass(frozen=True)
class Inputs:
    """Hidden states of both streams [N, D], W [V, D], labels [N] and the sequence of each row [N]."""

    h1: Tensor
    h0: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    softcap: float | None = None

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The tensors that need a gradient, by name."""
        named = {"factual": self.h1, "counterfactual": self.h0, "weight": self.weight}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


@dataclass(frozen=True)
class Step:
    """A task at a shape, and its weight when time is divided."""

    shape: Shape
    task: Task
    weight: float = 1.0


#: Measured at `TARGET` before everything else, and with more rounds if time is short.
FIRST = (
    Task("NextQuill", TRAINING, TRAINABLE),
    Task("NextQuill detached", TRAINING, TRAINABLE),
    Task("NextQuill", TRAINING, FROZEN),
    Task("NextQuill detached", TRAINING, FROZEN),
    Task("pair nll", FORWARD),
)
_FIRST_WEIGHT = 6.0
#: The tasks at the target with long sequences.
_LONG_TASKS = FIRST[:3]


def plan(device: torch.device, quick: bool = False) -> tuple[Step, ...]:
    """The steps for a device, the most important first. All tasks of a shape stand together."""
    sizes, todo = shapes(device, quick), tasks(device, quick)
    if quick or device.type != "cuda":
        return tuple(Step(shape, task) for shape in sizes for task in todo)
    target, *others = sizes
    long = replace(target, sequences=max(1, target.rows // LONG))
    return (
        *(Step(target, task, _FIRST_WEIGHT) for task in FIRST),
        *(Step(target, task) for task in todo if task not in FIRST),
        *(Step(long, task) for task in _LONG_TASKS),
        *(Step(shape, task) for shape in others for task in todo),
    )


def shapes(device: torch.device, quick: bool = False) -> tuple[Shape, ...]:
    """The cases for a device.

    On a GPU they have real sizes, but fewer rows if plain PyTorch's logits must fit into less than 100 GiB. On a CPU
    they have D/4, V/16 and 512 rows, so that the suite takes minutes on two cores. The label states the sizes.
    """
    if quick:
        return (Shape("tiny", 64, 32, 512), Shape("tiny capped", 64, 48, 384, softcap=30.0))
    if device.type != "cuda":
        return tuple(
            Shape(f"{model.name} (D/4, V/16)", 512, model.hidden // 4, model.vocabulary // 16, model.softcap)
            for model in MODELS
        )
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    rows = 8192 if gib > 100 else 4096 if gib > 60 else 2048 if gib > 30 else 1024
    return tuple(replace(shape, rows=rows) for shape in (TARGET, *MODELS))


def tasks(device: torch.device, quick: bool = False) -> tuple[Task, ...]:
    """The tasks at every shape, the most important first."""
    if quick:
        return (
            Task("NextQuill", TRAINING, TRAINABLE),
            Task("NextQuill detached", TRAINING, FROZEN),
            Task("pair nll", FORWARD),
        )
    chosen = [
        Task("NextQuill", TRAINING, TRAINABLE),
        Task("NextQuill detached", TRAINING, TRAINABLE),
        Task("NextQuill", TRAINING, FROZEN),
        Task("NextQuill detached", TRAINING, FROZEN),
        Task("PerCE", TRAINING, TRAINABLE),
        Task("NextQuill", FORWARD),
        Task("pair nll", FORWARD),
        Task("token nll", FORWARD),
    ]
    if device.type == "cuda":
        chosen[5:5] = [Task("PerCE", TRAINING, FROZEN), Task("SFT", TRAINING, TRAINABLE)]
    return tuple(chosen)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, rows: int | None = None) -> Inputs:
    """Inputs that are equal in every call; logits have a standard deviation of about 2.

    Half of the labels have a logit that is larger by 24, before a cap, in the factual stream only. So both of
    NextQuill's weights occur, and no probability lies near the threshold of 0.05, where rounding would decide.
    """
    n, generator = rows or shape.rows, torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.vocabulary, shape.hidden).mul_(2 / shape.hidden**0.5)
    labels = torch.randint(0, shape.vocabulary, (n,), generator=generator, device=device)
    h0 = normal(n, shape.hidden)
    h1 = 0.8 * h0 + 0.6 * normal(n, shape.hidden)
    towards = weight[labels]
    towards = towards * (24 / towards.square().sum(-1, keepdim=True))
    h1 = h1 + towards * (torch.arange(n, device=device) % 2)[:, None]
    ids = torch.arange(n, device=device) * shape.sequences // n
    return Inputs(h1.to(dtype), h0.to(dtype), weight.to(dtype), labels, ids, shape.softcap)


def for_task(inputs: Inputs, task: Task, dtype: torch.dtype | None = None) -> Inputs:
    """The same values as leaves that require the gradients of the task, in `dtype` if given."""
    training, both = task.mode == TRAINING, task.loss == "NextQuill"
    needs = {"h1": training, "h0": training and both, "weight": training and task.head == TRAINABLE}
    tensors = {name: getattr(inputs, name).detach().to(dtype or inputs.h1.dtype) for name in needs}
    return replace(inputs, **{name: tensor.requires_grad_(needs[name]) for name, tensor in tensors.items()})


def output_names(inputs: Inputs, task: Task) -> Sequence[str]:
    """The names of a provider's results, in order."""
    if task.loss == "pair nll":
        return ("nll_factual", "nll_counterfactual", "nll_effect")
    if task.loss == "token nll":
        return ("nll_factual",)
    return ("loss", *(f"grad_{name}" for name in inputs.wanted))
