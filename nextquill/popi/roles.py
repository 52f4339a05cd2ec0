"""The two models of POPI: one that infers a summary, one that generates with it.

    shared      one base model with two LoRA adapters, "inference" and "generator" (the default)
    separate    two models, each whole, or with an adapter of its own

Each role also has what it was at the start, which the preference loss and the KL term refer to: for a fresh adapter the
model without it, for a frozen role itself, else a frozen copy.

Switching PEFT's adapters changes which parameters want a gradient, and which of them that is belongs to the optimizer
here. So every switch puts those flags back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import ArgumentError, CheckpointError
from nextquill.files import write_whole
from nextquill.integrations.loading import is_adapter, load_model, load_tokenizer

INFERENCE, GENERATOR = "inference", "generator"
ROLES = (INFERENCE, GENERATOR)
ROLES_FILE, BASE = "popi.json", "base"
_FORMAT = 1
#: Adapters of these names are frozen copies of what the others were at the start.
_INITIAL = "_initial"


class Role:
    """One of the two models, as it is and as it was.

    Args:
        name: "inference" or "generator".
        model: the model, which the other role may share.
        tokenizer: its tokenizer.
        adapter: the adapter that makes the model this role; None where there is none to switch.
        initial: what it was: a model, the name of an adapter, or None for the model without adapters.
        frozen: it is not trained, and is what it was.
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
        with nullcontext() if self.adapter is None else _switched(self.model, self.adapter):
            yield self.model

    @contextmanager
    def initial(self) -> Iterator[Any]:
        """The model as this role was at the start; without gradient."""
        with torch.no_grad():
            if self.frozen:
                with self.active() as model:
                    yield model
            elif isinstance(self._initial, nn.Module):
                yield self._initial
            else:
                with _switched(self.model, self._initial):
                    yield self.model

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
            ArgumentError: the model has other adapters, or the config has dropout.
        """
        frozen = {INFERENCE: freeze_inference, GENERATOR: freeze_generator}
        initial: dict[str, str | None] = dict.fromkeys(ROLES)
        if is_adapter(model):
            if missing := [name for name in ROLES if name not in model.peft_config]:
                raise ArgumentError(
                    f"model: expected a model without adapters, or one with the adapters {INFERENCE} and {GENERATOR}, "
                    f"got {sorted(model.peft_config)} without {missing[0]}; merge_and_unload() makes an adapter a part "
                    "of its model"
                )
            for name in ROLES:
                _check_lora(model.peft_config[name])
                if not frozen[name]:
                    initial[name] = _copied_adapter(model, name)
        else:
            model = _with_adapters(model, peft_config)
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
            configs = list(getattr(model, "peft_config", {}).values())
            if len(configs) > 1:
                raise ArgumentError(f"{name}_model: expected at most one adapter, got {sorted(model.peft_config)}")
            for config in configs:
                _check_lora(config)
            if frozen:
                model.requires_grad_(False)
            initial = None if frozen else copy.deepcopy(model).requires_grad_(False).eval()
            roles.append(Role(name, model, tokenizer, None, initial, frozen=frozen))
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
            if role.adapter is None:
                role.model.save_pretrained(folder / role.name)
            else:  # PEFT puts an adapter into a folder of its name
                role.model.save_pretrained(folder, selected_adapters=[role.name], save_embedding_layers=False)
            role.tokenizer.save_pretrained(folder / role.name)
        base = self._save_base(folder) if self.is_shared else None
        header = {"nextquill_popi": _FORMAT, "shared": self.is_shared, "base_model": base, "settings": settings}
        write_whole(folder / ROLES_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")

    def _save_base(self, folder: Path) -> str:
        """Where the base of shared adapters is: where it came from, or, of a model that is new, in the folder."""
        base = self.inference.model.get_base_model()
        name = str(getattr(base, "name_or_path", "") or "")
        if name:
            return name
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
                _load_role(role, folder / role.name)

    @classmethod
    def load(cls, folder: str | Path, *, base_model: Any = None, dtype: str = "auto") -> Roles:
        """The roles that a run has saved, frozen.

        Args:
            folder: of `save`.
            base_model: the base of shared adapters, where it is at hand already.
            dtype: as `load_model`'s.

        Raises:
            CheckpointError: it is no folder of POPI, or an adapter is missing.
            UnsupportedModelError: the base model cannot be loaded.
        """
        from peft import PeftModel

        folder = Path(folder)
        header = check_roles(folder)
        if not header["shared"]:
            (inference, first), (generator, second) = (load_model(str(folder / name), dtype=dtype) for name in ROLES)
            return cls.separate(inference, generator, first, second, freeze_inference=True, freeze_generator=True)
        tokenizer = None
        if base_model is None:
            name = header["base_model"]
            base_model, tokenizer = load_model(str(folder / BASE) if name == BASE else name, dtype=dtype)
        tokenizer = _tokenizer_of(folder / INFERENCE) or tokenizer
        model: Any = PeftModel.from_pretrained(base_model, str(folder / INFERENCE), adapter_name=INFERENCE)
        model.load_adapter(str(folder / GENERATOR), adapter_name=GENERATOR)
        return cls.shared(model, tokenizer, freeze_inference=True, freeze_generator=True)


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


# ---- adapters --------------------------------------------------------------------------------------


@contextmanager
def _switched(model: Any, adapter: str | None) -> Iterator[None]:
    """A PEFT model with this adapter on, or none, for the length of the block; what is trained stays what it is."""
    previous = model.active_adapter
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    try:
        if adapter is None:
            with model.disable_adapter():
                restore()
                yield
        else:
            model.set_adapter(adapter)
            restore()
            yield
    finally:
        model.set_adapter(previous)
        restore()


def _with_adapters(model: Any, peft_config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    if peft_config is None:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    _check_lora(peft_config)
    adapted: Any = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=INFERENCE)
    adapted.add_adapter(GENERATOR, copy.deepcopy(peft_config))
    return adapted


def _check_lora(config: Any) -> None:
    if getattr(config, "lora_dropout", 0.0):
        raise ArgumentError(
            f"peft_config: expected lora_dropout=0, got {config.lora_dropout}: losses and rewards are measured without "
            "dropout, and the gradient has to be theirs"
        )
    if getattr(config, "modules_to_save", None):
        raise ArgumentError("peft_config: expected no modules_to_save; both roles share everything but their adapters")


def _copied_adapter(model: Any, name: str) -> str:
    """A frozen copy of an adapter, under another name."""
    copied = name + _INITIAL
    model.add_adapter(copied, copy.deepcopy(model.peft_config[name]))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for own, parameter in weights.items():
            if f".{copied}." in own:
                parameter.copy_(weights[own.replace(f".{copied}.", f".{name}.")])
    return copied


def _load_role(role: Role, folder: Path) -> None:
    found: dict[str, Tensor]
    try:
        if role.adapter is not None or is_adapter(role.model):
            from peft import load_peft_weights, set_peft_model_state_dict

            adapter = role.adapter or role.model.active_adapter
            found = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(role.model, found, adapter_name=adapter)
        else:
            saved: Any = type(role.model).from_pretrained(folder, dtype=role.model.dtype)
            role.model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded into the {role.name} model: {error}") from error


def _tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
