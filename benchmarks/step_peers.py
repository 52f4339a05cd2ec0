"""The providers of suite `step`: each turns the examples of a step into losses to call backward on.

    official            the published scheme: both passes padded to 4097 tokens, one example at a time, through the
                        model's own forward; float32 softmaxes over the vocabulary at every position
    two passes          a composition of today's parts: both passes unpadded, one example at a time, and three calls of
                        a fused cross-entropy for one stream: nll_f, nll_c (a constant, used only in the weights), and
                        the effect's NLL on h1 - h0
    ours, K=…           K examples of the user in a row of trees, through the passes of NextQuillTrainer
    unpadded            SFT: the factual pass unpadded, one example at a time, and a fused cross-entropy
    TRL, …              with a pretrained model: the loss of TRL's SFTTrainer over one batch, padded or padding-free,
                        which joins the examples into one row, as its packing does

All providers take the same examples, in micro-batches whose gradients add up to the gradient of the mean. The official
scheme is timed with one example per step, because it is slow; more examples would only reduce AdamW's small share. It
treats its logits as the published code does, including the discarded cross-entropies, but in float32. No
provider checkpoints activations, which trades time for memory; in TRL that is on by default.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import nextquill as nq
from benchmarks.peers.plain import nextquill_objective, nextquill_plain, perce_plain, sft_plain
from benchmarks.step_cases import Case
from nextquill.data import Branch, EncodedExample
from nextquill.models.branch_passes import PairPasses

#: Computes a micro-batch's share of the step's loss.
Micro = Callable[[], Tensor]
Build = Callable[[Any, Case, Sequence[EncodedExample]], list[Micro]]

LOSSES: dict[str, Callable[[], nq.PairLoss]] = {
    "NextQuill": nq.NextQuillLoss,
    "NextQuill detached": lambda: nq.NextQuillLoss(detach_counterfactual=True),
    "PerCE": nq.PerCELoss,
    "SFT": nq.SFTLoss,
}


@dataclass(frozen=True)
class StepProvider:
    """One way to do a step.

    Args:
        loss: the loss that it minimises, one of `LOSSES`.
        name: its name in the CSV.
        build: returns the micro-batches of a step.
        examples: the number of the case's examples in a timed step; None for all.
    """

    loss: str
    name: str
    build: Build
    examples: int | None = None

    @property
    def label(self) -> str:
        return f"{self.loss}, {self.name}"

    def examples_of(self, case: Case) -> int:
        return case.examples if self.examples is None else self.examples

    @property
    def is_others(self) -> bool:
        """Whether it runs a trainer of another project, which may be missing or wrong for a model."""
        return self.name.startswith("TRL")


def providers(case: Case) -> dict[str, StepProvider]:
    """The providers by label, the slowest first, so that a lack of memory shows early."""
    entrants = [
        StepProvider("NextQuill", "official", official, examples=1),
        StepProvider("NextQuill", "two passes", two_passes),
        *(
            StepProvider(loss, f"ours, K={group}", shared(loss, group))
            for loss in case.losses or LOSSES
            for group in case.groups
        ),
        StepProvider("SFT", "unpadded", unpadded),
    ]
    if case.model.lora:
        entrants += [StepProvider("SFT", "TRL, padded", trl()), StepProvider("SFT", "TRL, padding-free", trl(True))]
    return {entrant.label: entrant for entrant in entrants}


OFFICIAL, SFT = "NextQuill, official", "SFT, unpadded"


def step(optimiser: torch.optim.Optimizer, micros: Sequence[Micro]) -> None:
    """One optimiser step."""
    optimiser.zero_grad(set_to_none=True)
    for micro in micros:
        micro().backward()
    optimiser.step()


# ---- the published scheme ----------------------------------------------------------------------------


def official(model: Any, case: Case, examples: Sequence[EncodedExample]) -> list[Micro]:
    """The published scheme: padded on the left to a fixed length, which aligns both responses."""

    def micro(factual: dict[str, Tensor], counterfactual: dict[str, Tensor], labels: Tensor) -> Tensor:
        # As published: labels go into both forwards, which compute cross-entropies that are then discarded, the first
        # one's with its output at the end. Softmaxes over the vocabulary are part of the graph.
        unshifted = torch.nn.functional.pad(labels, (1, 0), value=-100)[None]
        first = model(**factual, labels=unshifted, use_cache=False)
        second = model(**counterfactual, labels=unshifted, use_cache=False)
        z1, z0 = (output.logits[0, :-1].float() for output in (first, second))
        del second
        picked = labels.clamp(min=0)[:, None]
        p1, p0 = z1.softmax(-1), z0.softmax(-1)
        personal = p1.gather(-1, picked)[:, 0] - p0.gather(-1, picked)[:, 0] > 0.05
        omega = torch.where(personal, 0.9, 0.1) * (labels != -100)
        nll_f = cross_entropy(z1, labels, reduction="none")
        loss: Tensor = (omega * nll_f).sum() / omega.sum() + 0.1 * cross_entropy(z1 - z0, labels)
        return loss / len(examples)

    def padded(branch: Branch) -> dict[str, Tensor]:
        missing = case.lengths.padded - len(branch.input_ids)
        mask = [0] * missing + [1] * len(branch.input_ids)
        ids = torch.tensor([[0] * missing + branch.input_ids, mask], device=model.device)
        return {"input_ids": ids[:1], "attention_mask": ids[1:]}

    def labels(branch: Branch) -> Tensor:
        ignored = case.lengths.padded - 1 - branch.response_length  # no label for the last position
        return torch.tensor([-100] * ignored + branch.response_ids, device=model.device)

    return [
        partial(micro, padded(each.factual), padded(each.counterfactual), labels(each.factual)) for each in examples
    ]


# ---- unpadded passes, one example at a time ----------------------------------------------------------


def two_passes(model: Any, case: Case, examples: Sequence[EncodedExample]) -> list[Micro]:
    """A composition of fused losses, which takes 8 products of the head's size, as with Liger.

    nll_c takes 1 product. nll_f takes 4, as its weights are known only after its forward. The mean of nll_e takes 3, as
    its forward finishes the gradient.
    """
    mean = nq.SFTLoss()

    def micro(h1: Tensor, h0: Tensor, labels: Tensor) -> Tensor:
        weight = model.lm_head.weight
        with torch.no_grad():
            nll_c = nq.linear_token_nll(h0, weight, labels)
        nll_f = nq.linear_token_nll(h1, weight, labels)
        return nextquill_objective(nll_f, nll_c, mean(h1 - h0, None, weight, labels), torch.zeros_like(labels))

    return _per_example(model, examples, micro)


def unpadded(model: Any, case: Case, examples: Sequence[EncodedExample]) -> list[Micro]:
    """SFT as users usually write it."""
    loss = nq.SFTLoss()

    def micro(h1: Tensor, _: Tensor | None, labels: Tensor) -> Tensor:
        result: Tensor = loss(h1, None, model.lm_head.weight, labels)
        return result

    return _per_example(model, examples, micro, counterfactual=False)


def reference(model: Any, loss: str, examples: Sequence[EncodedExample]) -> list[Micro]:
    """The reference for a loss: separate unpadded passes, and plain PyTorch over full logits of the responses."""

    def micro(h1: Tensor, h0: Tensor, labels: Tensor) -> Tensor:
        weight, ids = model.lm_head.weight, torch.zeros_like(labels)
        if loss == "SFT":
            return sft_plain(h1, weight, labels, ids)
        if loss == "PerCE":
            return perce_plain(h1, h0, weight, labels, ids)
        return nextquill_plain(h1, h0, weight, labels, ids, detach=loss == "NextQuill detached")

    return _per_example(model, examples, micro)


@torch.no_grad()
def share_above_threshold(model: Any, examples: Sequence[EncodedExample]) -> float:
    """The share of tokens to which NextQuill gives its higher weight."""
    loss = nq.NextQuillLoss()

    def micro(h1: Tensor, h0: Tensor, labels: Tensor) -> Tensor:
        return loss.compute(h1, h0, model.lm_head.weight, labels).share_above_threshold

    return sum(float(each()) for each in _per_example(model, examples, micro))


def _per_example(
    model: Any,
    examples: Sequence[EncodedExample],
    loss: Callable[[Tensor, Any, Tensor], Tensor],
    counterfactual: bool = True,
) -> list[Micro]:
    """Micro-batches of one example: `loss(h1, h0, labels)` on the hidden states that predict the response."""

    def hidden(ids: Tensor, response: int) -> Tensor:
        states: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return states[0, -response - 1 : -1]

    def bind(example: EncodedExample) -> Micro:
        first, second, labels = (
            torch.tensor(ids, device=model.device)
            for ids in ([example.factual.input_ids], [example.counterfactual.input_ids], example.factual.response_ids)
        )

        def micro() -> Tensor:
            h1 = hidden(first, len(labels))
            h0 = hidden(second, len(labels)) if counterfactual else None
            return loss(h1, h0, labels) / len(examples)

        return micro

    return [bind(example) for example in examples]


# ---- TRL ---------------------------------------------------------------------------------------------


def trl(padding_free: bool = False) -> Build:
    """The loss of TRL's SFTTrainer over all examples. Collation is not timed.

    TRL averages over tokens. As all responses have one length, that is the mean per example too.
    """

    def build(model: Any, case: Case, examples: Sequence[EncodedExample]) -> list[Micro]:
        rows = [
            {"input_ids": each.input_ids, "labels": [-100] * len(each.prompt_ids) + each.response_ids}
            for each in (example.factual for example in examples)
        ]
        trainer = _trl_trainer(model, rows, padding_free)
        batch = _on(trainer.data_collator(rows), model.device)
        count = sum(len(example.factual.response_ids) for example in examples)
        fused = model.__dict__.pop("forward")  # TRL's own forward, put back for TRL alone

        def micro() -> Tensor:
            model.forward = fused
            try:
                loss: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
            finally:
                del model.forward
            return loss

        return [micro]

    return build


def _trl_trainer(model: Any, rows: list[dict[str, list[int]]], padding_free: bool) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # SFTConfig sets an argument of transformers that has another name since.
        warnings.filterwarnings("ignore", ".gradient_checkpointing. is deprecated", FutureWarning)
        arguments = SFTConfig(
            folder, per_device_train_batch_size=len(rows), padding_free=padding_free, max_length=None, bf16=False,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, report_to=[],
            use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


# ---- ours --------------------------------------------------------------------------------------------


def shared(loss: str, group: int) -> Build:
    """Rows of trees with `group` examples each, which share their common beginnings. Collation is not timed."""

    def build(model: Any, case: Case, examples: Sequence[EncodedExample]) -> list[Micro]:
        passes = PairPasses(model, LOSSES[loss]())
        collate = passes.collator()

        def micro(batch: Any) -> Tensor:
            with passes:  # closed before the backward, which runs no layer again, as others use the same model
                return passes.training_loss(batch, float(len(examples)))[0]

        starts = range(0, len(examples), group)
        return [partial(micro, _on(collate(examples[start : start + group]), model.device)) for start in starts]

    return build


def _on(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, as the Trainer moves them."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on(each, device) for name, each in value.items()}
    return [_on(each, device) for each in value] if isinstance(value, list) else value
