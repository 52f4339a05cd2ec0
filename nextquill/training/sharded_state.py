"""The trained weights of a module that FSDP2 shards, as one file; the frozen ones are where they were loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import get_rank
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

#: The file of a checkpoint.
TRAINED_WEIGHTS = "trained_weights.pt"


def save_trained(module: nn.Module, folder: Path) -> None:
    """Write the trained weights, whole, into a folder; every process must call it, and the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(module, options=options)
    if get_rank() == 0:
        torch.save(weights, folder / TRAINED_WEIGHTS)


def load_trained(module: nn.Module, folder: Path) -> None:
    """Load what `save_trained` wrote; every process must call it, and the first one reads."""
    weights: dict[str, Any] = {}
    if get_rank() == 0:
        weights = torch.load(folder / TRAINED_WEIGHTS, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(module, weights, options=options)
