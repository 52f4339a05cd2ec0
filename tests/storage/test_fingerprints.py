"""Digests and seeds stay the same, because files on disk and repeated runs depend on them."""

from __future__ import annotations

import pytest

from nextquill.storage.fingerprints import digest_of, fingerprint, seed_of
from tests.helpers import run_python


def test_fingerprints_are_the_first_digits_of_sha_256() -> None:
    assert fingerprint([]) == "e3b0c44298fc1c14"
    assert fingerprint(["abü"]) == "dc76165671fd1d14"
    assert fingerprint(["abü"], digits=6) == "dc7616"


def test_text_and_its_bytes_have_one_fingerprint_however_they_are_cut() -> None:
    whole = fingerprint(["abü"])
    assert fingerprint(["abü".encode()]) == fingerprint(["a", b"b", "ü"]) == fingerprint(iter(["ab", "", "ü"])) == whole
    assert fingerprint(["bü", "a"]) != whole


def test_half_of_a_surrogate_pair_has_a_digest() -> None:
    assert fingerprint(["\ud800"]) == "91a681b998555fb4"
    assert seed_of("u\ud800") == 4804600422851127452


def test_digests_of_texts_stay_the_same() -> None:
    assert digest_of("x", 6).hex() == "0a7651f82b16"
    assert digest_of("[[1, 2], 3]", 16).hex() == "52907de8421c1cb77358c78822ed4a6a"


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        (("ann",), 5088345978781694418),
        (("0 7 factual",), 8954710319117773713),
        ((0, "draw", 3, "ann"), 1623434232484339047),
    ],
)
def test_seeds_stay_the_same(parts: tuple[object, ...], seed: int) -> None:
    assert seed_of(*parts) == seed


def test_seeds_tell_parts_apart_and_are_equal_in_every_process() -> None:
    assert len({seed_of("ab", "c"), seed_of("a", "bc"), seed_of("abc"), seed_of("c", "ab")}) == 4
    code = "from nextquill.storage.fingerprints import seed_of; print(seed_of('ann', 1))"
    assert {run_python(code, PYTHONHASHSEED=str(seed)).strip() for seed in (1, 2)} == {str(seed_of("ann", 1))}


def test_seeds_fit_into_a_signed_integer_of_64_bits() -> None:
    assert all(0 <= seed_of(number) < 2**63 for number in range(200))
