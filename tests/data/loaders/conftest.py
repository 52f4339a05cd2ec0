"""Small files with the real schemas, and a function that reads given rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fixtures() -> Path:
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write lines to a file with this name. A line is bytes, text, or a value to be written as JSON."""

    def call(name: str, *lines: Any) -> Path:
        path = tmp_path / name
        parts = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
        path.write_bytes(b"".join((part if isinstance(part, bytes) else part.encode()) + b"\n" for part in parts))
        return path

    return call
