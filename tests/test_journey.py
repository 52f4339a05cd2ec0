"""The whole journey on the command line, each command in a process of its own: measure, train and write.

The fast version has a tiny chat model with random weights, so it shows that the commands fit together and not that a
model learns. `NEXTQUILL_REAL_MODEL=FOLDER make test-slow` walks the same way with a real model.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import nextquill as nq
from nextquill.models.tiny_models import SCRATCH_SIZES, build_model, build_tokenizer
from tests.helpers import assert_close, run_python
from tests.processes import PRELOADED, run_command

THINGS = "lamp chair soup train hotel museum kettle bicycle".split()
VOICES = {
    "ann": "Lovely, cheers!",
    "ben": "Good value, I would say. -- B.",
    "cem": "NOT worth the money!!",
    "dora": "We were quite happy with it, thank you.",
    "eve": "meh, whatever",
    "finn": "Five stars, as ever.",
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REAL = "NEXTQUILL_REAL_MODEL"


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Commands:
    """Runs `nextquill` in a folder: as a user does or, faster, in processes forked from one that has the libraries."""

    def __init__(self, folder: Path, *, forked: bool) -> None:
        self.folder, self._forked, self._count = folder, forked, 0
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, words: list[str], stdin: str = "") -> tuple[Any, Path]:
        """Start a command; it writes to NUMBER.out and NUMBER.err."""
        self._count += 1
        base = self.folder / f"{self._count}"
        base.with_suffix(".in").write_text(stdin)
        streams = [str(base.with_suffix(suffix)) for suffix in (".in", ".out", ".err")]
        if self._forked:
            process = self._context.Process(target=run_command, args=(words, str(self.folder), *streams))
            process.start()
            return process, base
        command = [sys.executable, "-m", "nextquill.cli.main", *words]
        with open(streams[0]) as given, open(streams[1], "w") as out, open(streams[2], "w") as err:
            return subprocess.Popen(command, cwd=self.folder, stdin=given, stdout=out, stderr=err), base

    def finish(self, process: Any, base: Path) -> Said:
        if self._forked:
            process.join()
            code = process.exitcode
        else:
            code = process.wait()
        return Said(code, *(base.with_suffix(suffix).read_text() for suffix in (".out", ".err")))

    def __call__(self, line: str, *words: object, stdin: str = "", code: int = 0) -> Said:
        """Run a command line; `words` are further words, which may hold spaces."""
        every = [*line.split(), *map(str, words)]
        said = self.finish(*self.start(every, stdin))
        assert said.code == code, f"nextquill {' '.join(every)}\n{said.out}\n{said.err}"
        assert "Traceback" not in said.err
        return said

    def interrupted(self, line: str, after: Path) -> Said:
        """Run a command, and press Ctrl-C as soon as a path is there."""
        process, base = self.start(line.split())
        while not after.exists() and (process.is_alive() if self._forked else process.poll() is None):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        return self.finish(process, base)


def write_log(path: Path, days: int) -> None:
    """A log of reviews; every person closes with words of their own."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["author", "time", "title", "body"])
        for day in range(days):
            for number, (user, voice) in enumerate(VOICES.items()):
                thing = THINGS[(day + number) % len(THINGS)]
                text = f"I tried the {thing} on day {day + 1}. {voice}"
                writer.writerow([user, f"2024-03-{day + 1:02d}T09:0{number}:00Z", thing.title(), text])


