"""Implementations run on the right devices, or say why they cannot."""

import os

import pytest
import torch

import nextquill as nq
from nextquill.ops import chunk_native, dispatch
from tests.helpers import make_case, run_python

CPU = torch.device("cpu")


def resolved(impl="auto", device=CPU, dtype=torch.float32):
    return dispatch.resolve_impl(impl, device, dtype).name


def test_auto_on_a_cpu_is_native_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(chunk_native, "why_not", lambda: None)
    assert resolved() == "native"
    assert resolved(dtype=torch.float64) == "torch"
    monkeypatch.setattr(chunk_native, "why_not", lambda: "it is not installed")
    assert resolved() == "torch"


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton():
    assert resolved(device=torch.device("cuda")) == "triton"
    assert resolved(device=torch.device("cuda"), dtype=torch.float64) == "torch"


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "reason"),
    [
        ("native", "cpu", torch.float64, "float64"),
        ("triton", "cpu", torch.float64, "float64"),
        ("native", "cuda", torch.float32, "CPUs only"),
        ("triton", "mps", torch.float32, "CUDA and ROCm"),
    ],
)
def test_refusals_name_impl_device_and_reason(impl, device, dtype, reason):
    with pytest.raises(nq.BackendUnavailableError, match=f"^impl: '{impl}' cannot run on {device}: .*{reason}"):
        dispatch.resolve_impl(impl, torch.device(device), dtype)


def test_native_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(chunk_native, "_load", lambda: (None, "nextquill_ext is not installed"))
    with pytest.raises(nq.BackendUnavailableError, match="nextquill_ext is not installed"):
        dispatch.resolve_impl("native", CPU, torch.float32)


WITHOUT = """
import sys, torch
sys.modules[{module!r}] = None  # what an import finds where it is not installed
import nextquill as nq
h, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])
assert torch.isfinite(nq.linear_token_nll(h, w, y)).all()
try:
    nq.linear_token_nll(h, w, y, impl={impl!r})
except nq.BackendUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "impl"), [pytest.param("triton", "triton", marks=pytest.mark.slow), ("nextquill_ext", "native")]
)
def test_everything_works_without_it(module, impl):
    message = run_python(WITHOUT.format(module=module, impl=impl))
    assert f"impl: '{impl}' cannot run on cpu" in message
    assert "not installed" in message


def test_triton_on_a_cpu_needs_the_interpreter():
    code = WITHOUT.format(module="not_a_module", impl="triton").replace(
        "import sys", "import os; os.environ.pop('TRITON_INTERPRET', None)\nimport sys", 1
    )
    assert "needs a GPU" in run_python(code)


def test_float64_inputs_are_never_narrowed():
    case = make_case(8, 4, 9, dtype=torch.float64)
    assert nq.linear_pair_nll(*case.pair_args).factual.dtype == torch.float64


@pytest.mark.skipif("CI" not in os.environ, reason="elsewhere the extension is optional")
def test_native_is_built_where_the_tests_count():
    """The Makefile builds the extension before the tests, and skipping all its tests must be noticed."""
    assert chunk_native.why_not() is None
