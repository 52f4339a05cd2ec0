"""The model of a loss on a GPU: its counts against the maths, its bars, and that it sees a worse plan."""

from __future__ import annotations

import pytest

import nextquill as nq
from benchmarks import roofline
from benchmarks.roofline import H100, HIDDEN, LOSSES, ROWS, VOCABULARY, count

UNITS = {  # trainable, frozen
    "NextQuill": (6, 4),
    "NextQuill detached": (4, 3),
    "PerCE": (4, 3),
    "SFT": (3, 2),
}


def work(name="NextQuill", length=512, *, trainable=True):
    return count(LOSSES[name](), [length] * (ROWS // length), HIDDEN, VOCABULARY, trainable=trainable)


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_products_and_memory_at_the_target_shape(name, trainable):
    found = work(name, trainable=trainable)
    assert found.units(ROWS, HIDDEN, VOCABULARY) == UNITS[name][not trainable]
    assert found.peak_bytes <= 2 * 2**30
    streams = 1 if name == "SFT" else 2
    # Each logit is read once for the statistics, and dz is written once in two bytes.
    statistics = sum(size for kind, size in found.kernels if kind == "statistics")
    assert statistics == 4 * streams * ROWS * VOCABULARY
    gradient = sum(size for kind, size in found.kernels if kind == "gradient")
    read, written = {"NextQuill": (2, 2), "NextQuill detached": (2, 1)}.get(name, (1, 1))
    assert gradient == (4 * read + 2 * written) * ROWS * VOCABULARY


def test_the_modelled_time_is_near_the_floor():
    for name in ("NextQuill", "SFT"):
        trainable, frozen = work(name), work(name, trainable=False)
        assert sum(trainable.seconds(H100).values()) <= 1.25 * trainable.floor(H100)
        assert sum(frozen.seconds(H100).values()) <= 1.30 * frozen.floor(H100)
    assert 0.076 < work().floor(H100) < 0.079


def test_a_product_takes_its_arithmetic_in_whole_waves_and_some_of_its_bytes():
    one = roofline.Work(products=[("dh", 4224, 1000, 4096, 3_000_000)])
    arithmetic = 2 * 4224 * 1000 * 4096 / 790e12  # 33 · 16 tiles are four whole waves
    assert one.seconds(H100, 0.0)["dh"] == pytest.approx(arithmetic)
    assert one.seconds(H100, 0.5)["dh"] == pytest.approx(arithmetic + 0.5e-6)
    more = roofline.Work(products=[("dh", 4225, 1000, 4096, 0)])
    assert more.seconds(H100)["dh"] == pytest.approx(arithmetic * 5 / 4)
    bound = roofline.Work(products=[("dW", 128, 1, 256, 3_000_000)])
    assert bound.seconds(H100, 0.0)["dW"] == pytest.approx(1e-6)


def test_a_smaller_buffer_takes_longer():
    small = nq.NextQuillLoss(chunk_bytes=5 * 2**27)
    lengths = [512] * (ROWS // 512)
    less = count(small, lengths, HIDDEN, VOCABULARY, trainable=True)
    assert sum(less.seconds(H100).values()) > 1.1 * sum(work().seconds(H100).values())
    assert less.peak_bytes <= 5 * 2**27


def test_the_share_that_is_not_hidden_gives_the_reviewed_time_of_the_former_plan():
    """Products of 1,024 rows, each adding to all of dW in float32, and a gradient written over its logits."""
    rows, former = 1024, roofline.Work(kernels=[("zero fill", 4 * VOCABULARY * HIDDEN)])
    head, narrow = 2 * VOCABULARY * HIDDEN, 2 * rows * VOCABULARY
    for _ in range(2 * ROWS // rows):
        former.products += [
            ("logits", rows, HIDDEN, VOCABULARY, head + 2 * narrow),
            ("dh", rows, VOCABULARY, HIDDEN, head + narrow),
            ("dW", VOCABULARY, rows, HIDDEN, 4 * head + narrow),
        ]
        former.kernels += [("statistics", 2 * narrow), ("gradient", 3 * narrow)]
    assert sum(former.seconds(H100).values()) == pytest.approx(0.108, abs=0.0005)
