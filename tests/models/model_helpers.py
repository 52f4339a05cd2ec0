"""Tiny models, tokenizers, records and plain references that tests of models, training and evaluation share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedTokenizerFast, TrainingArguments

from nextquill import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss
from nextquill.data import Branch, EncodedExample, PromptTemplate
from nextquill.models.branch_passes import PairPasses
from nextquill.outputs import PairNLL, PreferenceLossOutput
from nextquill.reference import clip_weights, exp_clip_weights, pair_loss, threshold_weights
from nextquill.reference.linear import token_nll
from nextquill.training.trainer import NextQuillTrainer

VOCABULARY = 96
TEMPLATE = PromptTemplate(
    history_heading="past", query_heading="", closing_cue="write", title_label="", text_label="", empty_history="none"
)
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Large enough that a random model's probabilities differ between the branches.
    "initializer_range": 0.3,
}
#: Marks tests of layers with a state inside trees.
shares_states = pytest.mark.skipif(
    not hasattr(Cache, "get_conv_state"), reason="before transformers 5.21 such models are padded"
)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> nn.Module:
    """A random two-layer model of `kind` in eval mode."""
    implementation = options.pop("attn_implementation", "eager" if kind.startswith("gemma") else "sdpa")
    config = AutoConfig.for_model(kind, **{**_SIZES, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # initialised to zero, which would hide a bias that is not used
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ---- examples --------------------------------------------------------------------------------------


def random_examples(
    count: int = 3, seed: int = 0, vocabulary: int = VOCABULARY, shared: int = 0
) -> list[EncodedExample]:
    """Examples of different lengths with random tokens and a placebo; factual branches share their first tokens."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(rng.randint(low, high))]

    examples, prefix = [], ids(shared, shared)
    for index in range(count):
        query, response = ids(2, 4), ids(1, 9)
        factual, placebo = Branch(prefix + ids(3, 12) + query, response), Branch(ids(3, 12) + query, response)
        examples.append(EncodedExample(f"user{index}", index, factual, Branch(query, response), placebo, 1, 1))
    return examples


def shared_examples(count: int = 6, seed: int = 0, users: int = 2) -> list[EncodedExample]:
    """Examples of different lengths, of users in turn, with one system prompt, histories of 7 tokens and two queries.

    So a tree forks after the system prompt, after each history, and inside responses to one query that begin alike.
    """
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(count)]

    system, histories, queries, first = ids(3), [ids(7) for _ in range(users)], [ids(3), ids(3)], ids(1)
    examples = []
    for index in range(count):
        user, query, response = index % users, queries[index // users % 2], first + ids(rng.randint(0, 5))
        factual, counterfactual, placebo = (
            Branch(system + history + query, response) for history in (histories[user], [], histories[user - 1])
        )
        examples.append(EncodedExample(f"user{user}", index, factual, counterfactual, placebo, 1, 1))
    return examples


def run_loss(
    model: nn.Module, loss: PairLoss, examples: Sequence[EncodedExample], attention: str = "auto"
) -> tuple[Tensor, PreferenceLossOutput]:
    """The loss of one batch in one part, with its graph, and its diagnostics."""
    passes = PairPasses(model, loss, attention)
    value, outputs = passes.training_loss(passes.collator()(examples))
    return value, outputs[0]


def word_tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word, and `extra` unused words."""
    words = ["<pad>", "</s>", "<unk>", "past", "write", "none", *(f"w{i}" for i in range(80 + extra))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def make_records(count: int = 12, users: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Records of different lengths, whose responses repeat words of the user's history."""
    rng = random.Random(seed)

    def text(first: int, low: int, high: int) -> str:
        return " ".join(f"w{first + rng.randrange(10)}" for _ in range(rng.randint(low, high)))

    records = []
    for index in range(count):
        user = index % users
        own = 10 * (1 + user % 7)
        history = [text(own, 2, 5) for _ in range(rng.randint(1, 3))]
        records.append({"user_id": f"u{user}", "query": text(0, 1, 3), "history": history, "response": text(own, 1, 8)})
    return records


# ---- trainers --------------------------------------------------------------------------------------


def make_args(folder: Any, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **options})


def make_trainer(
    folder: Any, loss: PairLoss | None = None, model: nn.Module | None = None, **options: Any
) -> NextQuillTrainer:
    """A trainer of a tiny llama on `make_records()`. Options unknown to NextQuillTrainer go to its arguments."""
    names = (
        "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers", "max_length", "attention",
        "max_tokens", "examples_per_user",
    )  # fmt: skip
    given = {name: options.pop(name) for name in names if name in options}
    trainer_options = {"train_dataset": make_records(), "processing_class": word_tokenizer(), **given}
    return NextQuillTrainer(
        model=tiny_model() if model is None else model,
        args=make_args(folder, **options),
        loss=NextQuillLoss(detach_counterfactual=True, threshold=0.0) if loss is None else loss,
        template=TEMPLATE,
        **trainer_options,
    )


