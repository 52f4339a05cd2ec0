"""Forwards of a model that two processes share, of which one runs more than the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.fsdp import fully_shard

from nextquill.models.sharded import run_in_step, shard_each
from tests.models.model_helpers import tiny_model
from tests.models.sharded_worker import NUMBERS, PROCESSES, work


@pytest.mark.slow
def test_processes_run_as_many_forwards_as_the_one_that_needs_the_most(tmp_path: Path) -> None:
    """Each gets the logits of its own inputs, and the next gradient is right, in a PEFT wrapper too."""
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=PROCESSES, start_method="spawn")
    for rank in range(PROCESSES):
        for measured in torch.load(tmp_path / f"found_{rank}.pt").values():
            assert measured["error"] <= 1e-12
            assert measured["gradient"] <= 1e-12
            assert measured["forwards"] == [max(numbers) for numbers in NUMBERS]
            assert measured["hooks"] == 0, "what announces a forward is left in the model"


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_process_that_has_finished_runs_forwards_while_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said, lengths = fully_shard(tiny_model()), list[float](), list[int]()
    others = iter((1.0, 1.0, 1.0, 0.0))  # another process runs three forwards

    def exchanged(flag: Tensor, op: Any) -> None:
        said.append(float(flag))
        flag.clamp_(min=next(others))

    monkeypatch.setattr(dist, "all_reduce", exchanged)
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].numel()), with_kwargs=True)
    run_in_step(model, lambda: model(input_ids=torch.tensor([[5, 6, 7]])))
    assert lengths == [3, 1, 1]
    assert said == [1.0, 0.0, 0.0, 0.0]
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(said) == 4, "a later forward still says so"


def test_a_whole_model_runs_alone() -> None:
    done = list[int]()
    run_in_step(tiny_model(), lambda: done.append(1))  # without a process group
    assert done == [1]


@pytest.mark.parametrize("given", [None, ["MyLayer"]])
def test_each_model_is_sharded_with_its_layers_or_those_that_are_named(given: list[str] | None) -> None:
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=given)
    shard_each(plugin, [tiny_model(), tiny_model("gemma2"), tiny_model(seed=1)])
    models = ["LlamaForCausalLM", "Gemma2ForCausalLM"]
    layers = given or ["LlamaDecoderLayer", "Gemma2DecoderLayer"]
    assert plugin.transformer_cls_names_to_wrap == [*layers, *models]
