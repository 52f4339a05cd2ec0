"""Finds answers in texts, and test answers that the training data give away.

    answer      a test response is a training response, or stands in a training history of any user, if case and white
                space are ignored
    itself      a record's own response stands in its own history
    user        a user is in both training and test, although the division is by user
    time        a test record is earlier than a training record of its user, although the division is by time

A response of nine words or more is also found inside a longer text, as past texts often have a title or a rating around
the user's own words. A shorter response, or one in a script without spaces, must be the whole text.

Only the test records are held. The training records are read once, and each different text is looked up in a table, so
100,000 records with 20 past texts each take seconds.

`holds` looks for one answer in one text. It also ignores quotation marks, labels and invisible characters.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nextquill.data._checks import check_integer, check_one_of
from nextquill.data.records import Record
from nextquill.errors import RecordError

_KINDS = ("users", "time")
_SHOWN = 5
#: The number of words that a long response is looked up by. These are inner words, because inside a text the first
#: word may follow a quotation mark and the last may precede one.
_KEY_WORDS = 7
_LEAST_WORDS = _KEY_WORDS + 2
#: `holds` looks for texts of this many characters inside others; shorter ones recur by chance.
LONG = 24
# The label of a line: a quotation mark, a bullet, or the label of a rendered pair.
_LABEL = re.compile(r"^(?:(?:not )?preferred:\s?|[>*•-]+\s+|>)+")
_QUOTES = str.maketrans({**dict.fromkeys("‘’‚‛`´", "'"), **dict.fromkeys("“”„‟«»", '"')})  # noqa: RUF001
# Soft hyphens, zero-width spaces and joiners, direction marks, byte-order marks.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_CUT = "….[] "


@dataclass(frozen=True)
class Leak:
    """One test record that training gives away, with a message; the kind is "answer", "itself", "user" or "time"."""

    kind: str
    message: str


def check_no_leaks(
    train: Iterable[Record], test: Sequence[Record], *, split: str | None = None, least_characters: int = 1
) -> None:
    """Raise if the training records give away a test record.

    Args:
        train: the training records; an iterator is used up.
        test: the test records. Check validation records with a second call.
        split: a further promise of the division: "users" if no user is in both parts, "time" if no user's test record
            is earlier than a training record, None for neither.
        least_characters: shorter responses are not looked up, as a data set of one-word answers has to repeat them.

    Raises:
        RecordError: there is a leak; the message names the first records and the number of leaks.
        ArgumentError: an unknown `split`.
    """
    leaks = find_leaks(train, test, split=split, least_characters=least_characters)
    if leaks:
        shown = "; ".join(leak.message for leak in leaks[:_SHOWN])
        more = f"; and {len(leaks) - _SHOWN} more" if len(leaks) > _SHOWN else ""
        raise RecordError(f"{len(leaks)} leak{'s' if len(leaks) > 1 else ''} from test to train: {shown}{more}")


def find_leaks(
    train: Iterable[Record], test: Sequence[Record], *, split: str | None = None, least_characters: int = 1
) -> list[Leak]:
    """Return all leaks, in the order of the training records; see `check_no_leaks`.

    Each test response is reported once, with the first place where it stands.

    Raises:
        RecordError: `split` is "time" and a record has no timestamp.
        ArgumentError: an unknown `split`.
    """
    if split is not None:
        check_one_of("split", split, _KINDS)
    check_integer("least_characters", least_characters, least=1)
    search = _Search(test, split, least_characters)
    for position, record in enumerate(train):
        search.add(record, f"train record {position} (user {record.user_id!r})")
    return search.leaks


class _Search:
    def __init__(self, test: Sequence[Record], split: str | None, least_characters: int) -> None:
        self.leaks: list[Leak] = []
        self._split, self._least = split, least_characters
        self._answers: dict[str, list[tuple[str, str]]] = {}  # by normalised response: place and original
        # Normalised responses by their first inner words, by the number of inner words, and by all inner words. Many
        # responses begin alike, and comparing a text with each of those would take quadratic time.
        self._keys: dict[tuple[str, ...], dict[int, dict[str, list[str]]]] = {}
        self._users: dict[str, str] = {}  # the place of each test user's first record
        self._earliest: dict[str, tuple[float, str]] = {}
        self._seen: set[str] = set()
        for position, record in enumerate(test):
            self._add_test(record, f"test record {position} (user {record.user_id!r})")

    def _add_test(self, record: Record, where: str) -> None:
        self._check_itself(record, where)
        if len(record.response.strip()) >= self._least:
            answer = normalised(record.response)
            self._answers.setdefault(answer, []).append((where, record.response))
            if _is_long(answer):
                inner = answer.split(" ")[1:-1]
                known = self._keys.setdefault(tuple(inner[:_KEY_WORDS]), {}).setdefault(len(inner), {})
                known.setdefault(" ".join(inner), []).append(answer)
        self._users.setdefault(record.user_id, where)
        if self._split == "time":
            time = _timestamp(record, where)
            if time < self._earliest.get(record.user_id, (float("inf"), ""))[0]:
                self._earliest[record.user_id] = (time, where)

    def add(self, record: Record, where: str) -> None:
        """Compare a training record with all test records."""
        self._check_itself(record, where)
        self._look_up(record.response, f"the response of {where}")
        for position, item in enumerate(record.history):
            self._look_up(item.text, f"history[{position}] of {where}")
        if self._split == "users" and record.user_id in self._users:
            tested = self._users.pop(record.user_id)
            self.leaks.append(Leak("user", f"{tested}: expected a user who is not trained on, got that of {where}"))
        if self._split == "time":
            time = _timestamp(record, where)
            earliest, tested = self._earliest.get(record.user_id, (float("inf"), ""))
            if earliest < time:
                self.leaks.append(Leak("time", f"{tested}, at {earliest}, is earlier than {where}, at {time}"))
                del self._earliest[record.user_id]

    def _look_up(self, text: str, place: str) -> None:
        # Histories repeat: a text also stands in most later records of its user.
        if text in self._seen:
            return
        self._seen.add(text)
        whole = normalised(text)
        for where, response in self._answers.pop(whole, ()):
            same = "word for word" if text == response else "ignoring case and white space"
            self.leaks.append(Leak("answer", f"{where}: its response is {place}, {same}"))
        for answer in self._inside(whole):
            for where, _ in self._answers.pop(answer, ()):
                self.leaks.append(Leak("answer", f"{where}: its response stands in {place}"))

    def _inside(self, text: str) -> Iterator[str]:
        """The long test responses that stand inside a text."""
        words = text.split(" ") if self._keys else []
        for start in range(len(words) - _KEY_WORDS + 1):
            for size, known in self._keys.get(tuple(words[start : start + _KEY_WORDS]), {}).items():
                for answer in known.get(" ".join(words[start : start + size]), ()):
                    if answer in text:
                        yield answer

    def _check_itself(self, record: Record, where: str) -> None:
        if len(record.response.strip()) < self._least:
            return
        wanted = normalised(record.response)
        for position, item in enumerate(record.history):
            text = normalised(item.text)
            if text == wanted or (_is_long(wanted) and wanted in text):
                verb = "is" if text == wanted else "stands in"
                self.leaks.append(Leak("itself", f"{where}: its own response {verb} its history[{position}]"))
                return


@functools.lru_cache(maxsize=16_384)  # the same texts stand in most records of a user
def normalised(text: str) -> str:
    """The text with case, white space and the composition of characters (NFKC) made uniform."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _is_long(answer: str) -> bool:
    """Whether a normalised response has enough words to be searched inside texts."""
    return answer.count(" ") + 1 >= _LEAST_WORDS


