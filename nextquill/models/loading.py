"""Load models and tokenizers by name, and the prompt settings of a model that this library trained."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextquill.data import PromptTemplate, Record
from nextquill.errors import ArgumentError, CheckpointError, UnsupportedModelError
from nextquill.models.border import check_config, first_line, reading
from nextquill.models.gguf import SUFFIX, as_ordinary, check_gguf, gguf_arguments, is_gguf, read_once
from nextquill.models.pretrained import from_pretrained
from nextquill.models.tiny_models import SCRATCH_SIZES, build_model, build_tokenizer, is_new, training_texts
from nextquill.storage.input_files import real_path
from nextquill.storage.json_files import read_json

PROMPT_FILE = "nextquill_prompt.json"
_ADAPTER_FILE = "adapter_config.json"
_HUB_TIMEOUT_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """The template and the token budgets of a model's prompts."""

    template: PromptTemplate
    max_length: int
    max_response_length: int | None = None

    def with_chat(self, uses_chat: bool) -> PromptSettings:
        """The settings of a run, whose prompts stay the same if the tokenizer gets or loses its chat template."""
        return dataclasses.replace(self, template=dataclasses.replace(self.template, chat=uses_chat))

    def to_json(self) -> str:
        """Return the text of the settings' file."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_prompt_settings(folder: str | Path) -> PromptSettings | None:
    """The prompt settings stored in a model folder, or in the run folder of a checkpoint; None if there are none.

    CheckpointError if the file exists and cannot be read.
    """
    folder = Path(folder)
    places = [folder / PROMPT_FILE]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent / PROMPT_FILE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        raw = read_json(path)
        lengths = (raw["max_length"], raw.get("max_response_length"))
        for name, length in zip(("max_length", "max_response_length"), lengths, strict=True):
            if type(length) is not int and not (length is None and name == "max_response_length"):
                raise TypeError(f"{name}: expected an integer, got {length!r}")
        return PromptSettings(PromptTemplate(**raw["template"]), *lengths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the prompt settings of a nextquill model: {error}") from error


@dataclasses.dataclass(frozen=True)
class Loading:
    """How weights are loaded; see `load_model`."""

    dtype: str = "auto"
    revision: str | None = None
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    @property
    def quantised(self) -> str | None:
        """The flag that asks for fewer bits, or None."""
        return "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None

    def check(self, name_or_path: str) -> None:
        """Raise ArgumentError for values that do not go together, or that the model or this machine cannot take."""
        if self.load_in_4bit and self.load_in_8bit:
            raise ArgumentError("load_in_4bit: expected either this or load_in_8bit, got both")
        if self.quantised and is_new(name_or_path):
            raise ArgumentError(f"{self.quantised}: a new {name_or_path!r} model has no trained weights to quantise")
        if self.quantised and importlib.util.find_spec("bitsandbytes") is None:
            raise ArgumentError(f"{self.quantised}: needs the package bitsandbytes; pip install 'nextquill[quantize]'")
        if self.revision is not None and (is_new(name_or_path) or Path(name_or_path).expanduser().exists()):
            raise ArgumentError(f"revision: expected a model on the hub with it, got {name_or_path}")

    def quantisation(self) -> dict[str, Any]:
        """The argument of `from_pretrained` that quantises, if any."""
        if not self.quantised:
            return {}
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**{self.quantised: True}, bnb_4bit_quant_type="nf4")}


def load_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    records: Callable[[], Sequence[Record]] | None = None,
    seed: int = 0,
    revision: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a folder, a name on the Hugging Face hub, a GGUF file, or "tiny" / "small" for a new model whose
            tokenizer is made from `records`. A folder with a PEFT adapter loads its base model and the adapter,
            trainable. The weights of a GGUF file are dequantised.
        dtype: "auto" (as stored; float32 for a GGUF file), "float32", "bfloat16" or "float16".
        records: the training records, for a new model.
        seed: initialisation of a new model.
        revision: a branch, tag or commit of a model on the hub.
        attn_implementation: the model's own attention, such as "eager", "sdpa" or "flash_attention_2". Passes over
            trees replace it, see `nextquill.models.attention`.
        load_in_4bit, load_in_8bit: quantise the linear layers with bitsandbytes: 4 bits (NF4), or 8.

    Raises:
        UnsupportedModelError: the model cannot be loaded, some of its weights are missing, or an adapter does not fit
            its base model.
        ArgumentError: arguments that do not go together, or one that the model or this machine cannot take.
    """
    how = Loading(dtype, revision, attn_implementation, load_in_4bit, load_in_8bit)
    how.check(name_or_path)
    if is_new(name_or_path):
        return _with_attention(_new_model(name_or_path, records, seed), how)
    place, cached_only = _locate(name_or_path)
    what = f"model_name_or_path: cannot load {name_or_path!r}"
    if cached_only:
        what += ": it is not a folder here, the hub cannot be reached, and it is not in the hub's cache"
    elif is_gguf(place):
        what += f" of {Path(place).stat().st_size:,} bytes"  # it may not be complete
    with reading(place, what), read_once(place):
        if (Path(place) / _ADAPTER_FILE).is_file():
            return _load_adapter(place, how)
        model = _load_base(place, how, cached_only)
        return _with_attention((model, load_tokenizer(place, cached_only, revision)), how)


