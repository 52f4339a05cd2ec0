"""The demo's models: a base made from nothing, POPI on it, and a generator that reads raw signals.

The base stands for a language model that can read and write, and does not know what is wanted of it:

    requests    answers in a style that its prompt states, and in any style where it states none
    signals     the texts of users, every token of them, as language models learn; what chosen answers have in common
                helps to predict the next, so this alone makes it see what a user prefers
    summaries   "likes A and B", of three kinds, whoever the user is: a bland one that fits everybody, one of what the
                chosen answers show most, and one of what the *rejected* ones do

Which kind makes a user's choices predictable is left to POPI's reward.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from nextquill.data import Branch, PromptTemplate
from nextquill.models.tiny_models import ScratchSize, build_model
from nextquill.popi.config import POPIConfig
from nextquill.popi.demo.recipe import Recipe
from nextquill.popi.demo.world import (
    ASPECT_OF,
    BLAND,
    QUERIES,
    VALUES,
    Preferences,
    World,
    all_texts,
    draw_pairs,
    most_shown,
    write_answer,
    write_summary,
)
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import Roles
from nextquill.popi.trainer import POPITrainer
from nextquill.popi.users import Pair, draw
from nextquill.report.progress import Progress
from nextquill.storage.fingerprints import seed_of

TEMPLATES = PopiTemplates(
    instruction="what does this person like ?",
    inference=PromptTemplate(
        order="history_first",
        history_heading="[Signals]:",
        query_heading="[Task]:",
        closing_cue="[Summary]:",
        title_label="[Query]: ",
        text_label="",
    ),
    generator=PromptTemplate(
        order="history_first",
        counterfactual="removal",
        history_heading="[User]:",
        title_label="[Query]: ",
        text_label="",
    ),
)
END, PADDING, UNKNOWN = "<eos>", "<pad>", "<unk>"
SUMMARY_TOKENS = 8
MAX_GRAD_NORM = 1.0
_WARMUP = 20


def build_word_tokenizer() -> Any:
    """One token a word; white space is not kept, and a text reads back with single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inference, generator = TEMPLATES.inference, TEMPLATES.generator
    labels = [
        *(inference.history_heading, inference.query_heading, inference.closing_cue, inference.title_label),
        *(generator.history_heading, generator.query_heading, generator.closing_cue, generator.title_label),
        *(Pair("", "a", "b").as_item().text, TEMPLATES.instruction),
    ]
    words = dict.fromkeys(word for text in [*labels, *all_texts()] for word in text.split())
    known = {word: place for place, word in enumerate([PADDING, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, unk_token=UNKNOWN)


class Prompts:
    """The tokenizer and the prompts of both roles."""

    def __init__(self) -> None:
        self.tokenizer = build_word_tokenizer()
        self.inference = InferencePrompts(self.tokenizer, TEMPLATES, max_prompt_tokens=512)
        self.generator = GeneratorPrompts(self.tokenizer, TEMPLATES, max_length=512)


# ---- the base ---------------------------------------------------------------------------------------


def train_base(world: World, prompts: Prompts, recipe: Recipe, seed: int, progress: Progress) -> Any:
    """A model that reads and writes this world's texts."""
    size = ScratchSize(
        vocabulary=len(prompts.tokenizer),
        hidden_size=recipe.hidden_size,
        layers=recipe.layers,
        heads=recipe.hidden_size // 32,
        intermediate_size=3 * recipe.hidden_size,
        positions=1024,
    )
    end, pad = prompts.tokenizer.eos_token_id, prompts.tokenizer.pad_token_id
    model = build_model(size, seed, eos_token_id=end, pad_token_id=pad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(recipe.weight_scale)
    rng = random.Random(f"nextquill popi demo base {seed}")
    rate = recipe.base_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.base_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / _WARMUP, 2.0 * (recipe.base_steps - step) / recipe.base_steps)
        users = [_summary_example(world.train_preferences, prompts, recipe, rng) for _ in range(recipe.base_users)]
        requests = [_request_example(prompts, recipe, rng) for _ in range(recipe.base_requests)]
        read, written = _language_losses(model, users, pad)
        (read + written + _language_losses(model, requests, pad)[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        progress("base model", step + 1, recipe.base_steps)
    return model.eval()


def _summary_example(choices: Sequence[Preferences], prompts: Prompts, recipe: Recipe, rng: random.Random) -> Branch:
    """Signals of a new user, and a summary of one of the three kinds."""
    pairs = draw_pairs(rng.choice(choices), recipe.signals, rng)
    shares = {"bland": recipe.bland_share, "chosen": recipe.chosen_share, "rejected": recipe.rejected_share}
    (kind,) = rng.choices(list(shares), list(shares.values()))
    stated = BLAND if kind == "bland" else most_shown([getattr(pair, kind) for pair in pairs], rng)
    prompt, _ = prompts.inference.ids([pair.as_item() for pair in pairs])
    return Branch(prompt, prompts.inference.summary_ids(write_summary(rng.sample(stated, 2))))


def _request_example(prompts: Prompts, recipe: Recipe, rng: random.Random) -> Branch:
    """A query, four times in five with a summary of nobody in particular, and an answer that follows it."""
    stated = rng.sample(VALUES, 2)
    while ASPECT_OF[stated[0]] == ASPECT_OF[stated[1]]:
        stated = rng.sample(VALUES, 2)
    is_told = rng.random() < recipe.told_share
    followed = {ASPECT_OF[value]: value for value in stated if is_told and rng.random() < recipe.follow_share}
    pair = Pair(rng.choice(QUERIES), write_answer(followed, rng), "")
    return prompts.generator.branches(pair, summary=write_summary(stated) if is_told else None)[0]


def _language_losses(model: Any, branches: Sequence[Branch], pad: int) -> tuple[Tensor, Tensor]:
    """Mean nll of all tokens but the first, and of the responses' tokens."""
    input_ids, is_response = _padded(branches, pad)
    logits = model(input_ids=input_ids).logits[:, :-1]
    labels = input_ids[:, 1:]
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll[labels != pad].mean(), nll[is_response[:, 1:]].mean()


def _padded(branches: Sequence[Branch], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded on the right, where no token of interest sees it, and which are a response's."""
    width = max(branch.prompt_length + branch.response_length for branch in branches)
    input_ids = torch.full((len(branches), width), pad)
    is_response = torch.zeros(len(branches), width, dtype=torch.bool)
    for row, branch in enumerate(branches):
        ids = branch.input_tensor()
        input_ids[row, : len(ids)] = ids
        is_response[row, branch.prompt_length : len(ids)] = True
    return input_ids, is_response


# ---- POPI -------------------------------------------------------------------------------------------


class TrainedPopi:
    """The roles after training, and what was logged at each step."""

    def __init__(self, roles: Roles, history: list[dict[str, float]]) -> None:
        self.roles, self.history = roles, history


def popi_config(recipe: Recipe) -> POPIConfig:
    """What the demo asks of POPI."""
    return POPIConfig(
        beta=recipe.beta,
        group_size=recipe.group_size,
        pairs_per_user=recipe.pairs_per_user,
        signals_per_user=recipe.signals,
        kl_coef=0.0,
        max_summary_tokens=SUMMARY_TOKENS,
        max_signal_tokens=512,
        max_length=512,
        rollout_batch_size=64,
    )


def train_popi(
    base: Any, world: World, prompts: Prompts, recipe: Recipe, seed: int, folder: Path, progress: Progress
) -> TrainedPopi:
    """`POPITrainer` on a copy of the base."""
    with own_randomness(seed):
        trainer = POPITrainer(
            copy.deepcopy(base),
            _arguments(recipe, seed, folder),
            config=popi_config(recipe),
            train_dataset=[each.user for each in world.train],
            processing_class=prompts.tokenizer,
            peft_config=_lora(recipe),
            templates=TEMPLATES,
            callbacks=[_Reporter(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return TrainedPopi(trainer.roles, history)


def _arguments(recipe: Recipe, seed: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_users,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(5, recipe.steps),
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )


def _lora(recipe: Recipe) -> Any:
    from peft import LoraConfig

    rank = recipe.lora_rank
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


class _Reporter(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._progress("POPI", state.global_step, state.max_steps)


# ---- the generator of raw signals -------------------------------------------------------------------


def train_on_signals(base: Any, world: World, prompts: Prompts, recipe: Recipe, seed: int, progress: Progress) -> Any:
    """A generator that is trained with raw signals in place of summaries: as many steps, users and pairs, same loss."""
    from peft import get_peft_model

    rng = random.Random(f"nextquill popi demo signals {seed}")
    pad, loss = prompts.tokenizer.pad_token_id, popi_config(recipe).loss
    with own_randomness(seed):
        model: Any = get_peft_model(copy.deepcopy(base), _lora(recipe))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            left = (recipe.steps - step) / max(1, recipe.steps - 5)
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 5, left)
        told, plain = list[Branch](), list[Branch]()
        for each in rng.sample(world.train, recipe.batch_users):
            at = seed_of(seed, step)
            drawn = draw(each.user, num_pairs=recipe.pairs_per_user, num_signals=recipe.signals, seed=at)
            for pair in drawn.pairs:
                told += prompts.generator.branches(pair, signals=drawn.signals)
                plain += prompts.generator.branches(pair)
        with torch.no_grad():
            reference = _log_probs(base, plain, pad)
        policy = _log_probs(model, told, pad)
        lengths = torch.tensor([branch.response_length for branch in told]).view(-1, 2)
        losses = loss(policy.view(-1, 2), reference.view(-1, 2), lengths)
        slopes = torch.stack((losses.chosen_slope, losses.rejected_slope), dim=1).to(policy)
        ((slopes * policy.view(-1, 2)).sum() / len(losses.loss)).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        progress("generator of raw signals", step + 1, recipe.steps)
    return model.merge_and_unload().eval()


def _log_probs(model: Any, branches: Sequence[Branch], pad: int) -> Tensor:
    """log p(response | prompt), [branches]."""
    input_ids, is_response = _padded(branches, pad)
    logits = model(input_ids=input_ids).logits[:, :-1]
    labels = input_ids[:, 1:]
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return -(nll * is_response[:, 1:]).sum(1)


# ---- randomness, threads and warnings -------------------------------------------------------------------------


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeded global generators meanwhile: PEFT's and the Trainer's draws come from them."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread meanwhile: matrices this small gain nothing from a second, and sums have one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT asks a model for a name that transformers has deprecated; no user of the demo can do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
