"""Which tokens of a response are personal: as an untrained model finds them, or as the records say.

marked    p(token | own history) - p(token | another's history) > 0.05 in another evaluation of the same records
known     the token overlaps one of the record's own `personal` strings, such as a surname
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nextquill.data import Record
from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.errors import RecordError
from nextquill.evaluation.identity import records_digest
from nextquill.evaluation.results import EFFECTS_FILE, are_numbers, line_index, read_evaluation
from nextquill.evaluation.token_measures import Bools
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_objects

if TYPE_CHECKING:
    from nextquill.data import EncodedExample


class Marks(NamedTuple):
    """The marked tokens of every record.

    Attributes:
        token_ids: each response's tokens.
        personal: bool [tokens] of each response.
    """

    token_ids: list[list[int]]
    personal: list[Bools]

    @property
    def digest(self) -> str:
        """Equal for equal marks, wherever they were read."""
        return fingerprint(repr([ids, own.tolist()]) for ids, own in zip(*self, strict=True))

    def check(self, examples: Sequence[EncodedExample]) -> None:
        """Refuse marks of other tokens than the examples' responses.

        Raises:
            RecordError: a response has other tokens.
        """
        for index, (example, ids) in enumerate(zip(examples, self.token_ids, strict=True)):
            if example.factual.response_ids != ids:
                raise RecordError(
                    f"personal_from: expected this tokenizer's tokens, but record {index} has others there; "
                    "mark personal tokens with a model of the same tokenizer and response length",
                    argument="personal_from",
                )


def read_marks(folder: Path, records: Sequence[Record]) -> Marks:
    """The tokens that an evaluation of these records finds personal.

    Raises:
        RecordError: there is no such evaluation, it is damaged, it saw other records, or it has no placebo.
    """
    evaluation = read_evaluation(folder)
    if evaluation.records != records_digest(records):
        raise RecordError(
            f"{folder} is an evaluation of other records ({evaluation.num_examples}) than these ({len(records)})"
        )
    found = dict[int, tuple[list[int], Bools]]()
    for where, line in json_objects(folder / EFFECTS_FILE):
        ids, names = line.get("token_ids"), ("nll_factual", "nll_placebo")
        if "nll_placebo" not in line:
            raise RecordError(f"{where}: field 'nll_placebo': missing; a placebo needs records of several users")
        if not isinstance(ids, list) or not all(are_numbers(line.get(name), len(ids)) for name in names):
            raise RecordError(
                f"{where}: expected 'token_ids', 'nll_factual' and 'nll_placebo', one number a token each"
            )
        own, other = (np.exp(-np.asarray(line[name], dtype=np.float64)) for name in names)
        found[line_index(line, where)] = ids, own - other > DEFAULT_THRESHOLD
    if sorted(found) != list(range(len(records))):
        raise RecordError(f"{folder / EFFECTS_FILE}: expected a line for each of {len(records)} records")
    return Marks(*map(list, zip(*(found[index] for index in range(len(records))), strict=True)))


def personal_strings(record: Record, index: int) -> list[str] | None:
    """The strings that a record names as personal; None if it has no such field.

    Raises:
        RecordError: the field is not a list of texts, or one is blank.
    """
    strings = record.extra.get("personal")
    if strings is None:
        return None
    if not isinstance(strings, list) or not all(isinstance(each, str) and each.strip() for each in strings):
        problem = f"expected a list of strings, none of them blank, got {strings!r:.80}"
        raise RecordError(f"record {index}: field 'personal': {problem}", argument="records")
    return strings


def known_tokens(texts: Sequence[str], strings: Sequence[str]) -> Bools:
    """Which tokens overlap one of the strings, as whole words in upper or lower case; bool [tokens].

    Args:
        texts: the text that each token adds. One that ends inside a character adds nothing; it counts as a part of
            the text of the token that completes the character.
        strings: the personal ones.
    """
    ends = np.cumsum([len(text) for text in texts], dtype=int)
    starts, lengths = np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)
    completed = ends[np.minimum(np.searchsorted(ends, starts, side="right"), len(ends) - 1)]
    ends = np.where(lengths == 0, completed, ends)
    known = np.zeros(len(texts), dtype=bool)
    for each in strings:
        for match in re.finditer(rf"(?<!\w){re.escape(each.strip())}(?!\w)", "".join(texts), re.IGNORECASE):
            known |= (starts < match.end()) & (ends > match.start())
    return known
