"""The cases of suite `step`: models with random weights, and examples of one user with one history.

On a CPU the model is a Llama small enough for two cores, with a vocabulary of real size. On a GPU it has the shape of
Qwen2.5. Every example is `system + history + query + response`, and its counterfactual is `system + none + query +
response`. A user's examples differ in query and response. Lengths are those of a typical review, with a history of 8
items and a response of 300 tokens. The published code pads every pass to `padded` tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nextquill.data import Branch, EncodedExample


@dataclass(frozen=True)
class StepModel:
    """The sizes of a model of transformers."""

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    dtype: str = "float32"
    tied: bool = False
    initializer_range: float = 0.02

    def __str__(self) -> str:
        return f"{self.name}: {self.layers} layers, D={self.hidden}, V={self.vocabulary}"


@dataclass(frozen=True)
class Lengths:
    """The number of tokens in each part of an example."""

    system: int
    history: int
    none: int
    query: int
    response: int
    padded: int


@dataclass(frozen=True)
class Case:
    """A model, the lengths, the examples per optimiser step, and the numbers of examples that share a row."""

    model: StepModel
    lengths: Lengths
    examples: int = 8
    groups: tuple[int, ...] = (1, 4, 8)

    def __str__(self) -> str:
        return str(self.model)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        return cls(
            StepModel(**values["model"]), Lengths(**values["lengths"]), values["examples"], tuple(values["groups"])
        )


REVIEWS = Lengths(system=50, history=1750, none=2, query=160, response=300, padded=4097)
SHORT = Lengths(system=4, history=24, none=2, query=6, response=10, padded=64)

#: The intermediate size is 8/3 of D, rounded up to a multiple of 64, as in Llama.
LLAMA = StepModel("Llama", "llama", 4, 256, 8, 8, 704, 32000)
QWEN = (
    StepModel("Qwen2.5-0.5B", "qwen2", 24, 896, 14, 2, 4864, 151936, "bfloat16", tied=True),
    StepModel("Qwen2.5-3B", "qwen2", 36, 2048, 16, 2, 11008, 151936, "bfloat16", tied=True),
)


def cases(device: torch.device, quick: bool = False) -> tuple[Case, ...]:
    """The cases for a device."""
    models = QWEN if device.type == "cuda" else (LLAMA,)
    return (shrunken(Case(models[0], REVIEWS)),) if quick else tuple(Case(model, REVIEWS) for model in models)


def shrunken(case: Case) -> Case:
    """The same architecture in float32, so small that gradients take seconds.

    Large weights and a small vocabulary make some labels likely only with the history, so that both of NextQuill's
    weights occur.
    """
    grouped = case.model.heads // case.model.kv_heads
    small = replace(
        case.model, layers=2, hidden=64, heads=4, kv_heads=4 if grouped == 1 else 2, intermediate=96, vocabulary=24,
        dtype="float32", initializer_range=0.2,
    )  # fmt: skip
    return replace(case, model=small, lengths=SHORT)


def build_model(model: StepModel, device: torch.device) -> Any:
    """The model with random weights, which are equal in every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[model.architecture](
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=8192,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype)).train()


def make_examples(case: Case) -> list[EncodedExample]:
    """One user's examples with random tokens, which are equal in every call."""
    generator, sizes = torch.Generator().manual_seed(0), case.lengths

    def ids(length: int) -> list[int]:
        return torch.randint(0, case.model.vocabulary, (length,), generator=generator).tolist()

    system, history, none = ids(sizes.system), ids(sizes.history), ids(sizes.none)
    examples = []
    for index in range(case.examples):
        query, response = ids(sizes.query), ids(sizes.response)
        factual, counterfactual = Branch(system + history + query, response), Branch(system + none + query, response)
        examples.append(EncodedExample("user", index, factual, counterfactual, None, 1, 1))
    return examples
