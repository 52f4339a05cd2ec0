"""MIRROR-F: its anchor in the loss, the gradient of whole steps, its running means, and what changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nextquill as nq
from nextquill import reference
from nextquill.data.collator import IGNORE_INDEX
from nextquill.data.examples import EncodedExample
from nextquill.errors import ArgumentError
from nextquill.mirror import MirrorTrainer
from nextquill.mirror.term_means import TermMeans
from nextquill.outputs import AnchorRows
from tests.helpers import assert_close, make_case
from tests.mirror.mirror_helpers import Fixed, known_response, make_trainer
from tests.models.model_helpers import logs_of, make_records, parameters, tiny_model, word_tokenizer

IDS = torch.arange(30) // 7
ANCHOR_IDS = torch.arange(11) // 4
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}


# ---- the loss --------------------------------------------------------------------------------------


def anchor_of(case: Any) -> AnchorRows:
    """Eleven rows of three sequences, of which the last has no label."""
    labels = case.labels[:11].clamp(min=0).clone()
    labels[[1, 6, 8, 9, 10]] = IGNORE_INDEX
    return AnchorRows(case.hidden, labels, ANCHOR_IDS)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_value_and_gradients(alpha: float, reduction: str) -> None:
    made = []
    for _ in range(2):
        case = make_case(30, 7, 13, dtype=torch.float64).leaves()
        case.hidden = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        case.hidden.requires_grad_()
        made.append(case)
    got, exact = made
    loss_fn = nq.MirrorLoss(0.4, alpha, reduction=reduction)
    loss_fn.term_means = (0.2, 3.0)
    output = loss_fn.compute(*got.pair_args, got.bias, IDS, anchor=anchor_of(got))
    output.loss.backward()

    plain = nq.MirrorLoss(0.4, reduction=reduction)(*exact.pair_args, exact.bias, IDS)
    rows, labels, ids = anchor_of(exact)
    nll = reference.linear_token_nll(rows, exact.weight, labels, bias=exact.bias)
    keep = labels >= 0
    parts = [nll[keep]] if reduction == "token" else [nll[keep & (ids == each)] for each in (0, 1)]
    anchor = torch.stack([part.mean() for part in parts]).mean()
    truth = (1 - alpha) * plain / 0.2 + alpha * anchor / 3.0
    truth.backward()

    assert_close(output.loss, truth, 1e-10)
    assert_close(output.factual, plain, 1e-10)
    assert_close(output.effect, anchor, 1e-10)
    assert_close(output.token_loss.sum(), (1 - alpha) * plain / 0.2, 1e-10)
    for name in ("factual", "hidden", "weight", "bias"):
        assert_close(getattr(got, name).grad, getattr(exact, name).grad, 1e-9, name)


def test_bad_input() -> None:
    case = make_case(30, 7, 13)
    case.hidden = torch.randn(11, 7)
    with pytest.raises(ArgumentError, match=r"alpha: expected a number from 0 to 1, got 1\.5"):
        nq.MirrorLoss(alpha=1.5)
    with pytest.raises(ArgumentError, match=r"anchor: expected rows with alpha=0\.5, got None"):
        nq.MirrorLoss(alpha=0.5)(*case.pair_args)
    with pytest.raises(ArgumentError, match="anchor: expected None with alpha=0, got some"):
        nq.MirrorLoss()(*case.pair_args, anchor=anchor_of(case))


# ---- whole steps -----------------------------------------------------------------------------------


def plain_terms(model: nn.Module, examples: list[EncodedExample], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Divergence and anchor from transformers alone: a padded row per branch, whole logits, ordinary autograd."""
    rows, spans = list[list[int]](), list[tuple[int, int]]()
    for example, own in zip(examples, labels, strict=True):
        response = known_response(example.factual.prompt_ids)
        for branch, end in ((example.factual, response), (example.counterfactual, response), (example.factual, own)):
            spans.append((len(branch.prompt_ids) - 1, len(end)))
            rows.append(branch.prompt_ids + end)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    everything = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    cut = [everything[place, start : start + length] for place, (start, length) in enumerate(spans)]
    divergences, anchors = [], []
    for example, (student, teacher, own) in zip(examples, zip(*[iter(cut)] * 3, strict=True), strict=True):
        constant = teacher.detach()
        mixture = (0.5 * student.exp() + 0.5 * constant.exp()).log()
        jsd = 0.5 * constant.exp() * (constant - mixture) + 0.5 * student.exp() * (student - mixture)
        divergences.append(jsd.sum(-1).mean())
        assert example.anchor is not None
        counted = torch.tensor(example.anchor.labels)
        if (counted >= 0).any():
            nll = -own.gather(1, counted.clamp(min=0).long()[:, None])[:, 0]
            anchors.append(nll[counted >= 0].mean())
    return torch.stack(divergences).mean(), torch.stack(anchors).mean()


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_three_steps_are_those_of_a_plain_composition(tmp_path: Path, attention: str) -> None:
    """Gradients and running means, with SGD, against float64 and one whole batch in each step."""
    loss = nq.MirrorLoss(alpha=0.25)
    trainer = make_trainer(
        tmp_path, tiny_model().double(), rollouts=Fixed(), loss=loss, max_steps=3, per_device_train_batch_size=6,
        gradient_accumulation_steps=2, attention=attention, num_rollouts=2, **SGD,
    )  # fmt: skip
    examples = list(trainer.train_dataset.examples)
    labels = [example.factual.response_ids for example in examples]
    counted = [sum(label >= 0 for label in example.anchor.labels) for example in examples if example.anchor]
    assert 0 in counted, "an example without informative tokens is not among them"
    assert max(counted) > 1

    model, terms = tiny_model().double(), list[tuple[float, float]]()
    for _ in range(3):
        divergence, anchor = plain_terms(model, examples, labels)
        known = terms or [(divergence.item(), anchor.item())]
        means = [sum(each) / len(known) for each in zip(*known, strict=True)]
        (0.75 * divergence / means[0] + 0.25 * anchor / means[1]).backward()
        terms.append((divergence.item(), anchor.item()))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
                p.grad = None
    trainer.train()
    for log, (divergence, anchor) in zip(logs_of(trainer), terms, strict=False):
        assert log["loss_factual"] == pytest.approx(divergence, rel=1e-6)
        assert log["loss_effect"] == pytest.approx(anchor, rel=1e-6)
    start = tiny_model().double().state_dict()
    for name, want in model.state_dict().items():
        moved = (want - start[name]).abs().max()
        assert (trainer.model.state_dict()[name] - want).abs().max() <= 1e-6 * moved, name


