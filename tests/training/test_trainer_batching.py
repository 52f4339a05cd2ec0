"""The making and the layout of batches do not change the training: parts, trees, grouping by user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill import ArgumentError, ArgumentTypeError, BudgetError, NextQuillTrainer
from nextquill.data import EncodedDataset
from tests.models.model_helpers import (
    logs_of,
    loss_cases,
    make_records,
    make_trainer,
    parameters,
    shared_examples,
    tiny_model,
)

#: Short enough that a device's batch of 4 is several parts, and long enough for each example alone: two branches of an
#: example together take up to 32 tokens, and three, in an evaluation, up to 50.
BUDGET = {"official": 36, "detached": 30, "sft": 30}


def train(folder: Path, loss_name: str, reduction: str = "sequence", **options: Any) -> NextQuillTrainer:
    """Train two steps with SGD, because Adam divides by the gradient's size, so that rounding could flip an update."""
    case = loss_cases(reduction=reduction)[loss_name]
    trainer = make_trainer(folder, case.loss, **{"optim": "sgd", "learning_rate": 0.3, **options})
    trainer.train()
    assert trainer.state.global_step == 2
    return trainer


def assert_same_training(got: NextQuillTrainer, expected: NextQuillTrainer) -> None:
    start = tiny_model().state_dict()
    after = parameters(expected)
    assert max(float((after[name] - start[name]).abs().max()) for name in after) > 1e-2, "nothing was trained"
    for name, parameter in parameters(got).items():
        difference = float((parameter - after[name]).abs().max())
        assert difference <= 1e-6, f"{name} differs by {difference:.1e}"
    for log, expected_log in zip(logs_of(got), logs_of(expected), strict=True):
        assert log == pytest.approx(expected_log, rel=1e-4, abs=1e-6)


# ---- parts -----------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("loss_name", ["official", "detached", "sft"])
def test_a_token_budget_changes_nothing(
    tmp_path: Path, loss_name: str, reduction: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    whole = train(tmp_path, loss_name, reduction, **options)
    backwards = []
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: (backwards.append(1), original(self, *a, **k)))
    cut = train(tmp_path, loss_name, reduction, max_tokens=BUDGET[loss_name], **options)
    assert len(backwards) >= 5, "backwards of two steps: the budget cut nothing"
    assert_same_training(cut, whole)


def test_no_forward_with_gradient_is_over_the_budget(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss_cases()["official"].loss, max_tokens=36, logging_steps=2)
    sizes = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    assert len(sizes) > 4
    assert max(sizes) <= 36


def test_a_budget_that_an_example_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"max_tokens: expected at least the \d+ tokens .* got 6"):
        make_trainer(tmp_path, max_tokens=6)


def test_sharing_is_logged(tmp_path: Path) -> None:
    """The ratio of branch tokens to computed tokens: at least 1 with trees, at most 1 with padding."""
    factors = {}
    for attention in ("auto", "padded"):
        trainer = train(tmp_path, "official", attention=attention)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        factors[attention] = [log["sharing_factor"] for log in logs]
        assert all(log["tokens_per_second"] > 0 for log in logs)
    assert min(factors["auto"]) > 1
    assert max(factors["padded"]) < 1


