"""`nextquill popi summarize, summaries, evaluate, export` with trained models, and their refusals."""

import json
import shutil

import pytest

from nextquill.data import read_jsonl
from nextquill.popi.saved_run import SavedRun
from nextquill.popi.summaries import Summary, SummaryFile, signals_hash
from nextquill.popi.users import held_out, users_from_records

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
COLOURS = "red green blue".split()


# ---- summaries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summarize(popi, popi_model, pairs):
    def call(file, *words):
        flags = ("--model", popi_model, "--signals_file", pairs / "test.jsonl", "--output_file", file)
        return popi("summarize", *flags, *words)

    return call


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_one_summary_a_user_and_nothing_twice(summarize, tmp_path, popi_model):
    file = tmp_path / "new" / "s.jsonl"
    result = summarize(file)
    assert result.code == 0, result.err
    assert "3 written, 0 kept" in result.err
    first = lines(file)
    assert [line["user_id"] for line in first] == ["u3", "u4", "u5"]
    assert {line["model"] for line in first} == {SavedRun(popi_model).writer()}
    assert all(line["tokens"] <= 6 for line in first)
    assert "0 written, 3 kept" in summarize(file).err
    assert lines(file) == first
    assert "1 written" in summarize(tmp_path / "one.jsonl", "--limit", 1).err
    assert [line["summary"] for line in lines(tmp_path / "one.jsonl")] == [first[0]["summary"]], "of batch mates"
    assert "3 written" in summarize(file, "--signals_per_user", 2).err, "other signals"
    assert "3 written" in summarize(file, "--signals_per_user", 2, "--again").err


def test_a_summary_that_was_cut_is_marked_until_it_is_edited(summarize, popi, tmp_path):
    file = tmp_path / "s.jsonl"
    result = summarize(file, "--max_new_tokens", 1)
    assert "summaries cut at the limit of tokens: 3, such as that of 'u3'; see --max_new_tokens" in result.err
    assert [line["cut"] for line in lines(file)] == [True] * 3
    assert "1 tokens, cut at the limit)" in popi("summaries", "--summaries", file, "--show", "u4").out
    assert "cut" not in popi("summaries", "--summaries", file, "--edit", "u4", "Likes green things.").out
    assert [line["cut"] for line in lines(file)] == [True, False, True]


def test_an_edit_stays_and_a_deleted_summary_comes_back(summarize, popi, tmp_path):
    file = tmp_path / "s.jsonl"
    summarize(file)
    result = popi("summaries", "--summaries", file, "--edit", "u4", "Likes green things.")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("u4  (edited by a person, ")
    assert popi("summaries", "--summaries", file, "--show", "u4").out == result.out
    shown = popi("summaries", "--summaries", file).out
    assert [line.split()[0] for line in shown.splitlines() if not line.startswith("  ")] == ["u3", "u4", "u5"]
    assert popi("summaries", "--summaries", file, "--delete", "u5").code == 0
    again = summarize(file, "--again")
    assert "2 written, 1 kept (1 edited by a person)" in again.err
    assert lines(file)[1]["summary"] == "Likes green things."
    outdated = summarize(file, "--signals_per_user", 2)
    assert "edited summaries whose signals have changed: 1, such as that of 'u4'" in outdated.err
    assert "3 written" in summarize(file, "--force").err
    assert lines(file)[1]["summary"] != "Likes green things."


