"""YAML that would take all time or memory, or that contradicts itself, is refused in one line."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nextquill.cli.yaml_file import read_yaml

_BOMB = "a: &a [1, 2, 3]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefghij"))
_MERGES = "a: &a {k0: 1}\n" + "".join(
    f"{y}: &{y} {{<<: [{', '.join([f'*{x}'] * 9)}]}}\n" for x, y in pairwise("abcdefghij")
)


def test_aliases_and_merge_keys_work() -> None:
    text = "base: &base {a: 1, b: 2}\nmade: {<<: *base, b: 3}\nlist: [*base, *base]\n"
    base = {"a": 1, "b": 2}
    assert read_yaml(text) == {"base": base, "made": {"a": 1, "b": 3}, "list": [base, base]}
    assert read_yaml("") is None


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "an alias bomb": (_BOMB, "expected at most 10,000 values, with all aliases written out, got more, in line"),
        "merge keys": (_MERGES, "expected at most 10,000 values, with all aliases written out, got more, in line"),
        "a recursive mapping": ("a: &a {b: *a}", r"\*a is inside itself, in line 1"),
        "nested brackets": ("[" * 3000, "its lists or mappings are nested too deeply"),
        "a key twice": ("seed: 1\nloss: sft\nseed: 2\n", "the key 'seed' occurs twice, in line 3"),
        "no date": ("a: 2020-13-45", "month must be in 1..12"),
        "no boolean": ("a: !!bool x", "x"),
        "an object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    }.values(),
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
