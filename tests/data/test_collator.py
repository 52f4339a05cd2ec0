"""Batches: hidden rows that predict labels, shared rows, and the division into parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import Branch, EncodedExample, ExampleEncoder, PaddedCollator, TreeCollator
from nextquill.data.collator import CONSTANT_COUNTERFACTUAL, FACTUAL, JOINT, to_device
from nextquill.data.templates import BRANCHES
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError
from nextquill.tree import TreeLayout, build_prefix_tree

PAD = 99
LAYOUTS = {
    "factual": FACTUAL,
    "constant": CONSTANT_COUNTERFACTUAL,
    "joint": JOINT,
    "all in one": (("counterfactual", "placebo", "factual"),),
    "one each": (("counterfactual",), ("placebo",), ("factual",)),
}
# Few tokens, so that prompts share prefixes, end inside one another and are equal.
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
FORWARDS = st.sampled_from(list(LAYOUTS.values()))


@st.composite
def _examples(draw: st.DrawFn) -> EncodedExample:
    response = draw(IDS)
    factual, counterfactual, placebo = (Branch(draw(IDS), response) for _ in range(3))
    user = draw(st.sampled_from(["ann", "bob"]))
    return EncodedExample(user, draw(st.integers(0, 9)), factual, counterfactual, placebo, 1, 1)


EXAMPLES = st.lists(_examples(), min_size=1, max_size=5)


def _example(prompt: list[int], response: list[int], index: int = 0, user: str = "ann") -> EncodedExample:
    return EncodedExample(user, index, Branch(prompt, response), Branch(prompt[:1], response), None, 1, 1)


def seen_tokens(forward: dict[str, Any], position: int) -> list[int]:
    """The tokens that a flattened position sees, with itself, in order."""
    length = forward["input_ids"].shape[1]
    row, at = divmod(position, length)
    if "attention_mask" in forward:
        assert forward["attention_mask"][row, : at + 1].all()
        return forward["input_ids"][row, : at + 1].tolist()
    path = [j for j in range(at + 1) if at < forward["subtree_end"][0, j]]
    assert forward["position_ids"][0, path].tolist() == list(range(len(path)))
    return forward["input_ids"][0, path].tolist()


def assert_rows_predict_labels(part: dict[str, Any], examples: list[EncodedExample], forwards: Any) -> None:
    """Assert that, in every branch, each label's row sees the prompt and the response before the label."""
    assert [tuple(forward["rows"]) for forward in part["forwards"]] == list(forwards)
    members = part["sequence_ids"].unique_consecutive().tolist()
    assert len(members) == len(set(members)) == part["num_sequences"], "examples of the part"
    wanted = [(i, k) for i in members for k in range(len(examples[i].factual.response_ids))]
    assert part["sequence_ids"].tolist() == [i for i, _ in wanted]
    assert part["labels"].tolist() == [examples[i].factual.response_ids[k] for i, k in wanted]
    for forward in part["forwards"]:
        for name, rows in forward["rows"].items():
            branches = [getattr(examples[i], name) for i, _ in wanted]
            expected = [b.prompt_ids + b.response_ids[:k] for b, (_, k) in zip(branches, wanted, strict=True)]
            assert [seen_tokens(forward, row) for row in rows.tolist()] == expected, f"rows of the {name} branch"
    tensors = [part["labels"], part["sequence_ids"], *(rows for f in part["forwards"] for rows in f["rows"].values())]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def branch_tokens(examples: list[EncodedExample], forwards: Any) -> int:
    return sum(len(getattr(example, name).input_ids) for example in examples for names in forwards for name in names)


# ---- what both collators hold ----------------------------------------------------------------------


@settings(deadline=None)
@given(examples=EXAMPLES, forwards=FORWARDS)
def test_rows_of_trees_predict_their_labels(examples: list[EncodedExample], forwards: Any) -> None:
    batch = TreeCollator(forwards)(examples)
    assert sorted(batch) == ["example_index", "parts", "users"]
    assert batch["example_index"].tolist() == [example.index for example in examples]
    (part,) = batch["parts"]
    assert_rows_predict_labels(part, examples, forwards)
    for forward, names in zip(part["forwards"], forwards, strict=True):
        tree = build_prefix_tree([getattr(example, name).input_ids for name in names for example in examples])
        for key in ("input_ids", "position_ids", "subtree_end"):
            assert torch.equal(forward[key], getattr(tree, key)[None]), key
        assert torch.equal(forward["layout"].segments, TreeLayout.of_tree(tree).segments)
    assert part["num_tokens"] == sum(forward["input_ids"].numel() for forward in part["forwards"])
    assert part["num_branch_tokens"] == branch_tokens(examples, forwards)