def test_summaries_that_were_written_are_kept_when_it_is_stopped(summarize, tmp_path, monkeypatch):
    from nextquill.cli import popi_summarize

    real = popi_summarize.summarize

    def stopping(*arguments, **options):
        for count, each in enumerate(real(*arguments, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(popi_summarize, "summarize", stopping)
    file = tmp_path / "s.jsonl"
    assert summarize(file).code == 130
    assert len(lines(file)) == 2
    monkeypatch.setattr(popi_summarize, "summarize", real)
    assert "1 written, 2 kept" in summarize(file).err


WRONG_SUMMARIES = {
    "model": (("--model", "."), "--model: .: expected a folder that POPI has written"),
    "file": (("--signals_file", "no.jsonl"), "--records_file: no.jsonl"),
    "number": (("--batch_size", 0), "--batch_size: expected a positive number"),
    "temperature": (("--temperature", -1), "--temperature: expected 0"),
    "pairs": (("--max_pairs", 1), "--max_pairs: expected --held_out"),
}


@pytest.mark.parametrize("what", WRONG_SUMMARIES)
def test_bad_input_of_summarize_is_one_line(summarize, tmp_path, what):
    words, message = WRONG_SUMMARIES[what]
    result = summarize(tmp_path / "s.jsonl", *words)
    assert result.code in (1, 2)
    assert result.err.count("\n") == 1
    assert message in result.err
    assert not (tmp_path / "s.jsonl").exists()


def test_a_missing_adapter_is_one_line(summarize, popi_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(popi_model, copy, ignore=shutil.ignore_patterns("checkpoint-*", "adapter_model*"))
    result = summarize(tmp_path / "s.jsonl", "--model", copy)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "the inference adapter is missing" in result.err


def test_a_file_that_holds_something_else_is_left_alone(summarize, tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text('{"precious": 1}\n')
    result = summarize(file)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("nextquill: --output_file: ")
    assert file.read_text() == '{"precious": 1}\n'


def test_users_with_past_texts_alone_are_summarised(popi, popi_model, tmp_path, make_records):
    """No pairs are needed, because none is scored."""
    file, out = make_records(tmp_path / "logs.jsonl", 6), tmp_path / "out.jsonl"
    result = popi("summarize", "--model", popi_model, "--signals_file", file, "--output_file", out)
    assert result.code == 0, result.err
    assert len(lines(out)) >= 1


def test_users_with_too_few_signals_are_counted(summarize, tmp_path, write_pairs):
    few = write_pairs(tmp_path / "few.jsonl", users=1, pairs=1)
    assert (
        "expected users with at least 2 signals, got none of 1"
        in summarize(tmp_path / "s.jsonl", "--signals_file", few).err
    )
    many = write_pairs(tmp_path / "many.jsonl", users=1, first=7)
    result = summarize(tmp_path / "s.jsonl", "--signals_file", few, many)
    assert "users left out with too few signals: 1, such as 'u0'" in result.err
    assert [line["user_id"] for line in lines(tmp_path / "s.jsonl")] == ["u7"]


WRONG_EDITS = {
    "user": (("--show", "me"), "--show: expected one of the 3 users"),
    "text": (("--edit", "u3"), "--edit: expected a user and a text in quotation marks, got 1"),
    "words": (("--edit", "u3", "two", "words"), "got 3"),
    "both": (("--show", "u3", "--delete", "u3"), "expected one of --show, --edit and --delete"),
    "file": (("--summaries", "no.jsonl"), "--summaries_file: no.jsonl is not a file"),
}


@pytest.mark.parametrize("what", WRONG_EDITS)
def test_bad_input_of_summaries_is_one_line(summarize, popi, tmp_path, what):
    file = tmp_path / "s.jsonl"
    SummaryFile(file).put(*_made("u3", "u4", "u5"))
    before = file.read_bytes()
    words, message = WRONG_EDITS[what]
    result = popi("summaries", "--summaries", file, *words)
    assert result.code in (1, 2)
    assert result.err.count("\n") == 1
    assert message in result.err
    assert file.read_bytes() == before


def _made(*users, text="Likes green."):
    return [Summary.made_now(user, (), model="m", summary=text) for user in users]


# ---- evaluate --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(summarize, tmp_path_factory):
    """Useful summaries of the held-out signals, which a model with little training does not write."""
    file = tmp_path_factory.mktemp("told") / "s.jsonl"
    assert summarize(file, "--held_out").code == 0
    for k, user in enumerate(("u3", "u4", "u5")):
        SummaryFile(file).edit(user, f"Likes {COLOURS[k]} things.")
    return file


@pytest.fixture(scope="module")
def evaluate(popi, popi_model, pairs):
    def call(*words):
        return popi("evaluate", "--model", popi_model, "--test_file", pairs / "test.jsonl", "--resamples", 100, *words)

    return call


def test_evaluation_prints_a_table_and_writes_it(evaluate, told, popi_model, tmp_path):
    target = tmp_path / "e.json"
    result = evaluate("--summaries", told, "--output_file", target, "--transfer_model", popi_model / "base")
    assert result.code == 0, result.err
    for word in (
        "none",
        "signals",
        "summary",
        "placebo",
        "accuracy",
        "margin r",
        "summary - placebo",
        "transfer: ",
        "9 pairs of 3 users",
    ):
        assert word in result.out, word
    assert result.err.startswith("nextquill: 3 users, 9 pairs\n")
    found = json.loads(target.read_text())
    assert found["generator"]["contexts"].keys() == {"none", "signals", "summary", "placebo"}
    assert found["generator"]["contexts"]["signals"]["context_tokens"] > 20
    assert found["generator"]["contexts"]["none"]["margin"]["value"] != 0, "the reference is the trained generator"
    transferred = found["transfer"][str(popi_model / "base")]
    assert transferred["contexts"]["none"]["margin"]["value"] == 0
    assert transferred["contexts"]["none"]["accuracy"]["value"] == 0.5
    assert transferred["contexts"]["signals"]["margin"]["value"] != 0
    assert found["settings"]["objective"] == "ipo"
    assert found["left_out"] == {"no_pairs": 0, "few_signals": 0}
    refused = evaluate("--output_file", target)
    assert "--output_file" in refused.err
    assert refused.code == 1
    assert json.loads(target.read_text()) == found


def test_the_trainers_own_evaluation_is_the_same(evaluate, popi_model, tmp_path):
    assert evaluate("--output_file", tmp_path / "e.json").code == 0
    contexts = json.loads((tmp_path / "e.json").read_text())["generator"]["contexts"]
    logged = json.loads((popi_model / "metrics.json").read_text())["eval"]
    for context, suffix in (("summary", ""), ("none", "_none")):
        for name in ("accuracy", "margin", "loss"):
            assert contexts[context][name]["value"] == pytest.approx(logged[f"eval_{name}{suffix}"], abs=1e-4)


def test_checkpoints_and_moved_folders_of_new_models_are_found(evaluate, popi_model, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(popi_model, moved)
    assert not [file for file in moved.rglob("*.json") if str(popi_model) in file.read_text(encoding="utf-8")]
    for place, target in ((moved, "a"), (popi_model / "checkpoint-1", "b"), (popi_model, "c")):
        result = evaluate("--model", place, "--output_file", tmp_path / f"{target}.json")
        assert result.code == 0, result.err
    found = [json.loads((tmp_path / f"{name}.json").read_text())["generator"] for name in "abc"]
    assert found[0] == found[1] == found[2]


def test_a_file_of_the_same_summaries_gives_the_same_figures(evaluate, summarize, tmp_path, pairs):
    file = tmp_path / "s.jsonl"
    assert summarize(file, "--held_out").code == 0
    assert evaluate("--summaries", file, "--output_file", tmp_path / "a.json").code == 0
    assert evaluate("--output_file", tmp_path / "b.json").code == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["generator"] == second["generator"]


def test_summaries_that_may_have_seen_a_judged_pair_are_refused(evaluate, summarize, tmp_path, pairs):
    file = tmp_path / "s.jsonl"
    summarize(file, "--signals_per_user", 6)  # of all pairs
    SummaryFile(file).edit("u3", "Likes red hats.")  # an edit makes it no better
    result = evaluate("--summaries", file)
    assert (result.code, result.err.count("\n")) == (1, 2)
    assert "3 of 3 users have no summary of exactly these signals, such as 'u3'" in result.err
    users = users_from_records(read_jsonl(pairs / "test.jsonl"))
    summarize(tmp_path / "h.jsonl", "--held_out")
    for user in users:
        kept = SummaryFile(tmp_path / "h.jsonl").read()[user.user_id]
        draw = held_out(user, num_signals=3)
        assert kept.signals_hash == signals_hash(draw.signals)
        assert not {pair.as_item() for pair in draw.pairs} & set(draw.signals)


def test_empty_summaries_are_counted(evaluate, told, tmp_path):
    file = tmp_path / "s.jsonl"
    shutil.copy(told, file)
    SummaryFile(file).edit("u4", " ")
    result = evaluate("--summaries", file, "--output_file", tmp_path / "e.json")
    assert result.code == 0, result.err
    assert "empty summaries, which give no context: 1" in result.err
    assert json.loads((tmp_path / "e.json").read_text())["empty_summaries"] == 1


def test_one_user_has_no_placebo_and_no_interval(evaluate):
    result = evaluate("--limit", 1)
    assert result.code == 0, result.err
    assert "No placebo: it needs two users with a summary." in result.out


def test_users_who_cannot_be_judged_are_counted(evaluate, make_records, tmp_path, pairs, write_pairs):
    few = write_pairs(tmp_path / "few.jsonl", users=1, pairs=1)
    none = make_records(tmp_path / "none.jsonl", 1, user_id="nobody")
    result = evaluate("--test_file", few, none, pairs / "test.jsonl", "--output_file", tmp_path / "e.json")
    assert result.code == 0, result.err
    assert "1 left out without pairs, such as 'nobody'" in result.err
    assert "1 left out with too few signals, such as 'u0'" in result.err
    assert json.loads((tmp_path / "e.json").read_text())["left_out"] == {"no_pairs": 1, "few_signals": 1}
    alone = evaluate("--test_file", few)
    assert (alone.code, alone.err.count("\n")) == (1, 1)
    assert "--eval_file: users: expected some with pairs and signals beside them, got none" in alone.err


WRONG_EVALUATION = {
    "level": (("--level", 2), "--level: expected a share"),
    "tokens": (("--max_tokens", 0), "--max_tokens: expected a positive number"),
    "model": (("--model", "nowhere"), "--model: nowhere: expected a folder that POPI has written"),
    "summaries": (("--summaries", "no.jsonl"), "--summaries_file: no.jsonl is not a file"),
    "transfer": (("--transfer_model", "./nothing"), "--transfer_model: there is no folder"),
    "reference": (("--reference_model", "./nothing"), "--reference_model: there is no folder"),
}


@pytest.mark.parametrize("what", WRONG_EVALUATION)
def test_bad_input_of_evaluate_is_one_line(evaluate, what):
    words, message = WRONG_EVALUATION[what]
    result = evaluate(*words)
    assert result.code in (1, 2)
    assert message in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


# ---- export ----------------------------------------------------------------------------------------


def test_prompts_with_summaries_are_exported(popi, popi_model, pairs, tmp_path):
    file, queries = tmp_path / "s.jsonl", tmp_path / "q.jsonl"
    SummaryFile(file).put(*_made("u3", text="Likes green things."))
    queries.write_text('{"user_id": "u3", "query": "Which hat?"}\n{"user_id": 9, "query": "And now?", "more": 1}\n')
    flags = ("--summaries", file, "--queries_file", queries)
    result = popi("export", *flags, "--output_file", tmp_path / "chat.jsonl", "--model", popi_model)
    assert result.code == 0, result.err
    assert "2 prompts" in result.err
    assert "1 of them without a summary, such as that of '9'" in result.err
    first, second = lines(tmp_path / "chat.jsonl")
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert "Likes green things." in first["messages"][0]["content"]
    assert second["messages"] == [{"role": "user", "content": "And now?"}]
    assert popi("export", *flags, "--output_file", tmp_path / "t.jsonl", "--format", "text").code == 0
    assert "Likes green things." in lines(tmp_path / "t.jsonl")[0]["prompt"]
    assert popi("export", *flags, "--output_file", tmp_path / "t.jsonl").code == 1
    assert (
        popi(
            "export", "--summaries", file, "--queries_file", pairs / "test.jsonl", "--output_file", tmp_path / "r"
        ).code
        == 0
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1: expected an object with user_id and query, got list"),
        ('{"user_id": "u"}', "field 'query'"),
        ('{"query": "x"}', "field 'user_id'"),
        ("", "at least one to export"),
    ],
)
def test_bad_queries_are_one_line_and_write_nothing(popi, tmp_path, line, message):
    file, queries = tmp_path / "s.jsonl", tmp_path / "q.jsonl"
    SummaryFile(file).put(*_made("u3"))
    queries.write_text(line + "\n")
    result = popi("export", "--summaries", file, "--queries_file", queries, "--output_file", tmp_path / "o.jsonl")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "--queries_file: " in result.err
    assert message in result.err
    assert not (tmp_path / "o.jsonl").exists()


def test_inputs_are_not_overwritten(popi, tmp_path):
    file, queries = tmp_path / "s.jsonl", tmp_path / "q.jsonl"
    SummaryFile(file).put(*_made("u3"))
    queries.write_text('{"user_id": "u3", "query": "x"}\n')
    result = popi("export", "--summaries", file, "--queries_file", queries, "--output_file", queries, "--overwrite")
    assert "expected a file of its own" in result.err
    assert result.code == 2
