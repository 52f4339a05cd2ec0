"""What MIRROR samples: the gradient that samples give on average, bad samples, and their log."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import nextquill as nq
from nextquill.data import Branch
from nextquill.errors import ArgumentError, BudgetError
from nextquill.generation import Prompt
from nextquill.generation.rollouts import Rollouts, Sample
from nextquill.mirror import MirrorTrainer
from tests.mirror.mirror_helpers import Fixed, make_trainer
from tests.models.model_helpers import logs_of, make_records, parameters, tiny_model, word_tokenizer

#: "past", "write" and the words that records may use.
WORDS = ("<pad>", "</s>", "past", "write", "none", "w79", "a", "b", "c")
END = 1

# ---- a world of 73 responses -------------------------------------------------------------------------


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "none", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def small_world(folder: Path, rollouts: int) -> MirrorTrainer:
    """One step of SGD on one example, with responses of at most two of nine tokens."""
    record = {"user_id": "u", "query": "a", "history": ["b c", "c"], "response": "c b"}
    model = tiny_model(vocab_size=len(WORDS)).double()
    return make_trainer(
        folder, model, [record], processing_class=small_tokenizer(), max_new_tokens=2, num_rollouts=rollouts,
        per_device_train_batch_size=1, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
    )  # fmt: skip


RESPONSES = [[END], *([first, second] for first, second in itertools.product(range(9), range(9)) if first != END)]


def log_probs(model: nn.Module, branch: Branch) -> Tensor:
    logits = model(input_ids=torch.tensor([branch.input_ids])).logits[0]
    return logits[branch.prompt_length - 1 : -1].log_softmax(-1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    mixture = (0.5 * student.exp() + 0.5 * teacher.exp()).log()
    jsd = 0.5 * teacher.exp() * (teacher - mixture) + 0.5 * student.exp() * (student - mixture)
    return jsd.sum(-1).mean()


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.reshape(-1) for each in values])


def test_the_samples_gradient_is_on_average_that_of_the_loss_at_fixed_responses(tmp_path: Path) -> None:
    """Σ p(ŷ) ∇loss(ŷ), with p a constant: none through the sampling, which would add Σ ∇p(ŷ) loss(ŷ).

    Every response is enumerated with its probability and gradient. So the mean over samples is known along any
    direction, and its variance with it. The bound is five standard errors, which chance exceeds once in 1.7 million.
    """
    rollouts = 1500
    trainer = small_world(tmp_path, rollouts)
    example = trainer.train_dataset.examples[0]
    model = tiny_model(vocab_size=len(WORDS)).double()
    weights = list(model.parameters())
    chances, gradients, through_sampling = [], [], []
    for response in RESPONSES:
        student = log_probs(model, Branch(example.factual.prompt_ids, response))
        teacher = log_probs(model, Branch(example.counterfactual.prompt_ids, response)).detach()
        chance = student.gather(1, torch.tensor(response)[:, None]).sum().exp()
        loss = divergence(student, teacher)
        gradients.append(flat(torch.autograd.grad(loss, weights, retain_graph=True)))
        through_sampling.append(flat(torch.autograd.grad(chance, weights)) * loss.item())
        chances.append(chance.item())
    p, each = torch.tensor(chances, dtype=torch.float64), torch.stack(gradients)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    expected, other = p @ each, torch.stack(through_sampling).sum(0)
    direction = other / other.norm()
    along = each @ direction
    deviation = math.sqrt(float(p @ (along - p @ along) ** 2))
    bound = 5 * deviation / math.sqrt(rollouts)
    assert float(other.norm()) > 2 * bound, "the samples are too few to tell the two gradients apart"

    before = flat(list(parameters(trainer).values()))
    trainer.train()
    got = before - flat(list(parameters(trainer).values()))
    assert abs(float((got - expected) @ direction)) <= bound
    own = expected / expected.norm()
    spread = math.sqrt(float(p @ (each @ own - expected.norm()) ** 2))
    assert abs(float((got - expected) @ own)) <= 5 * spread / math.sqrt(rollouts)


# ---- bad samples -----------------------------------------------------------------------------------


class Given(Rollouts):
    """The same sample for every prompt."""

    def __init__(self, ids: list[int], text: str = "", *, ended: bool = True) -> None:
        self.given = Sample(ids, text, ended)

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [self.given for _ in prompts]


def logged(folder: Path, rollouts: Rollouts, **options: Any) -> dict[str, float]:
    trainer = make_trainer(folder, rollouts=rollouts, max_steps=1, **options)
    trainer.train()
    return logs_of(trainer)[0]


def test_a_response_of_the_stop_token_alone_is_trained_on_and_counted(tmp_path: Path) -> None:
    log = logged(tmp_path, Given([END]))
    assert (log["responses_empty"], log["response_tokens"], log["num_tokens"]) == (1.0, 1.0, 4)
    assert log["loss"] > 0


def test_a_response_without_a_token_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="rollouts: expected at least one token in each sample, sample 0 has none"):
        make_trainer(tmp_path, rollouts=Given([])).train()


def test_a_response_that_did_not_end_is_counted(tmp_path: Path) -> None:
    log = logged(tmp_path, Given([12, 13, 14, 15, 16, 17], "w6", ended=False))
    assert (log["responses_unfinished"], log["responses_empty"], log["response_tokens"]) == (1.0, 0.0, 6.0)


def test_a_response_that_equals_the_user_s_is_trained_on_and_counted(tmp_path: Path) -> None:
    records = [{**record, "response": "w4 w14"} for record in make_records(4)]
    own = [*word_tokenizer()("w4 w14").input_ids, END]
    log = logged(tmp_path, Given(own, "w4 w14"), records=records)
    assert log["responses_equal"] == 1.0
    assert log["loss"] > 0
    assert logged(tmp_path, Given(own, "w4 w14"))["responses_equal"] == 0.0


class Repeating(Rollouts):
    """Varied samples at first, then one token again and again."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        self.left -= 1
        ids = [12, 13, 14, 15] if self.left >= 0 else [12] * 4
        return [Sample(ids, "w4", False) for _ in prompts]


