"""The border to the packages that read folders of models and checkpoints: transformers, peft, safetensors, torch.

A damaged folder makes them fail anywhere, in JSON, a pickle, shapes or an architecture's own code, with errors of any
type that rarely name the file. `reading` turns them all into one typed error. It names the file that cannot be read on
its own, which is looked for only then.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextquill.errors import NextQuillError, RecordError, UnsupportedModelError
from nextquill.storage.input_files import open_input
from nextquill.storage.json_files import json_object

#: The largest number of layers that a config may ask for, four times that of the deepest published model.
_MOST_LAYERS = 4096


@contextmanager
def reading(
    place: str | Path | None, what: str, kind: type[NextQuillError] = UnsupportedModelError, file: str | None = None
) -> Iterator[None]:
    """Turn every error of another package into `kind`; nextquill's own and those of memory pass.

    Args:
        place: the folder that is read, if it is known.
        what: begins the message.
        kind: the type of the error.
        file: the file of the folder that is read, if it is only one.
    """
    try:
        yield
    except (NextQuillError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        reason = first_line(error) if file is None else f"{file}: {first_line(error)}"
        raise kind(f"{what}: {(place and _damage(Path(place))) or reason}") from error


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message; of torch's message, the line below the heading."""
    heading, *lines = str(error).strip().splitlines() or [""]
    if heading.endswith(":") and lines:
        return lines[0].strip()
    return f"{type(error).__name__}: {heading}".removesuffix(": ")


def check_config(folder: str | Path) -> None:
    """Raise UnsupportedModelError where the config.json of a folder is damaged, or asks for too many layers.

    The layers are modules, and some configs make lists of that length, so a wrong number takes all time and memory.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    try:
        found = list(_layers(json_object(path)))
    except RecordError as error:
        raise UnsupportedModelError(f"model_name_or_path: cannot load {folder}: {error}") from error
    for name, count in found:
        if count > _MOST_LAYERS:
            problem = f"{path}: {name}: expected at most {_MOST_LAYERS}, got {count}"
            raise UnsupportedModelError(f"model_name_or_path: cannot load {folder}: {problem}")


def _layers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of layers in a config and in the configs of its parts, by name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _layers(value)
        elif isinstance(value, (int, float)) and ("layer" in name or "block" in name):
            yield name, value


def _damage(folder: Path) -> str | None:
    """The first file of a folder that cannot be read on its own, and why; None if all can be read."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            _read_alone(path)
        except RecordError as error:  # names the file
            return str(error)
        except Exception as error:  # noqa: BLE001  (of any type, see above)
            return f"{path}: {first_line(error)}"
    return None


def _read_alone(path: Path) -> None:
    """Read as much of a file as shows that it is whole; an error of any type if it is not."""
    found = json_object(path) if path.suffix == ".json" else {}
    if path.name == "config.json":
        from transformers import AutoConfig

        AutoConfig.for_model(**found)
    elif path.name == "adapter_config.json":
        from peft import PeftConfig

        PeftConfig.from_pretrained(str(path.parent), local_files_only=True)
    elif path.name == "tokenizer.json":
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(path))
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):
        _check_archive(path)


def _check_archive(path: Path) -> None:
    """Raise an error where a file of `torch.save` was cut off or changed; without unpickling anything."""
    with open_input(path) as file:
        if file.peek(1)[:1] == b"\x80":  # a bare pickle, the format before torch 1.6, which has no check sums
            return
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"the check sum of {bad} in it differs")
