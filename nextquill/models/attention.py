"""Attention of a model of transformers over rows of trees.

    pieces     only the visible pairs, in dense pieces; PyTorch's fused kernel on a CPU (`nextquill.tree.attention`)
    varlen     a segment per node with its path's keys; torch's or flash-attn's variable-length kernel on a GPU
    flex       FlexAttention with a block mask, on a GPU
    mask       the whole mask, in the model's own sdpa or eager attention: any device, T² scores
    padded     no trees: a padded row per branch

The first three replace the model's attention function by ours while trees are in use. Ours passes every other call to
the model's own. It stays until the backward has finished, because gradient checkpointing runs layers again there;
`close` restores the model's own.

Layers that carry a state from token to token, such as linear attention, run through a row of trees by `recurrent`.

A model in which a token's computation depends on tokens outside its path is refused, with the reason: for what
`architectures` knows, or because a small tree differs from its branches in separate rows (`self_check`). "auto" goes
down the list until an attention is exact, and says so in a warning; `PairPasses` adds the last one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nextquill.errors import UnsupportedModelError
from nextquill.models.architectures import (
    check_architecture,
    check_dropout,
    layer_types,
    layer_windows,
    random_rates,
    rope_limit,
)
from nextquill.models.configs import base_model, text_config
from nextquill.models.probe import temporarily
from nextquill.models.recurrent import run_over_trees
from nextquill.models.self_check import check_against_separate_passes, masks_follow_window
from nextquill.tree import additive_mask, attend, visibility_mask
from nextquill.tree.runs import CHUNK

#: Errors of a model that does not accept the inputs for a row of branches.
_DOES_NOT_RUN = (AssertionError, AttributeError, TypeError, KeyError, ValueError, RuntimeError)


class TreeAttention:
    """Gives a model its inputs for rows of trees, and the attention they need.

    Args:
        model: an unwrapped causal language model of transformers, or a PEFT model around one.
        attention: "auto" (a kernel by device and dtype at every call, or else "mask"), "pieces", "varlen", "flex" or
            "mask".

    Attributes:
        attention: as given, or what "auto" had to take instead of a choice at every call.
        max_depth: tokens in the longest branch that a row may hold, or None; see `architectures.rope_limit`.
        has_state: whether layers carry a state from token to token; a cache of keys and values does not hold it.

    Raises:
        UnsupportedModelError: the model cannot run trees exactly, or cannot take this attention.
    """

    def __init__(self, model: nn.Module, attention: str = "auto") -> None:
        self.attention = attention
        self._model: Any = model
        self._base: Any = base_model(model)
        check_architecture(self._base)
        self.has_state = run_over_trees(self._base)
        self.max_depth = rope_limit(self._base)
        self._rates = random_rates(model)
        configs: Any = (getattr(module, "config", None) for module in self._base.modules())
        self._configs: dict[int, Any] = {id(c): c for c in configs if hasattr(c, "_attn_implementation")}
        self._previous: dict[int, str] = {}
        self._masks_by_type = self._has_window = False
        self._windows: list[tuple[int, Any]] | None = None
        try:
            self._prepare()
        except UnsupportedModelError as error:
            if attention != "auto":
                raise
            self._take_masks(error)

    def _prepare(self) -> None:
        """Check the attention with the model; UnsupportedModelError with the reason where it is not exact."""
        name, masked = type(self._base).__name__, self.attention == "mask"
        if not masked and not _takes_functions(self._base):
            raise UnsupportedModelError(
                f"{name}: its attention cannot be replaced by a function; use attention='mask' or 'padded'"
            )
        try:
            if masked:
                self._choose_masks()
            else:
                self._verify()
        except _DOES_NOT_RUN as error:
            if isinstance(error, (UnsupportedModelError, torch.OutOfMemoryError)):
                raise
            others = "'padded'" if masked else "'mask' or 'padded'"
            raise UnsupportedModelError(
                f"{name}: its attention does not run on a row of branches ({str(error) or type(error).__name__}); "
                f"use attention={others}"
            ) from error

    def _take_masks(self, why: UnsupportedModelError) -> None:
        """Continue with masks where our kernels are not exact; UnsupportedModelError if masks are not exact either."""
        self.attention = "mask"
        try:
            self._prepare()
        except UnsupportedModelError as error:
            raise error from why
        # From one line of one module, so that Python shows each message once.
        warnings.warn(
            f"attention: 'auto' computes whole masks, at a cost of T² scores: {why}", RuntimeWarning, stacklevel=1
        )

    def model_inputs(self, forward: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the model for one forward of a tree batch.

        UnsupportedModelError if a branch is longer than `max_depth`, or the model is training with dropout.
        """
        self._check_depth(forward["layout"].depth)
        check_dropout(self._rates, in_training_only=True)
        inputs = {"input_ids": forward["input_ids"], "position_ids": forward["position_ids"]}
        if self.has_state:
            # During `_verify` every shared segment has a state of its own, however short.
            inputs["nextquill_tree_runs"] = forward["layout"], CHUNK if self._windows is None else 0
        if self.attention == "mask":
            rows = forward["position_ids"][0], forward["subtree_end"][0]
            return {**inputs, "attention_mask": self.masks(lambda window: visibility_mask(*rows, window))}
        self._install()
        # The model uses a mask of four dimensions as it is and makes none of its own; our function ignores it. It is
        # empty so that the model's own function fails on it: after `close`, a backward that runs layers again raises.
        unused = torch.empty(1, 1, 0, 0, device=forward["input_ids"].device)
        tree = (forward["layout"], self.attention, *([] if self._windows is None else [self._windows]))
        return {**inputs, "attention_mask": unused, "nextquill_tree": tree}

    def close(self) -> None:
        """Restore the model's own attention; the next call of `model_inputs` replaces it again."""
        for key, name in self._previous.items():
            if self._configs[key]._attn_implementation in _NAMES.values():  # otherwise somebody has set another one
                self._configs[key]._attn_implementation_internal = name
        self._previous = {}

    # ---- checks --------------------------------------------------------------------------------

    def check_training(self, max_length: int) -> None:
        """Raise UnsupportedModelError now if branches may be longer than `max_depth`, or the model has dropout."""
        self._check_depth(max_length)
        self.check_dropout()

    def check_dropout(self) -> None:
        """Raise UnsupportedModelError if the model has dropout, in whatever mode it is."""
        check_dropout(self._rates)

    @property
    def why_limited(self) -> str:
        """The reason for `max_depth`."""
        name = type(self._base).__name__
        return f"{name}: its rotary embedding changes with a row's longest branch beyond {self.max_depth} tokens"

    def _check_depth(self, depth: int) -> None:
        if self.max_depth is not None and depth > self.max_depth:
            raise UnsupportedModelError(f"{self.why_limited}, got up to {depth}; set max_length to {self.max_depth}")

    def _verify(self) -> None:
        """Compare a small tree with its branches in separate rows, and the layers' windows with the config's."""
        windows: list[tuple[int, Any]] = []
        with closing(self), temporarily(self, "_windows", windows):
            self._compare()
        expected = layer_windows(self._base)
        by_mask = _own_name(self._base.config) in ("sdpa", "eager")
        if by_mask and any(window for _, window in windows) and not masks_follow_window(self._model):
            raise UnsupportedModelError(
                f"{type(self._base).__name__}: its attention receives a sliding window that its masks do not have; "
                "use attention='padded', or set config.sliding_window to None"
            )
        wrong = [layer for layer, window in windows if window != expected.get(layer)]
        # The small tree is shorter than a window, so its logits do not show the window.
        if wrong and (layer_types(self._base) or masks_follow_window(self._model)):
            raise UnsupportedModelError(
                f"{type(self._base).__name__}: the sliding window of layer {wrong[0]} is only in its mask, which this "
                "attention does not read; use attention='mask' or 'padded'"
            )

    def _compare(self) -> None:
        """Compare a small tree with its branches; on a GPU "auto" becomes "flex" if only that gives the same logits."""
        try:
            check_against_separate_passes(self._model, self.model_inputs, self.close)
        except _DOES_NOT_RUN as error:
            if self.attention != "auto" or not _on_gpu(self._base) or isinstance(error, torch.OutOfMemoryError):
                raise
            self.close()
            self.attention = "flex"
            try:
                check_against_separate_passes(self._model, self.model_inputs, self.close)
            except _DOES_NOT_RUN:
                raise error from None
            warnings.warn(
                f"attention: with the kernel that 'auto' chose, {type(self._base).__name__} fails its check on this "
                f"device, so it uses FlexAttention, which is slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    # ---- attention inside the model --------------------------------------------------------------

    def _install(self) -> None:
        for key, config in self._configs.items():
            name = config._attn_implementation
            if name is None or (key in self._previous and name in _NAMES.values()):
                continue
            self._previous[key] = _own_name(config)
            # The public setter would also set the configs inside, which may have other functions.
            config._attn_implementation_internal = _register(self._previous[key])

    # ---- masks -----------------------------------------------------------------------------------

    def _choose_masks(self) -> None:
        """Choose one mask for all layers or a dict by type of layer, whichever gives correct results in this model."""
        own = _own_name(self._base.config)
        if own not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"attention='mask': expected a model with sdpa or eager attention, got {own!r}; load it with "
                "attn_implementation='sdpa' or use another attention"
            )
        types = layer_types(self._base)
        # A config may hold a window that the model does not read.
        has = getattr(text_config(self._base), "sliding_window", None) is not None
        self._has_window = has and (bool(types) or masks_follow_window(self._model))
        if types:
            self._masks_by_type = True
            try:
                self._verify()
            except UnsupportedModelError:
                raise
            except _DOES_NOT_RUN:
                self._masks_by_type = False
            else:
                return
        if len(types) > 1:
            raise UnsupportedModelError(
                f"{type(self._base).__name__}: its layers attend differently ({', '.join(sorted(types))}) and take one "
                "mask; use another attention"
            )
        self._verify()

    def masks(self, visible: Callable[[int | None], Tensor]) -> Any:
        """The model's `attention_mask` from what each token sees: one mask, or a dict by type of layer.

        Args:
            visible: called with the sliding window of a layer, or None; returns bool [queries, keys].

        Raises:
            UnsupportedModelError: the model's attention was changed to one without masks.
        """
        own, text = _own_name(self._base.config), text_config(self._base)
        if own not in ("sdpa", "eager"):
            raise UnsupportedModelError(f"attention='mask': the model's attention was changed to {own!r}")
        dtype = next(self._base.parameters()).dtype

        def mask(window: int | None) -> Tensor:
            # eager adds its mask to the scores; a boolean mask would give wrong results without an error
            return (visible(window) if own == "sdpa" else additive_mask(visible(window), dtype))[None, None]

        window, types = getattr(text, "sliding_window", None) if self._has_window else None, layer_types(self._base)
        if self._masks_by_type:
            return {name: mask(window if name == "sliding_attention" else None) for name in types}
        return mask(window if not types or "sliding_attention" in types else None)


