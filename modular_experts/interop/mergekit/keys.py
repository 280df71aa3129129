"""Keys: a YAML file as plain values, with those keys only that it may have.

mergekit passes over a key that it does not know, and with it over a slip of the pen.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import yaml

__all__ = ["as_list", "as_mapping", "check_keys", "nearest", "read_yaml"]


def check_keys(mapping: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        ValueError: The sentence names the key, where it stands, and the nearest that is known.
    """
    for key in mapping:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where} has an unknown key {key!r}, which mergekit would pass over{hint}")


def nearest(name: str, known: Collection[str]) -> str:
    """Return `; did you mean x?`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class _Loader(yaml.SafeLoader):
    """A safe loader that takes no key twice: YAML forbids it, and the usual loader keeps the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" else key
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} comes twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> list[Any]:
    """Return the documents of a YAML text as plain values.

    Raises:
        ValueError: It is no YAML, or a key comes twice.
    """
    try:
        return list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a value that must be a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {value!r}")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """Return a value that must be a list with something in it."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with at least one entry, got {value!r}")
    return value
