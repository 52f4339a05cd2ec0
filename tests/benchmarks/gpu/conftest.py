"""The log that the phases of the GPU verification write to."""

from __future__ import annotations

import pytest

from tests.benchmarks.gpu_helpers import write


@pytest.fixture
def log(tmp_path):
    return write(tmp_path / "log.txt", "")
