"""GGUF files are read as ordinary models, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

from nextquill.data import Record
from nextquill.errors import UnsupportedModelError
from nextquill.models.loading import find_tokenizer, load_model
from nextquill.popi import Roles

gguf = pytest.importorskip("gguf")
RECORDS = [Record("u", "Write about the soup.", "The soup was warm and the service quick.")]
# How llama.cpp names the weights of a layer.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(weight, heads):
    """The order of rows in which llama.cpp rotates positions."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, model, tokenizer, architecture="llama"):
    """Write a Llama and its byte-level tokenizer as llama.cpp does, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    ids = tokenizer.get_vocab()
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_types([3 if index in tokenizer.all_special_ids else 1 for index in range(len(ids))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(tokenizer.eos_token_id)
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            heads = config.num_attention_heads
            values = (
                permuted(weight.numpy(), heads) if part in ("self_attn.q_proj", "self_attn.k_proj") else weight.numpy()
            )
            writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", values)
        elif stem != "lm_head":
            place = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[stem]
            writer.add_tensor(f"{place}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def original():
    return load_model("tiny", records=lambda: RECORDS)


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *original)


def test_a_file_gives_its_weights_tokens_and_chat_template(original, file):
    model, tokenizer = load_model(str(file))
    weights = original[0].state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = RECORDS[0].response
    assert tokenizer.encode(text, add_special_tokens=False) == original[1].encode(text, add_special_tokens=False)
    assert "[assistant]" in tokenizer.chat_template
    assert find_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()


def test_it_can_be_trained_and_saved_as_an_ordinary_model(file, tmp_path):
    model, tokenizer = load_model(str(file))
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_dtype(file):
    assert load_model(str(file), dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT expects a folder
def test_an_adapter_finds_the_file_of_its_base(file, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(load_model(str(file))[0], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    assert isinstance(load_model(str(tmp_path))[0], PeftModel)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT expects a folder
def test_a_run_of_popi_finds_the_file_of_its_base(file, tmp_path):
    model, tokenizer = load_model(str(file))
    Roles.shared(model, tokenizer).save(tmp_path, {})
    assert json.loads((tmp_path / "popi.json").read_text())["base_model"] == str(file)
    loaded = Roles.load(tmp_path, dtype="bfloat16", attn_implementation="eager").inference.model
    assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")


def test_a_card_names_the_model_and_the_file_without_its_folder(file):
    from nextquill.training.model_card import base_name, hub_name

    model = load_model(str(file))[0]
    assert hub_name(model) is None
    assert base_name(model) == "tiny, read from the file `tiny.gguf`"


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_named(file, tmp_path, share):
    cut = tmp_path / "cut.gguf"
    content = file.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnsupportedModelError, match=r"cannot load '.*cut\.gguf' of [\d,]+ by"):
        load_model(str(cut))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(UnsupportedModelError, match=r"page\.gguf is not a GGUF file: it begins with b'<htm'"):
        load_model(str(tmp_path / "page.gguf"))


def test_an_unknown_architecture_is_named(original, tmp_path):
    path = write(tmp_path / "new.gguf", *original, architecture="newmind")
    with pytest.raises(UnsupportedModelError, match=r"new\.gguf.*newmind"):
        load_model(str(path))


def test_a_missing_file_never_asks_the_hub(tmp_path, monkeypatch):
    from nextquill.models import loading

    monkeypatch.setattr(loading, "_hub_answers", None)
    with pytest.raises(UnsupportedModelError, match=r"there is no file gone/model\.gguf"):
        load_model("gone/model.gguf")


def test_a_missing_package_is_named(file, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    with pytest.raises(UnsupportedModelError, match=r"needs the package gguf; pip install 'nextquill\[gguf\]'"):
        load_model(str(file))


def test_the_command_line_trains_saves_and_scores(file, tmp_path):
    from nextquill.cli.main import main

    records = tmp_path / "train.jsonl"
    records.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in RECORDS * 2))
    shutil.copy(file, tmp_path / "base.gguf")
    run = tmp_path / "run"
    words = ["--train_file", records, "--model_name_or_path", tmp_path / "base.gguf", "--output_dir", run]
    assert main(["train", *map(str, words), "--max_steps", "1", "--use_cpu", "true"]) == 0
    (tmp_path / "base.gguf").unlink()  # the run is an ordinary model that needs no other file
    words = ["--eval_file", records, "--model_name_or_path", run, "--output_file", tmp_path / "scores.jsonl"]
    assert main(["score", *map(str, words), "--show", "0"]) == 0
