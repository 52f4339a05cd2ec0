"""The two models of POPI and their files: one model infers a summary, the other generates with it.

    shared      one base model with two LoRA adapters, "inference" and "generator" (the default)
    separate    two models, each whole, or with an adapter of its own

Each role also has an initial model, its state before training, which the preference loss and the KL term refer to. It
is the model without the adapter for a fresh adapter, the role itself for a frozen one, and else a frozen copy. The copy
holds only the adapter if nothing else is trained.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import ArgumentError, CheckpointError
from nextquill.models.border import reading
from nextquill.models.configs import is_adapter
from nextquill.models.loading import Loading, load_model, load_tokenizer
from nextquill.models.pretrained import from_pretrained
from nextquill.popi.adapters import check_trainable, initial_adapter, is_lora, switched, with_adapters
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.input_files import real_path
from nextquill.storage.json_files import read_json
from nextquill.storage.manifests import damage, has_manifest, write_manifest

INFERENCE, GENERATOR = "inference", "generator"
ROLES = (INFERENCE, GENERATOR)
ROLES_FILE, BASE = "popi.json", "base"
#: What a run's manifest lists; the settings in `popi.json` may be edited.
_SAVED = (*ROLES, BASE)
_FORMAT = 1
# The number of values of each base weight that go into the base's digest.
_SAMPLED_VALUES = 64


@dataclass(eq=False)
class Role:
    """One of the two models, with its initial state.

    Args:
        model: the model, which the other role may share.
        adapter: the adapter that makes the model this role; None if there is none to switch.
        initial_state: a model, the name of an adapter, or None for the model without adapters.
        frozen: whether the role stays as it is.
    """

    name: str
    model: Any
    tokenizer: Any
    adapter: str | None
    initial_state: nn.Module | str | None
    frozen: bool = field(kw_only=True)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Give the model as this role, within the block."""
        with nullcontext() if self.adapter is None else switched(self.model, self.adapter):
            yield self.model

    @contextmanager
    def initial(self) -> Iterator[Any]:
        """Give the model in this role's initial state, without gradient, within the block."""
        with torch.no_grad():
            if isinstance(self.initial_state, nn.Module):
                yield self.initial_state
            else:
                with switched(self.model, self.initial_state):
                    yield self.model

    @classmethod
    def untrained(cls, name: str, model: Any, tokenizer: Any) -> Role:
        """Make a role of a model as it is, adapters included; it is its own initial state."""
        return cls(name, model, tokenizer, None, model, frozen=True)

    def against(self, reference: nn.Module) -> Role:
        """Return this role with another model as its initial state."""
        return replace(self, initial_state=reference)

    @property
    def is_what_it_was(self) -> bool:
        """Whether the role is its own initial state, so that there is nothing to compare it with."""
        return self.initial_state is self.model or (self.adapter is not None and self.initial_state == self.adapter)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of this role."""
        if self.frozen:
            return []
        own = "" if self.adapter is None else f".{self.adapter}."
        return [p for name, p in self.model.named_parameters() if p.requires_grad and own in name]


class Roles(nn.Module):
    """Both roles as one module, for an optimizer. Use `shared`, `separate` or `load` to make it."""

    def __init__(self, inference: Role, generator: Role) -> None:
        super().__init__()
        self.inference, self.generator = inference, generator
        self.models = nn.ModuleList(dict.fromkeys((inference.model, generator.model)))  # a shared model once
        copies = [each for role in self if isinstance(each := role.initial_state, nn.Module) and each is not role.model]
        self.initial_models = nn.ModuleList(copies)  # so that a Trainer moves and shards them too

    @property
    def is_shared(self) -> bool:
        """Whether both roles are adapters of one model."""
        return len(self.models) == 1

    def __iter__(self) -> Iterator[Role]:
        return iter((self.inference, self.generator))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Enable it in all models; a Trainer calls this."""
        for model in self.models:
            model.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Enable it in all models; for transformers before 5.20 or so."""
        for model in self.models:
            model.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def forward(self, *_: Any, **__: Any) -> None:
        """Raise an error, as each role runs by itself."""
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
        """Make two adapters of one base model.

        Args:
            model: a causal language model without adapters, which gets two fresh ones; or a PEFT model with the
                adapters "inference" and "generator", which are trained further.
            tokenizer: its tokenizer.
            peft_config: the LoRA config of fresh adapters; by default rank 16 on all linear layers except the head.
            freeze_inference, freeze_generator: whether a role stays as it is.

        Raises:
            ArgumentError: the model has other adapters; it has adapters and a config was given; or the config has
                dropout, is not LoRA, or would train or change more than an adapter.
        """
        frozen = {INFERENCE: freeze_inference, GENERATOR: freeze_generator}
        initial: dict[str, str | None] = {name: name if frozen[name] else None for name in ROLES}
        if is_adapter(model):
            if peft_config is not None:
                raise ArgumentError("peft_config: expected None with a model that has its adapters already")
            if missing := [name for name in ROLES if name not in model.peft_config]:
                raise ArgumentError(
                    f"model: expected a model without adapters, or one with the adapters {INFERENCE} and {GENERATOR}, "
                    f"got {sorted(model.peft_config)} without {missing[0]}; merge the adapter with merge_and_unload(), "
                    "save the model and load it from there"
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
        """Make a role of each of two models. The parameters that require a gradient are trained.

        Args:
            inference_model, generator_model: causal language models with at most one adapter.
            inference_tokenizer, generator_tokenizer: their tokenizers; by default one for both.
            freeze_inference, freeze_generator: whether a model stays as it is.

        Raises:
            ArgumentError: both are the same model, or a model has several adapters or an adapter with dropout.
        """
        if inference_model is generator_model:
            raise ArgumentError(
                "generator_model: expected another model than inference_model; for one with two adapters, give model"
            )
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
            adapter = next((each for each, config in configs.items() if is_lora(config)), None)
            initial: Any = adapter or model
            if frozen:
                model.requires_grad_(False)
            elif adapter is not None and _trains_alone(model, adapter):
                initial = initial_adapter(model, adapter)
            else:
                initial = copy.deepcopy(model).requires_grad_(False).eval()
            roles.append(Role(name, model, tokenizer, adapter, initial, frozen=frozen))
        return cls(*roles)

    # ---- files -------------------------------------------------------------------------------------

    def save(self, folder: Path, settings: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write both roles into `folder`, and `popi.json` with further JSON `settings` for readers.

        A role with an adapter is written without its base model. `weights` are needed where processes divide the
        models: all tensors of `state_dict`, of the shapes and dtypes of the parameters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        states = [_below(weights or self.state_dict(), f"models.{place}.") for place in range(len(self.models))]
        for role, state in zip(self, (states[0], states[-1]), strict=True):
            if not self.is_shared:
                _save_separate(role, folder / role.name, state)
            else:  # PEFT saves an adapter into a subfolder of its name
                role.model.save_pretrained(
                    folder, selected_adapters=[role.name], save_embedding_layers=False, state_dict=state
                )
            role.tokenizer.save_pretrained(folder / role.name)
        header: dict[str, Any] = {
            "nextquill_popi": _FORMAT,
            "shared": self.is_shared,
            "base_model": None,
            "settings": settings,
        }
        if self.is_shared:
            base = _below(states[0], "base_model.model.")
            header["base_model"] = self._save_base(folder, base)
            header["base_digest"] = _base_digest(self.inference.model.get_base_model(), base)
        write_whole(folder / ROLES_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")
        write_manifest(folder, among=_SAVED)

    def _save_base(self, folder: Path, weights: Mapping[str, Tensor]) -> str:
        """Return the place of the shared base: where it was loaded from, or the folder, where a new model is saved."""
        base = self.inference.model.get_base_model()
        name = str(getattr(base, "name_or_path", "") or "")
        if name:
            return _place_of(name)
        whole = {key.replace(".base_layer", ""): value for key, value in weights.items() if "lora_" not in key}
        base.save_pretrained(folder / BASE, state_dict=whole)
        self.inference.tokenizer.save_pretrained(folder / BASE)
        return BASE

    def load_weights(self, folder: Path) -> None:
        """Load the weights that `save` wrote for these roles; CheckpointError if they are missing or do not fit."""
        check_roles(folder)
        for role in self:
            if not role.frozen:
                _load_role(role, folder / role.name)

    @classmethod
    def load(cls, folder: str | Path, *, base_model: Any = None, **loading: Any) -> Roles:
        """Load saved roles, frozen. The initial state of a role with an adapter is the model without it.

        Args:
            folder: the folder that `save` wrote.
            base_model: the base of shared adapters, if it is already loaded.
            loading: how models are loaded; see `load_model`. The base has the revision that it was trained at.

        Raises:
            ArgumentError: an argument of loading that this folder or this machine cannot take.
            CheckpointError: the folder is not from POPI, a file is missing or damaged, or the adapters were trained on
                another base model.
            UnsupportedModelError: the base model cannot be loaded.
        """
        from peft import PeftConfig, PeftModel

        folder = Path(folder)
        header = check_roles(folder)
        if has_manifest(folder) and (wrong := damage(folder, _SAVED)) is not None:
            raise CheckpointError(f"{folder}: {wrong}")
        Loading(**loading).check(str(folder))
        if not header["shared"]:
            (inference, first), (generator, second) = (load_model(str(folder / name), **loading) for name in ROLES)
            roles = cls.separate(inference, generator, first, second, freeze_inference=True, freeze_generator=True)
            return roles._compared_with_base()
        tokenizer = None
        if base_model is None:
            name = str(folder / BASE) if header["base_model"] == BASE else header["base_model"]
            if not Path(name).exists():
                with reading(folder / INFERENCE, f"{folder}: cannot load the inference adapter", CheckpointError):
                    loading["revision"] = PeftConfig.from_pretrained(str(folder / INFERENCE)).revision
            base_model, tokenizer = load_model(name, **loading)
        _check_base(folder, header, base_model)
        if (folder / INFERENCE / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(str(folder / INFERENCE))
        with reading(folder / INFERENCE, f"{folder}: cannot load the inference adapter", CheckpointError):
            model: Any = PeftModel.from_pretrained(base_model, str(folder / INFERENCE), adapter_name=INFERENCE)
        with reading(folder / GENERATOR, f"{folder}: cannot load the generator adapter", CheckpointError):
            model.load_adapter(str(folder / GENERATOR), adapter_name=GENERATOR)
        return cls.shared(model, tokenizer, freeze_inference=True, freeze_generator=True)._compared_with_base()

    def _compared_with_base(self) -> Roles:
        for role in self:
            if role.adapter is not None:
                role.initial_state = None
        return self


# ---- files ------------------------------------------------------------------------------------------


def check_roles(folder: Path) -> dict[str, Any]:
    """Return the header of a folder that `Roles.save` wrote.

    CheckpointError if the folder is not from POPI, or lacks a role's weights.
    """
    path = folder / ROLES_FILE
    try:
        header: dict[str, Any] = read_json(path)
        known = header["nextquill_popi"] == _FORMAT and {"shared", "settings"} <= header.keys()
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a folder that POPI has written, with a {ROLES_FILE}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or not from POPI") from error
    if not known:
        raise CheckpointError(f"{path}: expected format {_FORMAT}, got {header['nextquill_popi']}")
    for name in ROLES:
        weights = [*(folder / name).glob("*.safetensors"), *(folder / name).glob("*.bin")]
        if not weights:
            what = "adapter" if header["shared"] else "model"
            raise CheckpointError(f"{folder / name}: the {name} {what} is missing: there are no weights in it")
    return header


def _trains_alone(model: Any, adapter: str) -> bool:
    """Whether only the adapter of a model is trained."""
    return all(f".{adapter}." in name and "lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def _load_role(role: Role, folder: Path) -> None:
    """Load a role's weights; raise CheckpointError if they are damaged or do not fit."""
    with reading(folder, f"{folder}: cannot be loaded into the {role.name} model", CheckpointError):
        if role.adapter is not None or is_adapter(role.model):
            from peft import load_peft_weights, set_peft_model_state_dict

            weights = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(role.model, weights, adapter_name=role.adapter or role.model.active_adapter)
        else:
            saved = from_pretrained(type(role.model), str(folder), dtype=role.model.dtype)
            role.model.load_state_dict(saved.state_dict())


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}


