"""Roles: their initial state, their saved files, and loading on the model they were trained on."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from nextquill.errors import ArgumentError, CheckpointError
from nextquill.popi import Roles, evaluation
from nextquill.popi.adapters import switched
from nextquill.popi.passes import BranchPasses
from nextquill.popi.roles import ROLES_FILE
from tests.popi.popi_helpers import (
    logs_of,
    lora,
    make_trainer,
    make_users,
    summaries_of,
    tiny_model,
    trained_weights,
    word_tokenizer,
)

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
IDS = torch.arange(3, 12)[None]


def stored(folder: Path, seed: int = 0) -> Path:
    model: Any = tiny_model(seed)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def logits(context: Any) -> Tensor:
    with torch.no_grad(), context as model:
        found: Tensor = model(IDS).logits
    return found


def base_logits() -> Tensor:
    return logits(nullcontext(tiny_model()))


def stirred(model: Any) -> Any:
    """Roles with adapters that change the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_a_role_keeps_its_initial_state(options: dict[str, Any]) -> None:
    fresh = Roles.shared(tiny_model(), word_tokenizer(), lora(**options))
    assert torch.allclose(logits(fresh.generator.initial()), base_logits(), atol=1e-5)
    resumed = Roles.shared(stirred(fresh.inference.model), word_tokenizer())
    before = [logits(role.active()) for role in resumed]
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            if ".inference." in name or ".generator." in name:
                parameter.mul_(2)
    for role, was in zip(resumed, before, strict=True):
        assert torch.equal(logits(role.initial()), was)
        assert not torch.equal(logits(role.active()), was)
    names = {name for name, p in resumed.named_parameters() if p.requires_grad}
    assert names
    assert not any("_initial" in name for name in names)


def test_a_separate_adapter_is_copied_and_its_model_is_not() -> None:
    model = stirred(get_peft_model(tiny_model(1), lora()))
    roles = Roles.separate(model, tiny_model(2), word_tokenizer())
    before = logits(roles.inference.active())
    assert roles.inference.initial_state == "default_initial"  # so that the model is not copied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.mul_(2)
    assert torch.equal(logits(roles.inference.initial()), before)
    assert not torch.equal(logits(roles.inference.active()), before)
    fresh = Roles.separate(get_peft_model(tiny_model(1), lora()), tiny_model(2), word_tokenizer())
    assert fresh.inference.initial_state is None
    assert list(fresh.inference.model.peft_config) == ["default"]


def test_an_initial_model_moves_with_the_roles() -> None:
    roles = Roles.separate(tiny_model(1), tiny_model(2), word_tokenizer())
    roles.to("meta")
    with roles.generator.initial() as model:
        assert next(model.parameters()).device.type == "meta"


def test_switching_restores_the_trained_parameters() -> None:
    roles = Roles.shared(tiny_model(), word_tokenizer(), lora(), freeze_generator=True)
    model = roles.inference.model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for adapter in ("inference", "generator", None):
        with switched(model, adapter):
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert model.active_adapter == "inference"