@settings(deadline=None)
@given(examples=EXAMPLES, forwards=FORWARDS, multiple=st.sampled_from([None, 1, 4, 8]))
def test_rows_of_padded_branches_predict_their_labels(
    examples: list[EncodedExample], forwards: Any, multiple: int | None
) -> None:
    batch = PaddedCollator(PAD, forwards, multiple)(examples)
    assert sorted(batch) == ["example_index", "parts", "users"]
    (part,) = batch["parts"]
    assert part["sequence_ids"].unique().tolist() == list(range(len(examples)))
    assert_rows_predict_labels(part, examples, forwards)
    for forward, names in zip(part["forwards"], forwards, strict=True):
        branches = [getattr(example, name).input_ids for name in names for example in examples]
        ids, mask = forward["input_ids"], forward["attention_mask"]
        assert ids.shape == mask.shape == (len(branches), ids.shape[1])
        for row, branch in enumerate(branches):
            padding = ids.shape[1] - len(branch)
            assert ids[row].tolist() == branch + [PAD] * padding
            assert mask[row].tolist() == [1] * len(branch) + [0] * padding
        longest, step = max(map(len, branches)), multiple or 1
        assert longest <= ids.shape[1] < longest + step
        assert ids.shape[1] % step == 0
    assert part["num_tokens"] == sum(forward["input_ids"].numel() for forward in part["forwards"])
    assert part["num_branch_tokens"] == branch_tokens(examples, forwards)


