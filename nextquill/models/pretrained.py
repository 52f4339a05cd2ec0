"""Calls `from_pretrained` of transformers, so that code in a model folder never runs, and nothing asks about it.

Without `trust_remote_code`, transformers asks on standard input whether to run the code that a folder's `auto_map`
names, and takes any `y` that it finds there for the answer. A model that transformers also knows itself loads all the
same, with transformers' own code. PEFT's classes run no code of a folder and take no such argument.
"""

from __future__ import annotations

from typing import Any

from nextquill.errors import UnsupportedModelError


def from_pretrained(kind: Any, pretrained_model_name_or_path: str | None, **options: Any) -> Any:
    """What `kind.from_pretrained` returns, for a class of transformers.

    Raises:
        UnsupportedModelError: only code in the folder could load it.
    """
    try:
        return kind.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"model_name_or_path: {pretrained_model_name_or_path} can only be loaded with code of its own, and code in "
            "a model folder is not run"
        ) from error
