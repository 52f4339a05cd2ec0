"""The load-balancing loss of a mixture of experts, with the value it has over branches in separate rows.

transformers computes it from all rows of a forward, where a shared token of a tree would count once. Here it counts
once for every branch that holds it. The routers' logits are recorded while the model runs, repeated for each branch,
and passed to the architecture's own formula.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import UnsupportedModelError
from nextquill.models.configs import base_model, text_config


def without_router_loss(model: nn.Module) -> dict[str, bool]:
    """Forward arguments that switch off the router loss of a model whose config asks for it: it counts a token once."""
    return {"output_router_logits": False} if asks_for_router_loss(model) else {}


class RouterLoss:
    """`router_aux_loss_coef` times the load-balancing loss of a model whose config says `output_router_logits`.

    UnsupportedModelError if the routers or the formula are not found.
    """

    def __init__(self, model: nn.Module) -> None:
        base, config = base_model(model), text_config(model)
        recorder = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None:  # the class of the backbone holds the record
            found = (getattr(module, "_can_record_outputs", None) or {} for module in base.modules())
            recorder = next((record["router_logits"] for record in found if "router_logits" in record), None)
        kind, self._index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
        self._routers = [] if kind is None else [module for module in base.modules() if isinstance(module, kind)]
        self._formula: Any = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
        self._experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        self._chosen = getattr(config, "num_experts_per_tok", None)
        self._factor = float(getattr(config, "router_aux_loss_coef", 0.0))
        if not self._routers or self._formula is None or self._experts is None or self._chosen is None:
            raise UnsupportedModelError(
                f"{type(base).__name__}: its router loss is not supported; set config.output_router_logits to False"
            )
        self._base = base
        self._logits: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the routers' logits in the forward inside this block."""
        with ExitStack() as stack:
            stack.callback(self._logits.clear)
            for router in self._routers:
                stack.enter_context(router.register_forward_hook(self._record))
            yield

    def value(self, forward: Mapping[str, Any]) -> Tensor:
        """The loss over the recorded logits, a float32 scalar without a unit. Call this before the block ends.

        Args:
            forward: a forward of a batch; `multiplicity` or `attention_mask` counts the branches that hold each token.
        """
        if torch.is_grad_enabled() and any(_is_reentrant(module) for module in self._base.modules()):
            raise UnsupportedModelError(
                "gradient checkpointing: with use_reentrant=True the router loss would have no gradient; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        counts = forward["multiplicity"] if "multiplicity" in forward else forward["attention_mask"]
        rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.flatten())
        gathered = tuple(logits.flatten(0, -2)[rows] for logits in self._logits)
        loss: Tensor = self._formula(gathered, self._experts, self._chosen)
        return self._factor * loss.float()

    def _record(self, _: nn.Module, __: Any, output: Any) -> None:
        self._logits.append(output[self._index] if isinstance(output, tuple) else output)


def asks_for_router_loss(model: Any) -> bool:
    """Whether the model's config asks for a load-balancing loss."""
    return bool(getattr(text_config(model), "output_router_logits", False))


def _is_reentrant(module: nn.Module) -> bool:
    """Whether a layer uses reentrant checkpointing, which runs its first forward without a graph."""
    how = getattr(module, "_gradient_checkpointing_func", None)
    return (
        module.training
        and getattr(module, "gradient_checkpointing", False)
        and bool(getattr(how, "keywords", {}).get("use_reentrant", True))
    )
