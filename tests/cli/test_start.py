"""Commands answer quickly: they import little before they print their help or refuse a flag."""

import json
import os
import sys

import pytest

from nextquill.cli.main import COMMANDS
from nextquill.cli.popi import SUBCOMMANDS
from tests.helpers import run_python

#: Their flags are the fields of TrainingArguments, which imports torch and much else.
TRAINING = ("train", "popi train", "compare")
#: The benchmarks are a program of their own.
OTHERS = [name for name in COMMANDS if name not in (*TRAINING, "popi", "bench")]
OTHERS += [f"popi {name}" for name in SUBCOMMANDS if f"popi {name}" not in TRAINING]
# Calls the command line, and prints after each call the exit code and the modules that were not there before the first.
CALLS = """
import contextlib, io, json, sys
{before}
before = set(sys.modules)
from nextquill.cli.main import main
for words in {calls!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(words.split())
    print(json.dumps([words, code, sorted(set(sys.modules) - before)]))
"""


def called(calls, before=""):
    """Exit code and modules after each call, by its words; all are made in one fresh process."""
    out = run_python(CALLS.format(before=before, calls=calls))
    return {words: (code, set(modules)) for words, code, modules in map(json.loads, out.splitlines())}


def tops(modules):
    return {name.partition(".")[0] for name in modules}


def test_nothing_but_the_standard_library_is_needed_to_name_the_commands():
    for words, (code, modules) in called(["--help", "--version", "trian", "", "popi --help", "popi trian"]).items():
        assert code == (2 if "trian" in words or not words else 0)
        assert tops(modules) <= {"nextquill", *sys.stdlib_module_names}, words


def test_a_wrong_flag_is_refused_by_the_standard_library_alone():
    calls = [f"{name} --no_such_flag 1" for name in (*TRAINING, *OTHERS, "bench")]
    for words, (code, modules) in called(calls).items():
        assert code == 2, words
        assert tops(modules) <= {"nextquill", "benchmarks", *sys.stdlib_module_names}, words


def test_a_wrong_key_of_a_config_file_needs_no_parser(tmp_path):
    (tmp_path / "c.yaml").write_text("no_such_key: 1")
    calls = [f"{name} --config {tmp_path / 'c.yaml'}" for name in (*TRAINING, *OTHERS)]
    for words, (code, modules) in called(calls).items():
        assert code == 2, words
        assert not tops(modules) & {"torch", "transformers", "numpy"}, words


def test_the_benchmarks_answer_without_torch():
    for words, (code, modules) in called(["bench --help", "bench --suite no_such_suite"]).items():
        assert code == (0 if words.endswith("--help") else 2), words
        assert "torch" not in tops(modules), words


def test_help_and_wrong_flags_need_no_torch():
    calls = [f"{name} {words}" for name in OTHERS for words in ("--help", "--no_such_flag 1")]
    heavy = {"torch", "datasets", "pandas", "pyarrow", "matplotlib", "nltk", "peft", "accelerate", "tokenizers", "rich"}
    for words, (code, modules) in called(calls, before="from transformers import HfArgumentParser").items():
        assert code == (0 if words.endswith("--help") else 2), words
        assert not tops(modules) & heavy, words


def test_help_of_training_needs_training_arguments_and_little_else():
    """transformers' Trainer would import datasets with pandas and pyarrow, which takes half as long again."""
    calls = [f"{name} {words}" for name in TRAINING for words in ("--help", "--no_such_flag 1")]
    before = "from transformers import TrainingArguments; known = {name.partition('.')[0] for name in sys.modules}"
    found = called(calls, before + "; print(json.dumps(['', 0, sorted(known | set(sys.stdlib_module_names))]))")
    known = found.pop("")[1] | {"nextquill"}
    for words, (code, modules) in found.items():
        assert code == (0 if words.endswith("--help") else 2), words
        assert tops(modules) <= known, words
        assert not {name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))}, words
        assert "transformers.trainer" not in modules, words


# Up to the forward of the first batch; prints seconds of CPU time.
TRAINED = """
import os, sys, time
from nextquill.training.trainer import NextQuillTrainer

def begin(*_, **__):
    print(time.process_time(), flush=True)
    os._exit(0)

NextQuillTrainer.compute_loss = begin
from nextquill.cli.main import main
sys.exit(f"ended before the first forward, exit code {main(sys.argv[1:])}")
"""
LOADED = """
import sys, time
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
print(time.process_time())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("NEXTQUILL_REAL_MODEL" not in os.environ, reason="NEXTQUILL_REAL_MODEL names no model's folder")
def test_training_begins_soon_after_libraries_and_a_real_model_are_loaded(tmp_path):
    """At most 1.5 times as late, in CPU time of one thread: the wall time of a busy machine says little."""
    model, history = (
        os.environ["NEXTQUILL_REAL_MODEL"],
        [f"It was day {day}, and all was well. Cheers!" for day in range(9)],
    )
    lines = [
        json.dumps(
            {"user_id": f"u{n % 30}", "query": f"Write post {n}", "history": history, "response": history[n % 9]}
        )
        for n in range(300)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    train = (
        f"train --model {model} --train_file {tmp_path}/train.jsonl --max_steps 1 --output_dir {tmp_path}/run".split()
    )
    seconds = {"trained": [], "loaded": []}
    for _ in range(3):
        for name, code, words in (("loaded", LOADED, [model]), ("trained", TRAINED, [*train, "--overwrite"])):
            seconds[name].append(float(run_python(code, *words, timeout=300, OMP_NUM_THREADS="1")))
    assert min(seconds["trained"]) <= 1.5 * min(seconds["loaded"]), seconds
