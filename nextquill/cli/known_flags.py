"""The flags of a command, read from the source: a wrong one is refused before anything heavy is imported.

Importing TrainingArguments alone takes seconds, as it imports torch. Its source is read instead.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from nextquill.cli.flags import config_path, read_config

#: What other tools call a flag. Where a name stands twice, the first flag that the command has is meant.
_ELSEWHERE = {
    "dtype": "precision torch_dtype",
    "per_device_train_batch_size": "batch batch_size bs",
    "batch_size": "batch bs",
    "input": "data data_path dataset dataset_name input_file",
    "train_file": "data data_path dataset dataset_name input input_file records train_data train_dataset",
    "eval_file": "data data_path dataset dataset_name input input_file records eval_data eval_dataset test_data "
    "test_dataset test_file val_file valid_file validation_file",
    "records_file": "data data_path dataset dataset_name input input_file records",
    "gradient_accumulation_steps": "accumulation_steps grad_accum",
    "history_file": "history",
    "learning_rate": "lr",
    "limit": "n",
    "lora_r": "lora_dim lora_rank rank",
    "lora_target_modules": "target_modules",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "block_size context_length cutoff_len max_seq_len max_seq_length seq_length",
    "max_new_tokens": "max_gen_toks",
    "max_steps": "steps",
    "model": "adapter base_model checkpoint model_name model_path pretrained",
    "num_rollouts": "num_generations",
    "num_train_epochs": "epochs num_epochs",
    "output_dir": "o out out_dir output output_path save_dir",
    "output_file": "o out output output_path",
    "overwrite": "force",
    "query": "prompt",
    "resume_from_checkpoint": "resume",
    "temperature": "temp",
    "user_id": "user",
    "warmup_steps": "warmup",
    "weight_decay": "wd",
}


def unknown_flag(word: str, known: Mapping[str, str]) -> str:
    """The message on a flag that is not in `known`, which maps every spelling to the flag's name."""
    name = word.split("=", 1)[0]
    bare = name.strip("-").replace("-", "_").lower()
    same = [known[flag] for flag, names in _ELSEWHERE.items() if flag in known and bare in names.split()]
    close = same or [known[match] for match in difflib.get_close_matches(bare, known, n=1)]
    return f"unknown flag {name}" + (f"; did you mean --{close[0]}?" if close else "")


def refused(module: str, words: Sequence[str]) -> str | None:
    """The message on the first word, or key of --config, that is not a flag of the command in `module`.

    None where argparse has to decide. A word with a space is a value, and a negative number too.
    """
    flags = [word for word in words if re.match(r"--?[A-Za-z]", word) and " " not in word]
    if not flags or {"-h", "--help"} & set(flags):
        return None
    known = known_flags(module)
    if not known:
        return None
    wrong, path = _first_unknown(flags, known), config_path(words)
    if wrong or path is None:
        return wrong
    wrong = _first_unknown([f"--{key}" for key in read_config(path)], known)
    return wrong and f"--config: {path}: {wrong}"


def _first_unknown(flags: Sequence[str], known: Mapping[str, str]) -> str | None:
    names = ((word, word.split("=", 1)[0][2:].replace("-", "_")) for word in flags)
    wrong = (word for word, name in names if not word.startswith("--") or name.removeprefix("no_") not in known)
    return next((unknown_flag(word, known) for word in wrong), None)


def known_flags(module: str) -> dict[str, str]:
    """Every flag and alias of a command's module with the flag's name; empty where the source does not tell."""
    known = {"config": "config", "help": "help"}
    for node in _parsed(module).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "OPTIONS"
            and isinstance(node.value, ast.Tuple)
        ):
            for kind in node.value.elts:
                known |= dict(_fields(module, ast.unparse(kind)))
            return known
    return {}


def _fields(module: str, name: str) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass as a module names it, and their aliases."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            yield from _fields(str(node.module), name)
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for base in node.bases:
            yield from _fields(module, ast.unparse(base))
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, field.target.id
                for alias in _aliases(field.value):
                    yield alias, field.target.id


def _aliases(value: ast.expr | None) -> list[str]:
    """The argument `aliases` of `option(help, default, aliases)`."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "option":
        return []
    given = [*value.args[2:3], *(keyword.value for keyword in value.keywords if keyword.arg == "aliases")]
    return [alias for each in given for alias in ast.literal_eval(each)]


@cache
def _parsed(module: str) -> ast.Module:
    """A module's syntax tree; that of TrainingArguments ends before the methods, which is a tenth of the time."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ast.Module([], [])
    place = Path(spec.origin).parent.joinpath(*(rest or "training_args").split("."))
    place = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    try:
        text = place.read_text(encoding="utf-8")
    except OSError:
        return ast.Module([], [])
    return ast.parse(text if rest else text.partition("\n    def __post_init__")[0])
