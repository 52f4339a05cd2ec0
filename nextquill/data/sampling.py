"""An order of training examples in which a user's examples can share their history."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from nextquill.data._checks import check_integer
from nextquill.errors import ArgumentError


class UserGroupSampler(Sampler[int]):
    """A shuffled order in which examples of one user stand together in runs.

    Each user's examples are shuffled and cut into runs of `examples_per_user`. The remaining examples of all users are
    joined, in random order, into runs of the same length. Then the runs are shuffled. Batches whose size is a multiple
    of that length hold whole runs. Number and size of batches are the same as without grouping, but each batch comes
    from fewer users.

    The order depends only on `seed` and the epoch, so it is the same on every rank and in a resumed run.

    Args:
        user_ids: the user of each example, in order.
        examples_per_user: the length of a run.
        seed: decides the order, together with the epoch.

    Raises:
        ArgumentError, ArgumentTypeError: no examples, or a number that is not a positive integer.
    """

    def __init__(self, user_ids: Sequence[str], examples_per_user: int, seed: int = 0) -> None:
        check_integer("examples_per_user", examples_per_user, least=1)
        if not user_ids:
            raise ArgumentError("user_ids: expected at least one example, got none")
        self.user_ids = list(user_ids)
        self.examples_per_user = examples_per_user
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.user_ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng, size = random.Random(f"{self.seed}/{self.epoch}"), self.examples_per_user
        by_user: dict[str, list[int]] = defaultdict(list)
        for index, user in enumerate(self.user_ids):
            by_user[user].append(index)
        runs, rest = list[list[int]](), list[list[int]]()
        for indices in by_user.values():
            rng.shuffle(indices)
            for start in range(0, len(indices), size):
                run = indices[start : start + size]
                (runs if len(run) == size else rest).append(run)
        rng.shuffle(rest)
        left_over = [index for run in rest for index in run]
        cut = len(left_over) - len(left_over) % size
        runs += [left_over[start : start + size] for start in range(0, cut, size)]
        rng.shuffle(runs)
        for run in [*runs, left_over[cut:]]:
            yield from run
