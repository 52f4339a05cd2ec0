"""The settings of a run, in one frozen record that is written beside its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from nextquill.errors import ArgumentError, ArgumentTypeError

R = TypeVar("R", bound="DemoRecipe")


@dataclass(frozen=True)
class DemoRecipe:
    """What every demo can be told; each adds settings of its own.

    Args:
        seed: The first seed.
        seeds: How many seeds, each with its own users and models.
    """

    #: Settings of the smoke test that takes a few seconds.
    QUICK: ClassVar[dict[str, Any]] = {}

    seed: int = 0
    seeds: int = 3

    def __post_init__(self) -> None:
        self.check("seed", least=0)
        self.check("seeds", least=1)

    def check(self, name: str, least: int) -> None:
        """Raise ArgumentTypeError or ArgumentError unless a setting is an integer of at least `least`."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ArgumentTypeError(f"{name}: expected an int, got {value!r}")
        if value < least:
            raise ArgumentError(f"{name}: expected at least {least}, got {value}")

    @classmethod
    def of(cls: type[R], *, quick: bool = False, **given: int | None) -> R:
        """The recipe with the settings that are given; None stands for the default, which `quick` makes small."""
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return cls(**{**(cls.QUICK if quick else {}), **settings})

    @property
    def seed_values(self) -> range:
        """The seeds of the run."""
        return range(self.seed, self.seed + self.seeds)
