"""Suite `popi` runs, and does not time a layout with a wrong gradient."""

import csv

import pytest

from benchmarks import popi, run
from nextquill.popi.passes import BranchPasses

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


def test_a_step_is_timed_on_both_layouts(tmp_path):
    file = tmp_path / "popi.csv"
    assert run.main(["--suite", "popi", "--quick", "--rounds", "2", "--csv", str(file)]) == 0
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["provider"], row["metric"]) for row in rows} == {
        (name, metric) for name in (popi.BASELINE, popi.TREES) for metric in ("time", "tokens")
    }
    tokens = {row["provider"]: float(row["value"]) for row in rows if row["metric"] == "tokens"}
    assert tokens[popi.TREES] < tokens[popi.BASELINE]


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    honest = BranchPasses.loss
    monkeypatch.setattr(
        BranchPasses, "loss", lambda self, part: honest(self, part) * (2 if "layout" in part["forwards"][0] else 1)
    )
    file = tmp_path / "popi.csv"
    assert run.main(["--suite", "popi", "--quick", "--csv", str(file)]) == 1
    assert "differs by" in capsys.readouterr().err
    assert not file.exists()
