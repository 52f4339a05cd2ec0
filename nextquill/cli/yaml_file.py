"""Reads a YAML file of flags, and refuses one that would take all time or memory, or that says a thing twice."""

from __future__ import annotations

from typing import Any

import yaml

#: Values in a file, counted as if each alias were written out.
_MOST_VALUES = 10_000


def read_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError, of one line, if it cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("its lists or mappings are nested too deeply") from error
    # PyYAML's constructors let errors of any type pass: of `datetime` for 2020-13-01, KeyError for `!!bool x`.
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """Counts values while it composes them, before merge keys and aliases can multiply them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose as PyYAML does, and count."""
        event, before = self.peek_event(), self._count  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"*{event.anchor} is inside itself", event)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
        if self._count > _MOST_VALUES:
            raise _error(f"expected at most {_MOST_VALUES:,} values, with all aliases written out, got more", event)
        if isinstance(node, yaml.MappingNode) and not isinstance(event, yaml.AliasEvent):
            _check_keys(node)
        return node


def _error(problem: str, place: yaml.Node | yaml.Event) -> ValueError:
    return ValueError(f"{problem}, in line {place.start_mark.line + 1}" if place.start_mark else problem)


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise an error where a mapping has a key twice, of which PyYAML would take the last."""
    seen = set[str]()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _error(f"the key {key.value!r} occurs twice", key)
            seen.add(key.value)
