"""MirrorTrainer: what it samples, what each branch reads, its gradient, and what changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

import nextquill as nq
from nextquill import reference
from nextquill.errors import ArgumentError
from nextquill.generation import Prompt
from nextquill.generation.rollouts import ModelRollouts, RecordedRollouts, RecordingRollouts, Rollouts, Sample
from nextquill.mirror import MirrorTrainer
from tests.mirror.mirror_helpers import TEMPLATE, Fixed, known_response, make_trainer
from tests.models.model_helpers import logs_of, make_args, make_records, parameters, tiny_model, word_tokenizer
from tests.sharding import CHECKPOINTING, in_float64, trained


def test_the_teacher_reads_the_response_and_the_student_does_not(tmp_path: Path) -> None:
    records = make_records(6)
    trainer = make_trainer(tmp_path, records=records)
    tokenizer = word_tokenizer()
    for record, example in zip(records, trainer.train_dataset.examples, strict=True):
        student = tokenizer.decode(example.factual.prompt_ids)
        teacher = tokenizer.decode(example.counterfactual.prompt_ids)
        shown = f"w79 {record['response']}"
        assert shown in teacher
        assert "w79" not in student
        assert record["query"] in student
        assert all(text in student and text in teacher for text in record["history"])
        assert teacher.replace(f" {shown}", "") == student


def test_both_branches_compute_their_common_beginning_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rollouts=Fixed(), per_device_train_batch_size=12, max_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "sharing_factor" in log]
    assert log["sharing_factor"] > 1.4


def test_history_that_does_not_fit_the_teacher_is_in_neither(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, records=make_records(12), max_length=24)
    examples = trainer.train_dataset.examples
    assert any(0 < example.history_kept < example.history_total for example in examples)
    for example in examples:
        assert len(example.counterfactual.prompt_ids) + 6 <= 24


def test_the_gradient_is_that_of_a_plain_composition(tmp_path: Path) -> None:
    """One step of SGD on fixed responses, against full logits in float64 and ordinary autograd."""
    rate = 0.5
    trainer = make_trainer(
        tmp_path, tiny_model().double(), rollouts=Fixed(), max_steps=1, optim="sgd", learning_rate=rate,
        max_grad_norm=0.0, per_device_train_batch_size=12,
    )  # fmt: skip
    examples = trainer.train_dataset.examples
    model = tiny_model().double()
    losses = []
    for example in examples:
        response = known_response(example.factual.prompt_ids)
        hidden = []
        for branch in (example.factual, example.counterfactual):
            ids = torch.tensor([branch.prompt_ids + response])
            states = model.model(ids).last_hidden_state[0]
            hidden.append(states[len(branch.prompt_ids) - 1 : -1])
        jsd = reference.linear_pair_jsd(
            hidden[0], hidden[1].detach(), model.lm_head.weight, torch.tensor(response), beta=0.5
        )
        losses.append(jsd.mean())
    # The teacher's pass has no gradient at all, so its weights are constants too.
    loss = torch.stack(losses).mean()
    names = [name for name, p in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    before = parameters(trainer)
    trainer.train()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, after in parameters(trainer).items():
        step = (before[name] - after) / rate
        error = (step - gradients[name]).abs().max() / gradients[name].abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_a_division_of_a_step_changes_nothing(tmp_path: Path) -> None:
    def run(batch_size: int, accumulation: int, **options: Any) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=0.3, temperature=0.0, **options,
        )  # fmt: skip
        trainer.train()
        return parameters(trainer)

    whole, start = run(8, 1), tiny_model().state_dict()
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-4
    for other in (run(2, 4), run(4, 2, max_tokens=90), run(8, 1, attention="padded")):
        for name, expected in whole.items():
            assert float((other[name] - expected).abs().max()) <= 2e-6, name


def test_responses_come_from_the_present_model_and_differ_between_steps(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=3, records=make_records(4), per_device_train_batch_size=4, learning_rate=0.1
    )
    seen: list[tuple[dict[str, torch.Tensor], list[Prompt], list[Sample]]] = []
    inner = trainer.rollouts

    class Watching(Rollouts):
        def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
            found = inner.sample(prompts)
            seen.append((parameters(trainer), list(prompts), found))
            return found

    trainer.rollouts = Watching()
    trainer.train()
    assert len(seen) == 3
    for weights, prompts, samples in seen:
        model = tiny_model()
        model.load_state_dict(weights)
        again = ModelRollouts(model, word_tokenizer(), trainer._stops, max_new_tokens=6).sample(prompts)
        assert [sample.ids for sample in again] == [sample.ids for sample in samples]
    assert len({prompt.seed for _, prompts, _ in seen for prompt in prompts}) == 12


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole).values(), parameters(resumed).values(), strict=True))
    assert logs_of(whole)[2:4] == logs_of(resumed)[2:4]
    other = make_trainer(tmp_path / "whole", temperature=0.5, **options)
    with pytest.raises(nq.CheckpointError, match="temperature"):
        other.train(str(tmp_path / "whole" / "checkpoint-2"))


def test_recorded_responses_give_the_same_model(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "a")
    first.rollouts = RecordingRollouts(first.rollouts, tmp_path / "samples.jsonl")
    first.train()
    first.rollouts.close()
    second = make_trainer(tmp_path / "b", rollouts=RecordedRollouts(tmp_path / "samples.jsonl", word_tokenizer()))
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(parameters(first).values(), parameters(second).values(), strict=True))


def test_the_student_approaches_the_teacher(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=25, learning_rate=3e-3, per_device_train_batch_size=12)
    trainer.train()
    losses = [log["loss"] for log in logs_of(trainer) if "loss" in log]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_evaluation_is_of_the_people_s_own_texts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=make_records(8, seed=1))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll_factual"], rel=0.2)
    plain = nq.NextQuillTrainer(
        tiny_model(), make_args(tmp_path), eval_dataset=make_records(8, seed=1), processing_class=word_tokenizer(),
        template=TEMPLATE, loss=nq.SFTLoss(),
    ).evaluate()  # fmt: skip
    for name in ("eval_loss", "eval_nll_factual", "eval_nll_counterfactual", "eval_effect_placebo"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-6), name


def test_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    trainer = make_trainer(tmp_path, get_peft_model(tiny_model(), config), learning_rate=1e-2)
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if "lora_B" in name and bool(p.any())]
    assert moved


@pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_changes_no_weight(tmp_path: Path, *, adapted: bool) -> None:
    ends = []
    for checkpointing in (False, True):
        model: Any = in_float64(tiny_model())
        if adapted:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        options: dict[str, Any] = {"loss": nq.MirrorLoss(alpha=0.5), CHECKPOINTING: checkpointing}
        trainer = make_trainer(tmp_path, model, optim="sgd", learning_rate=0.3, **options)
        start = trained(trainer.model)
        trainer.train()
        ends.append(trained(trainer.model))
    for name, want in ends[0].items():
        assert (ends[1][name] - want).abs().max() <= 1e-9 * (want - start[name]).abs().max(), name


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="loss: expected a MirrorLoss, got PerCELoss"):
        make_trainer(tmp_path, loss=nq.PerCELoss())
    with pytest.raises(ArgumentError, match=r"reference: expected words with \{response\} in them, got 'none'"):
        MirrorTrainer(tiny_model(), processing_class=word_tokenizer(), reference="none")
    with pytest.raises(ArgumentError, match="max_new_tokens: expected"):
        MirrorTrainer(tiny_model(), processing_class=word_tokenizer(), max_new_tokens=0)
    with pytest.raises(ArgumentError, match="temperature: expected"):
        make_trainer(tmp_path, temperature=-1.0)
    encoded = make_trainer(tmp_path).train_dataset
    with pytest.raises(ArgumentError, match="train_dataset: expected records, as the teacher reads their responses"):
        make_trainer(tmp_path, records=encoded)