def _timestamp(record: Record, where: str) -> float:
    if record.timestamp is None:
        raise RecordError(f"{where}: expected a timestamp to check the order by, got none")
    return record.timestamp


def holds(text: str, answer: str) -> bool:
    """Whether a text is an answer, contains it as whole lines, or is a part of it that was cut out.

    Each line may follow the label of a rendered pair, a quotation mark or a bullet. An answer of `LONG` characters or
    more is also found inside a line. A part counts if it has `LONG` characters or more, not counting the dots of a cut.
    No text holds a blank answer. Differences of case, white space, quotation marks, invisible characters and the
    composition of characters are ignored.
    """
    wanted = folded(answer)
    if not wanted:
        return False
    whole = folded(text)
    if whole == wanted or (len(wanted) >= LONG and wanted in whole):
        return True
    if len(part := whole.strip(_CUT)) >= LONG and part in wanted:
        return True
    lines = _folded_lines(answer)
    return bool(lines.strip()) and lines in _folded_lines(text)


@functools.lru_cache(maxsize=16_384)
def folded(text: str) -> str:
    """The text with case, white space, quotation marks and composition made uniform, without invisible characters."""
    return normalised(_UNSEEN.sub("", text).translate(_QUOTES))


@functools.lru_cache(maxsize=16_384)
def _folded_lines(text: str) -> str:
    """The lines of a text that are not blank, without their labels, each between two line breaks."""
    lines = (_LABEL.sub("", folded(line)) for line in text.splitlines())
    return "\n".join(["", *(line for line in lines if line), ""])