def test_a_model_that_begins_to_repeat_itself_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, rollouts=Repeating(2), max_steps=4)
    trainer.train()
    (warning,) = (line for record in caplog.records if "repeat themselves" in (line := record.getMessage()))
    assert warning.startswith(
        "step 3: the sampled responses repeat themselves: 25% of a response's tokens are distinct"
    )
    assert [log["response_variety"] for log in logs_of(trainer)[:4]] == [1.0, 1.0, 0.25, 0.25]


def test_a_teacher_without_room_is_an_error_before_any_work(tmp_path: Path) -> None:
    records = [{**make_records(1)[0], "response": " ".join(["w7"] * 30)}]
    with pytest.raises(BudgetError, match=r"record 0 \(user 'u0'\): the teacher's prompt, .* max_length is 40"):
        make_trainer(tmp_path, records=records, max_length=40)


def test_more_new_tokens_than_a_response_may_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="max_new_tokens: expected at most max_response_length=5, got 6"):
        make_trainer(tmp_path, max_response_length=5)


def test_a_growing_loss_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The samples of a later step may be further from the teacher; a run of ours on given texts does warn."""

    def finish(trainer: Any) -> str:
        caplog.clear()
        trainer.train()
        trainer.state.log_history = [{"loss": value, "grad_norm": 1.0} for value in (0.1, 0.2, 0.3, 0.4)]
        guard = trainer.guard
        guard.on_train_end(trainer.args, trainer.state, trainer.control)
        return caplog.text

    assert "the loss began at" not in finish(make_trainer(tmp_path, max_steps=1))
    plain = nq.NextQuillTrainer(
        tiny_model(), make_trainer(tmp_path).args, train_dataset=make_records(), processing_class=word_tokenizer()
    )
    assert "the loss began at" in finish(plain)


# ---- their log -------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sampled_responses.jsonl").read_text().splitlines()]


def test_samples_are_logged_with_user_step_and_text(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rollouts=Fixed(), max_steps=5, log_samples_every=2, num_rollouts=2)
    trainer.train()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [0] * 8 + [2] * 8 + [4] * 8
    users = {example.index: example.user_id for example in trainer.train_dataset.examples}
    for line in lines:
        assert line == {
            "step": line["step"], "user_id": users[line["example"]], "example": line["example"],
            "response": "w4 w14", "tokens": 3, "ended": True,
        }  # fmt: skip


def test_no_log_of_samples(tmp_path: Path) -> None:
    make_trainer(tmp_path, rollouts=Fixed(), log_samples_every=0).train()
    assert not (tmp_path / "sampled_responses.jsonl").exists()


class _Killed(TrainerCallback):
    """Ends the run after its third step, between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


def test_a_run_that_was_killed_between_checkpoints_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "loss": nq.MirrorLoss(alpha=0.5),
        "learning_rate": 1e-2,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "killed", callbacks=[_Killed()], **options).train()
    assert max(line["step"] for line in lines_of(tmp_path / "killed")) == 2
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(True)
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole).values(), parameters(resumed).values(), strict=True))


def test_a_push_to_the_hub_would_upload_the_samples(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"args\.push_to_hub: not supported with log_samples_every=1"):
        make_trainer(tmp_path, push_to_hub=True)
