"""`generate` and `chat`: histories from files, records and standard input; texts, comparisons and refusals."""

import io
import json

import pytest

from nextquill.data import read_jsonl
from nextquill.generation.writer import Writer

TEXTS = ["the soup was salty", {"title": "naïve café", "text": "warm and friendly"}]


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    path = tmp_path_factory.mktemp("history") / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def common(trained):
    return "--model_name_or_path", trained, "--max_new_tokens", 6


@pytest.fixture(scope="module")
def records(data):
    return data / "train.jsonl"


def test_one_query_is_written_to_standard_output_alone(nextquill, common, history, trained):
    out = nextquill("generate", *common, "--history_file", history, "--query", "warm soup", "--guidance", 0.5)
    assert out.code == 0, out.err
    expected = Writer.load(str(trained)).write("warm soup", TEXTS, guidance=0.5, max_new_tokens=6)
    assert out.out == expected[0] + "\n"
    assert "2 texts of the user in the prompt" in out.err


def test_the_history_may_come_from_standard_input(nextquill, common, history, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(json.dumps(text) for text in TEXTS)))
    piped = nextquill("generate", *common, "--history_file", "-", "--query", "warm soup")
    assert piped.out == nextquill("generate", *common, "--history_file", history, "--query", "warm soup").out
    monkeypatch.setattr("sys.stdin", io.StringIO('"a"\n{'))
    broken = nextquill("generate", *common, "--history_file", "-", "--query", "x")
    assert broken.code == 1
    assert "--history_file: standard input line 2: not valid JSON: Expecting property name" in broken.err


def test_histories_side_by_side(nextquill, common, records, tmp_path, trained):
    queries, target = tmp_path / "queries.jsonl", tmp_path / "deep" / "out.jsonl"
    queries.write_text('"warm soup"\n{"query": "quick service"}\n')
    out = nextquill(
        "generate", *common, "--records_file", records, "--user_id", "u1", "--queries_file", queries,
        "--compare_history", "--guidance", 1, "--output_file", target,
    )  # fmt: skip
    assert out.code == 0, out.err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(line["history"], line["query"], line["guidance"]) for line in lines] == [
        (name, query, guidance)
        for name, guidance in (("own history", 1.0), ("no history", 0.0), ("history of u2", 0.0))
        for query in ("warm soup", "quick service")
    ]
    last = {record.user_id: record.history for record in read_jsonl(records)}
    writer = Writer.load(str(trained))
    asked = ["warm soup", "quick service"]
    expected = writer.write(asked, last["u1"], guidance=1.0, max_new_tokens=6)
    expected += writer.write(asked, max_new_tokens=6) + writer.write(asked, last["u2"], max_new_tokens=6)
    assert [line["text"] for line in lines] == expected
    assert all(name in out.out for name in ("own history", "no history", "history of u2", "warm soup"))
    again = nextquill("generate", *common, "--history_file", queries, "--query", "x", "--output_file", target)
    assert again.code == 1
    assert f"--output_file: {target} exists" in again.err


def test_guidance_can_move_away_from_another_users_history(nextquill, common, records, trained):
    words = ("generate", *common, "--records_file", records, "--user_id", "u1", "--query", "warm soup", "--guidance", 2)
    out = nextquill(*words, "--guidance_against", "placebo", "--other_user_id", "u0")
    last = {record.user_id: record.history for record in read_jsonl(records)}
    writer = Writer.load(str(trained))
    options = {"guidance": 2.0, "max_new_tokens": 6}
    assert out.out == writer.write("warm soup", last["u1"], against=last["u0"], **options)[0] + "\n"


def test_the_best_of_several_samples_is_written(nextquill, common, records, trained):
    words = ("generate", *common, "--records_file", records, "--user_id", "u1", "--query", "warm soup")
    words += ("--temperature", 3, "--best_of", 6)
    last = {record.user_id: record.history for record in read_jsonl(records)}
    writer, options = Writer.load(str(trained)), {"temperature": 3.0, "max_new_tokens": 6, "best_of": 6}
    for more, against in (((), ()), (("--guidance_against", "placebo", "--other_user_id", "u0"), last["u0"])):
        expected = writer.write("warm soup", last["u1"], against=against, **options)[0]
        assert nextquill(*words, *more).out == expected + "\n"


def test_an_empty_history_is_said_to_leave_guidance_without_effect(nextquill, common, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    guided = nextquill("generate", *common, "--history_file", empty, "--query", "soup", "--guidance", 1)
    assert guided.code == 0
    assert "the history is empty, so --guidance and --best_of change nothing" in guided.err
    assert guided.out == nextquill("generate", *common, "--history_file", empty, "--query", "soup").out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--query", "x"], 2, "--history_file: expected either this flag or --records_file with --user_id"),
        (["--query", "x", "--records_file", "RECORDS"], 2, "--user_id: expected together with --records_file"),
        (["--query", "x", "--records_file", "RECORDS", "--user_id", "u9"], 2, "has no user 'u9'; it has 4, such as u0"),
        (["--query", "x", "--history_file", "gone.jsonl"], 1, "--history_file: gone.jsonl is not a file"),
        (["--history_file", "HISTORY"], 2, "--query: expected either this flag or --queries_file"),
        (["--query", "x", "--history_file", "HISTORY", "--guidance", "-1"], 2, "--guidance: expected a finite number"),
        (["--query", "x", "--history_file", "HISTORY", "--best_of", "8"], 2, "--best_of: expected a temperature above"),
        (["--query", "x", "--history_file", "HISTORY", "--plausibility", "2"], 2, "--plausibility: expected a share"),
        (
            ["--query", "x", "--history_file", "HISTORY", "--draft_tokens", "2", "--engine", "hf"],
            2, "--draft_tokens: expected 0 with engine 'hf'",
        ),
        (
            ["--query", "x", "--history_file", "HISTORY", "--guidance", "1", "--guidance_against", "placebo"],
            2, "--guidance_against: placebo needs --records_file with another user",
        ),
        (["--query", "soup " * 3000, "--history_file", "HISTORY"], 1, "query: the prompt without any history takes"),
        (["--query", "x", "--history_file", "RECORDS"], 1, "field 'history[0].text': required, but missing"),
    ],
)  # fmt: skip
def test_bad_input(nextquill, common, history, records, words, code, message):
    words = [{"RECORDS": records, "HISTORY": history}.get(word, word) for word in words]
    out = nextquill("generate", *common, *words)
    assert out.code == code
    assert message in out.err
    assert out.err.count("\n") <= 1


def test_chat(nextquill, common, records, monkeypatch):
    asked = "warm soup\n\n/guidance 1\nwarm soup\n/guidance x\n/compare\nquick\n/history\n/foo\n" + "soup " * 3000
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    out = nextquill("chat", *common, "--records_file", records, "--user_id", "u1")
    assert out.code == 0, out.err
    alone = ["generate", *common, "--records_file", records, "--user_id", "u1", "--query", "warm soup"]
    plain, guided = (nextquill(*alone, "--guidance", gamma).out for gamma in (0, 1))
    last = {record.user_id: record.history for record in read_jsonl(records)}["u1"]
    assert all(item.text[:40] in out.out for item in last)
    assert plain + guided in out.out
    assert "history of u2" in out.out
    for note in (
        "guidance is 1",
        "expected a number of at least 0, got 'x'",
        "unknown command /foo",
        "query: the prompt",
    ):
        assert note in out.err
    refused = nextquill("chat", *common, "--history_file", "-")
    assert "--history_file: expected a file, as the queries come from standard input" in refused.err
