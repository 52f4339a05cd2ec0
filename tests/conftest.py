"""Shared by every test: a fixed seed, so that a failure repeats, and one thread, so that small tensors stay fast."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two threads that wait for each other on a busy machine made gradcheck forty times slower.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
