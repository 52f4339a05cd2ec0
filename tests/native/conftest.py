from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.native.cases import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each instruction set of this machine."""
    import nextquill_ext

    before = nextquill_ext.current_isa()
    nextquill_ext.set_isa(request.param)
    yield request.param
    nextquill_ext.set_isa(before)
