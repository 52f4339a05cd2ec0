from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import Branch, EncodedExample, ExampleEncoder, PairCollator, stack_branches
from nextquill.errors import ArgumentError, ArgumentTypeError

PAD = 99
IDS = st.lists(st.integers(0, 98), min_size=1, max_size=7)


@st.composite
def _examples(draw: st.DrawFn) -> EncodedExample:
    response = draw(IDS)
    factual, counterfactual, placebo = (Branch(draw(IDS), response) for _ in range(3))
    return EncodedExample("ann", draw(st.integers(0, 9)), factual, counterfactual, placebo, 1, 1)


def _example(prompt: list[int], response: list[int], index: int = 0) -> EncodedExample:
    return EncodedExample("ann", index, Branch(prompt, response), Branch(prompt[:1], response), None, 1, 1)


def test_labels_name_the_token_each_position_predicts() -> None:
    batch = PairCollator(PAD)([_example([1, 2, 3], [4, 5], index=7), _example([6], [8], index=2)])
    assert batch["factual"]["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 8, PAD, PAD, PAD]]
    assert batch["factual"]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["factual"]["labels"].tolist() == [[-100, -100, 4, 5, -100], [8, -100, -100, -100, -100]]
    assert batch["counterfactual"]["input_ids"].tolist() == [[1, 4, 5], [6, 8, PAD]]
    assert batch["counterfactual"]["labels"].tolist() == [[4, 5, -100], [8, -100, -100]]
    assert batch["example_index"].tolist() == [7, 2]
    assert sorted(batch) == ["counterfactual", "example_index", "factual"]


@settings(deadline=None)
@given(examples=st.lists(_examples(), min_size=1, max_size=5), multiple=st.sampled_from([None, 1, 4, 8]))
def test_every_branch_supervises_the_same_sequence(examples: list[EncodedExample], multiple: int | None) -> None:
    names = ("factual", "counterfactual", "placebo")
    batch = PairCollator(PAD, names, multiple)(examples)
    expected = [token for example in examples for token in example.factual.response_ids]
    for name in names:
        branch = batch[name]
        assert branch["labels"][branch["labels"] != -100].tolist() == expected
        assert {tensor.dtype for tensor in branch.values()} == {torch.int64}


@settings(deadline=None)
@given(examples=st.lists(_examples(), min_size=1, max_size=5), multiple=st.sampled_from([None, 1, 4, 8]))
def test_every_label_is_the_next_input_of_its_row_and_padding_is_masked(
    examples: list[EncodedExample], multiple: int | None
) -> None:
    batch = PairCollator(PAD, ("factual", "placebo"), multiple)(examples)
    for name in ("factual", "placebo"):
        ids, mask, labels = (batch[name][key] for key in ("input_ids", "attention_mask", "labels"))
        rows, columns = torch.nonzero(labels != -100, as_tuple=True)
        assert torch.equal(ids[rows, columns + 1], labels[rows, columns])
        branches = [getattr(example, name) for example in examples]
        for row, branch in enumerate(branches):
            length = len(branch.input_ids)
            assert ids[row, :length].tolist() == branch.input_ids
            assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)
            assert set(ids[row, length:].tolist()) <= {PAD}
        longest = max(len(branch.input_ids) for branch in branches)
        step = multiple or 1
        assert longest <= ids.shape[1] < longest + step
        assert ids.shape[1] % step == 0


def test_encoded_records_collate_with_their_responses(plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record("Thin plot.", user_id="ann"), make_record("Loud.", "Long.", user_id="bob", response="Fine.")]
    examples = ExampleEncoder(plain_tokenizer).encode_all(records, placebo=True)
    batch = PairCollator(plain_tokenizer.pad_token_id, ("factual", "counterfactual", "placebo"))(examples)
    for name in ("factual", "counterfactual", "placebo"):
        labels = batch[name]["labels"]
        texts = [plain_tokenizer.decode(row[row != -100]) for row in labels]
        assert texts == ["Slow, and good.</s>", "Fine.</s>"]


def test_a_missing_branch_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"^examples: expected a placebo branch in each, got none in example 4 "):
        PairCollator(PAD, ("factual", "placebo"))([_example([1], [2], index=4)])


def test_a_branch_without_prompt_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"got none in the factual branch of example 4"):
        PairCollator(PAD)([_example([], [2], index=4)])


def test_no_examples_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^examples: expected at least one, got none$"):
        PairCollator(PAD)([])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pad_token_id": None}, ArgumentTypeError, "pad_token_id: expected an integer, got None"),
        ({"pad_token_id": -1}, ArgumentError, "pad_token_id: expected at least 0, got -1"),
        ({"pad_to_multiple_of": 0}, ArgumentError, "pad_to_multiple_of: expected at least 1, got 0"),
        ({"pad_to_multiple_of": 8.0}, ArgumentTypeError, "pad_to_multiple_of: expected an integer, got 8.0"),
        ({"branches": ()}, ArgumentError, "branches: expected a tuple of some of"),
        ({"branches": "factual"}, ArgumentError, "branches: expected a tuple of some of"),
        ({"branches": ("labels",)}, ArgumentError, "branches: expected a tuple of some of"),
        ({"branches": ("factual", "factual")}, ArgumentError, "branches: expected each once"),
    ],
    ids=["pad-none", "pad-negative", "multiple-zero", "multiple-float", "none", "string", "unknown", "twice"],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        PairCollator(**{"pad_token_id": PAD, **arguments})
    assert str(caught.value).startswith(message)


@settings(deadline=None)
@given(examples=st.lists(_examples(), min_size=1, max_size=4))
def test_stacked_branches_hold_each_branch_in_its_rows(examples: list[EncodedExample]) -> None:
    batch = PairCollator(PAD, ("factual", "counterfactual", "placebo"))(examples)
    branches = [batch["placebo"], batch["factual"], batch["counterfactual"]]
    stacked = stack_branches(*branches, pad_token_id=PAD)
    length = max(branch["input_ids"].shape[1] for branch in branches)
    fills = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    assert sorted(stacked) == sorted(fills)
    for key, fill in fills.items():
        assert stacked[key].shape == (3 * len(examples), length)
        for part, branch in zip(stacked[key].split(len(examples)), branches, strict=True):
            width = branch[key].shape[1]
            assert torch.equal(part[:, :width], branch[key])
            assert torch.equal(part[:, width:], torch.full_like(part[:, width:], fill))


def test_stack_branches_refuses_nothing_and_other_keys() -> None:
    with pytest.raises(ArgumentError, match=r"^branches: expected at least one, got none$"):
        stack_branches()
    batch = PairCollator(PAD)([_example([1], [2])])
    with pytest.raises(ArgumentError, match=r"^branches\[1\]: expected the keys .*got \['input_ids'\]$"):
        stack_branches(batch["factual"], {"input_ids": batch["factual"]["input_ids"]})
