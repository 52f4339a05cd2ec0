"""Models by name or folder are loaded whole or refused, with their prompt settings."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from nextquill.cli.options import LoraOptions
from nextquill.data import PromptTemplate, Record
from nextquill.errors import ArgumentError, CheckpointError, UnsupportedModelError
from nextquill.models import loading
from nextquill.models.configs import context_length
from nextquill.models.loading import PROMPT_FILE, PromptSettings, load_model, load_prompt_settings
from nextquill.models.tiny_models import build_tokenizer

SETTINGS = PromptSettings(PromptTemplate(order="history_first", system="Être bref."), 700, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its tokenizer, saved."""
    path = tmp_path_factory.mktemp("models") / "base"
    model, tokenizer = load_model("tiny", records=lambda: [Record("u", "query", "response")])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def outputs(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


# ---- models ------------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved(folder):
    model, tokenizer = load_model(str(folder))
    new, _ = load_model("tiny", records=lambda: [Record("u", "query", "response")])
    assert torch.equal(outputs(model.eval()), outputs(new.eval()))
    assert tokenizer.decode(tokenizer.encode("response")) == "response"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder, dtype):
    assert load_model(str(folder), dtype=dtype)[0].dtype == getattr(torch, dtype)


def test_a_relative_path_becomes_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_model(folder.name)[0].name_or_path == str(folder)


def test_a_new_model_needs_records():
    with pytest.raises(UnsupportedModelError, match=r"a new 'tiny' model can only be trained.*write ./tiny"):
        load_model("tiny")


@pytest.fixture
def no_hub(monkeypatch):
    def refuse():
        raise AssertionError("the hub was asked about a local path")

    monkeypatch.setattr(loading, "_hub_answers", refuse)


@pytest.mark.parametrize("name", ["./no", "../no/where", "/no/where", "~/no", "a/b/c", "runs/no"])
def test_a_missing_path_never_asks_the_hub(name, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UnsupportedModelError, match=f"there is no folder {name}"):
        load_model(name)


@pytest.mark.parametrize("name", ["nosuchmodel", "nosuchowner/nosuchmodel"])
def test_an_unreachable_hub_is_named_at_once(name, monkeypatch):
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    waits = []

    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("socket.getaddrinfo", offline)
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(UnsupportedModelError, match="not a folder here, the hub cannot be reached, and it is not in"):
        load_model(name)
    assert not waits, "seconds between two requests: the hub was asked all the same, and again"


def test_an_unreachable_hub_raises_nothing(monkeypatch):
    import huggingface_hub

    def session():
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "get_session", session)
    assert not loading._hub_answers()


def test_a_file_or_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedModelError, match="expected a model folder"):
        load_model(str(tmp_path / "file"))
    with pytest.raises(UnsupportedModelError, match=r"no config\.json or adapter_config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00\x01" * 40], ids=["empty", "cut", "noise"])
def test_a_damaged_file_is_one_typed_error(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"cannot load .*/{name}") as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UnsupportedModelError, match="cannot load the tokenizer"):
        load_model(str(copy))


def test_weights_that_are_missing_are_not_made_up(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(UnsupportedModelError, match=r"lacks \d+ of the model's weights, such as model.layers.2"):
        load_model(str(copy))


def test_a_single_weight_that_is_missing_is_not_made_up(copy):
    (path,) = copy.glob("*.safetensors")
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 of the model's weights, such as model\.norm\.weight"):
        load_model(str(copy))


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load_model(str(copy))


# ---- adapters ----------------------------------------------------------------------------------


@pytest.fixture
def adapted(folder, tmp_path):
    """A folder with an adapter that changes the outputs, and those outputs."""
    model, _ = load_model(str(folder))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", outputs(model.eval())


def test_an_adapter_loads_with_its_base_and_is_trainable(adapted):
    model, tokenizer = load_model(str(adapted[0]))
    assert isinstance(model, PeftModel)
    assert torch.equal(outputs(model.eval()), adapted[1])
    assert len(tokenizer) > 256, "the base's tokenizer, as the adapter has none"
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_an_adapter_leaves_padded_embeddings_alone(adapted, folder):
    """PEFT's own auto class resizes them to the tokenizer, which changes every probability."""
    model, tokenizer = load_model(str(folder))
    rows = len(tokenizer) + 7
    model.resize_token_embeddings(rows)
    model.save_pretrained(adapted[0].parent / "padded")
    tokenizer.save_pretrained(adapted[0].parent / "padded")
    tokenizer.save_pretrained(adapted[0])
    config = json.loads((adapted[0] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapted[0].parent / "padded")
    (adapted[0] / "adapter_config.json").write_text(json.dumps(config))
    assert load_model(str(adapted[0]))[0].get_output_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize("base", ["./gone", None])
def test_an_adapter_without_its_base(adapted, base):
    path = adapted[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UnsupportedModelError, match="base model"):
        load_model(str(adapted[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 1},
            r"does not fit its base model .*other: the base lacks 4 weights, such as .*layers\.1",
        ),
        (
            {"num_hidden_layers": 3},
            r"does not fit its base model .*other: the adapter lacks 4 weights, such as .*layers\.2",
        ),
        ({"hidden_size": 128, "head_dim": 64}, r"does not fit its base model .*other: size mismatch for .*lora_A"),
    ],
    ids=["fewer-layers", "more-layers", "wider"],
)
def test_an_adapter_of_a_model_of_another_size(adapted, folder, change, message):
    config = AutoConfig.from_pretrained(folder)
    for name, value in change.items():
        setattr(config, name, value)
    config.layer_types = None
    rebased(adapted[0], LlamaForCausalLM(config), load_model(str(folder))[1])
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(str(adapted[0]))


def test_an_adapter_of_another_architecture(adapted, folder):
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2)
    rebased(adapted[0], GPT2LMHeadModel(config), load_model(str(folder))[1])
    with pytest.raises(UnsupportedModelError, match=r"does not fit its base model .*other: .*q_proj.* not found"):
        load_model(str(adapted[0]))


