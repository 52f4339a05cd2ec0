"""Evaluation: every metric against values computed example by example, under any batch size; the placebo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill import ArgumentError, NextQuillLoss, NextQuillTrainer
from nextquill.training.meter import EVAL_COLUMNS
from tests.models.model_helpers import branch_nll, loss_cases, make_records, make_trainer, reference_loss, tiny_model

METRICS = {
    "loss", "nll_factual", "nll_counterfactual", "nll_placebo", "effect_logprob", "effect_placebo", "effect_prob",
    "share_above_threshold", "num_tokens",
}  # fmt: skip
PLACEBO = {"nll_placebo", "effect_placebo"}


def own_metrics(metrics: dict[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The metrics without the Trainer's timing."""
    names = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
    return {name: value for name, value in names.items() if name in METRICS}


def independent_metrics(trainer: NextQuillTrainer, loss_name: str, reduction: str) -> dict[str, float]:
    """The metrics example by example, from the model's own logits."""
    model, examples = trainer.model, trainer.eval_dataset.examples
    nlls = {}
    with torch.no_grad():
        for name in ("factual", "counterfactual", "placebo"):
            nlls[name] = torch.cat([branch_nll(model, getattr(example, name)) for example in examples]).double()
        loss = reference_loss(loss_cases()[loss_name], model, examples, reduction)
    effect_prob = (-nlls["factual"]).exp() - (-nlls["counterfactual"]).exp()
    return {
        "loss": float(loss),
        **{f"nll_{name}": float(nll.mean()) for name, nll in nlls.items()},
        "effect_logprob": float((nlls["counterfactual"] - nlls["factual"]).mean()),
        "effect_placebo": float((nlls["placebo"] - nlls["factual"]).mean()),
        "effect_prob": float(effect_prob.mean()),
        "share_above_threshold": float((effect_prob > trainer.loss.threshold).double().mean()),
        "num_tokens": float(len(effect_prob)),
    }


@pytest.mark.parametrize(
    ("loss_name", "reduction"),
    [("official", "sequence"), ("paper", "token"), ("detached", "sequence"), ("perce", "token"), ("sft", "sequence")],
)
def test_metrics_equal_independent_values_under_any_batch_size(tmp_path: Path, loss_name: str, reduction: str) -> None:
    """With 7 examples, batches of 3 and of 5 leave a partial one."""
    model, loss = tiny_model(), loss_cases(reduction=reduction)[loss_name].loss
    for batch_size in (1, 3, 5, 8):
        trainer = make_trainer(
            tmp_path, loss, model, eval_dataset=make_records(7), per_device_eval_batch_size=batch_size
        )
        got = own_metrics(trainer.evaluate())
        expected = independent_metrics(trainer, loss_name, reduction)
        assert got.keys() == METRICS
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=2e-5, abs=1e-6), f"eval_{name} at batch size {batch_size}"


def test_micro_batch_reduction_is_evaluated_per_sequence(tmp_path: Path) -> None:
    metrics = []
    for reduction in ("micro_batch", "sequence"):
        loss = loss_cases(reduction=reduction)["official"].loss
        metrics.append(own_metrics(make_trainer(tmp_path, loss, eval_dataset=make_records(7)).evaluate()))
    assert metrics[0] == metrics[1]


def test_placebo_is_another_users_history(tmp_path: Path) -> None:
    records = make_records(8)
    trainer = make_trainer(tmp_path, eval_dataset=records)
    encoder = trainer.encoder
    histories = {record["user_id"]: [] for record in records}
    for record in records:
        words = {i for text in record["history"] for i in encoder.renderer.encode(text)}
        histories[record["user_id"]].append(words)
    for record, example in zip(records, trainer.eval_dataset.examples, strict=True):
        assert example.placebo.response_ids == example.factual.response_ids
        prompt = set(example.placebo.prompt_ids)
        others = [words for user, own in histories.items() for words in own if user != record["user_id"]]
        assert any(words <= prompt for words in others), "the placebo holds no other user's history"
        assert not any(words <= prompt for words in histories[record["user_id"]]), "the placebo holds the user's own"


def test_a_single_user_has_no_placebo_metrics(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=make_records(5, users=1))
    assert own_metrics(trainer.evaluate()).keys() == METRICS - PLACEBO


def test_a_dict_of_data_sets(tmp_path: Path) -> None:
    sets = {"many": make_records(6), "one": make_records(4, users=1)}
    trainer = make_trainer(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, records in sets.items():
        alone = own_metrics(make_trainer(tmp_path, eval_dataset=records).evaluate())
        got = own_metrics(metrics, f"eval_{name}")
        assert got == pytest.approx(alone), f"metrics of the set {name!r}"


def test_evaluation_of_other_records(tmp_path: Path) -> None:
    other = make_records(5, seed=9)
    trainer = make_trainer(tmp_path, eval_dataset=make_records(6))
    before = own_metrics(trainer.evaluate())
    got = own_metrics(trainer.evaluate(other))
    assert got == own_metrics(make_trainer(tmp_path, eval_dataset=other).evaluate())
    assert own_metrics(trainer.evaluate({"x": other}), "eval_x") == got
    assert own_metrics(trainer.evaluate()) == before


def test_evaluation_of_a_file(tmp_path: Path) -> None:
    import json

    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in make_records(5)))
    trainer = make_trainer(tmp_path, eval_dataset=make_records(5))
    assert own_metrics(trainer.evaluate(str(path))) == own_metrics(trainer.evaluate())


def test_evaluation_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(tmp_path).evaluate()


def test_predict_returns_the_table_of_examples(tmp_path: Path) -> None:
    records = make_records(7)
    trainer = make_trainer(tmp_path, NextQuillLoss(), eval_dataset=records, per_device_eval_batch_size=3)
    predicted = trainer.predict(records)
    assert predicted.predictions.shape == (7, len(EVAL_COLUMNS))
    assert predicted.label_ids.tolist() == list(range(7))
    assert own_metrics(predicted.metrics, "test") == own_metrics(trainer.evaluate())
    column = predicted.predictions[:, EVAL_COLUMNS.index("nll_placebo")]
    for example, value in zip(trainer.eval_dataset.examples, column, strict=True):
        expected = branch_nll(trainer.model, example.placebo).mean()
        assert float(value) == pytest.approx(float(expected.detach()), rel=2e-5), f"placebo nll of {example.index}"


def test_evaluation_changes_nothing_of_a_training(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path, eval_dataset=make_records(5), eval_strategy=strategy, eval_steps=1, max_steps=3
        )
        trainer.train()
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "evaluating changed the training"


def test_the_trainer_scores_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=make_records(6))
    scores = sorted(trainer.score(), key=lambda each: each.example.index)
    metrics = trainer.evaluate()
    total = sum(len(each.token_ids) for each in scores)
    assert total == metrics["eval_num_tokens"]
    effect = sum(float(each.effect_logprob.sum()) for each in scores) / total
    assert effect == pytest.approx(metrics["eval_effect_logprob"], rel=1e-4, abs=1e-6)
    assert len(list(trainer.score(make_records(3)))) == 3
    with pytest.raises(ArgumentError, match="records: expected records or an eval_dataset, got NoneType"):
        make_trainer(tmp_path).score()


def test_training_after_an_evaluation_has_training_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss_cases()["sft"].loss, eval_dataset=make_records(4))
    before = trainer.data_collator
    trainer.evaluate()
    assert trainer.data_collator is before
