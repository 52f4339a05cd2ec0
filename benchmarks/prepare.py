"""Suite `prepare`: preparing records (render, tokenise, fit, write) against the tokenizer alone, on the same cores.

The peer is only the fast tokenizer's batch call over the resulting prompts and responses, which is the time of a
perfect preparation. It runs second, when the tokenizer's cache of words is warm. Every round has new records, and gives
one ratio. There are two kinds of records, of about 2,000 tokens:

    new texts        no text occurs twice; 13 past texts per record, of which 9 or 10 fit
    ten a user       ten records per user, each with the ten texts before it, as in logs

`packed` adds the work of a data loader: examples are read from the folder and merged into prefix trees under a token
budget. Memory is measured in a separate process that prepares records from an iterator.
"""

from __future__ import annotations

import gc
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import RESULTS, GateError, Options, Row, make_row
from nextquill.data import ExampleEncoder, HistoryItem, PreparedDataset, Record, TreeCollator, prepare

MAX_LENGTH = 2048
VOCABULARY = 32_000
WORDS = 60_000
#: The records of a round and the number of rounds: by default, with --quick, and with --full (100,000 records).
SIZES = {"default": (500, None), "quick": (24, 2), "full": (5_000, 20)}
CASES = ("new texts", "ten a user")
BATCH_SIZE, MAX_TOKENS = 8, 16_384
_SYLLABLES = "b c d f g h k l m n p r s t v w st tr pl ch sh".split(), "a e i o u ea ou ai".split()
_CLOSED = ("", "", "n", "s", "r", "t")


def run(options: Options) -> list[Row]:
    """Check that prepared examples equal those encoded one by one, then measure time and memory."""
    count, rounds = SIZES["full" if options.full else "quick" if options.quick else "default"]
    rows: list[Row] = []
    tokenizer = make_tokenizer(300 if options.quick else VOCABULARY)
    began, budget = time.perf_counter(), options.budget if rounds is None else None
    for place, case in enumerate(CASES, start=1):
        until = None if budget is None else began + budget * place / len(CASES)
        rows += _timed(case, tokenizer, count, rounds or options.rounds, until)
        options.save(rows)
    return rows + _weighed(count * (rounds or options.rounds), options)


def _timed(case: str, tokenizer: Any, count: int, rounds: int, until: float | None) -> list[Row]:
    encoder, collate = ExampleEncoder(tokenizer, max_length=MAX_LENGTH), TreeCollator(max_tokens=MAX_TOKENS)
    backend = tokenizer.backend_tokenizer
    took: dict[str, list[Took]] = {name: [] for name in ("tokenizer", "prepare", "packed")}
    tokens = 0
    for turn in range(rounds):
        if until is not None and turn >= 3 and time.perf_counter() > until:
            break
        records = list(make_records(case, count, seed=turn))
        with tempfile.TemporaryDirectory() as folder:
            prepared, own = _clock(partial(prepare, records, encoder, Path(folder) / "prepared"))
            _, packing = _clock(partial(_pack, prepared, collate))
            _gate(case, encoder, records, prepared)
            texts = [
                encoder.renderer.prompt(record.query, record.history[example.history_total - example.history_kept :])
                for record, example in zip(records, prepared.examples, strict=True)
            ]
            tokens += sum(prepared.num_branch_tokens(["factual"]))
        texts += [encoder.renderer.response_text(record.response) for record in records]
        _, alone = _clock(partial(_tokenise, backend, texts))
        for name, each in (("tokenizer", alone), ("prepare", own), ("packed", own + packing)):
            took[name].append(each)
    done = len(took["tokenizer"])
    name = f"{case}, {done * count} records of {tokens / (done * count):.0f} tokens"
    rows = []
    for provider, found in took.items():
        rate = [count / each.seconds for each in found]
        rows.append(make_row("prepare", name, provider, "rate", "records/s", rate, device="cpu"))
        if provider != "tokenizer":
            pairs = list(zip(took["tokenizer"], found, strict=True))
            for metric, values in (
                ("throughput", [base.seconds / each.seconds for base, each in pairs]),
                ("per_cpu_second", [base.cpu_seconds / each.cpu_seconds for base, each in pairs]),
            ):
                rows.append(make_row("prepare", name, provider, metric, "x", values, "tokenizer", device="cpu"))
    return rows


