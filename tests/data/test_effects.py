"""Stored effects: found for every example, or refused with file, line and field; and carried into batches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill.data import Branch, EncodedExample, PaddedCollator, TreeCollator, load_effects
from nextquill.errors import ArgumentError, RecordError
from nextquill.storage.manifests import with_digest

RESPONSES = ([5, 6, 1], [7, 1], [8, 9, 10, 1])
EXAMPLES = [
    EncodedExample(f"u{i % 2}", i, Branch([2, 3, 4], ids), Branch([4], ids), None, 1, 1)
    for i, ids in enumerate(RESPONSES)
]


def line(index: int, /, **fields: Any) -> dict[str, Any]:
    ids = RESPONSES[index]
    values = [round(index + k / 10, 6) for k in range(len(ids))]
    return {
        "index": index,
        "user_id": f"u{index % 2}",
        "token_ids": ids,
        "nll_factual": values,
        "nll_counterfactual": [value + 0.5 for value in values],
    } | fields


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_each_example_gets_its_own_line(tmp_path: Path, order: tuple[int, ...]) -> None:
    file = write(tmp_path / "e.jsonl", [line(i) for i in order])
    found = load_effects(file, EXAMPLES)
    assert found == EXAMPLES, "everything else is what it was"
    for index, example in enumerate(found):
        wanted = line(index)
        assert example.effects is not None
        assert example.effects.dtype == torch.float32
        assert torch.equal(example.effects, torch.tensor([wanted["nll_factual"], wanted["nll_counterfactual"]]))
    assert EXAMPLES[0].effects is None


def test_lines_of_other_examples_are_skipped(tmp_path: Path) -> None:
    file = write(tmp_path / "e.jsonl", [line(0), line(1), {"index": 77}, line(2)])
    assert [example.index for example in load_effects(file, EXAMPLES[1:])] == [1, 2]


WRONG = {
    "user": (line(1, user_id="u7"), "field 'user_id': expected 'u1', whose example has index 1, got 'u7'"),
    "tokens": (
        line(1, token_ids=[7, 2]),
        r"field 'token_ids': expected the response of example 1, which begins \[7, 1",
    ),
    "fewer tokens": (line(1, token_ids=[7]), r"field 'token_ids': .* has 2 tokens, got \[7\] and 1"),
    "fewer numbers": (line(1, nll_factual=[0.1]), "field 'nll_factual': expected 2 numbers, one per token, got 1"),
    "text": (line(1, nll_counterfactual=[0.1, "x"]), "field 'nll_counterfactual': expected numbers only"),
    "flag": (line(1, nll_factual=[0.1, True]), "field 'nll_factual': expected numbers only"),
    "nan": (line(1, nll_factual=[0.1, float("nan")]), "field 'nll_factual': expected finite numbers"),
    "no list": (line(1, nll_factual=0.1), "field 'nll_factual': expected list, got float"),
    "no index": ({"user_id": "u1"}, "field 'index': required, but missing"),
    "odd index": (line(1, index="1"), "field 'index': expected int, got str"),
    "again": (line(0), "field 'index': expected each index once, got 0 again"),
    "no object": ([1], "expected an object with named fields, got list"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, wrong: str) -> None:
    bad, message = WRONG[wrong]
    file = write(tmp_path / "e.jsonl", [line(0), bad, line(2)])
    with pytest.raises(RecordError, match=f"{file} line 2: {message}"):
        load_effects(file, EXAMPLES)


def test_an_example_without_a_line_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "e.jsonl", [line(0), line(2)])
    with pytest.raises(
        RecordError, match=rf"{file}: expected a line for every example, got none with index 1 \(user 'u1"
    ):
        load_effects(file, EXAMPLES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        load_effects(tmp_path / "none", EXAMPLES)


def test_examples_with_the_same_index_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "e.jsonl", [line(0)])
    with pytest.raises(ArgumentError, match="examples: expected a different index for each"):
        load_effects(file, [EXAMPLES[0], EXAMPLES[0]])


@pytest.mark.parametrize("collate", [TreeCollator(), TreeCollator(max_tokens=14), PaddedCollator(0)], ids=str)
def test_effects_stand_beside_their_labels(tmp_path: Path, collate: Any) -> None:
    file = write(tmp_path / "e.jsonl", [line(i) for i in range(3)])
    examples = load_effects(file, EXAMPLES)[::-1]  # a batch's own order
    parts = collate(examples)["parts"]
    for part in parts:
        expected = [examples[i].effects for i in part["sequence_ids"].unique_consecutive().tolist()]
        assert part["effects"].shape == (2, part["labels"].numel())
        assert torch.equal(part["effects"], torch.cat(expected, dim=1))
    assert sum(part["labels"].numel() for part in parts) == 9


def test_a_part_with_an_example_that_has_none_has_none() -> None:
    first = dataclasses.replace(EXAMPLES[0], effects=torch.zeros(2, 3))
    (part,) = TreeCollator()([first, EXAMPLES[1]])["parts"]
    assert "effects" not in part


@pytest.mark.parametrize("off", [0.0, 2e-6, 1e-4])
def test_a_damaged_number_shows_in_the_effect(tmp_path: Path, off: float) -> None:
    """`nextquill score` writes all three, rounded to six decimals."""
    good = [line(index, effect_logprob=[0.5] * len(RESPONSES[index])) for index in range(len(RESPONSES))]
    good[1]["nll_counterfactual"][-1] += off
    path = write(tmp_path / "effects.jsonl", good)
    if off < 1e-5:
        load_effects(path, EXAMPLES)
        return
    with pytest.raises(RecordError, match=r"line 2: field 'effect_logprob': expected nll_counterfactual - nll_factual"):
        load_effects(path, EXAMPLES)


def test_a_flipped_bit_of_a_line_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Names that are not read may change, and so may white space; a difference of one in the last decimal is found."""
    good = [line(index, effect_logprob=[0.5] * len(RESPONSES[index]), effect_prob=[0.1]) for index in range(3)]
    path = write(tmp_path / "effects.jsonl", [with_digest(each) for each in good])
    content, whole = path.read_bytes(), load_effects(path, EXAMPLES)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with contextlib.suppress(RecordError):
            found = load_effects(path, EXAMPLES)
            assert found == whole, content[: place + 1]
            for one, other in zip(found, whole, strict=True):
                assert one.effects is not None
                assert other.effects is not None
                assert torch.equal(one.effects, other.effects), content[: place + 1]
    changed = with_digest(good[1]) | {"nll_factual": [1.000001, 1.1]}
    file = write(path, [with_digest(good[0]), changed, with_digest(good[2])])
    with pytest.raises(
        RecordError, match=f"{file} line 2: field 'digest': expected that of the line, which is damaged"
    ):
        load_effects(file, EXAMPLES)