# ---- the attention function ------------------------------------------------------------------------

# Name of our function by the name of the model's own. transformers treats names that contain "flash", "flex_attention"
# or "sdpa" in special ways, and looks up the function that makes masks by them.
_NAMES: dict[str, str] = {}


def _register(own: str) -> str:
    """The name of a function that attends over trees and passes every other call to `own`."""
    if own in _NAMES:
        return _NAMES[own]

    def attend_or_own(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        tree = options.pop("nextquill_tree", None)
        if tree is None:
            default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(own, default)
            result: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, **options)
            return result
        return _attend(module, query, key, value, tree, options), None

    name = f"nextquill_{len(_NAMES)}"
    AttentionInterface.register(name, attend_or_own)
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    _NAMES[own] = name
    return name


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, tree: tuple[Any, ...], options: Mapping[str, Any]
) -> Tensor:
    if options.get("dropout", 0.0):
        raise UnsupportedModelError("attention: dropout inside a shared prefix is not supported; set it to 0")
    layout, kernel, *seen = tree
    for windows in seen:  # only during `_verify`
        windows.append((getattr(module, "layer_idx", 0), options.get("sliding_window")))
    # Under autocast, q and k that were normalised with float32 weights arrive in float32; sdpa would cast them.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Latent attention has values that are smaller than its keys; the columns of zeros add nothing.
    size, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    out = attend(
        query, key, pad(value, (0, missing)) if missing > 0 else value, layout, scale=options.get("scaling"),
        window=options.get("sliding_window"), softcap=options.get("softcap"), sinks=options.get("s_aux"), kernel=kernel,
    )  # fmt: skip
    return out[..., :size].transpose(1, 2)


def _own_name(config: Any) -> str:
    """The model's own attention, also while ours replaces it."""
    name = str(config._attn_implementation)
    return next((own for own, ours in _NAMES.items() if ours == name), name)


def _on_gpu(base: Any) -> bool:
    return bool(next(base.parameters()).device.type == "cuda")


def _takes_functions(base: Any) -> bool:
    can_set = getattr(type(base), "_can_set_attn_implementation", None)
    return bool(can_set is not None and can_set())
