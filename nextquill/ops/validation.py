"""Checks of a caller's arguments, made once, before any work.

The engines do not check again: they expect flat rows, and dtypes and devices that agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from nextquill.errors import ArgumentError, ArgumentTypeError, GradientError
from nextquill.vocabulary_shard import VocabularyShard, is_dtensor, own_part, part_of


@dataclass(frozen=True)
class HeadInputs:
    """Validated inputs with the leading dimensions of the hidden states and labels flattened.

    Attributes:
        factual: [N, D], floating, hidden states with the user's history.
        counterfactual: [N, D], hidden states without it; None for an operator of one stream.
        weight, bias: [V, D] and [V] or None, in the hidden states' dtype except under autocast; this process's part of
            them if the vocabulary is divided.
        vocabulary_shard: which part that is, see `VocabularyShard.describe`; None for all of the vocabulary.
        labels: [N], int64.
        shape: the labels' original shape.
    """

    factual: Tensor
    counterfactual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    shape: torch.Size
    vocabulary_shard: str | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first arguments of the operators of a pair, in the shapes and dtypes above."""
        return self.factual, self.counterfactual, self.weight, self.bias, self.labels


def check_head_inputs(
    hidden_factual: Tensor,
    hidden_counterfactual: Tensor | None,
    lm_head_weight: Tensor | VocabularyShard,
    labels: Tensor,
    bias: Tensor | None,
    *,
    hidden_name: str = "hidden_factual",
    other_name: str = "hidden_counterfactual",
    labels_name: str = "labels",
) -> HeadInputs:
    """Check shapes, dtypes and devices, and flatten. The values of labels are checked later, where they are read.

    Args:
        hidden_factual: [N, D] or [B, T, D], floating.
        hidden_counterfactual: shape and dtype of `hidden_factual`, or None.
        lm_head_weight: [V, D], in the same dtype except under autocast; or one part of the vocabulary.
        labels: [N] or [B, T], any integer dtype.
        bias: [V], in the same dtype except under autocast, or None.
        hidden_name, other_name, labels_name: names of the hidden states and of the labels in messages. A `labels_name`
            of "mask" allows bool, which becomes 1 for True.

    Raises:
        ArgumentTypeError: not a tensor, a wrong dtype, or dtypes that do not agree.
        ArgumentError: shapes or devices that do not agree.
    """
    _check_transforms()
    check_floating(hidden_name, hidden_factual)
    given = part_of("lm_head_weight", lm_head_weight)
    shard = given.describe() if isinstance(given, VocabularyShard) else None
    lm_head_weight = own_part(given)
    check_floating("lm_head_weight", lm_head_weight)
    # An empty part is refused later, on all processes at once.
    empty = lm_head_weight.dim() == 2 and lm_head_weight.shape[0] == 0 and shard is None
    if lm_head_weight.dim() != 2 or empty or lm_head_weight.shape[1] == 0:
        raise ArgumentError(f"lm_head_weight: expected shape [V, D], got {_shape(lm_head_weight)}")
    vocabulary, hidden_size = lm_head_weight.shape
    if hidden_factual.dim() not in (2, 3):
        raise ArgumentError(f"{hidden_name}: expected shape [N, D] or [B, T, D], got {_shape(hidden_factual)}")
    if hidden_factual.shape[-1] != hidden_size:
        raise ArgumentError(
            f"{hidden_name}: expected last dimension {hidden_size} to match lm_head_weight "
            f"{_shape(lm_head_weight)}, got {_shape(hidden_factual)}"
        )
    if hidden_counterfactual is not None:
        check_floating(other_name, hidden_counterfactual)
        if hidden_counterfactual.shape != hidden_factual.shape:
            raise ArgumentError(
                f"{other_name}: expected the shape of {hidden_name} {_shape(hidden_factual)}, "
                f"got {_shape(hidden_counterfactual)}"
            )
        _check_same(other_name, hidden_counterfactual, hidden_name, hidden_factual)
    _check_same("lm_head_weight", lm_head_weight, hidden_name, hidden_factual)
    if bias is not None:
        bias = own_part(part_of("bias", bias))
        check_floating("bias", bias)
        if bias.shape != (vocabulary,):
            raise ArgumentError(f"bias: expected shape [{vocabulary}], got {_shape(bias)}")
        _check_same("bias", bias, hidden_name, hidden_factual)
    flat_labels = _check_labels(labels_name, labels, hidden_factual, hidden_name)
    return HeadInputs(
        factual=_flat(hidden_factual),
        counterfactual=None if hidden_counterfactual is None else _flat(hidden_counterfactual),
        weight=lm_head_weight,
        bias=bias,
        labels=flat_labels,
        shape=labels.shape,
        vocabulary_shard=shard,
    )


def _check_transforms() -> None:
    """Refuse derivatives that these operators do not have: the result would silently lack them."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise GradientError(
            "nextquill's operators do not work under torch.func transforms such as vmap: expected torch.autograd"
        )
    if forward_ad._current_level >= 0:
        raise GradientError("nextquill's operators have no forward-mode derivative: expected torch.autograd")


def check_head_options(softcap: float | None, logit_scale: float) -> None:
    """Raise ArgumentError unless `softcap` is None or finite and positive and `logit_scale` finite and non-zero."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    # Comparisons rather than math.isfinite, which torch.compile cannot trace.
    if softcap is not None and not 0 < softcap < math.inf:
        raise ArgumentError(f"softcap: expected None or a finite positive number, got {softcap!r}")
    if not abs(logit_scale) < math.inf or logit_scale == 0:
        raise ArgumentError(f"logit_scale: expected a finite non-zero number, got {logit_scale!r}")


