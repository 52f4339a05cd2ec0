"""Suite `mirror`: a step of MIRROR without sampling, and its divergence against the pair loss on the same rows.

A step computes the loss of four rollouts of one example with a history of 1,500 tokens, and its gradient. The rollouts
are given, as the speed of sampling is that of `generate`. Peers are compositions with transformers: a row per branch,
with the logits of all positions or of the response's alone, and the teacher without gradient. Metrics:

    time    x       seconds of CPU time over those of the baseline, round by round
    tokens  tokens  that go through the model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import GateError, Options, Row, make_row, ratios, time_in_turns
from benchmarks.step_cases import LLAMA, StepModel, build_model
from nextquill.data import Branch, EncodedExample
from nextquill.data.collator import IGNORE_INDEX
from nextquill.data.examples import Anchor
from nextquill.losses import NextQuillLoss, PairLoss
from nextquill.mirror import MirrorLoss
from nextquill.models.branch_passes import PairPasses
from nextquill.ops.dispatch import why_not

BASELINE, RESPONSE = "a row per branch", "a row per branch, logits of the response alone"
IMPLS = ("torch", "native")
METHODS = {"MIRROR": 0.0, "MIRROR-F": 0.5}
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """Tokens of an example's history, query, own response and rollouts, the number of rollouts, and rows of a head."""

    history: int = 1500
    query: int = 40
    own: int = 64
    rollout: int = 64
    rollouts: int = 4
    rows: tuple[int, int, int] = (256, 512, 32000)

    def __str__(self) -> str:
        return f"{self.rollouts} rollouts of {self.rollout} tokens, history of {self.history}"


QUICK = Sizes(24, 4, 4, 3, 2, (12, 16, 40))
_SMALL = replace(LLAMA, layers=2, hidden=32, heads=2, kv_heads=2, vocabulary=90)


def run(options: Options) -> list[Row]:
    """Check on a small model that all ways have the same gradients, then time them.

    Raises:
        GateError: a gradient of ours is wrong.
    """
    sizes, rows = QUICK if options.quick else Sizes(), list[Row]()
    budget = None if options.budget is None else options.budget / 3
    for method, alpha in METHODS.items():
        _gate(method, make_steps(_SMALL, QUICK, alpha))
        steps = make_steps(_SMALL if options.quick else LLAMA, sizes, alpha)
        seconds = time_in_turns(steps, options.rounds, warmup=0, budget=budget, clock=time.process_time)
        for name, values in ratios(seconds, BASELINE).items():
            given: dict[str, Any] = {"loss": method, "device": "cpu"}
            rows.append(make_row("mirror", str(sizes), name, "time", "x", values, BASELINE, **given))
            rows.append(make_row("mirror", str(sizes), name, "tokens", "tokens", [float(steps[name].tokens)], **given))
        options.save(rows)
    rows += _head_rows(sizes, options.rounds, budget)
    options.save(rows)
    return rows


# ---- steps -----------------------------------------------------------------------------------------


class Step:
    """One way to make the step; a call leaves the gradients in the model."""

    def __init__(self, model: Any, backward: Callable[[], int]) -> None:
        self.model, self._backward = model, backward
        self.tokens = 0

    def __call__(self) -> None:
        self.model.zero_grad()
        self.tokens = self._backward()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients, in the parameters' shapes and dtype."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


def make_steps(shape: StepModel, sizes: Sizes, alpha: float) -> dict[str, Step]:
    """The same step in every way that can run here, on one model."""
    model, examples = build_model(shape, torch.device("cpu")), make_examples(shape.vocabulary, sizes, alpha > 0)
    steps = {
        BASELINE: Step(model, partial(plain_step, model, examples, alpha, whole=True)),
        RESPONSE: Step(model, partial(plain_step, model, examples, alpha, whole=False)),
    }
    for impl in IMPLS:
        if why_not(impl, torch.device("cpu"), torch.float32) is None:
            steps[impl] = Step(model, partial(our_step, model, examples, MirrorLoss(alpha=alpha, impl=impl)))
    return steps


