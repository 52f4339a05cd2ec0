"""A small model, users and trainers for the tests of POPI's training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from nextquill.data import HistoryItem, PromptTemplate
from nextquill.popi import Pair, POPIConfig, PopiTemplates, POPITrainer, User

WORDS = ("<pad>", "</s>", "<unk>", "person", "about", "ask", "say", "red", "blue", *(f"w{i}" for i in range(16)))
TEMPLATES = PopiTemplates(
    instruction="about person",
    inference=PromptTemplate(
        order="history_first", history_heading="", query_heading="", closing_cue="say", title_label="ask ",
        text_label="", counterfactual="removal",
    ),
    generator=PromptTemplate(
        order="history_first", history_heading="about", query_heading="ask", closing_cue="say", title_label="ask ",
        text_label="", counterfactual="removal",
    ),
)  # fmt: skip
_OF_THE_TRAINER = (
    "model", "inference_model", "generator_model", "peft_config", "attention", "max_tokens", "rollouts",
    "train_dataset", "eval_dataset", "callbacks", "generator_tokenizer", "templates",
)  # fmt: skip
CONFIG: dict[str, Any] = {"group_size": 3, "pairs_per_user": 2, "signals_per_user": 2, "max_summary_tokens": 4}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def tiny_model(seed: int = 0, **options: Any) -> nn.Module:
    """A random two-layer Llama, with weights so large that prompts change its probabilities."""
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2,
        "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**sizes, **options}))
    return model.eval()  # type: ignore[no-any-return]


def make_users(count: int = 4, pairs: int = 5, items: int = 1) -> list[User]:
    """Users with one of two tastes."""
    users = []
    for number in range(count):
        likes, dislikes = ("red", "blue") if number % 2 else ("blue", "red")
        users.append(
            User(
                f"user {number}",
                tuple(
                    Pair(f"w{index} w{number}", f"{likes} w{index}", f"w{index} {dislikes} w{number}")
                    for index in range(pairs)
                ),
                tuple(HistoryItem(f"{likes} w{9 + index} w{number}") for index in range(items)),
                summary=f"{likes} person",
            )
        )
    return users


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})


def make_trainer(folder: Path | str, config: dict[str, Any] | None = None, **options: Any) -> POPITrainer:
    """A trainer of four steps with two users; `options` go to TrainingArguments and the trainer."""
    own = {name: options.pop(name) for name in _OF_THE_TRAINER if name in options}
    if "inference_model" not in own:
        own = {"model": tiny_model(), "peft_config": lora(), **own}
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    torch.manual_seed(5)  # of fresh adapters
    return POPITrainer(
        args=TrainingArguments(**{**arguments, **options}),
        config=POPIConfig(**{**CONFIG, **(config or {})}),
        processing_class=word_tokenizer(),
        **{"train_dataset": make_users(), "templates": TEMPLATES, **own},
    )


def trained_weights(trainer: POPITrainer, role: str = "") -> dict[str, Tensor]:
    """The trained tensors of one role's adapter, or of both."""
    found = {name: p.detach().clone() for name, p in trainer.roles.named_parameters() if p.requires_grad}
    return {name: p for name, p in found.items() if not role or f".{role}." in name or name.startswith(role)}


def logs_of(trainer: POPITrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "preference_loss" in entry]


def summaries_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "sampled_summaries.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
