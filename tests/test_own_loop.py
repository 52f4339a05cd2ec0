"""The code of docs/guides/own-loop.md runs as printed, and is the loss it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextquill import reference
from tests.snippets import blocks, make_model, write_files

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "own-loop.md"
BEFORE, AFTER, TREES = blocks(PAGE, "python")


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a block in a fresh folder and returns its names."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    write_files(PAGE)

    def run(block):
        names = {}
        exec(compile(block.text, block.id, "exec"), names)
        return names

    return run


def test_the_loop_before_and_after_is_the_loss_it_says(ran):
    before, after = ran(BEFORE), ran(AFTER)
    assert before["prompt"] + before["response"] == after["prompt"] + after["response"]
    model, h1, h0, labels = (after[name] for name in ("model", "h1", "h0", "labels"))
    plain = reference.linear_token_nll(h1, model.lm_head.weight, labels).mean()
    torch.testing.assert_close(before["loss"], plain, rtol=1e-5, atol=0)
    pair = reference.linear_pair_nll(h1, h0, model.lm_head.weight, labels)
    expected = reference.pair_loss(
        h1, h0, model.lm_head.weight, labels, token_weights=reference.clip_weights(pair, 0.8, 5.0),
        normalize_weights=False, detach_counterfactual=True,
    )  # fmt: skip
    torch.testing.assert_close(after["loss"], expected, rtol=1e-5, atol=0)
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_the_loop_over_trees_trains_every_weight(ran):
    names = ran(TREES)
    model = names["model"]
    start = type(model).from_pretrained("model").parameters()
    assert names["loss"].isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa"
