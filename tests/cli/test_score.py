"""`nextquill score`: per-token effects as JSONL, and some in colour."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextquill.data import ExampleEncoder, read_jsonl
from nextquill.errors import CheckpointError
from nextquill.evaluation import scoring
from nextquill.models.loading import load_prompt_settings
from nextquill.storage.resumable_jsonl import PartialFile


@pytest.fixture(scope="module")
def score(nextquill, trained, data):
    def call(output_file, *words):
        flags = ("--model_name_or_path", trained, "--eval_file", data / "eval.jsonl", "--output_file", output_file)
        return nextquill("score", *flags, *words)

    return call


@pytest.fixture(scope="module")
def scored(score, tmp_path_factory):
    """The lines of one output file, and the printed output."""
    file = tmp_path_factory.mktemp("score") / "scores.jsonl"
    result = score(file, "--show", 2, "--batch_size", 2)
    assert result.code == 0, result.err
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], result


def test_values_are_those_of_the_model_alone(scored, trained, data):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    settings = load_prompt_settings(trained)
    examples = ExampleEncoder(tokenizer, settings.template, settings.max_length).encode_all(
        read_jsonl(data / "eval.jsonl"), placebo=True, seed=42
    )

    def nll(branch):
        with torch.no_grad():
            logits = model(torch.tensor([branch.input_ids])).logits[0].double()
        start = len(branch.prompt_ids)
        targets = torch.tensor(branch.response_ids)
        return torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="none")

    for line, example in zip(scored[0], examples, strict=True):
        factual, counterfactual, placebo = (
            nll(getattr(example, name)) for name in ("factual", "counterfactual", "placebo")
        )
        expected = {
            "nll_factual": factual,
            "nll_counterfactual": counterfactual,
            "nll_placebo": placebo,
            "effect_logprob": counterfactual - factual,
            "effect_prob": (-factual).exp() - (-counterfactual).exp(),
        }
        for name, values in expected.items():
            assert line[name] == pytest.approx(values.tolist(), abs=5e-6), name
        assert line["token_ids"] == example.factual.response_ids
        assert line["history_kept"] == example.history_kept


def test_tokens_join_to_the_response(scored, data):
    for line, record in zip(scored[0], read_jsonl(data / "eval.jsonl"), strict=True):
        assert "".join(line["tokens"]) == record.response + "<|endoftext|>"
        assert len(line["tokens"]) == len(line["nll_factual"])
        assert line["user_id"] == record.user_id
    assert [line["index"] for line in scored[0]] == list(range(5))


def test_some_responses_are_printed(scored, data):
    records = read_jsonl(data / "eval.jsonl")
    out = scored[1].out
    for record in records[:2]:
        assert f"{record.user_id}  {record.query}" in out
        assert record.response in out
    assert out.count("<|endoftext|>") == 2
    assert "history lowered p" in out


def test_markup_in_a_query_is_text(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "markup.jsonl", 1, user_id="[bold]me", query="[/red] a [link=x]b[/link]")
    words = ("--eval_file", file, "--output_file", tmp_path / "s.jsonl")
    result = nextquill("score", "--model_name_or_path", trained, *words)
    assert result.code == 0, result.err
    assert "[bold]me  [/red] a [link=x]b[/link]" in result.out


def test_a_terminal_gets_no_escape_sequence_of_a_text(nextquill, trained, make_records, tmp_path):
    hostile = "a\x1b[2Jb\x9bc\u202ed\re"
    file = make_records(tmp_path / "escapes.jsonl", 1, user_id=hostile, query=hostile, response=hostile)
    words = ("--eval_file", file, "--output_file", tmp_path / "s.jsonl")
    result = nextquill("score", "--model_name_or_path", trained, *words)
    assert result.code == 0, result.err
    assert not set("\x1b\x9b\u202e\r") & set(result.out + result.err)
    assert result.out.count(r"a\x1b[2Jb\x9bc\u202ed\re") == 3


def test_nothing_is_shown_where_nothing_is_asked(score, tmp_path):
    assert score(tmp_path / "s.jsonl", "--show", 0, "--limit", 1).out == ""


def test_an_existing_file_is_not_replaced_unasked(score, tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text("precious")
    assert score(file).code == 1
    assert file.read_text() == "precious"
    assert score(file, "--overwrite", "--limit", 1).code == 0
    assert json.loads(file.read_text())["index"] == 0


# ---- runs that are cut short -----------------------------------------------------------------------


class Killed(BaseException):
    """An exception that no command catches."""


@pytest.fixture
def cut(score, monkeypatch):
    """Stop scoring after this many lines."""

    def call(output_file, lines, *words, error=Killed):
        calls, own = [], scoring.effect_line

        def failing(scores, tokenizer):
            calls.append(scores)
            if len(calls) > lines:
                raise error
            return own(scores, tokenizer)

        with monkeypatch.context() as patch:
            patch.setattr(scoring, "effect_line", failing)
            if error is KeyboardInterrupt:
                return score(output_file, *words)
            with pytest.raises(error):
                score(output_file, *words)
        return None

    return call


@pytest.fixture(scope="module")
def whole(score, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    file = tmp_path_factory.mktemp("whole") / "s.jsonl"
    assert score(file, "--show", 0, "--batch_size", 2).code == 0
    assert [path.name for path in file.parent.iterdir()] == ["s.jsonl"]
    return file.read_bytes()


@pytest.fixture
def count_forwards(monkeypatch):
    """The number of records in each part that is scored."""
    from nextquill.models.branch_passes import PairPasses

    seen, own = [], PairPasses.scores

    def scores(self, part, *rest):
        seen.append(part["num_sequences"])
        return own(self, part, *rest)

    monkeypatch.setattr(PairPasses, "scores", scores)
    return seen


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(score, cut, whole, tmp_path, count_forwards, lines):
    file = tmp_path / "s.jsonl"
    flags = ("--show", 1, "--batch_size", 2)
    cut(file, lines, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl.partial"]
    assert (tmp_path / "s.jsonl.partial").read_bytes().count(b"\n") == 1 + lines
    count_forwards.clear()
    result = score(file, *flags)
    assert result.code == 0, result.err
    assert f"{lines} of 5 records are already in" in result.err
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
    assert sum(count_forwards) < 5 + lines % 2, "records scored again"


def test_a_torn_line_is_computed_again(score, cut, whole, tmp_path):
    partial = tmp_path / "s.jsonl.partial"
    cut(tmp_path / "s.jsonl", 4, "--batch_size", 2)
    partial.write_bytes(partial.read_bytes()[:-40])
    cut(tmp_path / "s.jsonl", 1, "--batch_size", 2)
    lines = [json.loads(line) for line in partial.read_bytes().splitlines()]
    assert len({line["index"] for line in lines[1:]}) == 4, "nothing is left of the torn line"
    result = score(tmp_path / "s.jsonl", "--batch_size", 2)
    assert "4 of 5 records" in result.err
    assert (tmp_path / "s.jsonl").read_bytes() == whole


def test_a_file_cut_short_in_its_first_line_is_begun_anew(score, cut, whole, tmp_path):
    partial = tmp_path / "s.jsonl.partial"
    cut(tmp_path / "s.jsonl", 2, "--batch_size", 2)
    partial.write_bytes(partial.read_bytes()[:30])
    assert score(tmp_path / "s.jsonl", "--batch_size", 2).code == 0
    assert (tmp_path / "s.jsonl").read_bytes() == whole


def test_ctrl_c_says_how_to_go_on(cut, tmp_path):
    result = cut(tmp_path / "s.jsonl", 3, "--batch_size", 2, error=KeyboardInterrupt)
    assert result.code == 130
    assert "3 of 5 records are in" in result.err
    assert "the same command resumes" in result.err


def test_a_run_that_wrote_nothing_leaves_nothing(cut, tmp_path):
    cut(tmp_path / "s.jsonl", 0, error=RuntimeError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # `test_evaluation_resume` stops one within this process
def test_a_process_that_is_killed_leaves_what_it_wrote(trained, data, whole, score, tmp_path):
    """SIGKILL, which a process cannot handle."""
    file, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    code = (
        "import os, signal; from nextquill.cli import main; from nextquill.evaluation import scoring as c\n"
        "own, calls = c.effect_line, []\n"
        "def line(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return own(*a)\n"
        "c.effect_line = line\n"
        f"main.main(['score', '--model_name_or_path', {str(trained)!r}, '--eval_file', {str(data / 'eval.jsonl')!r},"
        f" '--output_file', {str(file)!r}, '--batch_size', '2'])"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert partial.read_bytes().count(b"\n") == 4
    assert score(file, "--batch_size", 2).code == 0
    assert file.read_bytes() == whole


DIFFERENT = {
    "--batch_size": (("--batch_size", 3), "--batch_size: there 2, here 3"),
    "seed": (("--seed", 1), "--seed: there 42, here 1"),
    "budget": (("--max_tokens", 999), "--max_tokens: there None, here 999"),
    "length": (("--max_length", 512), "max_length: there 1024, here 512"),
    "template": (("--prompt_order", "history_first"), "template order: there 'official', here 'history_first'"),
    "records": (("--limit", 4), "content of --eval_file: there '"),
    "precision": (("--dtype", "bfloat16"), "dtype: there 'torch.float32', here 'torch.bfloat16'"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_lines_of_another_run_are_refused_by_name(score, cut, tmp_path, what):
    words, message = DIFFERENT[what]
    cut(tmp_path / "s.jsonl", 2, "--batch_size", 2)
    before = (tmp_path / "s.jsonl.partial").read_bytes()
    result = score(tmp_path / "s.jsonl", "--batch_size", 2, *words)
    assert result.code == 1
    assert f"was started with another {message}" in result.err
    assert (tmp_path / "s.jsonl.partial").read_bytes() == before
    assert score(tmp_path / "s.jsonl", "--batch_size", 2, "--overwrite", *words).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def test_lines_of_another_model_are_refused(score, cut, trained, tmp_path):
    cut(tmp_path / "s.jsonl", 2)
    other = tmp_path / "model"
    shutil.copytree(trained, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight, std=0.1)
    model.save_pretrained(other)
    result = score(tmp_path / "s.jsonl", "--model_name_or_path", other)
    assert "was started with another model: there" in result.err
    shutil.rmtree(other)
    shutil.copytree(trained, other)
    assert score(tmp_path / "s.jsonl", "--model_name_or_path", other).code == 0, "the same model in another folder"


def test_a_file_of_somebody_else_is_left_alone(score, tmp_path):
    (tmp_path / "s.jsonl.partial").write_text("precious\n")
    result = score(tmp_path / "s.jsonl")
    assert "exists, and nextquill did not start it" in result.err
    assert (tmp_path / "s.jsonl.partial").read_text() == "precious\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such lock")
def test_two_runs_into_one_file_are_refused(score, tmp_path):
    with PartialFile(tmp_path / "s.jsonl", {}) as other:
        other.write({"index": 0})
        assert re.search("--output_file: another process.* is writing ", score(tmp_path / "s.jsonl").err)
        assert len((tmp_path / "s.jsonl.partial").read_bytes().splitlines()) == 2


def test_a_file_that_misses_a_record_is_not_finished(tmp_path):
    with PartialFile(tmp_path / "s.jsonl", {}) as partial:
        partial.write({"index": 1})
        with pytest.raises(CheckpointError, match="does not hold every record once"):
            partial.finish(range(2))
    assert not (tmp_path / "s.jsonl").exists()


def test_lines_stand_in_the_records_order(score, make_records, tmp_path, monkeypatch):
    """Scoring runs user by user."""
    computed, own = [], scoring.effect_line
    monkeypatch.setattr(scoring, "effect_line", lambda s, t: computed.append(s.example.index) or own(s, t))
    file = make_records(tmp_path / "r.jsonl", 7)  # four users in turn
    assert score(tmp_path / "s.jsonl", "--eval_file", file, "--show", 0, "--batch_size", 2).code == 0
    written = [json.loads(line)["index"] for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == list(range(7))
    assert [sorted(computed[i : i + 2]) for i in range(0, 6, 2)] == [[0, 4], [1, 5], [2, 6]]


@pytest.mark.parametrize("words", [("--attention", "padded"), ("--attention", "mask"), ("--max_tokens", 400)], ids=str)
def test_every_attention_and_budget_gives_the_same_figures(score, scored, tmp_path, words):
    assert score(tmp_path / "s.jsonl", "--show", 0, *words).code == 0
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, expected in zip(lines, scored[0], strict=True):
        for name in ("nll_factual", "nll_counterfactual", "nll_placebo"):
            assert line[name] == pytest.approx(expected[name], abs=1e-5)


def test_a_budget_that_a_record_exceeds_is_refused(score, tmp_path):
    result = score(tmp_path / "s.jsonl", "--max_tokens", 20)
    assert result.code == 1
    assert "nextquill: --max_tokens: expected at least the" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_padded_rows_counts_padding(score, tmp_path):
    assert score(tmp_path / "s.jsonl", "--attention", "padded", "--max_tokens", 400).code == 0
    result = score(tmp_path / "t.jsonl", "--attention", "padded", "--max_tokens", 20)
    assert "nextquill: --max_tokens: expected at least the" in result.err


def test_effects_are_plain_numbers(scored):
    for line in scored[0]:
        assert all(math.isfinite(value) and abs(value) <= 1 for value in line["effect_prob"])
