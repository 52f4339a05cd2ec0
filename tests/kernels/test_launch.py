"""Where kernels run, and what devices they take their tiles from."""

from __future__ import annotations

import pytest
import torch
from nextquill_kernels.launch import cdiv, check_together, interpreted, next_power_of_2, on_device, target_of


def test_interpreted_where_there_is_no_gpu(device):
    assert interpreted() == (device.type == "cpu")


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_100"),
    ],
)
def test_target_is_the_nearest_lower_one(capability, target, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert target_of(torch.device("cuda")) == target


def test_target_of_other_devices(monkeypatch):
    assert target_of(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert target_of(torch.device("cuda")) == "gfx942"


def test_tensors_on_several_devices_are_refused(device):
    here, elsewhere = torch.empty(1, device=device), torch.empty(1, device="meta")
    check_together(a=here, b=None, c=here)
    with pytest.raises(ValueError, match=r"c: expected a tensor on .* as a, got meta"):
        check_together(a=here, b=None, c=elsewhere)
    with pytest.raises(RuntimeError, match="a: got a tensor on meta"):
        check_together(a=elsewhere, b=elsewhere)


def test_on_device_passes_errors_on(device):
    with pytest.raises(ZeroDivisionError), on_device(torch.empty(1, device=device)):
        _ = 1 / 0


def test_integers():
    assert [next_power_of_2(value) for value in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]
    assert [cdiv(value, 16) for value in (0, 1, 16, 17)] == [0, 1, 1, 2]
