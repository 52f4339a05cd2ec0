"""Training with token weights from stored effects: they decide the weights, and no pass runs for weights alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nextquill import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss
from nextquill.errors import ArgumentError, CheckpointError, RecordError
from nextquill.evaluation.scoring import score_examples
from nextquill.models.branch_passes import PairPasses
from nextquill.models.stored_effects import stored_weights
from nextquill.outputs import PairNLL
from nextquill.reference import pair_loss
from nextquill.training.trainer import NextQuillTrainer
from tests.models.model_helpers import (
    TEMPLATE,
    assert_same_loss,
    assert_same_tensors,
    gradients,
    logs_of,
    loss_cases,
    make_args,
    make_records,
    model_logits,
    random_examples,
    tiny_model,
    word_tokenizer,
)

NO_TERM = {"perce": "perce", "longce": "longce", "plain": "plain"}


def cases(**options):
    """The published losses with weights, with their reference."""
    found = loss_cases(**options)
    del found["sft"]
    plain = NextQuillLoss(threshold=0.0, alpha=0.0, **options)
    found["plain"] = dataclasses.replace(
        found["official"], loss=plain, options={"normalize_weights": True, "alpha": 0.0}
    )
    return found


def with_effects(examples, seed=1):
    """Add effects that no model in these tests has."""
    rng = torch.Generator().manual_seed(seed)
    return [
        dataclasses.replace(e, effects=torch.rand(2, len(e.factual.response_ids), generator=rng) * 3) for e in examples
    ]


def by_hand(case, model, examples, reduction="sequence"):
    """The loss of separate unpadded passes, with weights from the examples' effects."""
    z1, z0 = (torch.cat([model_logits(model, getattr(e, n)) for e in examples]) for n in ("factual", "counterfactual"))
    labels = torch.tensor([token for e in examples for token in e.factual.response_ids])
    ids = torch.tensor([i for i, e in enumerate(examples) for _ in e.factual.response_ids])
    effects = torch.cat([e.effects for e in examples], dim=1)
    weights = case.weights(PairNLL(effects[0], effects[1], None))
    identity = torch.eye(z1.shape[1])
    return pair_loss(
        z1, z0, identity, labels, token_weights=weights, sequence_ids=ids, reduction=reduction, **case.options
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize("attention", ["auto", "padded"])
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
@pytest.mark.parametrize("name", sorted(cases()))
def test_loss_and_gradients_use_the_stored_weights(name, reduction, attention):
    case, model, examples = cases(reduction=reduction)[name], tiny_model(), with_effects(random_examples(4))
    passes = PairPasses(model, case.loss, attention, stored_effects=True)
    loss, _ = passes.training_loss(passes.collator()(examples))
    expected = by_hand(case, model, examples, reduction)
    assert_same_loss(loss, expected)
    assert_same_tensors(gradients(model, loss), gradients(model, expected), 1e-4, "gradient")


def test_several_parts_give_the_loss_of_one():
    case, model, examples = cases()["perce"], tiny_model(), with_effects(random_examples(6))
    passes = PairPasses(model, case.loss, stored_effects=True)
    batch = passes.collator(max_tokens=40)(examples)
    assert len(batch["parts"]) > 1
    assert_same_loss(passes.training_loss(batch)[0], by_hand(case, model, examples))


@pytest.mark.parametrize("name", sorted(cases()))
def test_the_counterfactual_runs_only_for_a_term_that_reads_it(name):
    case, model, examples = cases()[name], tiny_model(), with_effects(random_examples(3))
    passes = PairPasses(model, case.loss, stored_effects=True)
    seen = []
    model.base_model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    _, outputs = passes.training_loss(passes.collator()(examples))
    assert seen == {"detached": [False, True]}.get(name, [True])
    assert (outputs[0].pair_nll.counterfactual is None) is (name in NO_TERM)


def test_the_models_own_effects_stored_change_nothing():
    model, examples = tiny_model(), random_examples(4)
    scores = {s.example.index: s for s in score_examples(model, examples)}
    stored = [
        dataclasses.replace(e, effects=torch.stack([scores[e.index].nll_factual, scores[e.index].nll_counterfactual]))
        for e in examples
    ]
    own, given = PairPasses(model, PerCELoss(0.1, 2.0)), PairPasses(model, PerCELoss(0.1, 2.0), stored_effects=True)
    expected, _ = own.training_loss(own.collator()(examples))
    assert_same_loss(given.training_loss(given.collator()(stored))[0], expected)


def test_a_part_without_labels_has_no_loss():
    passes = PairPasses(tiny_model(), PerCELoss(), stored_effects=True)
    loss, _ = passes.part_loss(passes.collator().empty_part(), 3.0)
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_an_example_without_effects_is_refused():
    passes = PairPasses(tiny_model(), PerCELoss(), stored_effects=True)
    with pytest.raises(ArgumentError, match="batch: expected examples with stored effects"):
        passes.training_loss(passes.collator()(random_examples(2)))


REFUSED = {
    "sft": (SFTLoss(), "loss: SFTLoss gives all tokens one weight"),
    "reads the effect": (PairLoss(lambda pair: pair.effect), "expected a weighting with `reads_effect = False`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_cannot_use_stored_effects_is_refused(name):
    loss, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        PairPasses(tiny_model(), loss, stored_effects=True)


class Largest:
    """A user's weighting over whole sequences."""

    reads_effect = False

    def __call__(self, pair):
        return pair.counterfactual.div_(pair.counterfactual.max())  # in place, as it may


def test_a_weighting_of_whole_sequences_sees_one_at_a_time():
    effects, ids = torch.tensor([[0.0] * 5, [1.0, 2.0, 4.0, 1.0, 8.0]]), torch.tensor([3, 3, 3, 5, 5])
    before = effects.clone()
    assert stored_weights(PairLoss(Largest()), effects, ids).tolist() == [0.25, 0.5, 1.0, 0.125, 1.0]
    whole = stored_weights(PairLoss(Largest(), reduction="micro_batch"), effects, ids)
    assert whole.tolist() == [0.125, 0.25, 0.5, 0.125, 1.0]
    assert torch.equal(effects, before)


def test_a_weighting_must_return_a_weight_per_token():
    class Mean(Largest):
        def __call__(self, pair):
            return pair.factual.mean()

    with pytest.raises(ArgumentError, match=r"weighting: expected a tensor of shape \[3\], got \[\]"):
        stored_weights(PairLoss(Mean()), torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


# ---- the trainer -----------------------------------------------------------------------------------


def make_trainer(folder, loss, model=None, eval_dataset=None, effects_file=None, **args):
    return NextQuillTrainer(
        model=tiny_model() if model is None else model,
        args=make_args(folder, **args),
        train_dataset=make_records(),
        eval_dataset=eval_dataset,
        processing_class=word_tokenizer(),
        loss=loss,
        template=TEMPLATE,
        effects_file=effects_file,
    )


@pytest.fixture
def effects_file(tmp_path):
    """Made-up effects of `make_records()`, in another order."""
    trainer = make_trainer(tmp_path / "encoding", PerCELoss())
    lines = []
    for example in with_effects(trainer.train_dataset.examples):
        factual, counterfactual = example.effects.tolist()
        fields = {"index": example.index, "user_id": example.user_id, "token_ids": example.factual.response_ids}
        lines.append(json.dumps(fields | {"nll_factual": factual, "nll_counterfactual": counterfactual}))
    file = tmp_path / "effects.jsonl"
    file.write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["perce", "official"])
def test_the_trainers_first_loss_uses_the_stored_weights(tmp_path, effects_file, name):
    case, model = cases()[name], tiny_model()
    batch = {"per_device_train_batch_size": 12, "max_steps": 1}
    trainer = make_trainer(tmp_path / "run", case.loss, model, effects_file=effects_file, **batch)
    expected = by_hand(case, model, trainer.train_dataset.examples)
    trainer.train()
    (log,) = [log for log in logs_of(trainer) if "loss" in log]
    assert log["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)
    assert ("nll_counterfactual" in log) is (name == "official")


def test_evaluation_weighs_by_the_models_own_effects(tmp_path, effects_file):
    loss, evaluation = PerCELoss(0.1, 2.0), {"eval_dataset": make_records(seed=5)}
    frozen = make_trainer(tmp_path / "a", loss, effects_file=effects_file, **evaluation)
    own = make_trainer(tmp_path / "b", loss, **evaluation)
    assert frozen.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-6)


def test_the_file_is_checked_before_training(tmp_path, effects_file):
    lines = effects_file.read_text(encoding="utf-8").splitlines()
    effects_file.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"effects_file: .*effects.jsonl: .* got none with index 0 \(user 'u0'\)"):
        make_trainer(tmp_path / "run", LongCELoss(), effects_file=effects_file)


def test_a_run_resumes_with_its_own_effects_only(tmp_path, effects_file):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "run", PerCELoss(), effects_file=effects_file, **options).train()
    again = make_trainer(tmp_path / "run", PerCELoss(), effects_file=effects_file, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    without = make_trainer(tmp_path / "run", PerCELoss(), **options)
    with pytest.raises(CheckpointError, match=r"was written with another effects file: there \w+, here None"):
        without.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
