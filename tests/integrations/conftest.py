"""Puts this folder's helpers on the path, for the tests and for the processes they start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Trainers report to whatever is installed unless told; tests report nowhere.
os.environ.setdefault("WANDB_DISABLED", "true")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on several threads, and workers share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# peft 0.21.2 asks models for names that transformers 5.23 has deprecated.
PEFT_WARNING = r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings(PEFT_WARNING))
