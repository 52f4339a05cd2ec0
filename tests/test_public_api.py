"""The public API is what is written down: a name or a signature that comes, goes or changes is a decision."""

from __future__ import annotations

import pytest

from tools import public_api

AFTER_A_DECISION = "if this is meant: python -m tools.public_api, and a line in CHANGELOG.md"


def test_signatures_are_the_stored_ones() -> None:
    pytest.importorskip("trl")
    assert public_api.signatures() == public_api.SIGNATURES.read_text(encoding="utf-8"), AFTER_A_DECISION


def test_page_lists_every_name_with_its_own_words() -> None:
    pytest.importorskip("trl")
    assert public_api.page() == public_api.PAGE.read_text(encoding="utf-8"), AFTER_A_DECISION


@pytest.mark.parametrize("package", public_api.PACKAGES)
def test_every_name_is_explained_in_one_line(package: str) -> None:
    pytest.importorskip("trl")
    rows = [line for line in public_api.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    names = set(public_api.public_names(package))
    explained = {
        name for name in names for row in rows if row.startswith(f"| `{name}` | ") and len(row) > len(name) + 20
    }
    assert names - explained == set()


def test_a_changed_default_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from nextquill.losses import PerCELoss

    monkeypatch.setattr(PerCELoss.__init__, "__defaults__", (0.7, 5.0))
    assert "class PerCELoss(min_weight: float = 0.7," in public_api.signatures()
    assert "class PerCELoss(min_weight: float = 0.8," in public_api.SIGNATURES.read_text(encoding="utf-8")
