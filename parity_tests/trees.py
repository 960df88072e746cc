"""Nested dicts, tuples and lists of arrays as flat dicts of named leaves, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a/0/b": leaf}. A bare leaf is called "value"; None is left out."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        tree = dict(zip(tree._fields, tree, strict=True))  # type: ignore[attr-defined]
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, tuple | list):
        items = [(str(i), value) for i, value in enumerate(tree)]
    elif tree is None:
        return {}
    else:
        return {prefix or "value": tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves.update(flatten(value, f"{prefix}/{key}" if prefix else key))
    return leaves


def map_leaves(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """The same nesting with function(path, leaf) at each leaf."""

    def below(key: Any, value: Any) -> Any:
        return map_leaves(function, value, f"{prefix}/{key}" if prefix else str(key))

    if isinstance(tree, Mapping):
        return {key: below(key, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(below(i, value) for i, value in enumerate(tree))
    if isinstance(tree, list):
        return [below(i, value) for i, value in enumerate(tree)]
    return tree if tree is None else function(prefix or "value", tree)