def _new_model(name: str, records: Callable[[], Sequence[Record]] | None, seed: int) -> tuple[Any, Any]:
    if records is None:
        raise UnsupportedModelError(
            f"model_name_or_path: a new {name!r} model can only be trained; for a folder of that name write ./{name}"
        )
    size = SCRATCH_SIZES[name]
    tokenizer = build_tokenizer(training_texts(records()), size.vocabulary)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return build_model(size, seed, vocabulary=len(tokenizer), **ids), tokenizer


def _locate(name_or_path: str) -> tuple[str, bool]:
    """The absolute path of a folder, or the hub name; and whether to load from the hub's cache alone.

    The path is absolute so that an adapter saved later still finds its base model. If the hub cannot be reached, only
    the cache is used, as the hub's client would retry each file for a minute.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        _check_place(path)
        return str(real_path(path)), False
    if _looks_local(name_or_path):
        kind = "file" if is_gguf(name_or_path) else "folder"
        raise UnsupportedModelError(f"model_name_or_path: there is no {kind} {name_or_path}")
    return name_or_path, not _hub_answers()


def _check_place(path: Path) -> None:
    if path.is_file() and is_gguf(path):
        check_gguf(path)
        return
    if not path.is_dir():
        raise UnsupportedModelError(f"model_name_or_path: expected a model folder or a {SUFFIX} file, got {path}")
    if (path / "config.json").is_file() or (path / _ADAPTER_FILE).is_file():
        return
    checkpoints = sorted(path.glob("checkpoint-*"))
    hint = f"; its run has not finished; its last checkpoint is {checkpoints[-1]}" if checkpoints else ""
    raise UnsupportedModelError(f"model_name_or_path: no model in {path}: no config.json or {_ADAPTER_FILE}{hint}")


def _looks_local(name: str) -> bool:
    """Whether a name was meant as a path that does not exist: a hub name has at most one slash, in the middle."""
    first, _, rest = name.replace(os.sep, "/").partition("/")
    if name.startswith((".", "/", "~", os.sep)) or is_gguf(name):
        return True
    return "/" in rest or (bool(rest) and Path(first).is_dir())


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    # The client's exceptions differ between its versions, and offline mode has its own.
    except Exception:  # noqa: BLE001
        return False
    return True


def load_tokenizer(place: str, cached_only: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a folder, a GGUF file or a hub name, there of a revision; UnsupportedModelError if it fails."""
    from transformers import AutoTokenizer

    check_config(place)  # which transformers may read to find the kind of tokenizer
    with reading(place, f"model_name_or_path: cannot load the tokenizer of {place}", file="tokenizer_config.json"):
        found = from_pretrained(AutoTokenizer, **gguf_arguments(place), local_files_only=cached_only, **_at(revision))
        found.decode(found.encode("a"))  # some settings are only read on use
    return found


