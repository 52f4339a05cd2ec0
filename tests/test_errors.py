"""Errors carry the argument at fault, through pickling too, and `naming` gives them the name that the caller knows."""

import inspect
import pickle

import pytest

from nextquill import errors
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, BudgetError, CheckpointError, NextQuillError, RecordError, naming

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, NextQuillError)]


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("alpha: expected a number, got 'x'", "alpha", "expected a number, got 'x'"),
        ("max_tokens: expected 1:\n  two lines: here", "max_tokens", "expected 1:\n  two lines: here"),
        ("args.use_liger_kernel: True is not supported", "use_liger_kernel", "True is not supported"),
        ("no argument here", None, "no argument here"),
        ("train.jsonl line 3: field 'query': required", None, "train.jsonl line 3: field 'query': required"),
        ("record 3: no response", None, "record 3: no response"),
        ("/tmp/run: is a file", None, "/tmp/run: is a file"),
        ("query, key: expected one dtype", None, "query, key: expected one dtype"),
        ("branches[3]: expected a token", None, "branches[3]: expected a token"),
        ("LlamaModel: its attention is unknown", None, "LlamaModel: its attention is unknown"),
        ("first line\nalpha: not at the start", None, "first line\nalpha: not at the start"),
        ("alpha:0", None, "alpha:0"),
        ("", None, ""),
    ],
)
def test_the_argument_begins_the_message(text, argument, message):
    error = ArgumentError(text)
    assert (error.argument, error.message, str(error)) == (argument, message, text)


def test_an_argument_may_be_given_beside_the_message():
    error = RecordError("record 3: no response", argument="records")
    assert (error.argument, error.message, str(error)) == ("records", "record 3: no response", "record 3: no response")
    other = RecordError("metrics: rouge is missing", argument="records")
    assert (other.argument, other.message) == ("records", "metrics: rouge is missing")
    same = RecordError("metrics: rouge is missing", argument="metrics")
    assert (same.argument, same.message) == ("metrics", "rouge is missing")


def test_no_message_is_no_argument():
    assert (NextQuillError().argument, NextQuillError().message, str(NextQuillError())) == (None, "", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"argument": "beta"}], ids=["derived", "given"])
def test_every_kind_survives_pickling(kind, options):
    error = kind("alpha: too large", **options)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.argument, copy.message) == (str(error), error.argument, error.message)
    assert copy.argument == options.get("argument", "alpha")


def test_an_error_with_a_place_names_no_argument():
    error = pickle.loads(pickle.dumps(PlacedError("train.jsonl line 3", "required, but missing", "query")))
    assert error.argument is None
    assert error.message == str(error) == "train.jsonl line 3: field 'query': required, but missing"


def test_a_subclass_inherits_the_argument():
    class OwnError(BudgetError):
        pass

    assert OwnError("max_length: too small").argument == "max_length"


def test_naming_puts_the_callers_name_first():
    with pytest.raises(BudgetError) as caught, naming("train_file"):
        raise BudgetError("record 3: too long")
    assert str(caught.value) == "train_file: record 3: too long"
    assert (caught.value.argument, str(caught.value.__cause__)) == ("train_file", "record 3: too long")


def test_naming_replaces_only_the_inner_names_it_is_told():
    for text, expected in (
        ("source: is empty", "train_file: is empty"),
        ("limit: is negative", "train_file: limit: is negative"),
    ):
        with pytest.raises(CheckpointError, match=f"^{expected}$"), naming("train_file", "source"):
            raise CheckpointError(text)


def test_naming_turns_a_placed_error_into_a_record_error():
    with pytest.raises(RecordError) as caught, naming("train_file"):
        raise PlacedError("t.jsonl line 3", "missing", "query")
    assert type(caught.value) is RecordError
    assert str(caught.value) == "train_file: t.jsonl line 3: field 'query': missing"


def test_naming_lets_other_errors_pass():
    with pytest.raises(KeyError), naming("train_file"):
        raise KeyError("x")
