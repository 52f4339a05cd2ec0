"""The nll of general prose: its windows, its figure, and what is refused."""

from __future__ import annotations

import pytest
import torch

from nextquill.data import Branch
from nextquill.errors import ArgumentError, BudgetError
from nextquill.evaluation import prose
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import place_of
from nextquill.evaluation.metrics import MetricScores
from nextquill.evaluation.prose import Prose
from nextquill.evaluation.results import read_evaluation
from tests.evaluation.evaluation_helpers import contents, evaluate
from tests.models.model_helpers import branch_nll, tiny_model, word_tokenizer

WORDS = [f"w{i % 37}" for i in range(150)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(WORDS), encoding="utf-8")
    return str(path)


def test_the_figure_is_that_of_separate_forwards(model, text, tmp_path):
    evaluation = evaluate(model, tmp_path / "out", prose_file=text, generate_branches=())
    ids = word_tokenizer().encode(" ".join(WORDS), add_special_tokens=False)
    windows = [ids[:64], ids[64:128], ids[128:]]  # the model's context is 64 tokens
    with torch.no_grad():
        nll = [branch_nll(model, Branch(window[:1], window[1:])).double() for window in windows]
    metric = evaluation.metrics["nll_prose"]
    assert metric.value == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)
    scores = MetricScores.ratio_of([float(each.sum()) for each in nll], [63, 63, 21])
    _, low, high = bootstrap_interval(scores, list("abc"), resamples=50, seed=42)
    assert (metric.low, metric.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert (metric.unit, metric.higher_is_better, metric.per_example) == ("nats per token", False, None)
    assert place_of("nll_prose") == ("prose", "nll of general prose", "per token")
    assert "prose.jsonl" in contents(tmp_path / "out")
    assert read_evaluation(tmp_path / "out") == evaluation


def test_two_models_are_paired_by_windows(model, text, tmp_path):
    other, nowhere = tiny_model(seed=3), ()
    for name, each in (("a", model), ("b", other)):
        evaluate(each, tmp_path / name, prose_file=text, generate_branches=nowhere)
    own, theirs = (read_evaluation(tmp_path / name).metrics["nll_prose"].value for name in "ab")
    found = compare_evaluations(tmp_path / "a", tmp_path / "b")["nll_prose"]
    assert found.difference == pytest.approx(own - theirs)
    assert found.num == 3
    longer = tmp_path / "longer.txt"
    longer.write_text(" ".join([*WORDS, "w1"]))
    evaluate(other, tmp_path / "c", prose_file=str(longer), generate_branches=nowhere)
    assert "nll_prose" not in compare_evaluations(tmp_path / "a", tmp_path / "c"), "another text"


def test_windows_are_of_512_tokens_and_20000_in_all(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("w1 " * 30_000)
    wide = tiny_model(max_position_embeddings=1024)
    windows = Prose(path, wide, word_tokenizer()).windows
    assert [len(window) for window in windows] == [512] * 39 + [20_000 - 39 * 512]
    path.write_text("w1 " * 65)
    assert [len(window) for window in Prose(path, tiny_model(), word_tokenizer()).windows] == [64], "one token is none"


def test_only_the_beginning_of_a_large_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "MOST_CHARACTERS", 30)
    path = tmp_path / "large.txt"
    path.write_text("w1 " * 100_000)
    assert len(Prose(path, tiny_model(), word_tokenizer()).text) == 30


BAD = {
    "missing": (None, "prose_file: cannot read .*: No such file"),
    "empty": (b"", "prose_file: expected some text, .* is empty"),
    "blank": (b" \n\t", "prose_file: expected some text, .* is empty"),
    "one token": (b"w1", "prose_file: expected a text of at least two tokens, got 1"),
    "no UTF-8": (b"w1 w2 \xff\xfe", "prose_file: expected a plain UTF-8 text, .* is not: .*"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_before_anything_runs(model, tmp_path, what):
    content, message = BAD[what]
    path = tmp_path / "prose.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        evaluate(model, tmp_path / "out", prose_file=str(path))
    assert not (tmp_path / "out").exists()


def test_a_folder_and_a_window_that_does_not_fit(model, text, tmp_path):
    with pytest.raises(ArgumentError, match=r"prose_file: cannot read .*: Is a directory"):
        evaluate(model, tmp_path / "out", prose_file=str(tmp_path))
    with pytest.raises(
        BudgetError, match="max_tokens: expected at least the 64 tokens of a window of prose_file, got 63"
    ):
        evaluate(model, tmp_path / "out", prose_file=text, max_tokens=63)
    assert not (tmp_path / "out").exists()
