"""Shared by every test: a fixed seed, so that a failure repeats, and one thread, so that small tensors stay fast."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported: without a GPU, Triton's interpreter runs them on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two threads that wait for each other on a busy machine made gradcheck forty times slower.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
