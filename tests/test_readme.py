"""The README's code runs as printed, its commands and files exist, and it is short."""

from __future__ import annotations

import re
from pathlib import Path

from nextquill import NextQuillLoss
from nextquill.cli.main import COMMANDS
from nextquill.evaluation.results import read_evaluation
from nextquill.models.loading import load_prompt_settings
from tests.snippets import blocks, make_model, run_page

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_runs_from_top_to_bottom_in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    printed = list(run_page(ROOT / "README.md").values())
    assert all(name in "".join(printed) for name in ("own history", "no history", "history of user"))
    for run in ("runs/base", "runs/mine/evaluation"):
        evaluated = read_evaluation(Path(run))
        assert evaluated.num_examples == 24
        assert "effect_placebo" in evaluated.metrics
    assert Path("report.html").is_file()
    for run in ("runs/mine", "runs/trainer"):
        card = Path(run, "README.md").read_text(encoding="utf-8")
        assert "of 24 users" in card
        assert str(tmp_path) not in card
        assert load_prompt_settings(run) is not None


def test_the_five_lines_run_with_torch_alone():
    block = next(block for block in blocks(ROOT / "README.md", "python") if "with_history, without" in block.text)
    names = {}
    exec(block.text, names)
    assert names["loss"].isfinite()
    assert names["head"].weight.grad.norm() > 0
    assert len([line for line in block.text.splitlines() if line and not line.startswith("import")]) == 5


def test_defaults_are_the_numbers_in_the_table_of_losses():
    objective = NextQuillLoss().objective
    assert (objective.alpha, objective.weighting.high, objective.weighting.low, objective.weighting.threshold) == (
        0.1, 0.9, 0.1, 0.05,
    )  # fmt: skip


def test_commands_targets_and_files_exist():
    used = set(re.findall(r"^nextquill (\w+)", README, re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake (\w+)\b", README))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_it_is_under_200_lines():
    assert len(README.splitlines()) < 200
