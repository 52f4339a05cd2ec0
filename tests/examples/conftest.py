"""Puts this folder's helpers on the path, and makes the inputs of the examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with tied embeddings, its tokenizer, and 24 records of four users."""
    from example_helpers import save_model_and_records

    folder = tmp_path_factory.mktemp("model")
    save_model_and_records(folder)
    return folder
