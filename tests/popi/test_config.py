"""POPI's training refuses arguments that it would have to ignore or could not train exactly."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import IA3Config, get_peft_model
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import AutoConfig, AutoModelForCausalLM

from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError
from nextquill.generation.rollouts import Sample
from nextquill.popi import Roles
from nextquill.popi.config import check_engine
from tests.popi.popi_helpers import WORDS, lora, make_trainer, make_users, tiny_model, word_tokenizer

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


def mixture() -> Any:
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1,
        "max_position_embeddings": 256, "bos_token_id": None,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", output_router_logits=True, **sizes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, r"args\.auto_find_batch_size"),
        ({"bf16_full_eval": True}, r"args\.bf16_full_eval"),
        ({"torch_empty_cache_steps": 1}, r"args\.torch_empty_cache_steps"),
        ({"push_to_hub": True}, r"args\.push_to_hub.*sampled_summaries"),
        ({"label_smoothing_factor": 0.1}, r"args\.label_smoothing_factor"),
        ({"peft_config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}, "expected a LoraConfig"),
        ({"peft_config": lora(bias="lora_only")}, "bias='none'"),
        ({"peft_config": lora(init_lora_weights="pissa")}, "init_lora_weights True"),
        ({"peft_config": lora(init_lora_weights=False)}, "init_lora_weights True"),
        ({"peft_config": lora(trainable_token_indices=[3])}, "trainable_token_indices"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_trainer(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("engine", "setting", "message"),
    [
        ("deepspeed", {}, "args: each role's model runs by itself, and under DeepSpeed"),
        ("fsdp", {"fsdp_version": 1}, "args: each role's model runs by itself, and FSDP1"),
        ("fsdp", {"auto_wrap_policy": size_based_auto_wrap_policy}, "TRANSFORMER_BASED_WRAP, got size_based_auto_wrap"),
        ("fsdp", {"auto_wrap_policy": None}, "TRANSFORMER_BASED_WRAP, got None"),
        ("fsdp", {"activation_checkpointing": True}, "args.fsdp_config: expected activation_checkpointing False"),
        ("fsdp", {}, ""),
        ("fsdp", {"auto_wrap_policy": partial(transformer_auto_wrap_policy)}, ""),
        ("none", {}, ""),
    ],
)
def test_engines_under_which_roles_cannot_run_are_refused(engine: str, setting: dict[str, Any], message: str) -> None:
    usual = {"fsdp_version": 2, "auto_wrap_policy": transformer_auto_wrap_policy, "activation_checkpointing": False}
    plugin = SimpleNamespace(**{"cpu_offload": None, **usual, **setting})
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    flags = {f"is_{name}_enabled": name == engine for name in ("deepspeed", "fsdp")}
    with pytest.raises(ArgumentError, match=message) if message else nullcontext():
        check_engine(SimpleNamespace(accelerator=accelerator, **flags))


def test_a_prompt_and_its_summary_fit_the_models_context_together(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, {"max_summary_tokens": 6}, model=tiny_model(max_position_embeddings=64))
    assert trainer.config.max_signal_tokens == 64 - 6
    assert trainer.config.max_length == 64
    with pytest.raises(ArgumentError, match=r"max_summary_tokens: expected less than .* context of 64 tokens, got 64"):
        make_trainer(tmp_path, {"max_summary_tokens": 64}, model=tiny_model(max_position_embeddings=64))


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_a_model_with_dropout_is_refused(tmp_path: Path, attention: str) -> None:
    """Its training would use other probabilities than the losses were measured with."""
    with pytest.raises(ArgumentError, match=r"without dropout, got .*attention_dropout=0\.3"):
        make_trainer(tmp_path, model=tiny_model(attention_dropout=0.3), attention=attention)


def test_a_router_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"inference model's config\.output_router_logits"):
        make_trainer(tmp_path, inference_model=mixture(), generator_model=tiny_model())


def test_loaded_roles_are_refused_as_a_model_unless_they_fit_the_settings(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1).save_model(str(tmp_path / "saved"))
    roles = Roles.load(tmp_path / "saved")
    with pytest.raises(ArgumentError, match="role inference is frozen, expected what freeze_inference=False"):
        make_trainer(tmp_path, model=roles, peft_config=None)
    with pytest.raises(ArgumentError, match="peft_config: expected None with a model that is Roles"):
        make_trainer(tmp_path, model=roles)
    with pytest.raises(ArgumentError, match="peft_config: expected None with a model that has its adapters"):
        make_trainer(tmp_path, model=roles.inference.model)


def test_an_adapter_of_a_model_without_a_name_is_refused(tmp_path: Path) -> None:
    """It could be trained and saved, but never loaded."""
    adapted = get_peft_model(tiny_model(1), lora())
    with pytest.raises(ArgumentError, match="inference_model: expected an adapter of a model that was loaded"):
        make_trainer(tmp_path, inference_model=adapted, generator_model=tiny_model(2))


def test_a_checkpoint_without_an_optimizer_is_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 has no optimizer\.pt"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_sharded_weights_is_not_resumed_under_fsdp(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options).train()
    trainer = make_trainer(tmp_path, **options)
    trainer.is_fsdp_enabled = True
    with pytest.raises(CheckpointError, match=r"checkpoint-1 has no trained_weights\.pt: it was written without FSDP"):
        trainer.check_resume(tmp_path / "checkpoint-1")


def test_a_run_is_resumed_only_with_the_same_arguments(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options).train()
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 4}, "another seed: there 3, here 4"),
        ({"per_device_train_batch_size": 4}, "another users per step: there 2, here 4"),
        ({"peft_config": lora(lora_alpha=9)}, "another adapters"),
    ]
    for other, message in others:
        with pytest.raises(CheckpointError, match=message):
            make_trainer(tmp_path, **{**options, **other}).train(resume_from_checkpoint=True)
    trainer = make_trainer(
        tmp_path, **{**options, "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_users_that_fill_no_batch_are_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
    with pytest.raises(ArgumentError, match="leaves no batch of 8, there are 4 users"):
        trainer.train()
    with pytest.raises(ArgumentTypeError, match="eval_dataset: expected users or records, got a dict"):
        make_trainer(tmp_path, eval_dataset={"some": make_users()})
    with pytest.raises(ArgumentError, match="generator_tokenizer: expected None"):
        make_trainer(tmp_path, generator_tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    ("sample", "message"),
    [(lambda prompts: [Sample([], "", ended=False)] * len(prompts), "sample 0 has none"),
     (lambda prompts: [Sample([7, 1], "red", ended=True)], "expected 6 samples, got 1")],
)  # fmt: skip
def test_missing_and_empty_samples_are_named(tmp_path: Path, sample: Any, message: str) -> None:
    class Broken:
        def sample(self, prompts: Any) -> list[Sample]:
            found: list[Sample] = sample(prompts)
            return found

        def sync(self) -> None: ...

        def close(self) -> None: ...

    trainer = make_trainer(tmp_path, rollouts=Broken())
    with pytest.raises(ArgumentError, match=message):
        trainer.train()
