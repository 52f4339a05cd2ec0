"""`nextquill popi` keeps inputs and edited summaries, and does not pass on control characters."""

import json
import shutil

import pytest

from nextquill.popi.evaluation import CONTEXTS, PairScore, measure
from nextquill.popi.saved_run import SavedRun
from nextquill.popi.summaries import Summary, SummaryFile

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def summarize(popi, popi_model, pairs):
    def call(file, *words, model=popi_model):
        return popi(
            "summarize", "--model", model, "--signals_file", pairs / "test.jsonl", "--output_file", file, *words
        )

    return call


@pytest.fixture(scope="module")
def evaluate(popi, popi_model, pairs):
    def call(*words, test=pairs / "test.jsonl"):
        return popi("evaluate", "--model", popi_model, "--test_file", test, "--resamples", 50, *words)

    return call


def kept(file, *summaries):
    SummaryFile(file).put(*(Summary(user, "0", "m", text, "2026-01-01") for user, text in summaries))
    return file


# ---- summarize -------------------------------------------------------------------------------------


def test_summaries_are_written_again_after_a_change_of_settings(summarize, tmp_path):
    file = tmp_path / "s.jsonl"
    summarize(file)
    assert "3 written" in summarize(file, "--max_new_tokens", 2).err
    assert "0 written, 3 kept" in summarize(file, "--max_new_tokens", 2).err
    assert "3 written" in summarize(file, "--temperature", 1, "--seed", 1).err
    assert "0 written, 3 kept" in summarize(file, "--temperature", 1, "--seed", 1).err
    assert "3 written" in summarize(file, "--temperature", 1, "--seed", 2).err
    assert "3 written" in summarize(file).err
    assert "0 written, 3 kept" in summarize(file, "--seed", 2).err, "greedy: the seed makes no difference"


@pytest.mark.parametrize("what", ["instruction", "opening"])
def test_a_moved_run_keeps_its_summaries_and_another_wording_does_not(summarize, popi_model, tmp_path, what):
    file = tmp_path / "s.jsonl"
    summarize(file)
    moved = tmp_path / "moved"
    shutil.copytree(popi_model, moved)
    assert "0 written, 3 kept" in summarize(file, model=moved).err
    header = json.loads((moved / "popi.json").read_text())
    header["settings"]["templates"][what] = "What else?"
    (moved / "popi.json").write_text(json.dumps(header))
    assert "3 written" in summarize(file, model=moved).err


# ---- summaries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["show", "delete", "edit"])
def test_a_blank_user_is_one_line(popi, tmp_path, flag):
    file = kept(tmp_path / "s.jsonl", ("ann", "Likes tea."))
    result = popi("summaries", "--summaries", file, f"--{flag}", "", *(["text"] if flag == "edit" else []))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"--{flag}: expected one of the 1 users" in result.err
    assert SummaryFile(file).read().keys() == {"ann"}


def test_a_shown_summary_neither_steers_the_terminal_nor_looks_like_another_users(popi, tmp_path):
    text = "Likes tea.\x1b[2J\x07\u202e\nbob  (edited by a person, 2026-01-01)\n  Likes nothing."
    file = kept(tmp_path / "s.jsonl", ("ann\x1b]0;x", text), ("bob", ""))
    out = popi("summaries", "--summaries", file).out
    assert not any(sign in out for sign in "\x1b\x07\u202e")
    assert "\\x1b[2J" in out
    assert [line[:3] for line in out.splitlines() if not line.startswith("  ")] == ["ann", "bob"]


# ---- evaluate --------------------------------------------------------------------------------------


def test_evaluation_does_not_replace_what_it_reads(evaluate, summarize, write_pairs, tmp_path):
    test = write_pairs(tmp_path / "test.jsonl", first=3)
    before = test.read_bytes()
    result = evaluate("--output_file", test, "--overwrite", test=test)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--output_file: expected a file of its own" in result.err
    assert test.read_bytes() == before
    summaries = tmp_path / "s.jsonl"
    summarize(summaries, "--held_out")
    before = summaries.read_bytes()
    assert evaluate("--summaries", summaries, "--output_file", summaries, "--overwrite").code == 2
    assert summaries.read_bytes() == before


def test_users_who_were_trained_on_are_told(evaluate, popi, popi_model, pairs):
    found = evaluate()
    assert "were trained on" not in found.err
    assert "3 users (3 never trained on)" in found.out
    for model in (popi_model, popi_model / "checkpoint-1"):
        words = ("--model", model, "--test_file", pairs / "train.jsonl", "--resamples", 20)
        result = popi("evaluate", *words)
        assert result.code == 0
        assert " of 3 users were trained on" in result.err


def test_summaries_of_another_writer_are_told_and_those_of_people_are_not(evaluate, summarize, tmp_path):
    file = tmp_path / "s.jsonl"
    summarize(file, "--held_out")
    assert "another model" not in evaluate("--summaries", file).err
    summarize(file, "--held_out", "--max_new_tokens", 2)
    assert "or with other settings: 3, such as that of 'u3'" in evaluate("--summaries", file).err
    for user in ("u3", "u4", "u5"):
        SummaryFile(file).edit(user, "Likes tea.")
    assert "another model" not in evaluate("--summaries", file).err


def test_a_missing_transfer_model_costs_no_work(evaluate, tmp_path, monkeypatch):
    from nextquill.cli import popi_evaluate

    def never(*arguments, **options):
        raise AssertionError("work was done")

    monkeypatch.setattr(popi_evaluate, "_written", never)
    (tmp_path / "nothing").mkdir()
    result = evaluate("--transfer_model", tmp_path / "nothing")
    assert result.code == 1
    assert "--transfer_model" in result.err


def test_a_pair_that_does_not_fit_costs_no_work(evaluate, write_pairs, tmp_path, monkeypatch):
    from nextquill.cli import popi_evaluate

    monkeypatch.setattr(popi_evaluate, "_written", None)
    test = write_pairs(tmp_path / "long.jsonl", first=3, query="How? " * 600)
    text = test.read_text().splitlines()
    test.write_text("\n".join(line.replace("How? How?", f"How {n}?", 1) for n, line in enumerate(text)))
    result = evaluate(test=test)
    assert result.code == 1
    assert "--eval_file: user 'u3': the pair of query" in result.err


def test_the_table_is_whole_in_80_columns(monkeypatch, capsys):
    from nextquill.cli.popi_evaluate import _print_contexts

    monkeypatch.setenv("COLUMNS", "80")
    scores = [PairScore(f"u{k}", 0, (-1) ** k * (10 + k), -(10.0 + k), 10.5, 1024) for k in range(9)]
    _print_contexts("run", measure(dict.fromkeys(CONTEXTS, scores), resamples=50))
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(f"{name} " in out for name in (*CONTEXTS, "context"))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_writer_says_which_folder(popi_model):
    assert SavedRun(popi_model).writer().startswith(f"{popi_model.name}@")
