"""Work that processes share; `cli/test_shared_runs.py` starts several."""

from __future__ import annotations

from typing import Any

import pytest

from nextquill import ranks
from nextquill.errors import ArgumentError


def test_without_a_launcher_this_process_does_all_the_work() -> None:
    assert ranks.is_first()
    assert list(ranks.deal(range(3), lambda unit: [unit] * unit)) == [1, 2, 2]
    assert ranks.on_first(lambda: "here") == "here"


@pytest.mark.parametrize("others", [[{"seed": 7}], [{}]])
def test_processes_with_other_settings_are_refused(others: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[:] = [own, *others]

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ArgumentError, match=r"^seed: expected the same in all processes, got 3 and, on rank 1, "):
        ranks.check_agreement({"seed": 3})
