"""Which runs the study has, in an order in which every beginning is already a fair comparison.

    1. the untrained model, then every main method with every learning rate, rate by rate, and one rate more beyond the
       end of the range where the best rate so far is
    2. the main methods at their best rate with the other seeds
    3. the untrained model and the main methods on the other data sets, at the rates chosen on the first, with one seed
    4. the other methods on the first data set, at their parent's rate
    5. the rest: other data sets and other seeds
    6. methods whose first result was not what was expected: the seeds of the main methods, and the other data sets
    7. methods that joined later: those without a parent with every learning rate, then the others

A rate is chosen by nll on development people, each method at its own best temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.study.methods import BASE, LATER, METHODS, REPEATED
from benchmarks.study.people import Size, Sizes


@dataclass(frozen=True)
class Decoding:
    """One way to generate texts: greedy, or sampled from the nucleus."""

    guidance: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def name(self) -> str:
        """Its name in results."""
        return f"γ={self.guidance:g}" + (f", T={self.temperature:g}" if self.temperature else "")


@dataclass(frozen=True)
class BestOf(Decoding):
    """The best of several samples by what the history adds to them; see `GenerationOptions`."""

    best_of: int = 8

    @property
    def name(self) -> str:
        """Its name in results."""
        return f"best of {self.best_of}"


@dataclass(frozen=True)
class Preset:
    """The settings of all runs.

    Args:
        name: on the command line.
        main, others: names of methods; the first have learning rates of their own.
        rates: learning rates tried.
        beyond: the rates below and above them; a method whose best rate is at an end tries the one next to it. None for
            neither.
        seeds, other_seeds: seeds of the main methods, and of the others on the first data set.
        repeats_others: the other methods are trained on the other data sets too.
        steps, batch_size, examples_per_user, warmup_steps: of the training, with AdamW and a linear decay.
        lora_r: rank of adapters on all linear layers; None to train the whole model.
        lora_layers: the share of the model's last layers that get adapters.
        max_length: tokens of prompt and response.
        sizes: the people that are measured.
        decodings: how texts are generated.
        generated: texts of the test set that are generated, the first ones.
        judged: names of the decodings that the language model judges.
        max_new_tokens: the most of a generated text; see `Worker.longest`.
        save_steps: steps between checkpoints.
        later: names of methods that joined when others had finished runs; they are trained last.
        repeated: names of other methods that are trained again, because of their first result.
    """

    name: str
    main: Sequence[str]
    others: Sequence[str]
    rates: Sequence[float]
    beyond: tuple[float, float] | None
    seeds: Sequence[int]
    other_seeds: Sequence[int]
    repeats_others: bool
    steps: int
    batch_size: int
    examples_per_user: int
    warmup_steps: int
    lora_r: int | None
    lora_layers: float
    max_length: int
    sizes: Sizes
    decodings: Sequence[Decoding]
    generated: int
    judged: Sequence[str]
    max_new_tokens: int
    save_steps: int
    later: Sequence[str] = LATER
    repeated: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, without `later` and `repeated`, by which a study may grow."""
        return {name: value for name, value in asdict(self).items() if name not in ("later", "repeated")}


