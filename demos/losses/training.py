"""The demo's model and its three phases of training, as a plain PyTorch loop.

    phase A   SFT on everybody's reviews, until the model reads histories
    phase B   SFT on reviews that follow a habit only one time in four: a bland base that can read, and does not bother
    phase C   from that base, one copy for each loss: same examples, same order, same number of steps

Phase A matters. A causal loss weights tokens by the effect a history has; where a model cannot read a history there is
no effect, and the weights are noise.

`Contestant.step` is all that a plain PyTorch program needs: two passes of the backbone, the rows of hidden states that
predict a response token, and one call of the loss. It takes `model.lm_head.weight` directly, which is right in a single
process only; under DDP or FSDP the loss has to run inside the head, as `NextQuillTrainer` does.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from demos.kit.progress import Progress
from demos.kit.training import Learner, build_base
from demos.losses.recipe import LossRecipe
from demos.losses.world import EOS, PAD, VOCABULARY, Example, LossWorld, encode, prompt_words
from nextquill.losses import NextQuillLoss, PerCELoss, SFTLoss
from nextquill.models.tiny_models import ScratchSize

WARMUP_STEPS = 20
DEV_EVERY = 25
# The contestants of phase C.
SFT, SFT_FAST = "SFT", "SFT, 2× LR"
OFFICIAL, DETACHED, ANCHORED = "NextQuill (official)", "NextQuill (detached)", "NextQuill (anchored)"
CAUSAL = ("PerCE", OFFICIAL, DETACHED, ANCHORED)
SIZE = ScratchSize(vocabulary=len(VOCABULARY), hidden_size=96, layers=2, heads=3, intermediate_size=256, positions=128)


@dataclass(frozen=True)
class Batch:
    """Padded inputs and the rows that predict a response token.

    `input_ids` is [B, T], padded on the right: attention is causal, so no row of interest ever sees padding and no mask
    is needed. `rows` [N] index the flattened [B·T] positions; `labels`, `personal`, `sequence_ids` [N] belong to them.
    """

    input_ids: Tensor
    rows: Tensor
    labels: Tensor
    personal: Tensor
    sequence_ids: Tensor


def make_batch(examples: Sequence[Example], histories: Sequence[Sequence[str] | None]) -> Batch:
    """Encode `examples`, each after the history given for it: its own, another user's, or None."""
    prompts = [encode(prompt_words(each.item, history)) for each, history in zip(examples, histories, strict=True)]
    responses = [encode(each.response) for each in examples]
    texts = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    input_ids = pad_sequence(texts, batch_first=True, padding_value=VOCABULARY[PAD])
    # The token at position t is predicted at t − 1; labels are aligned with these rows, so nothing shifts later.
    starts = [index * input_ids.shape[1] + len(prompt) - 1 for index, prompt in enumerate(prompts)]
    return Batch(
        input_ids=input_ids,
        rows=torch.tensor([s + t for s, response in zip(starts, responses, strict=True) for t in range(len(response))]),
        labels=torch.tensor([token for response in responses for token in response]),
        personal=torch.tensor([mark for example in examples for mark in example.personal]),
        sequence_ids=torch.tensor([i for i, response in enumerate(responses) for _ in response]),
    )


def with_own_histories(examples: Sequence[Example]) -> Batch:
    """The examples, each after its own history."""
    return make_batch(examples, [each.history for each in examples])


def hidden_states(model: Any, batch: Batch, *, chunk: int = 32) -> Tensor:
    """Final hidden states at the predicting rows, [N, D]; `chunk` sequences at a time, which stay in the cache."""
    parts = [model.model(input_ids=ids, use_cache=False).last_hidden_state for ids in batch.input_ids.split(chunk)]
    return torch.cat(parts).flatten(0, 1)[batch.rows]


def build_model(seed: int) -> Any:
    """A Llama of about 250 thousand parameters with tied embeddings."""
    ids = {"pad_token_id": VOCABULARY[PAD], "eos_token_id": VOCABULARY[EOS]}
    return build_base(SIZE, seed, weight_scale=4.0, **ids)