def test_a_loaded_role_starts_from_the_model_without_its_adapter(tmp_path: Path) -> None:
    roles = Roles.shared(tiny_model(), word_tokenizer(), lora())
    stirred(roles.inference.model)
    roles.save(tmp_path, {})
    loaded = Roles.load(tmp_path)
    assert torch.equal(logits(loaded.generator.active()), logits(roles.generator.active()))
    assert torch.equal(logits(loaded.generator.initial()), base_logits())


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    """The model's name stands for its original weights, but the model was changed in memory."""
    model = AutoModelForCausalLM.from_pretrained(stored(tmp_path / "base"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    Roles.shared(model, word_tokenizer(), lora()).save(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match=r"trained on other weights than those of .*base"):
        Roles.load(tmp_path / "run")
    changed: Any = tiny_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    Roles.load(tmp_path / "run", base_model=changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_precision_is_still_the_same_base(tmp_path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored(tmp_path / "base"))
    Roles.shared(model, word_tokenizer(), lora(target_modules=["q_proj", "lm_head"])).save(tmp_path / "run", {})
    assert Roles.load(tmp_path / "run", dtype=dtype).inference.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("separate", [False, True])
def test_a_base_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool) -> None:
    monkeypatch.chdir(tmp_path)
    stored(Path("base"))
    if separate:  # with an adapter of any name
        adapted = stirred(get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora(), adapter_name="mine"))
        roles = Roles.separate(adapted, tiny_model(1), word_tokenizer())
    else:
        roles = Roles.shared(AutoModelForCausalLM.from_pretrained("base"), word_tokenizer(), lora())
    roles.save(Path("run"), {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = Roles.load("../run")
    assert torch.equal(logits(loaded.inference.active()), logits(roles.inference.active()))
    if separate:
        assert torch.equal(logits(loaded.inference.initial()), base_logits())


@pytest.mark.parametrize("local", [False, True])
def test_a_base_on_the_hub_has_the_revision_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored(tmp_path / "base"))
    Roles.shared(model, word_tokenizer(), lora(revision="v2")).save(tmp_path / "run", {})
    if not local:
        header = tmp_path / "run" / ROLES_FILE
        header.write_text(json.dumps({**json.loads(header.read_text()), "base_model": "some/model"}))
    asked = []

    def load_model(name: str, **options: Any) -> Any:
        asked.append((name, options.get("revision")))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base"), word_tokenizer()

    monkeypatch.setattr("nextquill.popi.roles.load_model", load_model)
    Roles.load(tmp_path / "run")
    assert asked == [(str(tmp_path / "base"), None) if local else ("some/model", "v2")]
    with pytest.raises(ArgumentError, match=r"^revision: expected a model on the hub with it, got .*run"):
        Roles.load(tmp_path / "run", revision="v3")


def test_a_new_base_moves_with_its_folder(tmp_path: Path) -> None:
    Roles.shared(tiny_model(), word_tokenizer(), lora()).save(tmp_path / "run", {})
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(logits(Roles.load(tmp_path / "moved").generator.active()), base_logits())


# ---- in training -----------------------------------------------------------------------------------


def test_a_run_with_a_frozen_role_resumes_with_any_state_of_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, {"freeze_generator": True}, **options)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    honest = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: honest(17 if seed == 5 else seed))  # as in another process
    resumed = make_trainer(tmp_path, {"freeze_generator": True}, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in trained_weights(whole).items():
        assert torch.equal(tensor, trained_weights(resumed)[name]), name


def test_mixed_precision_is_that_of_the_arguments(tmp_path: Path) -> None:
    """In samples, scores and passes with a gradient."""
    seen = set()
    trainer = make_trainer(tmp_path, max_steps=1, bf16=True, eval_dataset=make_users(2))
    layer = trainer.roles.inference.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.register_forward_hook(lambda _, __, output: seen.add((torch.is_grad_enabled(), output.dtype)))
    trainer.train()
    trainer.evaluate()
    assert seen == {(False, torch.bfloat16), (True, torch.bfloat16)}
    exact = make_trainer(tmp_path / "exact", max_steps=1)
    exact.train()
    (rounded,), (full,) = logs_of(trainer), logs_of(exact)
    assert rounded["preference_loss"] != full["preference_loss"]
    assert rounded["preference_loss"] == pytest.approx(full["preference_loss"], rel=0.02)


def test_evaluation_has_the_attention_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Passes(BranchPasses):
        def __init__(self, *args: Any, **options: Any) -> None:
            asked.append(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(evaluation, "BranchPasses", Passes)
    make_trainer(tmp_path, attention="mask", max_tokens=60).evaluate(make_users(2))
    assert asked
    assert all((each["attention"], each["max_tokens"]) == ("mask", 60) for each in asked)


def test_the_log_of_a_process_that_no_longer_exists_is_cut_as_well(tmp_path: Path) -> None:
    other = tmp_path / "sampled_summaries.rank1.jsonl"
    other.write_text('{"step": 0}\n{"step": 7}\n')
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert other.read_text() == ""
    other.write_text('{"step": 0}\n{"step": 7}\n')
    make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert other.read_text() == '{"step": 0}\n'
    assert {line["step"] for line in summaries_of(tmp_path)} == {0, 1}
