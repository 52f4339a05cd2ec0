"""Suite `step`: forward, backward and optimiser step of the command line's `small` model, per loss, on one batch.

"ours" runs through the same passes as NextQuillTrainer; "plain" runs the backbone on the same padded batches and the
loss over full logits. Ratios are to our SFT step. Two ordinary forwards with gradient would cost 2, and a second
forward without gradient 1.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.measure import GateError, Options, Row, make_row, ratios, time_in_turns
from benchmarks.peers.plain import nextquill_plain, perce_plain, sft_plain
from nextquill.data import Branch, EncodedExample, PairCollator, stack_branches
from nextquill.integrations.passes import PairPasses
from nextquill.integrations.scratch import SCRATCH_SIZES, ScratchSize, build_model

LOSSES: dict[str, Callable[[], nq.PairLoss]] = {
    "SFT": nq.SFTLoss,
    "PerCE": nq.PerCELoss,
    "NextQuill": nq.NextQuillLoss,
    "NextQuill detached": lambda: nq.NextQuillLoss(detach_counterfactual=True),
}
#: Tokens of query, history and response. A short history leaves the counterfactual nearly as long as the factual pass,
#: which is where a causal loss costs most.
CASES = {
    f"query {query}, history {history}, response {response}": (query, history, response)
    for query, history, response in ((48, 320, 128), (48, 96, 64), (192, 16, 128))
}
BATCH = 8
BASELINE = "SFT (ours)"


def run(options: Options) -> list[Row]:
    """Check, then time, every case; always on the CPU, which is what the `small` model is for."""
    size = SCRATCH_SIZES["tiny" if options.quick else "small"]
    rows: list[Row] = []
    for case, (query, history, response) in CASES.items():
        scale = 4 if options.quick else 1
        batch = make_batch(size, query // scale, history // scale, response // scale)
        gate(size, batch)
        budget = None if options.budget is None else options.budget / len(CASES)
        seconds = time_in_turns(steps(size, batch), options.rounds, budget=budget)
        labels = {"mode": "step", "head": "trainable", "dtype": "float32", "device": "cpu"}
        for name, values in ratios(seconds, BASELINE).items():
            rows.append(make_row("step", case, name, "time", "x", values, BASELINE, loss=loss_of(name), **labels))
        for name, values in seconds.items():
            rows.append(make_row("step", case, name, "seconds", "s", values, loss=loss_of(name), **labels))
        options.save(rows)
    return rows


def loss_of(provider: str) -> str:
    """A provider here is a loss and whose it is: `PerCE (ours)`."""
    return provider.rsplit(" (", 1)[0]


def make_batch(size: ScratchSize, query: int, history: int, response: int) -> dict[str, Any]:
    """Random examples with lengths within ±20% of the given ones."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        length = int(length * (0.8 + 0.4 * torch.rand((), generator=generator)))
        return torch.randint(0, size.vocabulary, (max(1, length),), generator=generator).tolist()

    examples = []
    for index in range(BATCH):
        question, past, answer = ids(query), ids(history), ids(response)
        factual, counterfactual = Branch(question + past, answer), Branch(question, answer)
        examples.append(EncodedExample(str(index), index, factual, counterfactual, None, 1, 1))
    return PairCollator(0)(examples)


def steps(size: ScratchSize, batch: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """One optimiser step per provider, each on a model of its own."""
    providers: dict[str, Callable[[], object]] = {}
    for name, make_loss in LOSSES.items():
        for kind, build in (("ours", our_loss), ("plain", plain_loss)):
            model = build_model(size, seed=0)
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
            loss = build(model, name, make_loss(), batch)
            providers[f"{name} ({kind})"] = lambda loss=loss, optimiser=optimiser: _step(loss, optimiser)
    return providers


def _step(loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss().backward()
    optimiser.step()


def our_loss(model: Any, name: str, loss: nq.PairLoss, batch: dict[str, Any]) -> Callable[[], Tensor]:
    passes = PairPasses(model, loss)
    return lambda: passes.training_loss(batch)[0]


def plain_loss(model: Any, name: str, loss: nq.PairLoss, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """The same passes by hand, with full logits of the supervised rows."""

    def hidden(branch: dict[str, Tensor]) -> Tensor:
        states = model.model(branch["input_ids"], branch["attention_mask"], use_cache=False).last_hidden_state
        return states[branch["labels"] != -100]

    def compute() -> Tensor:
        factual, counterfactual = batch["factual"], batch["counterfactual"]
        mask = factual["labels"] != -100
        labels, ids = factual["labels"][mask], mask.nonzero()[:, 0]
        weight = model.lm_head.weight
        if name == "SFT":
            return sft_plain(hidden(factual), weight, labels, ids)
        if loss.detaches_counterfactual:
            with torch.no_grad():
                h0 = hidden(counterfactual)
            h1 = hidden(factual)
        else:
            h1, h0 = hidden(stack_branches(factual, counterfactual)).chunk(2)
        if name == "PerCE":
            return perce_plain(h1, h0, weight, labels, ids)
        return nextquill_plain(h1, h0, weight, labels, ids, detach=loss.detaches_counterfactual)

    return compute


def gate(size: ScratchSize, batch: dict[str, Any]) -> None:
    """Refuse to time anything unless ours and plain agree in the loss and in every gradient."""
    for name, make_loss in LOSSES.items():
        results = []
        for build in (our_loss, plain_loss):
            model = build_model(size, seed=0)
            loss = build(model, name, make_loss(), batch)()
            loss.backward()
            results.append((loss.item(), [p.grad for p in model.parameters()]))
        (ours, own_grads), (plain, plain_grads) = results
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(own_grads, plain_grads, strict=True))
        if abs(ours - plain) > 1e-5 * abs(plain) or worst > 1e-4:
            raise GateError(f"step: {name}: loss {ours} against {plain}, gradients differ by {worst:.1e}; not timed")