def _weighed(count: int, options: Options) -> list[Row]:
    """Peak memory of a process that prepares a tenth of the records, and of one that prepares all."""
    rows = list[Row]()
    if not sys.platform.startswith("linux"):
        return rows
    vocabulary = 300 if options.quick else VOCABULARY
    for records in (max(1, count // 10), count):
        command = [sys.executable, "-m", "benchmarks.prepare", str(records), str(vocabulary)]
        done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GateError(f"prepare: {records} records in a process of their own: {done.stderr.strip()[-300:]}")
        before, peak = map(float, done.stdout.split())
        case = f"new texts, {records} records from an iterator"
        rows.append(make_row("prepare", case, "prepare", "peak", "MiB", [peak], device="cpu"))
        rows.append(make_row("prepare", case, "libraries and tokenizer", "peak", "MiB", [before], device="cpu"))
    return rows


def weigh(count: int, vocabulary: int) -> tuple[float, float]:
    """Peak memory in MiB of this process, before and after preparing `count` records from an iterator."""
    encoder = ExampleEncoder(make_tokenizer(vocabulary), max_length=MAX_LENGTH)
    encoder.encode(next(make_records(CASES[0], 1, seed=0)))
    before = _peak_mebibytes()
    with tempfile.TemporaryDirectory() as folder:
        prepare(make_records(CASES[0], count, seed=1), encoder, Path(folder) / "a")
    return before, _peak_mebibytes()


def _peak_mebibytes() -> float:
    """The high-water mark of this process's memory (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def make_records(case: str, count: int, seed: int) -> Iterator[Record]:
    """Records of about 2,000 tokens, with a vocabulary of 32,000."""
    rng = random.Random(f"{case}/{seed}")
    for number in range(count):
        if case == "new texts":
            history = [_item(rng, day) for day in range(13)]
        elif number % 10 == 0:
            history = [_item(rng, day) for day in range(10)]
        else:
            history = [*history[1:], _item(rng, number % 10 + 10)]
        user = f"user {seed}-{number if case == 'new texts' else number // 10}"
        yield Record(user, _text(rng, 25), _text(rng, 140), tuple(history), timestamp=1000.0)


def _item(rng: random.Random, day: int) -> HistoryItem:
    return HistoryItem(_text(rng, rng.randint(60, 160)), _text(rng, 5), float(day))


def _text(rng: random.Random, words: int) -> str:
    """Random words by Zipf's law, in sentences, some of which end with a line break."""
    vocabulary, weights = _words()
    found = rng.choices(vocabulary, cum_weights=weights, k=words)
    for at in range(0, words, 11):
        found[at] = found[at].capitalize()
        found[at - 1] += "." if at % 5 else ".\n" if at else ""
    return " ".join(found)


@lru_cache
def _words() -> tuple[list[str], list[float]]:
    rng, (heads, vowels) = random.Random(0), _SYLLABLES
    words = dict[str, None]()
    while len(words) < WORDS:
        syllables = range(rng.choices((1, 2, 3, 4), (3, 5, 3, 1))[0])
        words["".join(rng.choice(heads) + rng.choice(vowels) for _ in syllables) + rng.choice(_CLOSED)] = None
    ordered = sorted(words, key=len)  # frequent words are short
    return ordered, list(itertools.accumulate(1 / (rank + 2.7) for rank in range(WORDS)))


@lru_cache
def make_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE tokenizer like GPT-2's, trained on the same kind of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, tokenizer = random.Random(1), Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_text(rng, 200) for _ in range(vocabulary // 8)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def _gate(case: str, encoder: ExampleEncoder, records: list[Record], prepared: PreparedDataset) -> None:
    """Raise GateError if prepared examples differ from those encoded one by one."""
    for index in range(0, len(records), max(1, len(records) // 20)):
        if prepared[index] != encoder.encode(records[index], index):
            raise GateError(f"prepare: {case}: record {index} differs from the record encoded alone")


def _tokenise(backend: Any, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _pack(prepared: PreparedDataset, collate: TreeCollator) -> None:
    for start in range(0, len(prepared), BATCH_SIZE):
        collate(prepared.examples[start : start + BATCH_SIZE])


class Took(NamedTuple):
    """The time of a call: by the clock, and summed over all cores, on which other load has less influence."""

    seconds: float
    cpu_seconds: float

    def __add__(self, other: Any) -> Took:
        return Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def _clock(call: Callable[[], Any]) -> tuple[Any, Took]:
    gc.collect()
    gc.freeze()  # garbage collection over all imported modules takes 50 ms
    try:
        start, cpu = time.perf_counter(), time.process_time()
        result = call()
        return result, Took(time.perf_counter() - start, time.process_time() - cpu)
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    print(*weigh(int(sys.argv[1]), int(sys.argv[2])))
