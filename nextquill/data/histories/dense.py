"""Selects the past texts nearest in meaning, by the cosine similarity of the embeddings of query and item."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextquill.data._checks import needed_package
from nextquill.data.histories.base import History, RankedSelector, TokenBudget, best_first, describe, item_text
from nextquill.data.records import Record, check_times
from nextquill.errors import ArgumentError
from nextquill.storage.json_files import read_json

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

#: A function of n texts that returns an array of numbers [n, size].
TextEncoder = Callable[[list[str]], Any]


class DenseSelector(RankedSelector):
    """Keeps the items whose embedding is nearest to the query's; of equally near ones, the more recent.

    Every text is embedded once, and its embedding is kept: size · 4 bytes (1.5 KB with the default model).
    """

    def __init__(self, num_items: int | None, budget: TokenBudget | None, encoder: TextEncoder | str | None) -> None:
        super().__init__(num_items, budget)
        self._encoder = encoder if callable(encoder) else _load(encoder or DEFAULT_ENCODER)
        self._embeddings: dict[str, Tensor] = {}

    def fit(self, records: Iterable[Record]) -> None:
        """Embed the texts of all records in one call."""
        texts: dict[str, None] = {}
        for record in records:
            check_times(record.history, record.timestamp, describe(record))
            if record.history:
                texts.update(dict.fromkeys([record.query, *map(item_text, record.history)]))
        self._embed(texts)

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        texts = [record.query, *map(item_text, history)]
        self._embed(dict.fromkeys(texts))
        query, *items = (self._embeddings[text] for text in texts)
        # Rounded, because the order of summation may give equal texts scores that differ in the last digit.
        return best_first([round(score, 6) for score in (torch.stack(items) @ query).tolist()])

    def _embed(self, texts: Iterable[str]) -> None:
        """Embed new texts, scaled to length 1. An embedding of zeros stays zero, so its similarity to all is 0."""
        new = [text for text in texts if text not in self._embeddings]
        if not new:
            return
        found = torch.as_tensor(self._encoder(new), dtype=torch.float32, device="cpu").detach()
        if found.dim() != 2 or len(found) != len(new):
            raise ArgumentError(
                f"encoder: expected an array [{len(new)}, size] for {len(new)} texts, got shape {list(found.shape)}"
            )
        if not found.isfinite().all():
            raise ArgumentError("encoder: expected finite numbers, got NaN or infinity in an embedding")
        self._embeddings.update(zip(new, torch.nn.functional.normalize(found), strict=True))


def _load(name: str) -> TextEncoder:
    with needed_package("name: 'dense' needs sentence-transformers", "dense"):
        from sentence_transformers import SentenceTransformer
    modules = Path(name).expanduser() / "modules.json"
    # sentence-transformers 3.4 to 5 runs code in a folder here without being told to trust it.
    try:
        kinds = [str(module["type"]) for module in read_json(modules)] if modules.is_file() else []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"encoder: {modules}: not a list of modules, each with its type: {error}") from error
    own = next((kind for kind in kinds if not kind.startswith("sentence_transformers.")), None)
    if own is not None:
        raise ArgumentError(f"encoder: {name} names its own code, {own}, and code in a model folder is not run")
    return functools.partial(SentenceTransformer(name, trust_remote_code=False).encode, show_progress_bar=False)
