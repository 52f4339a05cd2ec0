"""Forwards without gradient of a model whose weights FSDP2 divides over processes.

Each forward gathers weights from all processes, so that one with a forward more than another would wait for it for
ever. Here processes may run different numbers of forwards: a response ends sooner on one of them, or its branches need
fewer rows. Before each forward they exchange a flag, and those that have finished run forwards of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

#: Name of the method through which FSDP2 gathers the weights that a model holds outside its layers.
_METHOD = "_nextquill_run"


def run_in_step(model: nn.Module, call: Callable[[], object], runs: nn.Module | None = None) -> None:
    """Call `call`, which runs forwards without gradient; every process that holds a part of the model must come here.

    Args:
        model: the model; where FSDP2 does not divide it, nothing but the call happens.
        call: a function that may run another number of forwards on each process.
        runs: the module that it runs, such as the model inside a PEFT wrapper; by default `model`.
    """
    if not isinstance(model, FSDPModule):
        call()
    elif runs is None or runs is model:
        _in_step(model, call)
    else:  # its forwards do not pass through the model's own, which gathers what no layer holds
        setattr(model, _METHOD, lambda: _in_step(runs, call))
        register_fsdp_forward_method(model, _METHOD)
        try:
            getattr(model, _METHOD)()
        finally:
            delattr(model, _METHOD)


def _in_step(module: nn.Module, call: Callable[[], object]) -> None:
    device = next(module.parameters()).device

    def any_runs(own: bool) -> bool:
        flag = torch.tensor(float(own), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def announce(*_: Any) -> None:
        any_runs(True)

    # In front of FSDP2's own hook, which gathers weights.
    with module.register_forward_pre_hook(announce, prepend=True):
        call()
    with torch.no_grad():
        while any_runs(False):  # somebody runs a forward
            module(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def shard_each(plugin: Any, models: Iterable[nn.Module]) -> None:
    """Make Accelerate shard each of these models by itself, and its layers, where they are parts of one module.

    A model's own forward then gathers what no layer holds. Each needs `_no_split_modules`, as transformers' models do.
    """
    every: list[Any] = list(models)
    layers = plugin.transformer_cls_names_to_wrap or [name for each in every for name in each._no_split_modules or ()]
    plugin.transformer_cls_names_to_wrap = list(dict.fromkeys([*layers, *(type(each).__name__ for each in every)]))
