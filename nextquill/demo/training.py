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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextquill.demo.recipe import Recipe
from nextquill.demo.world import Example, Item, Vocabulary, World, prompt_words
from nextquill.losses import NextQuillLoss, PerCELoss, SFTLoss
from nextquill.report.progress import Progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    Loss = NextQuillLoss | PerCELoss | SFTLoss

WARMUP_STEPS = 20
DEV_EVERY = 25
MAX_GRAD_NORM = 1.0


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


def make_batch(vocabulary: Vocabulary, examples: Sequence[Example], histories: Sequence[Sequence[str] | None]) -> Batch:
    """Encode `examples`, each after the history given for it: its own, another user's, or None."""
    prompts = [vocabulary.encode(prompt_words(e.item, h)) for e, h in zip(examples, histories, strict=True)]
    responses = [vocabulary.encode(e.response) for e in examples]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    rows: list[int] = []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response)
        input_ids[index, :length] = torch.tensor(prompt + response)
        # The token at position t is predicted at t − 1; labels are aligned with these rows, so nothing shifts later.
        rows += range(index * width + len(prompt) - 1, index * width + length - 1)
    return Batch(
        input_ids=input_ids,
        rows=torch.tensor(rows),
        labels=torch.tensor([token for response in responses for token in response]),
        personal=torch.tensor([mark for example in examples for mark in example.personal]),
        sequence_ids=torch.tensor([i for i, response in enumerate(responses) for _ in response]),
    )


def hidden_states(model: LlamaForCausalLM, batch: Batch, *, chunk: int = 32) -> Tensor:
    """Final hidden states at the predicting rows, [N, D]; `chunk` sequences at a time, which stay in the cache."""
    parts = [model.model(input_ids=ids, use_cache=False).last_hidden_state for ids in batch.input_ids.split(chunk)]
    return torch.cat(parts).flatten(0, 1)[batch.rows]


def build_model(vocabulary_size: int, seed: int) -> LlamaForCausalLM:
    """A Llama of about 250 thousand parameters with tied embeddings.

    `initializer_range=0.08` instead of the usual 0.02: at this width the model then learns to copy from its history
    several times sooner.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread meanwhile.

    Matrices this small gain little from a second (a pass over the test users: 0.6 s with two threads and 0.2 s with one
    while the other core was busy), and with one thread sums have the same order on every machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Base:
    """What phases A and B leave: the model, the steps phase A took and the dev accuracy it reached."""

    model: LlamaForCausalLM
    reading_steps: int
    reading_accuracy: float


def train_base(world: World, recipe: Recipe, seed: int, progress: Progress) -> Base:
    """Phases A and B."""
    model = build_model(len(world.vocabulary), seed)
    drops = random.Random(f"dropped histories {seed}")
    dev = make_batch(world.vocabulary, world.dev, [example.history for example in world.dev])
    accuracy, step = 0.0, 0
    for step in _sft_steps(model, world, recipe, drops, recipe.reading_learning_rate, recipe.reading_steps, 1.0):
        progress("A: learns to read histories", step, recipe.reading_steps)
        if step % DEV_EVERY == 0 or step == recipe.reading_steps:
            accuracy = personal_accuracy(model, dev)
            if accuracy >= recipe.reading_target:
                break
    blandness = recipe.bland_habit_probability
    for done in _sft_steps(model, world, recipe, drops, recipe.bland_learning_rate, recipe.bland_steps, blandness):
        progress("B: turns bland", done, recipe.bland_steps)
    return Base(model, step, accuracy)


def _sft_steps(
    model: LlamaForCausalLM,
    world: World,
    recipe: Recipe,
    drops: random.Random,
    learning_rate: float,
    steps: int,
    habit_probability: float,
) -> Iterator[int]:
    """Plain SFT on the old catalogue with some histories dropped; yields after each step."""
    learner = Contestant("SFT", SFTLoss(), model, learning_rate)
    for step in range(1, steps + 1):
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / WARMUP_STEPS)
        examples = world.training_examples(recipe.batch_size, world.old_items, habit_probability=habit_probability)
        histories = [None if drops.random() < recipe.drop_history else example.history for example in examples]
        learner.step(make_batch(world.vocabulary, examples, histories), None)
        yield step


@torch.no_grad()
def personal_accuracy(model: LlamaForCausalLM, batch: Batch) -> float:
    """How often the most probable token is the right one, over personal tokens."""
    logits = hidden_states(model, batch) @ model.lm_head.weight.T
    return float((logits.argmax(-1) == batch.labels)[batch.personal].double().mean())


@dataclass
class Contestant:
    """One loss, its copy of the model, its optimizer, and the seconds each of its steps took."""

    name: str
    loss: Loss
    model: LlamaForCausalLM
    learning_rate: float
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, factual: Batch, counterfactual: Batch | None) -> None:
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
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


def make_contestants(base: LlamaForCausalLM, learning_rate: float) -> list[Contestant]:
    """A copy of the base for each loss; SFT twice, because its learning rate matters as much as the choice of loss."""
    losses: list[tuple[str, Loss, float]] = [
        ("SFT", SFTLoss(), 1.0),
        ("SFT, 2× LR", SFTLoss(), 2.0),
        ("PerCE", PerCELoss(), 1.0),
        ("NextQuill (official)", NextQuillLoss(), 1.0),
        ("NextQuill (detached)", NextQuillLoss(detach_counterfactual=True), 1.0),
        ("NextQuill (anchored)", NextQuillLoss(anchor=0.1), 1.0),
    ]
    return [Contestant(name, loss, copy.deepcopy(base), learning_rate * factor) for name, loss, factor in losses]


def phase_c_steps(
    contestants: Sequence[Contestant], world: World, items: Sequence[Item], recipe: Recipe
) -> Iterator[int]:
    """Step all contestants in turn on the same batch; yields after each round.

    In turn rather than one after the other, so that a busy machine slows all of them alike.
    """
    for step in range(1, recipe.long_steps + 1):
        examples = world.training_examples(recipe.batch_size, items)
        factual = make_batch(world.vocabulary, examples, [example.history for example in examples])
        counterfactual = make_batch(world.vocabulary, examples, [None] * len(examples))
        for contestant in contestants:
            contestant.step(factual, counterfactual)
        yield step