def find_tokenizer(name_or_path: str) -> Any:
    """The tokenizer that `load_model` would return, without loading weights; errors are those of `load_tokenizer`.

    A folder with only a tokenizer works too.
    """
    folder = Path(name_or_path).expanduser()
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    place, cached_only = _locate(name_or_path)
    if (Path(place) / _ADAPTER_FILE).is_file():
        return find_tokenizer(_base(place)[0])
    return load_tokenizer(place, cached_only)


def _at(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _with_attention(loaded: tuple[Any, Any], how: Loading) -> tuple[Any, Any]:
    if how.attn_implementation is not None:
        try:
            loaded[0].set_attn_implementation(how.attn_implementation)
        except (ValueError, ImportError, RuntimeError, OSError) as error:
            raise ArgumentError(f"attn_implementation: {first_line(error)}") from error
    return loaded


def _load_base(place: str, how: Loading, cached_only: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    check_config(place)
    # The search for an adapter does not read the model's own settings.
    hub = {"local_files_only": cached_only, **_at(how.revision)}
    from_file, quantisation = is_gguf(place), how.quantisation()
    dtype = "float32" if from_file and how.dtype == "auto" else how.dtype
    options: dict[str, Any] = {"dtype": dtype, **hub, "adapter_kwargs": hub}
    options |= {} if from_file else quantisation
    model, info = from_pretrained(AutoModelForCausalLM, **gguf_arguments(place), **options, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initialises them at random, and only logs it
        raise UnsupportedModelError(
            f"model_name_or_path: {place} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        )
    return as_ordinary(model, place, **quantisation) if from_file else model


def _load_adapter(place: str, how: Loading) -> tuple[Any, Any]:
    """The base model with the adapter of a folder. PEFT's auto class is not used: it resizes the base's embeddings."""
    base_name, revision = _base(place)
    try:
        revision = None if Path(base_name).exists() else revision  # a base that was saved to a folder has no revision
        base, tokenizer = load_model(base_name, **vars(how) | {"revision": revision})
    except UnsupportedModelError as error:
        message = f"model_name_or_path: the adapter in {place} needs its base model: {error.message}"
        raise UnsupportedModelError(message) from error
    if (Path(place) / "tokenizer_config.json").is_file():
        own = load_tokenizer(place)
        _check_same_tokens(own, tokenizer, place, base_name)
        tokenizer = own
    return _with_adapter(base, place, base_name), tokenizer


def _with_adapter(base: Any, place: str, base_name: str) -> Any:
    """The base in the adapter. PEFT itself silently drops weights for layers that the base lacks."""
    from peft import PeftModel

    unfit = f"model_name_or_path: the adapter in {place} does not fit its base model {base_name}"
    with reading(place, unfit), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights that the adapter lacks
        model: Any = PeftModel.from_pretrained(base, place, is_trainable=True)
        found = model.load_adapter(place, "default", is_trainable=True)  # again, as only this says what was missing
    for names, where in ((found.unexpected_keys, "the base"), (found.missing_keys, "the adapter")):
        if names:
            raise UnsupportedModelError(f"{unfit}: {where} lacks {len(names)} weights, such as {min(names)}")
    model.name_or_path = place  # else it would be the base's
    return model


def _check_same_tokens(own: Any, base: Any, place: str, base_name: str) -> None:
    """Raise UnsupportedModelError if a token has another id in the base; an adapter may add tokens."""
    ids, base_ids = own.get_vocab(), base.get_vocab()
    other = next((token for token, index in ids.items() if base_ids.get(token, index) != index), None)
    if other is not None:
        raise UnsupportedModelError(
            f"model_name_or_path: the adapter in {place} was trained with another vocabulary than its base model "
            f"{base_name}: token {other!r} is {ids[other]} there and {base_ids[other]} here"
        )


def _base(place: str) -> tuple[str, str | None]:
    """The name of an adapter's base model, and its revision."""
    from peft import PeftConfig

    with reading(place, "model_name_or_path: cannot load the adapter", file=_ADAPTER_FILE):
        config = PeftConfig.from_pretrained(place)
    name = config.base_model_name_or_path
    if not name:
        raise UnsupportedModelError(f"model_name_or_path: the adapter in {place} does not name its base model")
    return str(name), config.revision
