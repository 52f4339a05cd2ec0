"""The new places of the modules of this former folder. Importing one names its place; removed in version 0.3."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import NoReturn

_NOW = {
    "ATTENTIONS": "nextquill.models.ATTENTIONS",
    "architectures": "nextquill.models.architectures",
    "attention": "nextquill.models.attention",
    "checkpoints": "nextquill.storage.checkpoints",
    "checks": "nextquill.training.checks",
    "effects": "nextquill.models.stored_effects",
    "evaluating": "nextquill.evaluation.evaluate",
    "evaluation_folder": "nextquill.evaluation.results",
    "evaluation_options": "nextquill.evaluation.options",
    "evaluation_tasks": "nextquill.evaluation.evaluate",
    "generation": "nextquill.generation",
    "head": "nextquill.models.head",
    "identity": "nextquill.evaluation.identity",
    "item_effects": "nextquill.evaluation.item_effects",
    "loading": "nextquill.models.loading",
    "measures": "nextquill.evaluation.measures",
    "metrics": "nextquill.training.meter",
    "mixin": "nextquill.training.causal_loss_mixin",
    "partial_file": "nextquill.storage.resumable_jsonl",
    "passes": "nextquill.models.branch_passes",
    "preferences": "nextquill.evaluation.preferences",
    "probe": "nextquill.models.probe",
    "router": "nextquill.models.router",
    "scoring": "nextquill.evaluation.scoring",
    "scratch": "nextquill.models.tiny_models",
    "self_check": "nextquill.models.self_check",
    "staged": "nextquill.training.atomic_checkpoints",
    "trainer": "nextquill.training.trainer",
    "trl": "nextquill.training.trl",
}


def __getattr__(name: str) -> NoReturn:
    error = ImportError if name in _NOW else AttributeError
    raise error(f"{__name__}.{name} is now {_NOW[name]}" if name in _NOW else f"{__name__} has no {name!r}")


class _Former(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        package, _, module = name.rpartition(".")
        if package == __name__ and module in _NOW:
            raise ModuleNotFoundError(f"{name} is now {_NOW[module]}", name=name)


sys.meta_path.append(_Former())
