"""`nextquill prepare`, and training from what it makes."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from nextquill.data import ExampleEncoder, PreparedDataset, read_jsonl
from nextquill.models.loading import load_prompt_settings, load_tokenizer


@pytest.fixture(scope="module")
def prepare(nextquill, trained, data):
    def call(output_dir, *words):
        flags = ("--train_file", data / "train.jsonl", "--model_name_or_path", trained, "--output_dir", output_dir)
        return nextquill("prepare", *flags, *words)

    return call


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """The model without the prompt settings of its training, like a model from elsewhere."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "nextquill_*"))
    return folder


@pytest.fixture
def train_on(nextquill, tmp_path):
    def call(model, *words, output="run"):
        sizes = ("--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3)
        return nextquill("train", "--model_name_or_path", model, "--output_dir", tmp_path / output, *sizes, *words)

    return call


def test_a_folder_holds_what_train_would_make(prepare, trained, data, tmp_path):
    result = prepare(tmp_path / "p", "--placebo")
    assert result.code == 0, result.err
    assert result.out == ""
    assert result.err.startswith(f"Wrote 8 examples to {tmp_path / 'p'}: ")
    settings = load_prompt_settings(trained)
    encoder = ExampleEncoder(load_tokenizer(str(trained)), settings.template, settings.max_length)
    prepared = PreparedDataset(tmp_path / "p")
    assert list(prepared.examples) == list(encoder.encode_iter(read_jsonl(data / "train.jsonl"), True, 42))
    prepared.check(encoder)


def test_training_on_it_gives_the_same_weights(prepare, train_on, trained, data, tmp_path):
    assert prepare(tmp_path / "p").code == 0
    assert prepare(tmp_path / "e", "--placebo", "--train_file", data / "eval.jsonl").code == 0
    result = train_on(trained, "--train_file", tmp_path / "p", "--eval_file", tmp_path / "e", "--examples_per_user", 2)
    assert result.code == 0, result.err
    assert "another user's" in result.err
    other = train_on(trained, "--train_file", data / "train.jsonl", "--examples_per_user", 2, output="other")
    assert other.code == 0, other.err
    assert result.err.splitlines()[0] == other.err.splitlines()[0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "other"))
    assert all(one[name].equal(two[name]) for name in two)


def test_a_model_without_prompt_settings_takes_the_folders(prepare, train_on, base, tmp_path):
    assert (
        prepare(
            tmp_path / "p", "--model_name_or_path", base, "--prompt_order", "history_first", "--max_length", 99
        ).code
        == 0
    )
    result = train_on(base, "--train_file", tmp_path / "p", "--max_tokens", 400)
    assert result.code == 0, result.err
    settings = load_prompt_settings(tmp_path / "run")
    assert (settings.template.order, settings.max_length) == ("history_first", 99)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max_length", 64), "max_length: there 99, here 64"),
        (("--prompt_order", "official"), "template order: there 'history_first', here 'official'"),
    ],
    ids=["length", "order"],
)
def test_other_settings_than_the_folders_are_named(prepare, train_on, base, tmp_path, words, message):
    assert (
        prepare(
            tmp_path / "p", "--model_name_or_path", base, "--prompt_order", "history_first", "--max_length", 99
        ).code
        == 0
    )
    result = train_on(base, "--train_file", tmp_path / "p", *words)
    assert result.code == 1
    assert f"--train_file: {tmp_path / 'p'} was prepared with another {message}" in result.err
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_named(prepare, train_on, train, data, tmp_path):
    other = tmp_path / "text.jsonl"
    other.write_text((data / "train.jsonl").read_text(encoding="utf-8").replace("soup", "bread"), encoding="utf-8")
    assert train(tmp_path / "model", "--train_file", other).code == 0
    assert prepare(tmp_path / "p").code == 0
    result = train_on(tmp_path / "model", "--train_file", tmp_path / "p")
    assert result.code == 1
    assert "was prepared with another tokenizer: there '" in result.err


