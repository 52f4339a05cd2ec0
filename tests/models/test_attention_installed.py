"""While trees are in use, ordinary forwards of the model do not change. Afterwards the model is as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from nextquill.evaluation.scoring import score_examples
from nextquill.models.branch_passes import PairPasses
from nextquill.models.cache_names import cache_of, for_forward
from tests.models.model_helpers import (
    assert_same_tensors,
    gradients,
    loss_cases,
    make_records,
    make_trainer,
    reference_loss,
    run_loss,
    shared_examples,
    tiny_model,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdpa": ("llama", {}),
    "eager": ("llama", {"attn_implementation": "eager"}),
    "soft cap, eager, window": ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 3.0}),
    "window": ("mistral", {"sliding_window": 5}),
    "two types": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "positions": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def make(name: str) -> nn.Module:
    kind, options = MODELS[name]
    return tiny_model(kind, **options)


def own_attention(model: Any) -> list[str]:
    """The attention's name in every config of the model."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def installed(model: Any, loss_name: str = "official") -> PairPasses:
    """Passes that have run, so that the model uses our attention."""
    passes = PairPasses(model, loss_cases()[loss_name].loss)
    passes.training_loss(passes.collator()(shared_examples()))
    assert all(name.startswith("nextquill") for name in own_attention(model)), "the tests below would test nothing"
    return passes


def assert_untouched(model: Any, before: list[str]) -> None:
    assert own_attention(model) == before, "the model's own attention was not put back"
    assert "forward" not in model.get_output_embeddings().__dict__, "the head's forward was not put back"


# ---- the model still works -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_ordinary_forwards_are_the_models_own(name: str) -> None:
    """Without a mask, with padding on either side, and step by step with a cache."""
    model = make(name)
    ids = torch.randint(2, 96, (3, 12))
    left = torch.ones_like(ids)
    left[0, :4] = left[2, :9] = 0
    right = left.flip(1)

    def run() -> list[Tensor]:
        with torch.no_grad():
            logits = [model(ids).logits]
            logits += [model(ids, attention_mask=mask).logits[mask.bool()] for mask in (left, right)]
            first = model(ids[:, :7], use_cache=True)
            rest = model(ids[:, 7:], use_cache=True, **for_forward(model, cache_of(first)))
        return [*logits, first.logits, rest.logits]

    expected = run()
    passes = installed(model)
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)
    passes.close()
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_generation_is_the_models_own(name: str) -> None:
    model = make(name)
    ids = torch.randint(2, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def run() -> Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)

    expected = run()
    passes = installed(model)
    assert torch.equal(run(), expected)
    passes.close()
    assert torch.equal(run(), expected)


