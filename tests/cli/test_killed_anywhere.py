"""A command killed at any change of a file can be repeated, and then leaves what an uninterrupted one leaves."""

import json
import shutil

import pytest

from tests.cli.conftest import LENGTHS, SIZES
from tests.kills import Kills, contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings(
        r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
    ),
]

TRAINING = ("--max_steps", 2, "--save_steps", 1, "--save_total_limit", 1, "--use_cpu", "true", "--learning_rate", 1e-3)
SCORED = ("--model", "trained", "--eval_file", "eval.jsonl")
COMMANDS = {
    "score": ("score", *SCORED, "--output_file", "out"),
    "evaluate": (
        "evaluate", *SCORED, "--output_dir", "out", "--output_file", "out.json", "--generate", "true",
        "--generate_limit", 2, "--max_new_tokens", 2, "--resamples", 20,
    ),
    "report": ("report", "evaluated", "--output_file", "out"),
    "generate": (
        "generate", "--model", "trained", "--records_file", "train.jsonl", "--user_id", "u1", "--query", "soup",
        "--max_new_tokens", 2, "--output_file", "out",
    ),
    "convert": (
        "convert", "--input", "train.jsonl", "--format", "table", "--output_file", "out", "--split_by", "users",
        "--share", 0.3, "--eval_file", "out.eval", "--test_file", "out.test",
    ),
    "prepare": ("prepare", "--train_file", "train.jsonl", "--model", "trained", "--output_dir", "out"),
    "train": (
        "train", "--train_file", "train.jsonl", "--eval_file", "eval.jsonl", "--model", "tiny", "--output_dir", "out",
        "--per_device_train_batch_size", 4, *TRAINING,
    ),
    "compare": (
        "compare", "--train_file", "train.jsonl", "--eval_file", "eval.jsonl", "--model", "tiny", "--output_dir", "out",
        "--per_device_train_batch_size", 4, "--arms", "sft", "--resamples", 20, "--generate", "false", *TRAINING[:4],
    ),
    "popi train": (
        "popi", "train", "--train_file", "pairs.jsonl", "--model", "tiny", "--output_dir", "out", "--lora_r", 2,
        *SIZES, *LENGTHS, *TRAINING,
    ),
    "popi summarize": (
        "popi", "summarize", "--model", "popi", "--signals_file", "pairs.jsonl", "--output_file", "out",
    ),
    "popi evaluate": (
        "popi", "evaluate", "--model", "popi", "--test_file", "pairs.jsonl", "--output_file", "out", "--resamples", 20,
    ),
    "popi export": (
        "popi", "export", "--model", "popi", "--summaries_file", "summaries.jsonl", "--queries_file", "queries.jsonl",
        "--output_file", "out",
    ),
}  # fmt: skip
#: Kills of a command; only `compare` changes more files, and does the same in every run.
_MOST = 170
#: Files that hold times.
TIMED = (
    "metrics.json", "trainer_state.json", "training_args.bin", "nextquill_manifest.json", "run.json", "README.md",
    "comparison.json", "comparison.md", "report.html", "out.json", "evaluation.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(data, trained, pairs, popi_model, nextquill, tmp_path_factory):
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("killed") / "start"
    folder.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(data / name, folder / name)
    shutil.copy(pairs / "train.jsonl", folder / "pairs.jsonl")
    shutil.copytree(trained, folder / "trained", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copytree(popi_model, folder / "popi", ignore=shutil.ignore_patterns("checkpoint-*"))
    words = ("--model", folder / "trained", "--eval_file", folder / "eval.jsonl", "--output_dir", folder / "evaluated")
    assert nextquill("evaluate", *words, "--resamples", 20).code == 0
    signals = ("--signals_file", folder / "pairs.jsonl", "--output_file", folder / "summaries.jsonl")
    assert nextquill("popi", "summarize", "--model", folder / "popi", *signals).code == 0
    users = [json.loads(line)["user_id"] for line in (folder / "summaries.jsonl").read_text().splitlines()]
    (folder / "queries.jsonl").write_text("".join(f'{{"user_id": "{user}", "query": "soup"}}\n' for user in users))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_anywhere_can_be_repeated(name, start, tmp_path):
    words = [str(word) for word in COMMANDS[name]]

    def again(folder):
        """What the messages recommend."""
        if list(folder.glob("out/checkpoint-*")) and name.endswith("train"):
            return [[*words, "--resume_from_checkpoint", "true"]]
        return [words, *([] if name.endswith("summarize") else [[*words, "--overwrite"]])]

    kills = Kills(start, tmp_path)
    for at, folder, whole in kills.everywhere(words, again, _MOST):
        assert contents(folder, TIMED) == contents(whole, TIMED), f"killed before change {at}"
