"""The cases of suite `step`: models, and examples of one user with one history.

On a CPU the model is a Llama small enough for two cores, with a vocabulary of real size. On a GPU it has the shape of
Qwen2.5. Every example is `system + history + query + response`, and its counterfactual is `system + none + query +
response`. A user's examples differ in query and response. Lengths are those of a typical review, with a history of 8
items and a response of 300 tokens. The published code pads every pass to `padded` tokens.

`--model` replaces these cases by one: a pretrained model with LoRA on all linear layers, and the lengths of short
reasons for a verdict, with queries of different lengths. Its tokens are random too, as no figure depends on the text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nextquill.data import Branch, EncodedExample
from nextquill.errors import UnsupportedModelError
from nextquill.models.loading import load_model


@dataclass(frozen=True)
class StepModel:
    """The sizes of a model of transformers; with LoRA of rank `lora`, if that is not 0; `place` has its weights."""

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
    lora: int = 0
    place: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.layers} layers, D={self.hidden}, V={self.vocabulary}"


@dataclass(frozen=True)
class Lengths:
    """The number of tokens in each part of an example; queries differ from `query` by at most `spread`."""

    system: int
    history: int
    none: int
    query: int
    response: int
    padded: int
    spread: int = 0


@dataclass(frozen=True)
class Case:
    """A model, the lengths, the examples per optimiser step, the numbers of examples that share a row, and the losses.

    Without `losses`, all losses of `benchmarks.step_peers` take part.
    """

    model: StepModel
    lengths: Lengths
    examples: int = 8
    groups: tuple[int, ...] = (1, 4, 8)
    losses: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.model)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        own = {**values, "model": StepModel(**values["model"]), "lengths": Lengths(**values["lengths"])}
        return cls(**own | {name: tuple(values[name]) for name in ("groups", "losses")})


REVIEWS = Lengths(system=50, history=1750, none=2, query=160, response=300, padded=4097)
REASONS = Lengths(system=20, history=250, none=2, query=110, response=18, padded=512, spread=20)
SHORT = Lengths(system=4, history=24, none=2, query=6, response=10, padded=64)

#: The intermediate size is 8/3 of D, rounded up to a multiple of 64, as in Llama.
LLAMA = StepModel("Llama", "llama", 4, 256, 8, 8, 704, 32000)
QWEN = (
    StepModel("Qwen2.5-0.5B", "qwen2", 24, 896, 14, 2, 4864, 151936, "bfloat16", tied=True),
    StepModel("Qwen2.5-3B", "qwen2", 36, 2048, 16, 2, 11008, 151936, "bfloat16", tied=True),
)

_ON_GPU = (("NextQuill", "NextQuill detached", "SFT"), ("NextQuill", "SFT"))


def cases(device: torch.device, quick: bool = False) -> tuple[Case, ...]:
    """The cases for a device."""
    on_gpu = device.type == "cuda"
    # PerCE's steps cost what those of the detached loss do. The larger model's come last, if there is time.
    chosen = tuple(Case(model, REVIEWS, losses=losses) for model, losses in zip(QWEN, _ON_GPU, strict=True))
    if not on_gpu:
        chosen = (Case(LLAMA, REVIEWS),)
    return (shrunken(chosen[0]),) if quick else chosen


def pretrained_case(name: str, device: torch.device, quick: bool = False) -> Case:
    """The case of a pretrained model, by name or folder.

    Raises:
        UnsupportedModelError: it cannot be loaded, has an adapter, or its parts and sizes are not named as Llama's are.
    """
    place = str(Path(name).absolute()) if Path(name).exists() else name
    model = load_model(place)[0]
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(f"{name}: expected a model without an adapter, got one with; merge it first")
    config, parts = model.config.get_text_config(), ("model", "lm_head")
    sizes = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size",
    )  # fmt: skip
    missing = [*(part for part in parts if not hasattr(model, part)), *(s for s in sizes if not hasattr(config, s))]
    if missing:
        raise UnsupportedModelError(f"{name}: expected a model like Llama, got one without {', '.join(missing)}")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    found = StepModel(
        f"{Path(place).name}, LoRA", config.model_type, *(getattr(config, size) for size in sizes), dtype,
        tied=config.tie_word_embeddings, lora=16, place=place,
    )  # fmt: skip
    return Case(found, replace(SHORT, spread=3) if quick else REASONS, groups=(1, 8))


def shrunken(case: Case) -> Case:
    """The same architecture in float32 with random weights, so small that gradients take seconds.

    Large weights and a small vocabulary make some labels likely only with the history, so that both of NextQuill's
    weights occur.
    """
    grouped = case.model.heads // case.model.kv_heads
    small = replace(
        case.model, layers=2, hidden=64, heads=4, kv_heads=4 if grouped == 1 else 2, intermediate=96, vocabulary=24,
        dtype="float32", initializer_range=0.2, place="",
    )  # fmt: skip
    return replace(case, model=small, lengths=replace(SHORT, spread=min(3, case.lengths.spread)))


def build_model(model: StepModel, device: torch.device) -> Any:
    """The model in training mode. Its random weights are equal in every call."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        built = load_model(model.place, dtype=model.dtype)[0].to(device) if model.place else _new_model(model, device)
        if model.lora:
            from peft import LoraConfig, inject_adapter_in_model

            # LoRA's B starts at zero, which the gate cannot use: the gradient of A would be zero too.
            config = LoraConfig(
                r=model.lora, lora_alpha=2 * model.lora, target_modules="all-linear",
                init_lora_weights=bool(model.place),
            )  # fmt: skip
            inject_adapter_in_model(config, built)
        return built.train()


def _new_model(model: StepModel, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model.architecture,
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
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype))


def make_examples(case: Case) -> list[EncodedExample]:
    """One user's examples with random tokens, which are equal in every call."""
    generator, sizes = torch.Generator().manual_seed(0), case.lengths

    def ids(length: int) -> list[int]:
        return torch.randint(0, case.model.vocabulary, (length,), generator=generator).tolist()

    system, history, none = ids(sizes.system), ids(sizes.history), ids(sizes.none)
    examples = []
    for index in range(case.examples):
        offset = round(sizes.spread * (2 * index / max(1, case.examples - 1) - 1))
        query, response = ids(sizes.query + offset), ids(sizes.response)
        factual, counterfactual = Branch(system + history + query, response), Branch(system + none + query, response)
        examples.append(EncodedExample("user", index, factual, counterfactual, None, 1, 1))
    return examples
