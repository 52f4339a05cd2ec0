"""Compares a small tree with its branches in separate rows, in any architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextquill.devices import send
from nextquill.errors import NonFiniteError, UnsupportedModelError
from nextquill.models.configs import base_model, text_config
from nextquill.models.head import find_head
from nextquill.models.probe import in_eval_mode, replaced_forward, returned_logits, temporarily
from nextquill.models.router import without_router_loss
from nextquill.tree import PrefixTree, TreeLayout, build_prefix_tree

#: Limits of the relative error of the logits. Rounding gives at most a tenth, wrong attention at least 0.28.
_LIMIT, _HALF_LIMIT = 1e-3, 0.1


@torch.no_grad()
def check_against_separate_passes(
    model: Any, model_inputs: Callable[[Mapping[str, Any]], dict[str, Any]], before_the_others: Callable[[], None]
) -> None:
    """Raise UnsupportedModelError unless branches that share a prefix have the same logits as in separate rows.

    NonFiniteError if the logits in separate rows are not finite. A model whose parameters are not loaded, or are
    partitioned by ZeRO-3, is not checked. `model_inputs` returns the model's keyword arguments for a tree of a
    collator, and `before_the_others` is called before the separate rows.
    """
    base = base_model(model)
    if not _is_loaded(base):
        return
    device, (branches, tree) = next(base.parameters()).device, _small_tree(base)
    forward = {
        "input_ids": send(tree.input_ids[None], device),
        "position_ids": send(tree.position_ids[None], device),
        "subtree_end": send(tree.subtree_end[None], device),
        "layout": TreeLayout.of_tree(tree),
    }
    router = without_router_loss(base)
    with in_eval_mode(model):
        together = returned_logits(model(**model_inputs(forward), **router, use_cache=False))[0]
        before_the_others()
        for rows, branch in zip(tree.branch_rows, branches, strict=True):
            alone = model(input_ids=torch.tensor([branch], device=device), use_cache=False)
            _compare(together[send(rows, device)], returned_logits(alone)[0], model, _SHARED)


@torch.no_grad()
def check_padded_rows(model: Any) -> None:
    """Raise UnsupportedModelError unless rows that are padded on the right have the same head input as alone.

    A model is not checked as in `check_against_separate_passes`, or if its logits are not finite.
    """
    base = base_model(model)
    if not _is_loaded(base):
        return
    device, (branches, _) = next(base.parameters()).device, _small_tree(base)
    rows = [torch.tensor(branch, device=device) for branch in branches]
    ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
    # A head's weight may be narrower than its input, which only our own product takes: so its input is compared.
    with in_eval_mode(model), replaced_forward(find_head(model), lambda hidden, *_, **__: hidden):
        outputs = model(input_ids=ids, attention_mask=mask, **without_router_loss(base), use_cache=False)
        for padded, row in zip(returned_logits(outputs), rows, strict=True):
            alone = returned_logits(model(input_ids=row[None], use_cache=False))[0]
            if alone.isfinite().all():  # what is not finite is found later, with the example's name
                _compare(padded[: len(row)], alone, model, _PADDED)


@torch.no_grad()
def masks_follow_window(model: Any) -> bool:
    """Whether an ordinary forward uses the config's sliding window; some models ignore it."""
    base = base_model(model)
    if not _is_loaded(base):
        return True
    config, device = text_config(base), next(base.parameters()).device
    branch = torch.tensor([_small_tree(base)[0][0]], device=device)
    logits = list[Tensor]()
    for window in (config.sliding_window, 2):
        with in_eval_mode(model), temporarily(config, "sliding_window", window):
            logits.append(returned_logits(model(input_ids=branch, use_cache=False)))
    return not torch.equal(*logits)


def _is_loaded(base: Any) -> bool:
    return not any(p.is_meta or p.numel() == 0 for p in base.parameters())


def _small_tree(base: Any) -> tuple[list[list[int]], PrefixTree]:
    ids = ((torch.arange(13) * 7 + 3) % min(64, base.get_input_embeddings().weight.shape[0])).tolist()
    branches = [ids[:5] + ids[5:8], ids[:5] + ids[8:13]]
    if branches[0][5] == branches[1][5]:  # a tiny vocabulary
        branches[1][5] = (branches[1][5] + 1) % 2
    return branches, build_prefix_tree(branches)


_SHARED = (
    "branches that share a prefix do not give the same logits as in separate rows (relative error {:.1e}); "
    "use attention='padded'"
)
_PADDED = (
    "rows with padding on the right do not give the same logits as alone (relative error {:.1e}), so neither trees nor "
    "padded batches of this model are exact"
)


def _compare(together: Tensor, alone: Tensor, model: Any, message: str) -> None:
    if not alone.isfinite().all():
        name = getattr(model, "name_or_path", "") or type(base_model(model)).__name__
        raise NonFiniteError(
            f"model: {name} gives logits that are not finite; its weights are damaged, or its precision is too low"
        )
    together, alone = together.double(), alone.double()
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    error = float((together - alone).norm() / spread.clamp(min=1e-30))
    # accelerate keeps its autocast around a model's forward, and sets this attribute
    narrow = next(base_model(model).parameters()).element_size() < 4
    half = narrow or hasattr(model, "_original_forward") or torch.is_autocast_enabled(alone.device.type)
    if not error < (_HALF_LIMIT if half else _LIMIT):
        raise UnsupportedModelError(f"{type(base_model(model)).__name__}: {message.format(error)}")
