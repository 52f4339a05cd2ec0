"""The README's code runs as printed, its commands and files exist, and it is short."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from nextquill import NextQuillLoss
from nextquill.cli.main import COMMANDS, main
from tests.models.model_helpers import make_args, make_records, tiny_model
from tests.models.model_helpers import word_tokenizer as make_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_five_lines_run_with_torch_alone():
    names = {}
    exec(BLOCKS[0], names)
    assert names["loss"].isfinite()
    assert names["head"].weight.grad.norm() > 0
    assert len([line for line in BLOCKS[0].splitlines() if line and not line.startswith("import")]) == 5


def test_the_trainer_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        lines = [json.dumps(record) for record in make_records(8)]
        Path(f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    names = {"model": tiny_model(max_position_embeddings=512), "tokenizer": make_tokenizer()}
    exec(BLOCKS[1][BLOCKS[1].index("# after") :], names | {"args": make_args(tmp_path / "out", max_steps=1)})


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


def test_flags_of_the_commands_are_flags(capsys):
    commands = "\n".join(re.findall(r"```bash\n(nextquill.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    for line in commands.splitlines():
        command = line.split()[1]
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        flags = re.findall(r"--\w+", line)
        assert flags
        assert [flag for flag in flags if flag not in shown] == []


def test_it_is_under_200_lines():
    assert len(README.splitlines()) < 200