def test_attention_weights_are_still_returned() -> None:
    model, ids = make("eager"), torch.randint(2, 96, (1, 7))
    expected = model(ids, output_attentions=True).attentions
    installed(model)
    got = model(ids, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_own_gradients_are_the_models_own() -> None:
    """Gradients of an ordinary forward while trees are in use."""
    model, case = make("two types"), loss_cases()["official"]
    expected = gradients(model, reference_loss(case, model, shared_examples()))
    installed(model)
    got = gradients(model, reference_loss(case, model, shared_examples()))
    assert_same_tensors(got, expected, 0.0, "gradient")


# What torch says of a reentrant checkpoint in a forward without gradient.
@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("loss_name", ["official", "detached"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["sdpa", "two types", "soft cap, eager, window"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool, loss_name: str) -> None:
    """Layers run again in the backward, after a forward of another batch and an ordinary forward."""
    case, examples, other = loss_cases()[loss_name], shared_examples(), shared_examples(3, seed=1)
    plain = make(name)
    expected = gradients(plain, reference_loss(case, plain, examples))
    model = make(name)
    # transformers 5.20 or so gave it the first name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    passes = PairPasses(model, case.loss)
    loss, _ = passes.training_loss(passes.collator()(examples))
    with torch.no_grad():
        passes.training_loss(passes.collator()(other))
        model(torch.randint(2, 96, (2, 9)))
    assert_same_tensors(gradients(model, loss), expected, 2e-5, "gradient under gradient checkpointing")


@pytest.mark.parametrize(
    "reentrant",
    [True, False],
    ids=["reentrant", "not reentrant"],
)
def test_a_checkpointed_backward_after_close_raises(reentrant: bool) -> None:
    """The layers that run again would use the model's own attention, which does not know trees."""
    case, examples, model = loss_cases()["official"], shared_examples(), make("sdpa")
    expected = gradients(model, reference_loss(case, model, examples))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    with PairPasses(model, case.loss) as passes:
        loss, _ = passes.training_loss(passes.collator()(examples))
    try:
        got = gradients(model, loss)
    except Exception:  # noqa: BLE001
        return
    assert_same_tensors(got, expected, 2e-5, "gradient")


# ---- the model gets its attention back -------------------------------------------------------------


def use_and_close(model: Any) -> None:
    passes = installed(model)
    passes.close()
    passes.close()


def use_in_a_context(model: Any) -> None:
    with PairPasses(model, loss_cases()["detached"].loss) as passes:
        passes.training_loss(passes.collator()(shared_examples()))


def fail_in_the_forward(model: Any) -> None:
    handle = None
    try:
        with PairPasses(model, loss_cases()["official"].loss) as passes:
            handle = model.base_model.register_forward_pre_hook(_interrupt)
            passes.training_loss(passes.collator()(shared_examples()))
    finally:
        handle.remove()


def fail_in_the_loss(model: Any) -> None:
    with PairPasses(model, loss_cases()["official"].loss) as passes:
        passes.loss.compute = _interrupt
        passes.training_loss(passes.collator()(shared_examples()))


def score_all(model: Any) -> None:
    assert len(list(score_examples(model, shared_examples(), batch_size=2))) == 6


def stop_scoring(model: Any) -> None:
    scores = score_examples(model, shared_examples(), batch_size=2)
    next(scores)
    assert own_attention(model)[0].startswith("nextquill")
    scores.close()


def fail_scoring(model: Any) -> None:
    scores = score_examples(model, shared_examples(), batch_size=2)
    next(scores)
    handle = model.base_model.register_forward_pre_hook(_interrupt)
    try:
        list(scores)
    finally:
        handle.remove()


def _interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("use", "raises"),
    [
        (use_and_close, False), (use_in_a_context, False), (fail_in_the_forward, True), (fail_in_the_loss, True),
        (score_all, False), (stop_scoring, False), (fail_scoring, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_the_model_is_given_back(use: Callable[[Any], None], raises: bool, training: bool) -> None:
    model = make("soft cap, eager, window").train(training)
    before = own_attention(model)
    assert set(before) == {"eager"}
    if raises:
        with pytest.raises(KeyboardInterrupt):
            use(model)
    else:
        use(model)
    assert_untouched(model, before)
    assert model.training is training


def test_closed_passes_can_be_used_again() -> None:
    model, examples = make("sdpa"), shared_examples()
    passes = PairPasses(model, loss_cases()["official"].loss)
    first, _ = passes.training_loss(passes.collator()(examples))
    passes.close()
    again, _ = passes.training_loss(passes.collator()(examples))
    assert torch.equal(first, again)
    assert own_attention(model)[0].startswith("nextquill")


def test_two_users_of_one_model_do_not_leave_ours_behind() -> None:
    model = make("sdpa")
    before = own_attention(model)
    outer, inner = installed(model), PairPasses(model, loss_cases()["detached"].loss)
    inner.training_loss(inner.collator()(shared_examples()))
    inner.close()
    value, _ = outer.training_loss(outer.collator()(shared_examples()))
    expected, _ = run_loss(make("sdpa"), loss_cases()["official"].loss, shared_examples())
    assert torch.equal(value, expected), "the second user's close took the first one's attention away"
    outer.close()
    assert_untouched(model, before)


def test_layers_with_configs_of_their_own_are_switched_too() -> None:
    """Some models copy their config into submodules, and attention that reads such a copy must change too."""
    import copy

    model = make("sdpa")
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    before = own_attention(model)
    passes = installed(model)
    assert len({id(m.config) for m in model.modules() if hasattr(m, "config")}) == 2
    passes.close()
    assert_untouched(model, before)


def test_saving_while_trees_are_in_use_does_not_name_them(tmp_path: Path) -> None:
    model = make("sdpa")
    installed(model)
    model.save_pretrained(tmp_path)
    assert "nextquill" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


# ---- the trainer and its evaluation ----------------------------------------------------------------


class StopAt(TrainerCallback):
    """Records the attention at some events, and interrupts at one."""

    def __init__(self, event: str) -> None:
        self.event, self.seen = event, []

    def _happened(self, event: str, model: Any) -> None:
        self.seen.append((event, model.config._attn_implementation))
        if event == self.event:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._happened("step", model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._happened("evaluate", model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._happened("save", model)

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._happened("prediction", model)


def watched(folder: Path, event: str = "") -> tuple[Any, StopAt]:
    watch = StopAt(event)
    options = {"eval_dataset": make_records(5), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    return make_trainer(folder, None, save_steps=1, callbacks=[watch], **options), watch


@pytest.mark.parametrize("event", ["", "step", "prediction", "evaluate", "save"])
def test_training_gives_the_model_back(tmp_path: Path, event: str) -> None:
    trainer, watch = watched(tmp_path, event)
    if event:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
        assert {name for name, _ in watch.seen} == {"step", "prediction", "evaluate", "save"}
    assert all(name.startswith("nextquill") for _, name in watch.seen), "trees were not in use"
    assert_untouched(trainer.model, ["sdpa"] * len(own_attention(trainer.model)))


@pytest.mark.parametrize("event", ["", "prediction"])
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_evaluation_gives_the_model_back(tmp_path: Path, method: str, event: str) -> None:
    trainer, _ = watched(tmp_path, event)
    run = trainer.evaluate if method == "evaluate" else lambda: trainer.predict(make_records(3))
    if event:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert_untouched(trainer.model, ["sdpa"] * len(own_attention(trainer.model)))


def test_checkpoints_written_while_training_do_not_name_trees(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path)
    trainer.train()
    for name in ("checkpoint-1", "checkpoint-2"):
        assert "nextquill" not in json.dumps(json.loads((tmp_path / name / "config.json").read_text()))