def test_a_division_of_a_step_changes_nothing(tmp_path: Path) -> None:
    def run(batch_size: int, accumulation: int, **options: Any) -> MirrorTrainer:
        trainer = make_trainer(
            tmp_path, tiny_model().double(), per_device_train_batch_size=batch_size, max_steps=3, temperature=0.0,
            gradient_accumulation_steps=accumulation, loss=nq.MirrorLoss(alpha=0.5), **SGD, **options,
        )  # fmt: skip
        trainer.train()
        return trainer

    whole, start = run(8, 1), tiny_model().double().state_dict()
    for other in (run(2, 4), run(4, 2, max_tokens=110), run(8, 1, attention="padded")):
        assert other.term_means.sums == pytest.approx(whole.term_means.sums, rel=1e-6)
        for name, want in parameters(whole).items():
            moved = (want - start[name]).abs().max()
            assert (parameters(other)[name] - want).abs().max() <= 1e-6 * moved, name


def test_the_anchor_costs_the_tokens_of_one_response(tmp_path: Path) -> None:
    """Rollouts of one example share its prompt and its anchor, and a response without informative tokens adds none."""
    trainer = make_trainer(tmp_path, rollouts=Fixed(), loss=nq.MirrorLoss(alpha=0.5), num_rollouts=3)
    (example,) = [each for each in trainer.train_dataset.examples if each.index == 0]
    epoch = iter([{"examples": [example]}])
    (batch,) = trainer._sampled(epoch, 1)
    (part,) = batch["parts"]
    own = example.factual.response_ids
    branches = [example.factual.prompt_ids, own, known_response(example.factual.prompt_ids)]
    teacher = example.counterfactual.prompt_ids
    together = len(teacher) + sum(map(len, branches[1:])) + len(branches[2])
    assert part["num_tokens"] <= together, "the third copy of a known response is in the tree already"
    assert int((part["anchor_labels"] >= 0).sum()) == sum(label >= 0 for label in example.anchor.labels)


