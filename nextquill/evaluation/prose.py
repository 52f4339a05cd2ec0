"""The nll of general prose, which does not depend on a user: it shows how much language a training has cost.

    nll = Σ −log p(token | the tokens before it in its window) / number of those tokens        (nats per token)

A text is cut into windows of 512 tokens, or of the model's context if that is shorter. The first token of a window has
nothing before it and is not counted. The interval resamples windows, because this text has no users.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nextquill.data import Branch
from nextquill.errors import ArgumentError, BudgetError
from nextquill.evaluation.measures import NLL_PROSE, PROSE, LabelledScores
from nextquill.evaluation.metrics import MetricScores
from nextquill.evaluation.scoring import BranchScorer, pad_token
from nextquill.models.configs import context_length
from nextquill.ranks import deal
from nextquill.storage.input_files import open_input

#: Tokens of a window; the most tokens of a text, its first ones; and the most characters that are read for them.
WINDOW, MOST_TOKENS, MOST_CHARACTERS = 512, 20_000, 400_000


class Prose:
    """A text in windows of tokens.

    Args:
        path: a plain UTF-8 text; its first 20,000 tokens count.
        model, tokenizer: they decide the windows.
        max_tokens: of one forward; a window must fit.

    Attributes:
        text: the part of the text that is read.
        windows: the token ids of each window.

    Raises:
        ArgumentError: the file is missing, unreadable, not UTF-8, or has fewer than two tokens.
        BudgetError: a window takes more than `max_tokens`.
    """

    def __init__(self, path: str | Path, model: Any, tokenizer: Any, max_tokens: int | None = None) -> None:
        self.text = _read(Path(path))
        size = min(WINDOW, context_length(model) or WINDOW)
        ids = list(tokenizer.encode(self.text, add_special_tokens=False, verbose=False))[:MOST_TOKENS]
        windows = [ids[start : start + size] for start in range(0, len(ids), size)]
        self.windows = [window for window in windows if len(window) > 1]
        if not self.windows:
            raise ArgumentError(f"prose_file: expected a text of at least two tokens, got {len(ids)} in {path}")
        if max_tokens is not None and max_tokens < len(self.windows[0]):
            raise BudgetError(
                f"max_tokens: expected at least the {len(self.windows[0])} tokens of a window of prose_file, got "
                f"{max_tokens}"
            )

    def lines(self, model: Any, tokenizer: Any, done: Any, **options: Any) -> Iterator[dict[str, Any]]:
        """The summed nll of every window, in nats, and its number of tokens; those in `done` are left out.

        `options` are those of `BranchScorer`.
        """
        left = (index for index in range(len(self.windows)) if index not in done)
        with BranchScorer(model, pad_token(tokenizer), **options) as scorer:

            def lines(index: int) -> list[dict[str, Any]]:
                first, *rest = self.windows[index]
                (nll,) = scorer([Branch([first], rest)])
                return [{"index": index, "nll": round(float(nll.double().sum()), 6), "tokens": len(rest)}]

            yield from deal(left, lines)


def prose_measures(lines: Sequence[Mapping[str, Any]]) -> dict[str, LabelledScores]:
    """The measure by its name, from the lines of all windows; nothing without lines."""
    if not lines:
        return {}
    scores = MetricScores.ratio_of([line["nll"] for line in lines], [line["tokens"] for line in lines])
    groups = [str(line["index"]) for line in lines]
    return {NLL_PROSE: LabelledScores(PROSE.label, scores, range(len(lines)), PROSE.unit, False, groups=groups)}


def _read(path: Path) -> str:
    try:
        with io.TextIOWrapper(open_input(path), encoding="utf-8") as stream:
            text = stream.read(MOST_CHARACTERS)
    except OSError as error:
        raise ArgumentError(f"prose_file: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"prose_file: expected a plain UTF-8 text, {path} is not: {error}") from error
    if not text.strip():
        raise ArgumentError(f"prose_file: expected some text, {path} is empty")
    return text
