"""The native kernels refuse bad arguments, and are found or reported missing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextquill
from nextquill.errors import BackendUnavailableError
from nextquill.ops import chunk_native
from tests.native.cases import needs_native

ROOT = Path(__file__).resolve().parents[2]
N, V = 3, 8


def arguments() -> dict[str, Any]:
    return {
        "logits_factual": torch.zeros(N, V),
        "logits_counterfactual": torch.zeros(N, V),
        "labels": torch.zeros(N, dtype=torch.int64),
        "stats": torch.zeros(9, N),
        "grad_factual": torch.ones(N),
        "grad_counterfactual": torch.ones(N),
        "grad_effect": torch.ones(N),
        "softcap": 5.0,
        "logit_scale": 1.0,
    }


def grad_with(**changed: Any) -> None:
    given = {**arguments(), **changed}
    logits = (given.pop("logits_factual"), given.pop("logits_counterfactual"))
    grads = (given.pop("grad_factual"), given.pop("grad_counterfactual"), given.pop("grad_effect"))
    chunk_native.pair_grad(logits, grad_nlls=grads, outs=logits, **given)


BAD = {
    "logits-float64": ("logits_factual", torch.zeros(N, V, dtype=torch.float64), TypeError, "float32, got float64"),
    "logits-bfloat16": ("logits_factual", torch.zeros(N, V, dtype=torch.bfloat16), TypeError, "got bfloat16"),
    "other-float16": ("logits_counterfactual", torch.zeros(N, V, dtype=torch.float16), TypeError, "got float16"),
    "other-shape": ("logits_counterfactual", torch.zeros(N, V + 1), ValueError, r"\[3, 8\], got \[3, 9\]"),
    "logits-1d": ("logits_factual", torch.zeros(N), ValueError, r"\[n, V\], got \[3\]"),
    "logits-transposed": ("logits_factual", torch.zeros(V, N).T, ValueError, "last stride of 1, got 3"),
    "logits-overlap": ("logits_factual", torch.zeros(1, V).expand(N, V), ValueError, "row stride of 0"),
    "logits-empty": ("logits_factual", torch.zeros(N, 0), ValueError, "at least one column"),
    "labels-int32": ("labels", torch.zeros(N, dtype=torch.int32), TypeError, "int64, got int32"),
    "labels-length": ("labels", torch.zeros(N + 1, dtype=torch.int64), ValueError, r"\[3\], got \[4\]"),
    "labels-negative": ("labels", torch.tensor([0, -100, 0]), ValueError, r"\[0, 8\], got -100 at row 1"),
    "labels-too-large": ("labels", torch.tensor([0, 0, V + 1]), ValueError, r"\[0, 8\], got 9 at row 2"),
    "stats-shape": ("stats", torch.zeros(6, N), ValueError, r"\[9, 3\], got \[6, 3\]"),
    "gradient-float64": ("grad_effect", torch.ones(N, dtype=torch.float64), TypeError, "float32, got float64"),
    "gradient-shape": ("grad_factual", torch.ones(N, 1), ValueError, r"\[3\], got \[3, 1\]"),
    "gradient-length": ("grad_counterfactual", torch.ones(1), ValueError, r"\[3\], got \[1\]"),
    "softcap-zero": ("softcap", 0.0, ValueError, "above 0"),
    "softcap-nan": ("softcap", float("nan"), ValueError, "finite"),
}


@needs_native
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{name}: expected .*{message}"):
        grad_with(**{name: value})


@needs_native
@pytest.mark.parametrize("label", [-1, V + 1, 2**40, -(2**62)])
def test_label_out_of_range_is_refused_before_anything_is_written(label: int) -> None:
    labels = torch.tensor([0, 0, label])
    logits, out = torch.zeros(N, V), torch.full((3, N), 7.0)
    with pytest.raises(ValueError, match=r"^labels: "):
        chunk_native.token_stats(logits, labels, out)
    with pytest.raises(ValueError, match=r"^labels: "):
        chunk_native.token_grad(logits, labels, torch.zeros(3, N), torch.ones(N), logits)
    assert bool((out == 7).all())
    assert bool((logits == 0).all())


@needs_native
@pytest.mark.parametrize("rows", [1, 8, 10])
def test_out_of_another_height_is_refused(rows: int) -> None:
    logits, labels = torch.zeros(N, V), torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^out: expected "):
        chunk_native.pair_stats((logits, logits), labels, torch.zeros(rows, N))
    with pytest.raises(ValueError, match=r"^out: expected "):
        chunk_native.token_stats(logits, labels, torch.zeros(rows, N))


@needs_native
def test_extension_takes_tensors_and_refuses_other_objects() -> None:
    import nextquill_ext

    labels, out = torch.zeros(N, dtype=torch.int64), torch.zeros(3, N)
    nextquill_ext.token_stats(torch.zeros(N, V), labels, out)
    assert torch.equal(out, torch.tensor([0.0, V, math.log(V)])[:, None].expand(3, N))
    with pytest.raises(TypeError, match=r"^logits: expected a tensor"):
        nextquill_ext.token_stats([[0.0]], labels, out)
    with pytest.raises(ValueError, match=r"^threads: expected at least 1, got 0"):
        nextquill_ext.token_stats(torch.zeros(N, V), labels, out, threads=0)


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    import nextquill_ext

    before = nextquill_ext.current_isa()
    assert nextquill_ext.available_isas()[-1] == "baseline"
    with pytest.raises(ValueError, match=r"^isa: this machine runs .*baseline, got 'mmx'"):
        nextquill_ext.set_isa("mmx")
    assert nextquill_ext.current_isa() == before


def _import_with(isa: str) -> subprocess.CompletedProcess[str]:
    source = "import nextquill_ext; print(nextquill_ext.current_isa())"
    environment = {**os.environ, "NEXTQUILL_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@needs_native
def test_environment_fixes_the_instruction_set() -> None:
    assert _import_with("baseline").stdout == "baseline\n"
    refused = _import_with("mmx")
    assert refused.returncode != 0
    assert "ImportError: NEXTQUILL_ISA: isa: this machine runs" in refused.stderr


@needs_native
def test_available() -> None:
    assert chunk_native.why_not() is None


@pytest.fixture
def _fresh_load() -> Any:
    chunk_native._load.cache_clear()
    yield
    chunk_native._load.cache_clear()


@pytest.mark.usefixtures("_fresh_load")
def test_absent_extension_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(chunk_native.importlib, "import_module", absent)
    assert "pip install ./csrc" in str(chunk_native.why_not())
    with pytest.raises(BackendUnavailableError, match="nextquill_ext is not installed"):
        chunk_native.token_stats(torch.zeros(N, V), torch.zeros(N, dtype=torch.int64), torch.zeros(3, N))


@pytest.mark.usefixtures("_fresh_load")
def test_extension_that_fails_to_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("NEXTQUILL_ISA: isa: no")

    monkeypatch.setattr(chunk_native.importlib, "import_module", broken)
    assert chunk_native.why_not() == "nextquill_ext cannot be imported: NEXTQUILL_ISA: isa: no"


@pytest.mark.usefixtures("_fresh_load")
def test_extension_with_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_native.importlib, "import_module", lambda name: SimpleNamespace(INTERFACE_VERSION=0))
    assert "interface 0" in str(chunk_native.why_not())


def test_versions_agree() -> None:
    source = (ROOT / "csrc/nextquill_ext/__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*?)"', source, re.MULTILINE) == [nextquill.__version__]


def test_licence_is_the_same() -> None:
    assert (ROOT / "csrc" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
