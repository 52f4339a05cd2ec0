"""The two models of POPI: one that infers a summary, one that generates with it.

    shared      one base model with two LoRA adapters, "inference" and "generator" (the default)
    separate    two models, each whole, or with an adapter of its own

Each role also has what it was at the start, which the preference loss and the KL term refer to: for a fresh adapter the
model without it, for a frozen role itself, else a frozen copy, of the adapter where that is all that is trained.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextquill.errors import ArgumentError, CheckpointError
from nextquill.models.configs import is_adapter
from nextquill.models.loading import load_model
from nextquill.popi.adapters import check_trainable, initial_adapter, is_lora, switched, with_adapters
from nextquill.popi.role_files import base_digest, check_base, load_role, place_of, save_separate, tokenizer_of
from nextquill.storage.atomic_files import write_whole

INFERENCE, GENERATOR = "inference", "generator"
ROLES = (INFERENCE, GENERATOR)
ROLES_FILE, BASE = "popi.json", "base"
_FORMAT = 1


class Role:
    """One of the two models, as it is and as it was.

    Args:
        name: "inference" or "generator".
        model: the model, which the other role may share.
        tokenizer: its tokenizer.
        adapter: the adapter that makes the model this role; None where there is none to switch.
        initial: what it was: a model, the name of an adapter, or None for the model without adapters.
        frozen: it is not trained.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        adapter: str | None,
        initial: nn.Module | str | None,
        *,
        frozen: bool,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.adapter, self.frozen = adapter, frozen
        self._initial = initial

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model as this role, for the length of the block."""
        with nullcontext() if self.adapter is None else switched(self.model, self.adapter):
            yield self.model

    @contextmanager
    def initial(self) -> Iterator[Any]:
        """The model as this role was at the start; without gradient."""
        with torch.no_grad():
            if isinstance(self._initial, nn.Module):
                # A Trainer moves the model, and knows nothing of what it was.
                yield self._initial.to(next(self.model.parameters()).device)
            else:
                with switched(self.model, self._initial):
                    yield self.model

    @classmethod
    def untrained(cls, name: str, model: Any, tokenizer: Any) -> Role:
        """A model that no training has touched, adapters and all: it is what it was."""
        return cls(name, model, tokenizer, None, model, frozen=True)

    def against(self, reference: nn.Module) -> Role:
        """The same model, with another one for what it was."""
        return Role(self.name, self.model, self.tokenizer, self.adapter, reference, frozen=self.frozen)

    @property
    def is_what_it_was(self) -> bool:
        """Whether there is no other model to hold it against."""
        return self._initial is self.model or (self.adapter is not None and self._initial == self.adapter)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of this role."""
        if self.frozen:
            return []
        own = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return [p for name, p in own if self.adapter is None or f".{self.adapter}." in name]


