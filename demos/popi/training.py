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
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from demos.kit.progress import Progress
from demos.kit.training import MAX_GRAD_NORM, Learner, build_base, own_randomness
from demos.popi.recipe import PopiRecipe
from demos.popi.world import (
    ASPECT_OF,
    BLAND,
    QUERIES,
    VALUES,
    Preferences,
    PreferenceWorld,
    all_texts,
    draw_pairs,
    most_shown,
    write_answer,
    write_summary,
)
from nextquill.data import Branch, PromptTemplate
from nextquill.models.tiny_models import ScratchSize
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import Roles
from nextquill.popi.trainer import POPITrainer
from nextquill.popi.users import Pair, draw
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
_WARMUP = 20


def build_word_tokenizer() -> Any:
    """One token a word; white space is not kept, and a text reads back with single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = list[str]()
    for each in (TEMPLATES.inference, TEMPLATES.generator):
        texts += [each.history_heading, each.query_heading, each.closing_cue, each.title_label]
    texts += [Pair("", "a", "b").as_item().text, TEMPLATES.instruction, *all_texts()]
    words = dict.fromkeys(word for text in texts for word in text.split())
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


def train_base(world: PreferenceWorld, prompts: Prompts, recipe: PopiRecipe, seed: int, progress: Progress) -> Any:
    """A model that reads and writes this world's texts."""
    tokenizer, width = prompts.tokenizer, recipe.hidden_size
    size = ScratchSize(len(tokenizer), width, recipe.layers, width // 32, intermediate_size=3 * width, positions=1024)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = build_base(size, seed, weight_scale=recipe.weight_scale, eos_token_id=end, pad_token_id=pad)
    learner = Learner(model.parameters(), recipe.base_learning_rate)
    rng = random.Random(f"nextquill popi demo base {seed}")
    for step in range(recipe.base_steps):
        users = [_summary_example(world.train_preferences, prompts, recipe, rng) for _ in range(recipe.base_users)]
        requests = [_request_example(prompts, recipe, rng) for _ in range(recipe.base_requests)]
        nll, is_token, is_summary = _nll(model, users, pad)
        answers, _, is_answer = _nll(model, requests, pad)
        loss = nll[is_token].mean() + nll[is_summary].mean() + answers[is_answer].mean()
        learner.step(loss, min(1.0, (step + 1) / _WARMUP, 2.0 * (recipe.base_steps - step) / recipe.base_steps))
        progress("base model", step + 1, recipe.base_steps)
    return model.eval()


def _summary_example(
    choices: Sequence[Preferences], prompts: Prompts, recipe: PopiRecipe, rng: random.Random
) -> Branch:
    """Signals of a new user, and a summary of one of the three kinds."""
    pairs = draw_pairs(rng.choice(choices), recipe.signals, rng)
    shares = {"bland": recipe.bland_share, "chosen": recipe.chosen_share, "rejected": recipe.rejected_share}
    (kind,) = rng.choices(list(shares), list(shares.values()))
    stated = BLAND if kind == "bland" else most_shown([getattr(pair, kind) for pair in pairs], rng)
    prompt, _ = prompts.inference.ids([pair.as_item() for pair in pairs])
    return Branch(prompt, prompts.inference.summary_ids(write_summary(rng.sample(stated, 2))))


def _request_example(prompts: Prompts, recipe: PopiRecipe, rng: random.Random) -> Branch:
    """A query, four times in five with a summary of nobody in particular, and an answer that follows it."""
    stated = rng.sample(VALUES, 2)
    while ASPECT_OF[stated[0]] == ASPECT_OF[stated[1]]:
        stated = rng.sample(VALUES, 2)
    is_told = rng.random() < recipe.told_share
    followed = {ASPECT_OF[value]: value for value in stated if is_told and rng.random() < recipe.follow_share}
    pair = Pair(rng.choice(QUERIES), write_answer(followed, rng), "")
    return prompts.generator.branches(pair, summary=write_summary(stated) if is_told else None)[0]


def _nll(model: Any, branches: Sequence[Branch], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nll of every token but the first; which of them are tokens, not padding; and which a response's: [B, T − 1].

    Rows are padded on the right, where no token of interest sees it.
    """
    texts = [branch.input_tensor() for branch in branches]
    input_ids = pad_sequence(texts, batch_first=True, padding_value=pad)
    marks = [torch.arange(len(text)) >= each.prompt_length for text, each in zip(texts, branches, strict=True)]
    logits, labels = model(input_ids=input_ids).logits[:, :-1], input_ids[:, 1:]
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll, labels != pad, pad_sequence(marks, batch_first=True)[:, 1:]


# ---- POPI -------------------------------------------------------------------------------------------


def popi_config(recipe: PopiRecipe) -> POPIConfig:
    """The settings that the demo gives to POPI."""
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
    base: Any, world: PreferenceWorld, prompts: Prompts, recipe: PopiRecipe, seed: int, progress: Progress
) -> tuple[Roles, list[dict[str, float]]]:
    """`POPITrainer` on a copy of the base: the roles, and what was logged at each step."""
    with tempfile.TemporaryDirectory() as folder, own_randomness(seed):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_users,
            learning_rate=recipe.learning_rate,
            warmup_steps=min(5, recipe.steps),
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = POPITrainer(
            copy.deepcopy(base),
            arguments,
            config=popi_config(recipe),
            train_dataset=[each.user for each in world.train],
            processing_class=prompts.tokenizer,
            peft_config=_lora(recipe),
            templates=TEMPLATES,
            callbacks=[_Reporter(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.roles, [entry for entry in trainer.state.log_history if "reward" in entry]


def _lora(recipe: PopiRecipe) -> Any:
    from peft import LoraConfig

    rank = recipe.lora_rank
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


class _Reporter(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._progress("POPI", state.global_step, state.max_steps)


# ---- the generator of raw signals -------------------------------------------------------------------


def train_on_signals(
    base: Any, world: PreferenceWorld, prompts: Prompts, recipe: PopiRecipe, seed: int, progress: Progress
) -> Any:
    """A generator that is trained with raw signals in place of summaries: as many steps, users and pairs, same loss."""
    from peft import get_peft_model

    rng = random.Random(f"nextquill popi demo signals {seed}")
    pad, preference_loss = prompts.tokenizer.pad_token_id, popi_config(recipe).loss
    with own_randomness(seed):
        model: Any = get_peft_model(copy.deepcopy(base), _lora(recipe))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner = Learner(trained, recipe.learning_rate, betas=(0.9, 0.999))
    for step in range(recipe.steps):
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
        losses = preference_loss(policy, reference, lengths)
        slopes = torch.stack((losses.chosen_slope, losses.rejected_slope), dim=1).to(policy)
        left = (recipe.steps - step) / max(1, recipe.steps - 5)
        learner.step((slopes * policy).sum() / len(policy), min(1.0, (step + 1) / 5, left))
        progress("generator of raw signals", step + 1, recipe.steps)
    return model.merge_and_unload().eval()


def _log_probs(model: Any, branches: Sequence[Branch], pad: int) -> Tensor:
    """log p(response | prompt), [pairs, 2]."""
    nll, _, is_response = _nll(model, branches, pad)
    return -(nll * is_response).sum(1).view(-1, 2)