def logs_of(trainer: NextQuillTrainer) -> list[dict[str, float]]:
    """The log history without values that depend on the clock, on sharing, or on a resume."""
    timing = ("runtime", "_per_second", "total_flos", "preparation_time", "train_loss", "sharing_factor")
    return [{k: v for k, v in log.items() if not k.endswith(timing)} for log in trainer.state.log_history]


def parameters(trainer: NextQuillTrainer) -> dict[str, Tensor]:
    """Copies of the model's parameters."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# ---- references ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """A loss and its reference functions."""

    loss: PairLoss
    weights: Callable[[PairNLL], Tensor]
    options: dict[str, Any]


def _threshold(pair: PairNLL) -> Tensor:
    return threshold_weights(pair, 0.0, 0.9, 0.1)


def loss_cases(**common: Any) -> dict[str, LossCase]:
    """Every published objective with its reference. With threshold 0, a random model has tokens on both sides."""

    def nextquill(**options: Any) -> LossCase:
        loss = NextQuillLoss(threshold=0.0, alpha=0.3, **options, **common)
        return LossCase(loss, _threshold, {"normalize_weights": True, "alpha": 0.3, **options})

    plain = {"normalize_weights": False}
    return {
        "sft": LossCase(SFTLoss(**common), lambda pair: torch.ones_like(pair.factual), plain),
        "perce": LossCase(PerCELoss(0.1, 2.0, **common), lambda pair: clip_weights(pair, 0.1, 2.0), plain),
        "longce": LossCase(LongCELoss(2.0, **common), lambda pair: exp_clip_weights(pair, 2.0), plain),
        "official": nextquill(),
        "paper": nextquill(weighted_effect=True),
        "detached": nextquill(detach_counterfactual=True),
        "anchored": nextquill(anchor=0.2),
    }


def branch_rows(branch: Branch) -> slice:
    """The positions that predict the response."""
    return slice(len(branch.prompt_ids) - 1, len(branch.input_ids) - 1)


def model_logits(model: nn.Module, branch: Branch) -> Tensor:
    """The model's own logits [n, V] of one unpadded branch at the predicting positions."""
    return model(input_ids=torch.tensor([branch.input_ids]), use_cache=False).logits[0, branch_rows(branch)]


def branch_nll(model: nn.Module, branch: Branch) -> Tensor:
    return token_nll(model_logits(model, branch), torch.tensor(branch.response_ids))


def reference_pair_loss(
    case: LossCase,
    z1: Sequence[Tensor],
    z0: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    reduction: str = "sequence",
) -> Tensor:
    """The loss of given logits per example, with an identity as the head."""
    first, second, y = torch.cat(list(z1)), torch.cat(list(z0)), torch.tensor([i for ids in labels for i in ids])
    ids = torch.tensor([index for index, own in enumerate(labels) for _ in own])
    pair = PairNLL(token_nll(first, y), token_nll(second, y), None)
    identity = torch.eye(first.shape[1], dtype=first.dtype)
    weights = case.weights(pair).detach()
    return pair_loss(
        first, second, identity, y, token_weights=weights, sequence_ids=ids, reduction=reduction, **case.options
    )


def reference_loss(
    case: LossCase, model: nn.Module, examples: Sequence[EncodedExample], reduction: str = "sequence"
) -> Tensor:
    """The loss from separate unpadded passes, through the model's own logits."""
    return reference_pair_loss(
        case,
        [model_logits(model, example.factual) for example in examples],
        [model_logits(model, example.counterfactual) for example in examples],
        [example.factual.response_ids for example in examples],
        reduction,
    )


def assert_same_loss(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    got, expected = got.detach(), expected.detach()
    error = float((got - expected).abs() / expected.abs())
    assert error <= tolerance, f"the loss is {float(got)}, expected {float(expected)}: relative error {error:.2e}"


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Compare tensors by their relative errors; if a norm is nearly zero, the largest norm replaces it."""
    assert got.keys() == expected.keys(), f"{what}: not the same parameters: {sorted(got.keys() ^ expected.keys())}"
    floor = 1e-3 * max(float(tensor.norm()) for tensor in expected.values())
    for name, want in expected.items():
        error = float((got[name] - want).norm()) / max(float(want.norm()), floor)
        assert error <= tolerance, f"{what} of {name}: relative error {error:.2e} > {tolerance:.0e}"