def train_base(world: LossWorld, recipe: LossRecipe, seed: int, progress: Progress) -> tuple[Any, int, float]:
    """Phases A and B: the model, the steps phase A took and the dev accuracy it reached."""
    model, dev = build_model(seed), with_own_histories(world.dev)
    drops = random.Random(f"dropped histories {seed}")

    def sft(learning_rate: float, steps: int, habit_probability: float) -> Iterator[int]:
        """Plain SFT on the old catalogue with some histories dropped; yields after each step."""
        learner = Contestant(SFT, SFTLoss(), model, learning_rate)
        for step in range(1, steps + 1):
            examples = world.training_examples(recipe.batch_size, world.old_items, habit_probability=habit_probability)
            histories = [None if drops.random() < recipe.drop_history else each.history for each in examples]
            learner.step(make_batch(examples, histories), None, share=min(1.0, step / WARMUP_STEPS))
            yield step

    accuracy, step = 0.0, 0
    for step in sft(recipe.reading_learning_rate, recipe.reading_steps, 1.0):
        progress("A: learns to read histories", step, recipe.reading_steps)
        if step % DEV_EVERY == 0 or step == recipe.reading_steps:
            accuracy = personal_accuracy(model, dev)
            if accuracy >= recipe.reading_target:
                break
    for done in sft(recipe.bland_learning_rate, recipe.bland_steps, recipe.bland_habit_probability):
        progress("B: turns bland", done, recipe.bland_steps)
    return model, step, accuracy


@torch.no_grad()
def personal_accuracy(model: Any, batch: Batch) -> float:
    """The share of personal tokens for which the most probable token is the right one."""
    logits = hidden_states(model, batch) @ model.lm_head.weight.T
    return float((logits.argmax(-1) == batch.labels)[batch.personal].double().mean())


@dataclass
class Contestant:
    """One loss, its copy of the model, its optimizer, and the seconds each of its steps took."""

    name: str
    loss: NextQuillLoss | PerCELoss | SFTLoss
    model: Any
    learning_rate: float
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._learner = Learner(self.model.parameters(), self.learning_rate)

    def step(self, factual: Batch, counterfactual: Batch | None, share: float = 1.0) -> None:
        """One optimizer step. `counterfactual` is the same responses without a history; SFT does not look at it."""
        start = time.perf_counter()
        hidden_factual = hidden_states(self.model, factual)
        hidden_counterfactual = None
        if self.loss.needs_counterfactual and counterfactual is not None:
            with torch.set_grad_enabled(not self.loss.detaches_counterfactual):
                hidden_counterfactual = hidden_states(self.model, counterfactual)
        loss = self.loss(
            hidden_factual,
            hidden_counterfactual,
            self.model.lm_head.weight,
            factual.labels,
            sequence_ids=factual.sequence_ids,
        )
        self._learner.step(loss, share)
        self.seconds.append(time.perf_counter() - start)


def make_contestants(base: Any, learning_rate: float) -> list[Contestant]:
    """A copy of the base for each loss; SFT twice, because its learning rate matters as much as the choice of loss."""
    losses: dict[str, NextQuillLoss | PerCELoss | SFTLoss] = {
        SFT: SFTLoss(),
        SFT_FAST: SFTLoss(),
        "PerCE": PerCELoss(),
        OFFICIAL: NextQuillLoss(),
        DETACHED: NextQuillLoss(detach_counterfactual=True),
        ANCHORED: NextQuillLoss(anchor=0.1),
    }
    rates = {SFT_FAST: 2 * learning_rate}
    return [
        Contestant(name, loss, copy.deepcopy(base), rates.get(name, learning_rate)) for name, loss in losses.items()
    ]


def phase_c_steps(contestants: Sequence[Contestant], world: LossWorld, recipe: LossRecipe) -> Iterator[int]:
    """Step all contestants in turn on the same batch; yields after each round.

    In turn rather than one after the other, so that a busy machine slows all of them alike.
    """
    for step in range(1, recipe.long_steps + 1):
        examples = world.training_examples(recipe.batch_size, world.new_items)
        factual, counterfactual = with_own_histories(examples), make_batch(examples, [None] * len(examples))
        for contestant in contestants:
            contestant.step(factual, counterfactual)
        yield step
