"""Which tokens of a response are personal: as an untrained model finds them, or as the records say.

marked    p(token | own history) - p(token | another's history) > 0.05 in another evaluation of the same records
known     the token overlaps one of the record's own `personal` strings, such as a surname
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextquill.data import EncodedExample, Record
from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.errors import RecordError
from nextquill.evaluation.identity import records_digest
from nextquill.evaluation.results import EFFECTS_FILE, are_numbers, line_index, read_evaluation
from nextquill.evaluation.token_measures import Bools
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_objects


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