_DECODINGS = (
    *(Decoding(gamma) for gamma in (0.0, 0.25, 0.5, 1.0)),
    Decoding(temperature=0.8, top_p=0.95),
)
_MAIN = ("sft", "perce", "nextquill_detached")
_OTHERS = tuple(name for name in METHODS if name not in (BASE, *_MAIN, *LATER))

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu", _MAIN, _OTHERS, (1e-3, 3e-4, 3e-3), (1e-4, 1e-2), (1, 2, 3), (1,), False,
            steps=60, batch_size=16, examples_per_user=8, warmup_steps=6, lora_r=16, lora_layers=0.4, max_length=1024,
            sizes=Sizes(Size(120, 960), Size(24, 36), Size(48, 96), Size(24, 24), 10),
            decodings=_DECODINGS, generated=48, judged=("γ=0", "γ=1"), max_new_tokens=128, save_steps=20,
            repeated=REPEATED,
        ),
        Preset(
            "gpu", _MAIN, _OTHERS, (3e-5, 1e-5, 1e-4), (3e-6, 3e-4), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), True,
            steps=120, batch_size=32, examples_per_user=8, warmup_steps=12, lora_r=None, lora_layers=1.0,
            max_length=2048, sizes=Sizes(Size(200, 3840), Size(24, 96), Size(96, 384), Size(48, 192), 10),
            decodings=_DECODINGS, generated=192, judged=("γ=0", "γ=1"), max_new_tokens=128, save_steps=60,
        ),
        Preset(
            "smoke", ("sft", "perce"), ("perce_random", "perce_uncopied"), (1e-3, 1e-2), None, (1,), (1,), False,
            steps=4, batch_size=4, examples_per_user=2, warmup_steps=1, lora_r=2, lora_layers=1.0, max_length=256,
            sizes=Sizes(Size(8, 16), Size(3, 3), Size(4, 4), Size(3, 3), 2),
            decodings=(Decoding(), Decoding(1.0)), generated=4, judged=("γ=0",), max_new_tokens=6, save_steps=2,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Args:
        data, method, seed: what is trained on what, from which seed.
        rate: the learning rate; 0 for the untrained model.
        needs: the names of runs that must be finished before it starts.
    """

    data: str
    method: str
    seed: int
    rate: float
    needs: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """Its name in results and as a file."""
        return "-".join((self.data, self.method, *([f"{self.rate:g}", f"seed{self.seed}"] if self.rate else [])))


#: `score(name)` is a finished run's nll on development people, which decides between rates; None before it is finished.
Score = Callable[[str], float | None]


def planned(preset: Preset, data: Sequence[str], score: Score) -> Iterator[Run]:
    """The runs in their order, as far as the finished ones decide them."""
    first, others = data[0], data[1:]
    bases = {name: Run(name, BASE, 0, 0.0) for name in data}
    yield bases[first]
    rates = yield from _trials(preset, preset.main, first, score)
    yield from _runs(first, preset.main, preset.seeds[1:], rates)
    for name in others:
        yield bases[name]
        yield from _runs(name, preset.main, preset.seeds[:1], rates)
    yield from _runs(first, preset.others, preset.other_seeds[:1], rates)
    for name in others:
        yield from _runs(name, preset.main, preset.seeds[1:], rates)
    for name in data:
        if name == first or preset.repeats_others:
            yield from _runs(name, preset.others, preset.other_seeds[name == first :], rates)
    if None in rates.values():  # the runs before are not all known yet
        return
    yield from _runs(first, preset.repeated, [seed for seed in preset.seeds if seed not in preset.other_seeds], rates)
    for name in others:
        yield from _runs(name, preset.repeated, preset.seeds[:1], rates)
    tuned = [name for name in preset.later if METHODS[name].parent is None]
    rates = yield from _trials(preset, tuned, first, score)
    variants = [name for name in preset.later if name not in tuned]
    yield from _runs(first, variants, preset.other_seeds[:1], rates)
    yield from _runs(first, preset.later, preset.other_seeds[1:], rates)
    for name in others if preset.repeats_others else ():
        yield from _runs(name, preset.later, preset.other_seeds, rates)


def _trials(
    preset: Preset, names: Sequence[str], data: str, score: Score
) -> Generator[Run, None, dict[str, float | None]]:
    """Yield the runs of methods with every rate, and return each one's best; None while a run is missing."""
    tried = {name: [Run(data, name, preset.seeds[0], rate) for rate in preset.rates] for name in names}
    yield from (tried[name][place] for place in range(len(preset.rates)) for name in names)
    for name in names if preset.beyond else ():
        best = _best(tried[name], score)
        if best in (min(preset.rates), max(preset.rates)):
            tried[name].append(Run(data, name, preset.seeds[0], _beyond(preset, best)))
            yield tried[name][-1]
    return {name: _best(runs, score) for name, runs in tried.items()}


def _runs(data: str, methods: Sequence[str], seeds: Sequence[int], rates: Mapping[str, float | None]) -> Iterator[Run]:
    for seed in seeds:
        for name in methods:
            method = METHODS[name]
            rate = rates.get(method.parent or name)
            if rate is None:
                continue
            needs = []
            for other in {method.effects, method.matches_time, method.matches_time and method.parent} - {None, BASE}:
                own = rates.get(METHODS[str(other)].parent or str(other))
                needs.append(None if own is None else Run(data, str(other), seed, own).name)
            if None not in needs:
                yield Run(data, name, seed, rate, tuple(sorted(map(str, needs))))


def _beyond(preset: Preset, rate: float) -> float:
    assert preset.beyond is not None
    return preset.beyond[rate == max(preset.rates)]


def _best(runs: Sequence[Run], score: Score) -> float | None:
    """The rate with the lowest nll on development people; None while a run is missing."""
    scores = [score(run.name) for run in runs]
    found = [(value, run.rate) for value, run in zip(scores, runs, strict=True) if value is not None]
    return min(found)[1] if len(found) == len(runs) else None
