"""The code of docs/guides/own-loop.md runs as printed, and is the loss it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from nextquill import NextQuillLoss, reference
from nextquill.data import PaddedCollator
from tests.models.model_helpers import make_records, random_examples, tiny_model
from tests.models.model_helpers import word_tokenizer as make_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "own-loop.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_loop_before_and_after_runs_and_is_the_loss_it_says():
    model, examples = tiny_model(), random_examples(3)
    part = PaddedCollator(0, (("counterfactual",), ("factual",)))(examples)["parts"][0]
    counterfactual, factual = part["forwards"]

    def rows(forward, name):
        selected = torch.zeros_like(forward["input_ids"], dtype=torch.bool)
        selected.view(-1)[forward["rows"][name]] = True
        return selected

    names = {
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
    before, after = BLOCKS[0].split("# after")
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


def test_the_loop_over_trees_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("\n".join(json.dumps(record) for record in make_records(8)), encoding="utf-8")
    model = tiny_model(max_position_embeddings=2048)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {
        "model": model, "tokenizer": make_tokenizer(), "loss_fn": NextQuillLoss(detach_counterfactual=True),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    exec(BLOCKS[1], names)
    assert names["loss"].isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa"