# ---- running means ---------------------------------------------------------------------------------


def test_means_of_terms() -> None:
    means = TermMeans()
    assert means.values() == (1.0, 1.0)
    assert means.values((0.5, None)) == (0.5, 1e-6)
    means.add((0.2, None))
    assert (means.has(anchor=False), means.has(anchor=True)) == (True, False)
    assert means.values((9.0, 4.0)) == (0.2, 4.0)
    means.add((0.4, 3.0))
    means.add((0.9, 9.0))
    means.forget()
    assert means.values() == pytest.approx((0.3, 3.0))
    means.add((0.0, 0.0))
    assert means.values() == pytest.approx((0.2, 1.5))


def test_terms_of_almost_zero_do_not_become_the_loss() -> None:
    means = TermMeans()
    means.add((1e-12, 1e-12))
    assert means.values() == (1e-6, 1e-6)


def test_a_step_without_informative_tokens_has_the_divergence_alone(tmp_path: Path) -> None:
    records = [{**record, "history": ["w79"], "query": "w78"} for record in make_records(4)]
    trainer = make_trainer(tmp_path, records=records, loss=nq.MirrorLoss(alpha=0.5), max_steps=2)
    trainer.train()
    logs = [log for log in logs_of(trainer) if "loss" in log]
    assert [log["loss_effect"] for log in logs] == [0, 0]
    assert logs[0]["loss"] == pytest.approx(0.5, rel=1e-4)
    assert trainer.term_means.counts == [2, 0]


def test_a_skipped_step_counts_for_no_mean(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss=nq.MirrorLoss(alpha=0.5), max_steps=2)
    trainer.train()
    before = list(trainer.term_means.counts)
    trainer._forget_step()
    assert trainer.term_means.counts == [count - 1 for count in before]


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_rollouts": 2, "learning_rate": 1e-2,
        "loss": nq.MirrorLoss(alpha=0.5),
    }  # fmt: skip
    whole = make_trainer(tmp_path, **options)
    whole.train()
    written = (tmp_path / "sampled_responses.jsonl").read_text()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TermMeans"]["attributes"]["counts"] == [2, 2]
    resumed = make_trainer(tmp_path, **options)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole).values(), parameters(resumed).values(), strict=True))
    assert logs_of(whole)[2:4] == logs_of(resumed)[2:4]
    assert (tmp_path / "sampled_responses.jsonl").read_text() == written
    other = make_trainer(tmp_path, **{**options, "loss": nq.MirrorLoss()})
    with pytest.raises(nq.CheckpointError, match="loss"):
        other.train(str(tmp_path / "checkpoint-2"))


def test_history_that_is_not_in_the_prompt_gives_no_informative_tokens(tmp_path: Path) -> None:
    record = {
        "user_id": "u", "query": "w1", "history": ["w10 w10 w10 w10 w10 w10 w10 w10 w10", "w12 w13"],
        "response": "w10 w12",
    }  # fmt: skip
    for length, expected in ((20, ["w12"]), (60, ["w10", "w12"])):
        trainer = make_trainer(tmp_path, records=[record], loss=nq.MirrorLoss(alpha=0.5), max_length=length)
        (example,) = trainer.train_dataset.examples
        assert example.history_kept == len(expected)
        assert example.anchor is not None
        assert word_tokenizer().decode([label for label in example.anchor.labels if label >= 0]) == " ".join(expected)
