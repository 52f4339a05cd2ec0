"""A finished evaluation, and a record of the forwards of a scoring."""

from __future__ import annotations

import pytest

from nextquill.models.branch_passes import PairPasses
from tests.evaluation.evaluation_helpers import ALL, evaluate
from tests.models.model_helpers import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.6)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A finished evaluation of everything and its folder, which tests only read."""
    folder = tmp_path_factory.mktemp("evaluation") / "deep" / "folder"
    return evaluate(model, folder, **ALL), folder


@pytest.fixture
def forwards(monkeypatch):
    """The positions of the examples and the number of tokens, for each forward."""
    seen, own = [], PairPasses.scores

    def scores(self, part, *rest):
        seen.append((part["sequence_ids"].unique().tolist(), part["num_tokens"]))
        return own(self, part, *rest)

    monkeypatch.setattr(PairPasses, "scores", scores)
    return seen
