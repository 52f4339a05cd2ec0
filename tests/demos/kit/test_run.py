"""What every demo refuses before it makes or computes anything, and what importing it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextquill.errors import ArgumentError, ArgumentTypeError, OutputExistsError
from tests.helpers import run_python

pytest.importorskip("transformers")

from demos.losses import run as losses
from demos.popi import run as popi

DEMOS = pytest.mark.parametrize("run_demo", [losses.run_demo, popi.run_demo], ids=["losses", "popi"])


def refuses(run_demo: Any, folder: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_demo(folder, **settings)
    assert not folder.exists()


@DEMOS
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seeds": 0}, ArgumentError, "seeds: expected at least 1, got 0"),
        ({"seed": -1}, ArgumentError, "seed: expected at least 0, got -1"),
        ({"seed": 1.5}, ArgumentTypeError, "seed: expected an int, got 1.5"),
        ({"seeds": True}, ArgumentTypeError, "seeds: expected an int, got True"),
    ],
)
def test_bad_seeds_are_refused(
    tmp_path: Path, run_demo: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    refuses(run_demo, tmp_path / "new", settings, error, message)


@DEMOS
def test_a_file_in_the_way_is_refused(tmp_path: Path, run_demo: Any) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="output_dir: expected a folder"):
        run_demo(tmp_path / "file", quick=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_importing_the_demo_of_losses_imports_neither_transformers_nor_what_draws() -> None:
    run_python(
        "import sys, demos.losses.run, demos.losses.world\n"
        "loaded = {'transformers', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