# ---- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_name",
    ["official", "detached", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "anchored", "perce"))],
)
def test_trees_masks_and_padded_rows_train_the_same(tmp_path: Path, loss_name: str) -> None:
    padded = train(tmp_path, loss_name, attention="padded")
    for attention in ("auto", "mask"):
        assert_same_training(train(tmp_path, loss_name, attention=attention), padded)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 60},
        {"attention": "mask"},
        {"attention": "mask", "max_tokens": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_name", ["official", "sft"])
def test_evaluation_equals_that_of_padded_rows(tmp_path: Path, loss_name: str, options: dict[str, Any]) -> None:
    model, loss, results = tiny_model(), loss_cases()[loss_name].loss, []
    for given in ({"attention": "padded"}, options):
        trainer = make_trainer(tmp_path, loss, model, eval_dataset=make_records(7), **given)
        metrics = trainer.evaluate()
        timing = ("runtime", "_per_second", "preparation_time")
        results.append({name: value for name, value in metrics.items() if not name.endswith(timing)})
        predicted = trainer.predict(make_records(7))
        assert predicted.label_ids.tolist() == list(range(7))
        results[-1]["rows"] = predicted.predictions.sum(1).tolist()
    assert results[1]["rows"] == pytest.approx(results[0].pop("rows"), rel=1e-4)
    del results[1]["rows"]
    assert len(results[0]) >= 8
    assert results[1] == pytest.approx(results[0], rel=2e-5, abs=1e-6)


# ---- grouping by user ------------------------------------------------------------------------------


def steps_of(trainer: NextQuillTrainer) -> list[list[int]]:
    """The examples of every batch of an epoch, by their index."""
    return [batch["example_index"].tolist() for batch in trainer.get_train_dataloader()]


def test_a_users_examples_meet_and_the_batch_size_stays(tmp_path: Path) -> None:
    records = make_records(24, users=6)
    plain = make_trainer(tmp_path, train_dataset=records)
    grouped = make_trainer(tmp_path, train_dataset=records, examples_per_user=2)
    batches = steps_of(grouped)
    assert [len(batch) for batch in batches] == [len(batch) for batch in steps_of(plain)] == [4] * 6
    assert sorted(index for batch in batches for index in batch) == list(range(24))
    for batch in batches:
        users = [index % 6 for index in batch]
        assert (users[0], users[2]) == (users[1], users[3]), "runs of two of one user"


@pytest.mark.parametrize(("size", "accumulation", "most"), [(1, 1, 4), (2, 1, 2), (4, 1, 1), (2, 2, 4), (4, 2, 2)])
def test_users_per_step_are_logged(tmp_path: Path, size: int, accumulation: int, most: int) -> None:
    records = make_records(24, users=6)
    trainer = make_trainer(
        tmp_path, train_dataset=records, examples_per_user=size, gradient_accumulation_steps=accumulation,
        max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    seen: list[set[int]] = []
    original = trainer.get_batch_samples

    def record(*args: Any) -> Any:
        batches, items = original(*args)
        seen.append({int(user) for batch in batches for user in batch["users"]})
        return batches, items

    trainer.get_batch_samples = record
    trainer.train()
    logged = [log["users_per_step"] for log in trainer.state.log_history if "users_per_step" in log]
    assert logged == [len(users) for users in seen], "users of each step"
    assert max(logged) <= most
    assert size == 1 or logged == [most] * (6 // accumulation) or max(logged) == most
    assert [log["num_sequences"] for log in trainer.state.log_history if "loss" in log] == [4 * accumulation] * (
        6 // accumulation
    )


def test_users_are_averaged_over_the_steps_of_a_log(tmp_path: Path) -> None:
    records = make_records(8, users=2)
    trainer = make_trainer(tmp_path, train_dataset=records, examples_per_user=4, logging_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["users_per_step"] == 1.0


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    def epochs(**options: Any) -> list[list[int]]:
        trainer = make_trainer(
            tmp_path, train_dataset=make_records(24), examples_per_user=2, max_steps=-1, num_train_epochs=2, **options
        )
        seen: list[int] = []
        original = trainer.get_batch_samples

        def record(*args: Any) -> Any:
            batches, items = original(*args)
            seen.extend(int(index) for batch in batches for index in batch["example_index"])
            return batches, items

        trainer.get_batch_samples = record
        trainer.train()
        return [seen[:24], seen[24:]]

    first = epochs()
    assert [sorted(epoch) for epoch in first] == [list(range(24))] * 2
    assert first[0] != first[1], "both epochs have one order"
    assert epochs() == first, "another run with this seed"
    assert epochs(seed=4)[0] != first[0]
    assert epochs(seed=4, data_seed=3) == first, "the data's own seed decides"


def test_grouping_shares_more(tmp_path: Path) -> None:
    """With the history first in the prompt, examples of a user share 7 of about 16 tokens."""
    factors = []
    for size in (1, 4):
        trainer = make_trainer(
            tmp_path, loss_cases()["sft"].loss, train_dataset=EncodedDataset(shared_examples(48, users=12)),
            examples_per_user=size, max_steps=-1, num_train_epochs=1, logging_steps=12,
        )  # fmt: skip
        trainer.train()
        factors.append(trainer.state.log_history[0]["sharing_factor"])
    assert factors[1] > 1.25 * factors[0]


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ArgumentError, "max_tokens: expected a positive number, got 0"),
        ({"max_tokens": True}, ArgumentTypeError, "max_tokens: expected an integer, got True"),
        ({"max_tokens": 64.0}, ArgumentTypeError, "max_tokens: expected an integer, got 64.0"),
        ({"max_tokens": "64"}, ArgumentTypeError, "max_tokens: expected an integer, got '64'"),
        ({"examples_per_user": 0}, ArgumentError, "examples_per_user: expected a positive number, got 0"),
        ({"examples_per_user": True}, ArgumentTypeError, "examples_per_user: expected an integer, got True"),
        ({"examples_per_user": 2.0}, ArgumentTypeError, "examples_per_user: expected an integer, got 2.0"),
        ({"examples_per_user": None}, ArgumentTypeError, "examples_per_user: expected an integer, got None"),
        ({"examples_per_user": 3}, ArgumentError, "a divisor of per_device_train_batch_size=4, got 3"),
        ({"examples_per_user": 8}, ArgumentError, "a divisor of per_device_train_batch_size=4, got 8"),
    ],
    ids=str,
)
def test_batches_that_cannot_be_made(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists(), "something was written"


def test_a_token_budget_needs_a_loss_that_is_the_same_in_parts(tmp_path: Path) -> None:
    loss = loss_cases(reduction="micro_batch")["official"].loss
    with pytest.raises(ArgumentError, match="max_tokens: expected None with reduction='micro_batch'"):
        make_trainer(tmp_path / "run", loss, max_tokens=64)
    assert not (tmp_path / "run").exists()
    make_trainer(tmp_path, loss, max_steps=1).train()


def test_an_order_of_ones_own_is_not_shuffled_by_user(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"examples_per_user: expected 1 with .*'sequential'"):
        make_trainer(tmp_path, examples_per_user=2, train_sampling_strategy="sequential")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches=True"),
        ({"neftune_noise_alpha": 5.0, "attention": "pieces"}, "neftune_noise_alpha: not supported with trees"),
    ],
)
def test_arguments_that_would_change_shared_tokens(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_trainer(tmp_path, **options)


def test_a_budget_of_training_is_enough_for_evaluation(tmp_path: Path) -> None:
    """All three branches then stand in one row."""
    longest = max(len(e.factual.input_ids) for e in make_trainer(tmp_path).train_dataset.examples)
    trainer = make_trainer(tmp_path, max_tokens=longest, eval_dataset=make_records(6), max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_num_tokens"] > 0


@pytest.mark.parametrize("processes", [1, 3])
def test_the_loss_is_scaled_for_engines_that_average_over_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The sum over the processes is normalised, and DDP takes the mean of their gradients."""
    trainer = make_trainer(tmp_path, loss_cases()["detached"].loss, tiny_model(), train_dataset=make_records(4))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, batch)
    items = trainer.passes.count_items(batch)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(items))
    assert found.item() == pytest.approx(processes * expected.item(), rel=1e-6)