def test_a_tree_written_out() -> None:
    """Both branches of two examples with a common history: 1 2 3, questions 4 and 5."""
    examples = [
        EncodedExample("ann", 7, Branch([1, 2, 3, 4], [8, 9]), Branch([1, 4], [8, 9]), None, 1, 1),
        EncodedExample("ann", 2, Branch([1, 2, 3, 5], [6]), Branch([1, 5], [6]), None, 1, 1),
    ]
    batch = TreeCollator()(examples)
    (part,) = batch["parts"]
    (forward,) = part["forwards"]
    assert forward["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9, 5, 6, 4, 8, 9, 5, 6]]
    assert forward["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 1, 2, 3, 1, 2]]
    assert forward["subtree_end"].tolist() == [[13, 8, 8, 6, 6, 6, 8, 8, 11, 11, 11, 13, 13]]
    assert part["labels"].tolist() == [8, 9, 6]
    assert part["sequence_ids"].tolist() == [0, 0, 1]
    assert forward["rows"]["factual"].tolist() == [3, 4, 6]
    assert forward["rows"]["counterfactual"].tolist() == [8, 9, 11]
    assert (part["num_tokens"], part["num_branch_tokens"], part["num_sequences"]) == (13, 18, 2)
    assert batch["example_index"].tolist() == [7, 2]


def test_padded_rows_written_out() -> None:
    (part,) = PaddedCollator(PAD)([_example([1, 2, 3], [4, 5]), _example([6], [8])])["parts"]
    (forward,) = part["forwards"]
    expected = [[1, 2, 3, 4, 5], [6, 8, PAD, PAD, PAD], [1, 4, 5, PAD, PAD], [6, 8, PAD, PAD, PAD]]
    assert forward["input_ids"].tolist() == expected
    assert forward["rows"]["factual"].tolist() == [2, 3, 5]
    assert forward["rows"]["counterfactual"].tolist() == [10, 11, 15]
    assert (part["num_tokens"], part["num_branch_tokens"]) == (20, 12)


@pytest.mark.parametrize("collator", [TreeCollator(JOINT), PaddedCollator(PAD, JOINT)], ids=["trees", "padded"])
def test_encoded_records_collate_with_their_responses(collator: Any, plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record("Thin plot.", user_id="ann"), make_record("Loud.", "Long.", user_id="bob", response="Fine.")]
    examples = ExampleEncoder(plain_tokenizer).encode_all(records)
    (part,) = collator(examples)["parts"]
    texts = [plain_tokenizer.decode(part["labels"][part["sequence_ids"] == i]) for i in (0, 1)]
    assert texts == ["Slow, and good.</s>", "Fine.</s>"]


@pytest.mark.parametrize("collator", [TreeCollator(FACTUAL), PaddedCollator(PAD, FACTUAL)], ids=["trees", "padded"])
def test_users_are_told_apart_by_the_same_numbers_in_every_process(collator: Any) -> None:
    names = ["ann", "bob", "ann", "", "Ann", "ünal"]
    users = collator([_example([1], [2], user=name) for name in names])["users"]
    assert users.dtype == torch.int64
    assert [users.tolist().index(user) for user in users.tolist()] == [0, 1, 0, 3, 4, 5]
    assert users.min() >= 0, "negative numbers mark users that are filled in"
    # Python's own hash of strings is another one in every process.
    assert users[0] == 5088345978781694418


# ---- parts under a token budget --------------------------------------------------------------------


@settings(deadline=None)
@given(examples=EXAMPLES, forwards=FORWARDS, budget=st.integers(1, 60))
def test_parts_hold_every_example_once_within_the_budget(
    examples: list[EncodedExample], forwards: Any, budget: int
) -> None:
    alone = [len(build_prefix_tree([getattr(e, name).input_ids for name in forwards[-1]])) for e in examples]
    if max(alone) > budget:
        with pytest.raises(BudgetError, match=rf"^examples: .*max_tokens is {budget}"):
            TreeCollator(forwards, budget)(examples)
        return
    parts = TreeCollator(forwards, budget)(examples)["parts"]
    for part in parts:
        assert_rows_predict_labels(part, examples, forwards)
        assert part["forwards"][-1]["input_ids"].numel() <= budget, "tokens of the forward with gradient"
    members = [i for part in parts for i in part["sequence_ids"].unique_consecutive().tolist()]
    assert sorted(members) == list(range(len(examples))), "examples of all parts"
    assert sum(part["num_branch_tokens"] for part in parts) == branch_tokens(examples, forwards)
    (whole,) = TreeCollator(forwards)(examples)["parts"]
    if whole["forwards"][-1]["input_ids"].numel() <= budget:
        assert len(parts) == 1, "a batch that fits was cut"


def test_an_example_that_does_not_fit_is_named() -> None:
    examples = [_example([1], [2]), _example([3, 4, 5], [6, 7])]
    with pytest.raises(BudgetError, match=r"^examples: groups\[1\]: .* 7 tokens together; max_tokens is 6 \(groups "):
        TreeCollator(JOINT, 6)(examples)
    assert len(TreeCollator(JOINT, 7)(examples)["parts"]) == 2


def test_examples_that_share_a_history_go_into_one_part() -> None:
    histories = [[1] * 10, [2] * 10]
    examples = [_example([*histories[i % 2], 3 + i], [9], user=str(i % 2)) for i in range(6)]
    parts = TreeCollator(FACTUAL, 16)(examples)["parts"]
    assert [part["sequence_ids"].tolist() for part in parts] == [[0, 2, 4], [1, 3, 5]]


# ---- parts without examples ------------------------------------------------------------------------


@pytest.mark.parametrize("forwards", list(LAYOUTS.values()), ids=list(LAYOUTS))
@pytest.mark.parametrize("layout", ["trees", "padded"])
def test_an_empty_part_is_one_token_per_forward_without_labels(layout: str, forwards: Any) -> None:
    collator: Any = TreeCollator(forwards, 5) if layout == "trees" else PaddedCollator(PAD, forwards)
    (part,) = collator([_example_with_placebo()])["parts"]
    empty = collator.empty_part()
    assert empty.keys() == part.keys()
    assert_rows_predict_labels(empty, [], forwards)
    assert empty["labels"].shape == empty["sequence_ids"].shape == (0,)
    assert (empty["num_sequences"], empty["num_tokens"], empty["num_branch_tokens"]) == (0, len(forwards), 0)
    for got, usual in zip(empty["forwards"], part["forwards"], strict=True):
        assert got.keys() == usual.keys()
        assert got["input_ids"].shape == (1, 1)
    if layout == "trees":
        assert [forward["layout"].num_rows for forward in empty["forwards"]] == [1] * len(forwards)
    else:
        assert all(forward["input_ids"].item() == PAD for forward in empty["forwards"])
        assert all(forward["attention_mask"].item() == 1 for forward in empty["forwards"])


def _example_with_placebo() -> EncodedExample:
    return EncodedExample("ann", 0, Branch([1], [2]), Branch([1], [2]), Branch([1], [2]), 1, 1)


# ---- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("collator", [TreeCollator(), PaddedCollator(PAD)], ids=["trees", "padded"])
def test_a_batch_moves_to_a_device_but_for_what_attention_reads_on_the_host(collator: Any) -> None:
    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return [tensor for each in inner for tensor in tensors(each)]

    batch = collator([_example([1, 2], [3]), _example([1, 4], [5])])
    moved = to_device(batch, "meta")
    assert len(tensors(moved)) == len(tensors(batch)) > 5
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}, "the batch itself was changed"
    forward, before = (each["parts"][0]["forwards"][0] for each in (moved, batch))
    assert moved["parts"][0]["num_tokens"] == batch["parts"][0]["num_tokens"]
    assert forward.get("layout") is before.get("layout")
    if "layout" in forward:
        assert forward["layout"].segments.device.type == "cpu"


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [TreeCollator, lambda *rest: PaddedCollator(PAD, *rest)], ids=["trees", "padded"])
class TestRefusals:
    def test_a_missing_branch_is_named(self, make: Any) -> None:
        with pytest.raises(
            ArgumentError, match=r"^examples: expected a placebo branch in each, got none in example 4 "
        ):
            make(LAYOUTS["one each"])([_example_with_placebo(), _example([1], [2], index=4)])

    @pytest.mark.parametrize(("prompt", "response"), [([], [2]), ([1], [])], ids=["prompt", "response"])
    def test_an_empty_prompt_or_response_is_refused(self, make: Any, prompt: list[int], response: list[int]) -> None:
        with pytest.raises(ArgumentError, match=r"^examples: .*got an empty one in the factual branch of example 4"):
            make(FACTUAL)([_example([1], [2]), _example(prompt, response, index=4)])

    def test_a_branch_that_is_not_asked_for_may_be_missing(self, make: Any) -> None:
        example = EncodedExample("ann", 0, Branch([1], [2]), Branch([], [2]), None, 1, 1)
        assert make(FACTUAL)([example])["parts"][0]["labels"].tolist() == [2]

    def test_no_examples_are_refused(self, make: Any) -> None:
        with pytest.raises(ArgumentError, match=r"^examples: expected at least one, got none$"):
            make()([])

    @pytest.mark.parametrize(
        "forwards",
        [
            (), "factual", ((),), ("factual",), (("factual",), ()), (("labels",),), (("factual", "factual"),),
            (("factual",), ("factual",)), None, (("factual", None),), ((1,),),
        ],
    )  # fmt: skip
    def test_unknown_forwards_are_refused(self, make: Any, forwards: Any) -> None:
        with pytest.raises(ArgumentError, match=r"^forwards: expected a tuple of tuples of .*, got"):
            make(forwards)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PaddedCollator(None), ArgumentTypeError, "pad_token_id: expected an integer, got None"),
        (lambda: PaddedCollator(True), ArgumentTypeError, "pad_token_id: expected an integer, got True"),
        (lambda: PaddedCollator(-1), ArgumentError, "pad_token_id: expected at least 0, got -1"),
        (lambda: PaddedCollator(PAD, JOINT, 0), ArgumentError, "pad_to_multiple_of: expected at least 1, got 0"),
        (lambda: PaddedCollator(PAD, JOINT, 8.0), ArgumentTypeError, "pad_to_multiple_of: expected an integer"),
        (lambda: TreeCollator(JOINT, 0), ArgumentError, "max_tokens: expected at least 1, got 0"),
        (lambda: TreeCollator(JOINT, 64.0), ArgumentTypeError, "max_tokens: expected an integer, got 64.0"),
        (lambda: TreeCollator(JOINT, True), ArgumentTypeError, "max_tokens: expected an integer, got True"),
    ],
    ids=["pad none", "pad bool", "pad negative", "multiple zero", "multiple float", "zero", "float", "bool"],
)
def test_a_bad_argument_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_the_names_of_branches_are_fields_of_an_example() -> None:
    assert all(isinstance(getattr(_example_with_placebo(), name), Branch) for name in BRANCHES)