def _save_separate(role: Role, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the model of a separate role, or its adapter, so that `load_model` can load it."""
    if role.adapter is None:
        role.model.save_pretrained(folder, state_dict=weights)
        return
    config = role.model.peft_config[role.adapter]
    config.base_model_name_or_path = _place_of(str(config.base_model_name_or_path or ""))
    role.model.save_pretrained(folder, selected_adapters=[role.adapter], state_dict=weights)
    inner = folder / role.adapter
    if inner.is_dir():  # for every adapter name except "default"
        for path in inner.iterdir():
            path.replace(folder / path.name)
        shutil.rmtree(inner)


def _place_of(name: str) -> str:
    """The place of a model, so that it is found from any working directory."""
    return str(real_path(name)) if name and Path(name).is_dir() else name


def _base_digest(base: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """A digest of the base weights in bfloat16, as they may be loaded in it; None for other lossy formats."""
    half = any(p.dtype == torch.float16 for p in base.parameters())
    if half or getattr(getattr(base, "config", None), "quantization_config", None) is not None:
        return None
    parts = []
    for name, parameter in base.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            values = weights[name].detach().reshape(-1)
            sample = values[:: max(1, values.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES].bfloat16().float()
            parts.append(f"{name.replace('.base_layer', '')} {sample.cpu().tolist()}")
    return fingerprint(parts)


def _check_base(folder: Path, header: dict[str, Any], base: nn.Module) -> None:
    """Raise CheckpointError if the adapters in a folder were trained on other base weights."""
    known, found = header.get("base_digest"), _base_digest(base, dict(base.named_parameters()))
    if None not in (known, found) and known != found:
        raise CheckpointError(
            f"{folder}: its adapters were trained on other weights than those of {header['base_model']}; give the "
            "model they were trained on as base_model"
        )
