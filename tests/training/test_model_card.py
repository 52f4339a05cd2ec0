"""The model card: filled from the run, without a path of this machine, in every folder that holds a model."""

import yaml

from nextquill.models.loading import PromptSettings, load_prompt_settings
from nextquill.training.model_card import model_card
from nextquill.training.trainer import NextQuillTrainer
from tests.models.model_helpers import TEMPLATE, make_args, make_records, tiny_model, word_tokenizer


def make_trainer(folder, **options):
    model = options.pop("model", None) or tiny_model(max_position_embeddings=512)
    records = make_records(8)
    args = make_args(folder, max_steps=2, **options.pop("args", {}))
    return NextQuillTrainer(
        model,
        args,
        train_dataset=records,
        processing_class=word_tokenizer(),
        template=TEMPLATE,
        max_length=200,
        **options,
    )


def read(card):
    data, _, text = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(data), text


def test_it_has_the_loss_the_data_the_prompt_and_the_measures(tmp_path):
    trainer = make_trainer(tmp_path / "run", eval_dataset=make_records(6, seed=1), args={"learning_rate": 1e-3})
    assert "None during training" in model_card(trainer)
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model()
    data, text = read((tmp_path / "run" / "README.md").read_text(encoding="utf-8"))
    assert data["library_name"] == "transformers"
    assert "base_model" not in data
    stats = trainer.train_dataset.stats
    users = len({record["user_id"] for record in make_records(8)})
    assert f"8 examples of {users} users, {stats.response_tokens} response tokens" in text
    assert "PerCELoss(" in text
    assert "2 steps of" in text
    assert "learning rate 0.001" in text
    assert "| NLL without a history, nats a token | " + f"{measured['eval_nll_counterfactual']:.3g} |" in text
    renderer = trainer.encoder.renderer
    assert "past" in text[text.index("~~~~text") :]
    assert renderer.template.closing_cue in text


def test_it_stands_beside_the_prompt_settings_in_checkpoints_too(tmp_path):
    trainer = make_trainer(tmp_path / "run", args={"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert f"| training | {step} step{'s' * (step > 1)} of" in (folder / "README.md").read_text(encoding="utf-8")
        settings = load_prompt_settings(folder)
        assert settings is not None
        assert settings == PromptSettings(TEMPLATE, 200).with_chat(False)


def test_an_adapters_card_names_a_base_on_the_hub_but_no_local_folder(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_model(max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    for name, expected in (("me/base", "me/base"), (str(tmp_path / "base"), None)):
        base.config._name_or_path = name
        trainer = make_trainer(tmp_path / "run", model=get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
        trainer.save_model()
        card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
        data, _ = read(card)
        assert data["library_name"] == "peft"
        assert data.get("base_model") == expected
        assert str(tmp_path) not in card
        base = trainer.model.unload()


def test_a_push_to_the_hub_writes_the_same_card(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.create_model_card(model_name="run")
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == model_card(trainer)