def test_a_damaged_folder_is_named(prepare, train_on, trained, tmp_path):
    assert prepare(tmp_path / "p").code == 0
    (tmp_path / "p" / "shard-00000.tokens").write_bytes(b"")
    result = train_on(trained, "--train_file", tmp_path / "p")
    assert result.code == 1
    assert "nextquill: --train_file: " in result.err
    assert "shard-00000.tokens: damaged" in result.err


def test_a_new_model_cannot_be_prepared_for_nor_trained(prepare, train_on, tmp_path):
    result = prepare(tmp_path / "p", "--model_name_or_path", "tiny")
    assert result.code == 2
    assert "--model: a new 'tiny' model takes its tokenizer from the text" in result.err
    assert prepare(tmp_path / "p").code == 0
    result = train_on("tiny", "--train_file", tmp_path / "p")
    assert result.code == 2
    assert "give the records, or the model that they were prepared for" in result.err


def test_a_record_over_budget_is_named_or_left_out(prepare, tmp_path, make_records):
    file = make_records(tmp_path / "r.jsonl", 6)
    lines = file.read_text(encoding="utf-8").splitlines()
    lines.insert(3, json.dumps({"user_id": "bob", "query": "q", "history": [], "response": "soup " * 60}))
    file.write_text("\n".join(lines), encoding="utf-8")
    words = ("--train_file", file, "--max_response_length", 50)
    result = prepare(tmp_path / "p", *words)
    assert result.code == 1
    assert "nextquill: --records_file: record 3 (user 'bob'): the response takes " in result.err
    assert "--skip_bad leaves such records out" in result.err
    assert not (tmp_path / "p").exists()
    result = prepare(tmp_path / "p", *words, "--skip_bad")
    assert result.code == 0, result.err
    assert "1 records left out, listed in " in result.err
    assert "  record 3 (user 'bob'): the response takes " in result.err
    assert len(PreparedDataset(tmp_path / "p")) == 6


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--train_file", "nowhere.jsonl"), 1, "--records_file: nowhere.jsonl is not a file"),
        (("--max_length", 0), 2, "--max_length: expected a positive number, got 0"),
        (("--max_lenght", 9), 2, "did you mean --max_length?"),
        (("--model_name_or_path", "/nowhere"), 1, "--model: there is no folder"),
    ],
    ids=["file", "length", "flag", "model"],
)
def test_mistakes_are_one_line_and_leave_nothing(prepare, tmp_path, words, code, message):
    result = prepare(tmp_path / "p", *words)
    assert result.code == code
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_no_record_is_named(prepare, tmp_path, data):
    file = tmp_path / "r.jsonl"
    file.write_text((data / "train.jsonl").read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    result = prepare(tmp_path / "p", "--train_file", file)
    assert result.code == 1
    assert f"--records_file: {file} line 9: field 'history': required, but missing" in result.err


def test_records_of_the_hub_are_prepared_as_those_of_a_file(prepare, tmp_path, data, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or rows)
    for output in ("hub", "file"):
        place = "hf://a/b/c:test" if output == "hub" else data / "train.jsonl"
        result = prepare(tmp_path / output, "--records_file", place)
        assert result.code == 0, result.err
    assert calls == [(("a/b", "c"), {"split": "test", "streaming": True})]
    assert list(PreparedDataset(tmp_path / "hub").examples) == list(PreparedDataset(tmp_path / "file").examples)
    result = prepare(tmp_path / "none", "--records_file", "hf://a/b", "--dry_run")
    assert result.out.startswith("tokenizer"), result.err
    assert "records            8; the rows below" in result.out


@pytest.mark.parametrize("words", [(), ("--dry_run",)])
def test_a_hub_that_cannot_be_reached_is_one_line(prepare, tmp_path, monkeypatch, words):
    datasets = pytest.importorskip("datasets")

    def unreachable(*names, **options):
        raise ConnectionError("Couldn't reach 'a/b'")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = prepare(tmp_path / "p", "--records_file", "hf://a/b", *words)
    assert (result.code, result.out) == (2, "")
    assert result.err == "nextquill: --records_file: hf://a/b, split 'train': Couldn't reach 'a/b'\n"


def test_a_folder_that_is_there_is_kept_unless_it_may_go(prepare, tmp_path):
    assert prepare(tmp_path / "p").code == 0
    result = prepare(tmp_path / "p", "--seed", 1)
    assert result.code == 1
    assert "--output_dir: " in result.err
    assert "exists and is not empty" in result.err
    assert prepare(tmp_path / "p", "--seed", 1, "--overwrite").code == 0


def test_a_process_that_is_killed_leaves_what_it_wrote(prepare, trained, tmp_path, make_records):
    """SIGKILL, which a process cannot handle."""
    file = make_records(tmp_path / "r.jsonl", 40)
    assert prepare(tmp_path / "whole", "--train_file", file).code == 0
    code = (
        "import os, signal\n"
        "from nextquill.cli import main\n"
        "from nextquill.data import encoding, preparing\n"
        "encoding._BATCH_SIZE = 3\n"
        "preparing.prepare.__kwdefaults__['shard_examples'] = 8\n"
        "own = preparing._Shards.add\n"
        "def add(self, example):\n"
        "    if example.index == 29: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return own(self, example)\n"
        "preparing._Shards.add = add\n"
        f"main.main(['prepare', '--train_file', {str(file)!r}, '--model_name_or_path', {str(trained)!r},"
        f" '--output_dir', {str(tmp_path / 'p')!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    progress = json.loads((tmp_path / "p.partial" / "progress.json").read_bytes())
    assert [shard["records"] for shard in progress["shards"]] == [8, 16, 24]
    result = prepare(tmp_path / "p", "--train_file", file, "--max_length", 77)
    assert result.code == 1
    assert "was started with another max_length: there 1024, here 77" in result.err
    assert prepare(tmp_path / "p", "--train_file", file).code == 0
    assert not (tmp_path / "p.partial").exists()
    assert list(PreparedDataset(tmp_path / "p").examples) == list(PreparedDataset(tmp_path / "whole").examples)


def test_the_library_trains_on_a_folder(prepare, trained, data, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    from nextquill.errors import CheckpointError
    from nextquill.training.trainer import NextQuillTrainer

    assert prepare(tmp_path / "p", "--placebo").code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), load_tokenizer(str(trained))
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    options = {"processing_class": tokenizer, "train_dataset": tmp_path / "p", "max_length": 1024, "max_tokens": 900}
    trainer = NextQuillTrainer(model, args, eval_dataset=PreparedDataset(tmp_path / "p"), **options)
    trainer.train()
    assert "eval_nll_placebo" in trainer.evaluate()
    assert sum(1 for _ in trainer.score()) == 8
    with pytest.raises(CheckpointError, match="was prepared with another max_length: there 1024, here 512"):
        NextQuillTrainer(model, args, **options | {"max_length": 512})


def test_worker_processes_make_the_same_folder(prepare, make_records, tmp_path):
    records = make_records(tmp_path / "many.jsonl", 300)
    for name, workers in (("one", 1), ("two", 2)):
        words = ("--train_file", records, "--placebo", "--num_workers", workers)
        result = prepare(tmp_path / name, *words)
        assert result.code == 0, result.err
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names
    with records.open("a") as stream:
        record = {"user_id": "u0", "query": "long", "response": "word " * 3000, "history": ["a"]}
        stream.write(json.dumps(record) + "\n")
    told = {workers: prepare(tmp_path / "bad", *words[:-1], workers).err for workers in (1, 2)}
    assert "--records_file: record 300 (user 'u0'): the prompt without any history" in told[1]
    assert told[2] == told[1]
    assert prepare(tmp_path / "bad", "--num_workers", 0).err.startswith("nextquill: --num_workers: expected")


def end_at_once(jobs):
    os._exit(1)


def test_the_end_of_a_worker_process_is_one_line(prepare, make_records, tmp_path, monkeypatch):
    monkeypatch.setattr("nextquill.data.encoding._encode_in_worker", end_at_once)
    result = prepare(tmp_path / "p", "--num_workers", 2)
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "a worker process has ended" in result.err
    assert not (tmp_path / "p").exists()