def write_pairs(path: Path, users: list[str]) -> None:
    """Preference pairs as other libraries write them; the last one of a user has a history of its own."""
    rows: list[dict[str, Any]] = [
        {
            "user_id": user,
            "prompt": f"How was the {thing}, {user}?",
            "chosen": f"The {thing} of {user}: {VOICES[user]}",
            "rejected": f"The {thing} of {user} is adequate.",
        }
        for user in users
        for thing in THINGS[:5]
    ]
    for row in rows[4::5]:
        row["history"] = [f"Once upon a time. {VOICES[row['user_id']]}"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_chat_model(folder: Path, text: str) -> None:
    """A tiny random Llama whose tokenizer has a chat template."""
    tokenizer = build_tokenizer([text] * 2, 600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_model(SCRATCH_SIZES["tiny"], 0, vocabulary=len(tokenizer), **ids)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.parameters():
                weight.mul_(5)  # as initialised, it would repeat the last token whatever stands before
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["tiny", pytest.param("real", marks=pytest.mark.slow)])
def test_the_whole_journey(model: str, tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", days=6)
    if model == "tiny":
        make_chat_model(tmp_path / "model", (tmp_path / "log.csv").read_text())
    elif REAL in os.environ:
        (tmp_path / "model").symlink_to(Path(os.environ[REAL]).resolve())
    else:
        pytest.skip(f"needs {REAL}, the folder of a chat model")
    nextquill = Commands(tmp_path, forked=model == "tiny")

    measure(nextquill)
    train(nextquill)
    evaluate(nextquill)
    write(nextquill)
    merge(nextquill.folder)
    summarise(nextquill)


def measure(nextquill: Commands) -> None:
    """From a log to records, a look at one, and a prepared folder."""
    columns = "--columns user_id=author timestamp=time text=body"
    convert = f"convert --format events --input log.csv {columns} --min_history 1"
    files = "--split_by last --output_file train.jsonl --eval_file valid.jsonl --test_file test.jsonl"
    said = nextquill(f"{convert} {files}", "--query", "Write a review titled {title}")
    assert "train.jsonl: 18 records, 6 users" in said.err.replace("\n", " ")
    first = records(nextquill.folder / "train.jsonl")[0]
    assert (first["user_id"], first["query"], first["title"]) == ("ann", "Write a review titled Chair", "Chair")
    assert "exists" in nextquill(f"{convert} {files} --query x", code=1).err
    shown = nextquill("inspect --train_file train.jsonl --model_name_or_path model --user_id ben --limit 1")
    assert "user ben" in shown.out
    assert "<|im_start|>" in shown.out, "the prompt is in the model's chat template"
    said = nextquill(
        "prepare --train_file train.jsonl --model_name_or_path model --output_dir prepared --max_length 512"
    )
    assert "18 examples" in said.err


def train(nextquill: Commands) -> None:
    """Training with LoRA, interrupted and resumed; what is there already is not lost."""
    line = (
        "train --train_file prepared --eval_file valid.jsonl --model_name_or_path model --output_dir run --lora_r 4 "
        "--loss nextquill --detach_counterfactual true --max_steps 6 --save_steps 1 --per_device_train_batch_size 2 "
        "--max_length 512 --learning_rate 1e-3"
    )
    run = nextquill.folder / "run"
    said = nextquill.interrupted(line, after=run / "checkpoint-1")
    assert said.code == 130, said
    assert "--resume_from_checkpoint" in said.err
    assert not (run / "adapter_model.safetensors").exists()
    assert "resume" in nextquill(line, code=1).err
    nextquill(f"{line} --resume_from_checkpoint true")
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert (run / "adapter_model.safetensors").exists()
    refused = nextquill(line, code=1)
    assert "--overwrite" in refused.err


def evaluate(nextquill: Commands) -> None:
    """Base and run, beside each other; a report; a comparison of two losses."""
    line = "evaluate --eval_file test.jsonl --max_new_tokens 6 --generate_limit 3 --resamples 100"
    nextquill(f"{line} --model_name_or_path model --max_length 512 --output_dir base")
    nextquill(
        f"{line} --model_name_or_path run --output_dir run/evaluation --baseline base --item_effects 2 --guidance 1"
    )
    found = json.loads((nextquill.folder / "run" / "evaluation" / "evaluation.json").read_text())
    assert found["settings"]["guidance"] == 1
    nextquill("score --model_name_or_path run --eval_file test.jsonl --output_file effects.jsonl")
    assert [len(each["tokens"]) for each in records(nextquill.folder / "effects.jsonl")]
    nextquill("report run base --output_file report.html")
    page = (nextquill.folder / "report.html").read_text()
    assert "tried the" in page
    nextquill(
        "compare --train_file train.jsonl --eval_file test.jsonl --model_name_or_path model --output_dir compared "
        "--arms sft nextquill_detached --seeds 0 --max_steps 1 --per_device_train_batch_size 2 --max_length 512 "
        "--generate false --resamples 100 --lora_r 4"
    )


def write(nextquill: Commands) -> None:
    """Texts in a person's voice: from standard input, side by side, guided, and in a chat."""
    line = "generate --model_name_or_path run --max_new_tokens 8"
    own = "--records_file test.jsonl --user_id ben"
    history = "".join(json.dumps(text) + "\n" for text in (f"Fine. {VOICES['ann']}", {"title": "Lamp", "text": "Dim."}))
    said = nextquill(f"{line} --history_file - --query", "Review the desk.", stdin=history)
    assert "2 texts of the user in the prompt" in said.err
    nextquill(
        f"{line} {own} --compare_history --guidance 1 --output_file texts.jsonl --query",
        "Review the desk.", "Review the cup.",
    )  # fmt: skip
    texts = records(nextquill.folder / "texts.jsonl")
    assert [(each["query"], each["history"], each["guidance"]) for each in texts] == [
        (f"Review the {thing}.", name, guidance)
        for name, guidance in (("own history", 1.0), ("no history", 0.0), ("history of cem", 0.0))
        for thing in ("desk", "cup")
    ]
    asked = "Review the desk.\n/guidance 1\nReview the desk.\n/history\n/quit\n"
    chatted = nextquill(f"chat --model_name_or_path run --max_new_tokens 8 {own}", stdin=asked)
    for guidance in (0, 1):
        alone = nextquill(f"{line} {own} --guidance {guidance} --query", "Review the desk.")
        assert alone.out.strip()
        assert alone.out in chatted.out
    assert "has no user 'zoe'" in nextquill(f"{line} --records_file test.jsonl --user_id zoe --query x", code=2).err


_RELOADED = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, target = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
prompt = torch.tensor([[int(id) for id in ids.split()]])
with torch.no_grad():
    torch.save(model(prompt).logits, target)
new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
print(tokenizer.decode(new[0, prompt.shape[1] :]))
assert not any(name.startswith("nextquill") for name in sys.modules)
"""


def merge(folder: Path) -> None:
    """The adapter merged by peft; the merged model read by transformers alone gives the same logits."""
    prompt = nq.prompt_for(str(folder / "run"), "Review the desk.", [f"Fine. {VOICES['ann']}"], max_new_tokens=8)
    assert prompt.history_kept == 1
    adapter = AutoPeftModelForCausalLM.from_pretrained(folder / "run", dtype="float32")
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        trained = adapter(ids).logits
        with adapter.disable_adapter():
            base = adapter(ids).logits
    adapter.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "run").save_pretrained(folder / "merged")
    text = run_python(_RELOADED, str(folder / "merged"), " ".join(map(str, prompt.ids)), str(folder / "logits.pt"))
    assert text.strip()
    assert_close(torch.load(folder / "logits.pt"), trained, 1e-4)
    assert float((trained - base).norm() / base.norm()) > 1e-3, "training changed the model"


def summarise(nextquill: Commands) -> None:
    """POPI on preference pairs, up to prompts for another model."""
    users = list(VOICES)
    write_pairs(nextquill.folder / "pairs.jsonl", users[:4])
    write_pairs(nextquill.folder / "other_pairs.jsonl", users[4:])
    line = (
        "popi train --train_file pairs.jsonl --model_name_or_path model --output_dir popi --max_steps 1 --lora_r 4 "
        "--per_device_train_batch_size 2 --group_size 2 --pairs_per_user 2 --signals_per_user 3 --max_summary_tokens 8 "
        "--max_length 512 --max_signal_tokens 512"
    )
    assert "--format preferences" in nextquill(line, code=1).err
    assert "4 of 4 users" in nextquill(f"{line} --format preferences").err
    pairs = "--model popi --format preferences"
    nextquill(f"popi summarize {pairs} --signals_file other_pairs.jsonl --held_out --output_file summaries.jsonl")
    nextquill(
        f"popi evaluate {pairs} --test_file other_pairs.jsonl --summaries summaries.jsonl --resamples 100 "
        "--output_file popi.json"
    )
    measured = json.loads((nextquill.folder / "popi.json").read_text())
    assert measured["generator"]["users"] == 2
    (nextquill.folder / "queries.jsonl").write_text('{"user_id": "eve", "query": "How was the tea?"}\n')
    nextquill("popi export --queries_file queries.jsonl --summaries summaries.jsonl --output_file prompts.jsonl")
    (prompt,) = records(nextquill.folder / "prompts.jsonl")
    assert prompt["messages"][-1] == {"role": "user", "content": "How was the tea?"}