class Roles(nn.Module):
    """Both roles as one module, whose parameters an optimizer can have. Made by `shared`, `separate` or `load`."""

    def __init__(self, inference: Role, generator: Role) -> None:
        super().__init__()
        self.inference, self.generator = inference, generator
        self.models = nn.ModuleList([inference.model])
        if generator.model is not inference.model:
            self.models.append(generator.model)

    @property
    def is_shared(self) -> bool:
        """Whether both are adapters of one model."""
        return len(self.models) == 1

    def __iter__(self) -> Iterator[Role]:
        return iter((self.inference, self.generator))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As the models', for a Trainer."""
        for model in self.models:
            model.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same for transformers before 5.20 or so."""
        for model in self.models:
            model.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def forward(self, *_: Any, **__: Any) -> None:
        """Not to be called: each role runs by itself."""
        raise NotImplementedError("run a role's own model: with roles.generator.active() as model")

    # ---- making ------------------------------------------------------------------------------------

    @classmethod
    def shared(
        cls,
        model: Any,
        tokenizer: Any,
        peft_config: Any = None,
        *,
        freeze_inference: bool = False,
        freeze_generator: bool = False,
    ) -> Roles:
        """Two adapters of one base model.

        Args:
            model: a causal language model without adapters, which gets two fresh ones; or a PEFT model that has
                "inference" and "generator", which are gone on with.
            tokenizer: its tokenizer.
            peft_config: a LoRA config for fresh adapters; by default rank 16 on all linear layers but the head.
            freeze_inference, freeze_generator: leave a role as it is.

        Raises:
            ArgumentError: the model has other adapters or a config as well, or the config has dropout, is not of LoRA,
                or would train or change more than an adapter.
        """
        frozen = {INFERENCE: freeze_inference, GENERATOR: freeze_generator}
        initial: dict[str, str | None] = {name: name if frozen[name] else None for name in ROLES}
        if is_adapter(model):
            if peft_config is not None:
                raise ArgumentError("peft_config: expected None with a model that has its adapters already")
            if missing := [name for name in ROLES if name not in model.peft_config]:
                raise ArgumentError(
                    f"model: expected a model without adapters, or one with the adapters {INFERENCE} and {GENERATOR}, "
                    f"got {sorted(model.peft_config)} without {missing[0]}; merge_and_unload() makes an adapter a part "
                    "of its model, which is to be saved and loaded from there"
                )
            for name in ROLES:
                check_trainable(model.peft_config[name])
                if not is_lora(model.peft_config[name]):
                    raise ArgumentError(f"model: expected LoRA adapters, got {model.peft_config[name].peft_type}")
                if not frozen[name]:
                    initial[name] = initial_adapter(model, name)
        else:
            model = with_adapters(model, peft_config, ROLES, [name for name in ROLES if frozen[name]])
        for name, parameter in model.named_parameters():
            owner = next((role for role in ROLES if f".{role}." in name), None)
            parameter.requires_grad_(owner is not None and "lora_" in name and not frozen[owner])
        made = [Role(name, model, tokenizer, name, initial[name], frozen=frozen[name]) for name in ROLES]
        return cls(*made)

    @classmethod
    def separate(
        cls,
        inference_model: Any,
        generator_model: Any,
        inference_tokenizer: Any,
        generator_tokenizer: Any = None,
        *,
        freeze_inference: bool = False,
        freeze_generator: bool = False,
    ) -> Roles:
        """Two models; what is trained of each is what wants a gradient, and what it was is a copy of it.

        Args:
            inference_model, generator_model: causal language models, with one adapter or none.
            inference_tokenizer, generator_tokenizer: theirs; by default the same one.
            freeze_inference, freeze_generator: leave a model as it is.

        Raises:
            ArgumentError: both are one model, or a model has several adapters or dropout in one.
        """
        if inference_model is generator_model:
            raise ArgumentError("generator_model: expected another model than inference_model; one model has adapters")
        tokenizers = (inference_tokenizer, generator_tokenizer or inference_tokenizer)
        roles = []
        for name, model, tokenizer, frozen in zip(
            ROLES, (inference_model, generator_model), tokenizers, (freeze_inference, freeze_generator), strict=True
        ):
            configs = getattr(model, "peft_config", {})
            if len(configs) > 1:
                raise ArgumentError(f"{name}_model: expected at most one adapter, got {sorted(configs)}")
            for config in configs.values():
                check_trainable(config)
            if frozen:
                model.requires_grad_(False)
            adapter = next((each for each, config in configs.items() if is_lora(config)), None)
            initial: Any
            if frozen:
                initial = model if adapter is None else adapter
            elif adapter is not None and _trains_alone(model, adapter):
                initial = initial_adapter(model, adapter)
            else:
                initial = copy.deepcopy(model).requires_grad_(False).eval()
            roles.append(Role(name, model, tokenizer, adapter, initial, frozen=frozen))
        return cls(*roles)

    # ---- files -------------------------------------------------------------------------------------

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write both roles and `popi.json`; of adapters the adapters alone.

        Args:
            folder: shared adapters go to `inference/` and `generator/` in it, separate models too.
            settings: what else a reader needs, under the key "settings"; JSON.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for role in self:
            if not self.is_shared:
                save_separate(role, folder / role.name)
            else:  # PEFT puts an adapter into a folder of its name
                role.model.save_pretrained(folder, selected_adapters=[role.name], save_embedding_layers=False)
            role.tokenizer.save_pretrained(folder / role.name)
        header: dict[str, Any] = {
            "nextquill_popi": _FORMAT,
            "shared": self.is_shared,
            "base_model": None,
            "settings": settings,
        }
        if self.is_shared:
            header["base_model"] = self._save_base(folder)
            header["base_digest"] = base_digest(self.inference.model.get_base_model())
        write_whole(folder / ROLES_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")

    def _save_base(self, folder: Path) -> str:
        """Where the base of shared adapters is: where it came from, or, of a model that is new, in the folder."""
        base = self.inference.model.get_base_model()
        name = str(getattr(base, "name_or_path", "") or "")
        if name:
            return place_of(name)
        whole = {
            key.replace(".base_layer", ""): value for key, value in base.state_dict().items() if "lora_" not in key
        }
        base.save_pretrained(folder / BASE, state_dict=whole)
        self.inference.tokenizer.save_pretrained(folder / BASE)
        return BASE

    def load_weights(self, folder: Path) -> None:
        """Take over the weights that `save` wrote of these same roles.

        Raises:
            CheckpointError: a role's weights are missing there, or are others'.
        """
        check_roles(folder)
        for role in self:
            if not role.frozen:
                load_role(role, folder / role.name)

    @classmethod
    def load(cls, folder: str | Path, *, base_model: Any = None, dtype: str = "auto") -> Roles:
        """The roles that a run has saved, frozen. What they were is the model without their adapters, if they have any.

        Args:
            folder: of `save`.
            base_model: the base of shared adapters, where it is at hand already.
            dtype: as `load_model`'s.

        Raises:
            CheckpointError: it is no folder of POPI, an adapter is missing, or the base model is not the one they were
                trained on.
            UnsupportedModelError: the base model cannot be loaded.
        """
        from peft import PeftModel

        folder = Path(folder)
        header = check_roles(folder)
        if not header["shared"]:
            (inference, first), (generator, second) = (load_model(str(folder / name), dtype=dtype) for name in ROLES)
            roles = cls.separate(inference, generator, first, second, freeze_inference=True, freeze_generator=True)
            return roles._begun_without_adapters()
        tokenizer = None
        if base_model is None:
            name = header["base_model"]
            base_model, tokenizer = load_model(str(folder / BASE) if name == BASE else name, dtype=dtype)
        check_base(folder, header, base_model)
        tokenizer = tokenizer_of(folder / INFERENCE) or tokenizer
        model: Any = PeftModel.from_pretrained(base_model, str(folder / INFERENCE), adapter_name=INFERENCE)
        model.load_adapter(str(folder / GENERATOR), adapter_name=GENERATOR)
        return cls.shared(model, tokenizer, freeze_inference=True, freeze_generator=True)._begun_without_adapters()

    def _begun_without_adapters(self) -> Roles:
        for role in self:
            if role.adapter is not None:
                role._initial = None
        return self


def check_roles(folder: Path) -> dict[str, Any]:
    """The header of a folder of `Roles.save`, whose parts are there.

    Raises:
        CheckpointError: it is none, or a part is missing.
    """
    path = folder / ROLES_FILE
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = header["nextquill_popi"] == _FORMAT and {"shared", "settings"} <= header.keys()
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a folder that POPI has written, with a {ROLES_FILE}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or not POPI's") from error
    if not known:
        raise CheckpointError(f"{path}: expected format {_FORMAT}, got {header['nextquill_popi']}")
    for name in ROLES:
        weights = [*(folder / name).glob("*.safetensors"), *(folder / name).glob("*.bin")]
        if not weights:
            what = "adapter" if header["shared"] else "model"
            raise CheckpointError(f"{folder / name}: the {name} {what} is missing: there are no weights in it")
    return header


def _trains_alone(model: Any, adapter: str) -> bool:
    """Whether a model's adapter is all that is trained of it."""
    return all(f".{adapter}." in name and "lora_" in name for name, p in model.named_parameters() if p.requires_grad)