def check_beta(beta: float) -> float:
    """Return `beta` if it is a number in [0, 1], or raise."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise ArgumentTypeError(f"beta: expected a number, got {type(beta).__name__} {beta!r}")
    if not 0 <= beta <= 1:
        raise ArgumentError(f"beta: expected a number in [0, 1], got {beta!r}")
    return float(beta)


def check_ignore_index(ignore_index: object) -> int:
    """Return `ignore_index` if it is an int of 64 bits, or raise."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ArgumentTypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__} {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ArgumentError(f"ignore_index: expected a number of 64 bits, got {ignore_index!r}")
    return ignore_index


def check_sequence_ids(sequence_ids: Tensor | None, labels: Tensor) -> Tensor:
    """Return the sequence id of each flat row: [N], int64.

    Args:
        sequence_ids: labels' shape, any integer dtype. By default each row of [B, T] is one sequence, and a batch [N]
            is a single one.
        labels: [N] or [B, T], integers.
    """
    if sequence_ids is None:
        if labels.dim() == 1:
            return torch.zeros(labels.numel(), dtype=torch.long, device=labels.device)
        rows = torch.arange(labels.shape[0], device=labels.device)
        return rows[:, None].expand(labels.shape).reshape(-1)
    if not isinstance(sequence_ids, Tensor) or not _is_integer(sequence_ids):
        got = sequence_ids.dtype if isinstance(sequence_ids, Tensor) else type(sequence_ids).__name__
        raise ArgumentTypeError(f"sequence_ids: expected an integer tensor, got {got}")
    _check_dense("sequence_ids", sequence_ids)
    _check_beside_labels("sequence_ids", sequence_ids, labels)
    return sequence_ids.reshape(-1).long()


def check_token_weights(token_weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """Return the weight of each flat row: [N], floating. Its values are checked later, where labels are read.

    Args:
        token_weights: labels' shape, floating, without gradient; or None, which is returned.
        labels: [N] or [B, T], integers.
    """
    if token_weights is None:
        return None
    check_floating("token_weights", token_weights)
    _check_beside_labels("token_weights", token_weights, labels)
    if token_weights.requires_grad:
        raise ArgumentError("token_weights: expected constants, got a tensor that requires grad; detach it")
    return token_weights.reshape(-1)


def _check_beside_labels(name: str, tensor: Tensor, labels: Tensor) -> None:
    if tensor.shape != labels.shape:
        raise ArgumentError(f"{name}: expected the labels' shape {_shape(labels)}, got {_shape(tensor)}")
    if tensor.device != labels.device:
        raise ArgumentError(f"{name}: expected device {labels.device}, got {tensor.device}")


def _flat(hidden: Tensor) -> Tensor:
    """Return `hidden` as [N, D], copied if made in inference mode: such a tensor cannot be saved for a backward."""
    if not torch.compiler.is_compiling() and hidden.is_inference() and not torch.is_inference_mode_enabled():
        hidden = hidden.clone()
    return hidden.reshape(-1, hidden.shape[-1])


def _check_labels(name: str, labels: Tensor, hidden: Tensor, hidden_name: str) -> Tensor:
    allowed = "a bool or integer" if name == "mask" else "an integer"
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError(f"{name}: expected {allowed} tensor, got {type(labels).__name__}")
    if not _is_integer(labels) and not (name == "mask" and labels.dtype == torch.bool):
        raise ArgumentTypeError(f"{name}: expected {allowed} dtype, got {labels.dtype}")
    _check_dense(name, labels)
    if labels.shape != hidden.shape[:-1]:
        raise ArgumentError(
            f"{name}: expected shape {list(hidden.shape[:-1])} to match {hidden_name} {_shape(hidden)}, "
            f"got {_shape(labels)}"
        )
    if labels.device != hidden.device:
        raise ArgumentError(f"{name}: expected device {hidden.device} like {hidden_name}, got {labels.device}")
    return labels.reshape(-1).long()


def check_floating(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a dense tensor of a floating dtype."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if is_dtensor(tensor):
        raise ArgumentTypeError(f"{name}: expected a plain tensor, got a DTensor; pass its `.full_tensor()`")
    _check_dense(name, tensor)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ArgumentTypeError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; convert it first, for example by .to_dense()"
        )
    # A compiler's fake tensors stand for real ones, and may say that they are on the meta device.
    if tensor.is_meta and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor):
        raise ArgumentError(
            f"{name}: expected a tensor with values, got one on the meta device; load the model's weights first (those "
            "of an offloaded model are there during its forward only)"
        )


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ArgumentError(f"{name}: expected device {other.device} like {other_name}, got {tensor.device}")
    # Under autocast the backbone's output is in half precision while the master weights stay in float32.
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise ArgumentTypeError(f"{name}: expected dtype {other.dtype} like {other_name}, got {tensor.dtype}")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_chunk_bytes(chunk_bytes: object) -> None:
    """Raise ArgumentTypeError or ArgumentError unless `chunk_bytes` is None or a positive number of bytes."""
    if chunk_bytes is None:
        return
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise ArgumentTypeError(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__} {chunk_bytes!r}")
    if not 0 < chunk_bytes < 2**63:
        raise ArgumentError(f"chunk_bytes: expected a positive number of bytes, got {chunk_bytes!r}")
