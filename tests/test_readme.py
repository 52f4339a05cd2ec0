"""The README's code runs as printed, its commands and files exist, and it is short."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import nextquill.data
from nextquill import NextQuillLoss, reference
from nextquill.cli.main import COMMANDS, main
from nextquill.data import PaddedCollator
from tests.models.model_helpers import make_args, make_records, random_examples, tiny_model
from tests.models.model_helpers import word_tokenizer as make_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def code(position: int) -> tuple[str, str]:
    """The parts of a block before and after its `# after` line."""
    before, _, after = BLOCKS[position].partition("# after")
    return before, "# after" + after


def test_the_loop_before_and_after_runs_and_is_the_loss_it_says():
    model, examples = tiny_model(), random_examples(3)
    part = PaddedCollator(0, (("counterfactual",), ("factual",)))(examples)["parts"][0]
    counterfactual, factual = part["forwards"]

    def rows(forward, name):
        selected = torch.zeros_like(forward["input_ids"], dtype=torch.bool)
        selected.view(-1)[forward["rows"][name]] = True
        return selected

    names = {
        "torch": torch,
        "F": functional,
        "model": model,
        "input_ids": factual["input_ids"],
        "mask": factual["attention_mask"],
        "rows": rows(factual, "factual"),
        "input_ids_0": counterfactual["input_ids"],
        "mask_0": counterfactual["attention_mask"],
        "rows_0": rows(counterfactual, "counterfactual"),
        "labels": part["labels"],
        "ids": part["sequence_ids"],
    }
    before, after = code(0)
    exec(before, names)
    assert names["loss"].isfinite()
    exec(after, names)
    names["loss"].backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 0
    pair = reference.linear_pair_nll(names["h1"], names["h0"], model.lm_head.weight, names["labels"])
    expected = reference.pair_loss(
        names["h1"], names["h0"], model.lm_head.weight, names["labels"],
        token_weights=reference.threshold_weights(pair, 0.05, 0.9, 0.1), normalize_weights=True, alpha=0.1,
        detach_counterfactual=True, sequence_ids=names["ids"],
    )  # fmt: skip
    torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=0)


def test_the_trainer_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        lines = [json.dumps(record) for record in make_records(8)]
        Path(f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    names = {"model": tiny_model(max_position_embeddings=512), "tokenizer": make_tokenizer()}
    exec(code(1)[1], names | {"args": make_args(tmp_path / "out", max_steps=1)})


def test_the_loop_over_trees_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("\n".join(json.dumps(record) for record in make_records(8)), encoding="utf-8")
    model = tiny_model(max_position_embeddings=2048)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {
        "nq": nextquill, "model": model, "tokenizer": make_tokenizer(), "DataLoader": DataLoader,
        "loss_fn": NextQuillLoss(detach_counterfactual=True), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        **{name: getattr(nextquill.data, name) for name in nextquill.data.__all__},
    }  # fmt: skip
    exec(BLOCKS[2], names)
    assert names["loss"].isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa"


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