def test_an_adapter_of_another_vocabulary(adapted, folder):
    model, tokenizer = load_model(str(folder))
    tokenizer.save_pretrained(adapted[0])
    other = build_tokenizer(["quite another text, quite another text"], 300)
    rebased(adapted[0], model, other)
    with pytest.raises(
        UnsupportedModelError, match=r"another vocabulary than its base model .*other: token '.*' is \d+ "
    ):
        load_model(str(adapted[0]))


def test_an_adapter_may_add_tokens(adapted, folder):
    _, tokenizer = load_model(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapted[0])
    assert load_model(str(adapted[0]))[1].get_vocab() == tokenizer.get_vocab()


def rebased(adapter, model, tokenizer):
    """Let an adapter's folder name another base model, in a folder beside it."""
    base = adapter.parent / "other"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


# ---- how a model is loaded ---------------------------------------------------------------------


def test_the_models_own_attention_is_chosen(folder):
    assert load_model(str(folder), attn_implementation="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match=r"^attn_implementation: .*nosuch"):
        load_model(str(folder), attn_implementation="nosuch")


@pytest.mark.parametrize("name", ["tiny", "folder"])
def test_a_revision_is_for_the_hub(folder, name):
    with pytest.raises(ArgumentError, match=r"^revision: expected a model on the hub with it, got"):
        load_model(str(folder) if name == "folder" else name, revision="main")


def test_the_revision_is_asked_for(monkeypatch):
    asked = []

    def returning(found):
        def from_pretrained(*names, **options):
            asked.append((options["revision"], options.get("adapter_kwargs", options)["revision"]))
            return found

        return from_pretrained

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    model = returning((SimpleNamespace(), {"missing_keys": set()}))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", model)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", returning(build_tokenizer(["a"], 300)))
    load_model("some/model", revision="v2")
    assert asked == [("v2", "v2")] * 2


def test_an_adapter_loads_the_revision_of_its_base(adapted, monkeypatch):
    path = adapted[0] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"revision": "v2"}))
    load_model(str(adapted[0]))  # its base is a folder, which has no revisions
    path.write_text(json.dumps(config | {"revision": "v2", "base_model_name_or_path": "some/model"}))
    asked = []

    def from_pretrained(*names, **options):
        asked.append(options["revision"])
        raise OSError("enough")

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(UnsupportedModelError, match=r"needs its base model: .*some/model.*enough"):
        load_model(str(adapted[0]))
    assert asked == ["v2"]


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantising_needs_its_package(folder, bits, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ArgumentError, match=rf"^{bits}: needs the package bitsandbytes; pip install 'nextquill\[quant"):
        load_model(str(folder), **{bits: True})


def test_quantising_twice_or_a_new_model_is_refused(folder):
    with pytest.raises(ArgumentError, match="expected either this or load_in_8bit"):
        load_model(str(folder), load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ArgumentError, match="load_in_8bit: a new 'tiny' model has no trained weights"):
        load_model("tiny", load_in_8bit=True)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.4), (8, 0.1)])
def test_quantised_weights_give_nearly_the_same_logits(folder, bits, most):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(str(folder), **{f"load_in_{bits}bit": True})
    assert model.is_quantized
    with pytest.raises(ArgumentError, match=r"^lora_r: expected a rank, as a quantised model"):
        LoraOptions().apply(model)
    whole = outputs(load_model(str(folder))[0])
    assert 0 < (outputs(model) - whole).std() / whole.std() < most


# ---- settings ----------------------------------------------------------------------------------


def test_prompt_settings_are_kept_beside_the_model_and_found_from_its_checkpoints(tmp_path):
    (tmp_path / PROMPT_FILE).write_text(SETTINGS.to_json(), encoding="utf-8")
    assert load_prompt_settings(tmp_path) == SETTINGS
    assert load_prompt_settings(tmp_path / "checkpoint-12") == SETTINGS


def test_a_run_folder_says_nothing_of_other_models_in_it(tmp_path):
    (tmp_path / PROMPT_FILE).write_text(SETTINGS.to_json(), encoding="utf-8")
    assert load_prompt_settings(tmp_path / "base") is None
    assert load_prompt_settings("Qwen/Qwen3-0.6B") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"template": {"order": "sideways"}, "max_length": 3}', "\xff"])
def test_unreadable_prompt_settings(tmp_path, text):
    (tmp_path / PROMPT_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=PROMPT_FILE):
        load_prompt_settings(tmp_path)


@pytest.mark.parametrize("lengths", [{}, {"max_length": "10"}, {"max_length": 10, "max_response_length": 2.5}])
def test_lengths_other_than_integers_are_named(tmp_path, lengths):
    (tmp_path / PROMPT_FILE).write_text(json.dumps({"template": {}, **lengths}))
    with pytest.raises(CheckpointError, match=r"max_(response_)?length"):
        load_prompt_settings(tmp_path)


def test_a_response_budget_may_be_left_out(tmp_path):
    (tmp_path / PROMPT_FILE).write_text(json.dumps({"template": {}, "max_length": 10}))
    settings = load_prompt_settings(tmp_path)
    assert settings is not None
    assert (settings.max_length, settings.max_response_length) == (10, None)


@pytest.mark.parametrize(("limit", "expected"), [(64, 64), (None, None), (0, None)])
def test_context_length(limit, expected):
    assert context_length(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))) == expected
    assert context_length(SimpleNamespace()) is None
