"""The files of roles: their weights, and what tells the base model they were trained on from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import CheckpointError
from nextquill.models.configs import is_adapter
from nextquill.models.loading import load_tokenizer
from nextquill.storage.fingerprints import fingerprint

# Values of each of the base's weights that tell it from another.
_SAMPLED_VALUES = 64


def load_role(role: Any, folder: Path) -> None:
    """Take over a role's weights.

    Raises:
        CheckpointError: they are others', or damaged.
    """
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


def save_separate(role: Any, folder: Path) -> None:
    """Write a model of its own, or its adapter, where `load_model` finds it."""
    if role.adapter is None:
        role.model.save_pretrained(folder)
        return
    config = role.model.peft_config[role.adapter]
    config.base_model_name_or_path = place_of(str(config.base_model_name_or_path or ""))
    role.model.save_pretrained(folder, selected_adapters=[role.adapter])
    inner = folder / role.adapter
    if inner.is_dir():  # of any name but "default"
        for path in inner.iterdir():
            path.replace(folder / path.name)
        shutil.rmtree(inner)


def place_of(name: str) -> str:
    """Where a model came from, as it is found from any other folder too."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def base_digest(base: nn.Module) -> str | None:
    """A digest of base weights in bfloat16, to which they may have been rounded since; None where that says nothing."""
    half = any(p.dtype == torch.float16 for p in base.parameters())
    if half or getattr(getattr(base, "config", None), "quantization_config", None) is not None:
        return None
    parts = []
    for name, parameter in base.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            values = parameter.detach().reshape(-1)
            sample = values[:: max(1, values.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES].bfloat16().float()
            parts.append(f"{name.replace('.base_layer', '')} {sample.cpu().tolist()}")
    return fingerprint(parts)


def check_base(folder: Path, header: dict[str, Any], base: nn.Module) -> None:
    """Raise CheckpointError where the adapters in a folder were trained on other base weights."""
    known, found = header.get("base_digest"), base_digest(base)
    if None not in (known, found) and known != found:
        raise CheckpointError(
            f"{folder}: its adapters were trained on other weights than those of {header['base_model']}; give the "
            "model they were trained on as base_model"
        )


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder, or None."""
    return load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