def make_examples(vocabulary: int, sizes: Sizes, anchored: bool) -> list[EncodedExample]:
    """The rollouts of one example with random tokens; a third of the own response's tokens count."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    prompt, shown, own = ids(sizes.history + sizes.query), ids(8), ids(sizes.own)
    labels = [token if place % 3 == 0 else IGNORE_INDEX for place, token in enumerate(own)]
    examples = []
    for number in range(sizes.rollouts):
        response = ids(sizes.rollout)
        student, teacher = Branch(prompt, response), Branch(prompt + shown + own, response)
        anchor = Anchor(Branch(prompt, own), _array(labels)) if number == 0 else Anchor(student, _ignored(response))
        example = EncodedExample("user", number, student, teacher, None, 1, 1, anchor=anchor if anchored else None)
        examples.append(example)
    return examples


def our_step(model: Any, examples: Sequence[EncodedExample], loss: MirrorLoss) -> int:
    """Run a step in one tree; the tokens computed."""
    with PairPasses(model, loss) as passes:
        batch = passes.collator()(examples)
        passes.backward(batch)
    return sum(part["num_tokens"] for part in batch["parts"])


def plain_step(model: Any, examples: Sequence[EncodedExample], alpha: float, *, whole: bool) -> int:
    """Run a step row by row with `F.log_softmax` over logits [1, T, V], of all positions or of the response's."""
    tokens = 0
    for example in examples:
        student = _log_probs(model, example.factual, whole)
        with torch.no_grad():
            teacher = _log_probs(model, example.counterfactual, whole)
        mixture = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
        jsd = 0.5 * teacher.exp() * (teacher - mixture) + 0.5 * student.exp() * (student - mixture)
        ((1 - alpha) * jsd.sum(-1).mean() / len(examples)).backward()
        tokens += len(example.factual.input_ids) + len(example.counterfactual.input_ids)
    first = examples[0].anchor
    if first is not None:
        labels = torch.tensor(first.labels).long()
        log_probs = _log_probs(model, first.branch, whole)[labels >= 0]
        (-alpha * log_probs.gather(1, labels[labels >= 0][:, None]).mean()).backward()
        tokens += len(first.branch.input_ids)
    return tokens


def _log_probs(model: Any, branch: Branch, whole: bool) -> Tensor:
    """The log-probabilities [n, V] at the positions that predict the response."""
    keep = 0 if whole else branch.response_length + 1
    logits = model(input_ids=branch.input_tensor()[None], logits_to_keep=keep, use_cache=False).logits
    chosen = logits.float()[0, -branch.response_length - 1 : -1]
    return torch.nn.functional.log_softmax(chosen, dim=-1)


def _array(labels: Sequence[int]) -> Any:
    return Branch([0], labels).to_arrays()[1]


def _ignored(response: Sequence[int]) -> Any:
    return _array([IGNORE_INDEX] * len(response))


def _gate(method: str, steps: dict[str, Step]) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for name, step in steps.items():
        step()
        found[name] = step.gradients()
    largest = max(float(tensor.norm()) for tensor in found[BASELINE].values())
    for way in steps:
        for name, expected in found[BASELINE].items():
            error = float((found[way][name] - expected).norm()) / max(float(expected.norm()), 1e-2 * largest)
            if not error <= _TOLERANCE:
                raise GateError(f"mirror: {method}, {way}: the gradient of {name} differs by {error:.1e}")


# ---- the head alone --------------------------------------------------------------------------------


def _head_rows(sizes: Sizes, rounds: int, budget: float | None) -> list[Row]:
    """Forward and backward of the divergence over those of the pair losses, with a trained and a frozen head."""
    found = list[Row]()
    for impl in IMPLS:
        if why_not(impl, torch.device("cpu"), torch.float32) is not None:
            continue
        losses: dict[str, PairLoss] = {
            "pair loss": NextQuillLoss(impl=impl),
            "pair loss, detached": NextQuillLoss(detach_counterfactual=True, impl=impl),
            "divergence": MirrorLoss(impl=impl),
        }
        for head in ("trained", "frozen"):
            calls = {name: partial(_head_call, loss, *_streams(*sizes.rows, head)) for name, loss in losses.items()}
            share = None if budget is None else budget / 4
            seconds = time_in_turns(calls, rounds, budget=share, clock=time.process_time)
            case = "N={}, D={}, V={}".format(*sizes.rows)
            for name, values in ratios(seconds, "pair loss").items():
                row = make_row(
                    "mirror", case, name, "time", "x", values, "pair loss", loss=impl, head=head, device="cpu"
                )
                found.append(row)
    return found


def _streams(n: int, d: int, v: int, head: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(n, d, generator=generator).requires_grad_() for _ in range(2)]
    weight = 0.05 * torch.randn(v, d, generator=generator)
    labels = torch.randint(0, v, (n,), generator=generator)
    return streams[0], streams[1], weight.requires_grad_(head == "trained"), labels


def _head_call(loss: PairLoss, factual: Tensor, counterfactual: Tensor, weight: Tensor, labels: Tensor) -> None:
    for tensor in (factual, counterfactual, weight):
        tensor.grad = None
    loss.compute(factual, counterfactual, weight, labels, effect_nll=False).loss.backward()
