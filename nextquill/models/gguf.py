"""Read a GGUF file, llama.cpp's single-file format, as an ordinary model of transformers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextquill.errors import UnsupportedModelError
from nextquill.models.pretrained import from_pretrained

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(name_or_path: str | Path) -> bool:
    """Whether this is the path of a GGUF file, by its name."""
    return str(name_or_path).lower().endswith(SUFFIX)


def check_gguf(path: Path) -> None:
    """Raise UnsupportedModelError if a file is not GGUF, or the package that reads it is missing."""
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise UnsupportedModelError(f"model_name_or_path: {path} is not a GGUF file: it begins with {start!r}")
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(
            f"model_name_or_path: reading {path} needs the package gguf; pip install 'nextquill[gguf]'"
        )


@contextmanager
def read_once(place: str) -> Iterator[None]:
    """Let transformers parse a GGUF file once, not for config, weights and tokenizer, some 10 seconds each."""
    if not is_gguf(place):
        yield
        return
    import gguf

    module: Any = gguf
    reader = module.GGUFReader
    module.GGUFReader = functools.lru_cache(reader)
    try:
        yield
    finally:
        module.GGUFReader = reader


def gguf_arguments(place: str) -> dict[str, str]:
    """The arguments of `from_pretrained` for a folder, a hub name or a GGUF file."""
    if not is_gguf(place):
        return {"pretrained_model_name_or_path": place}
    path = Path(place)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def as_ordinary(model: Any, place: str, **options: Any) -> Any:
    """Return a model with the same weights that can be trained and saved.

    transformers takes a model from a GGUF file for a quantised one, although its weights are dequantised, and refuses
    to train or save it.
    """
    config = model.config
    vars(config).pop("quantization_config", None)
    weights = model.state_dict()
    ordinary = from_pretrained(type(model), None, config=config, state_dict=weights, dtype=model.dtype, **options)
    ordinary.config._name_or_path = ordinary.name_or_path = place  # where an adapter finds its base model
    ordinary.gguf_name = _name(place)
    return ordinary


def _name(place: str) -> str | None:
    """The name of the model that a GGUF file holds, as the file tells it."""
    import gguf

    module: Any = gguf
    field = module.GGUFReader(place).fields.get("general.name")
    return None if field is None else str(field.contents())
