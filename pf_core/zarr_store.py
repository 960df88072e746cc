"""Opening a zarr store that nobody vouches for; anndata reads it once it is found harmless."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pf_core.errors import DataError, nearest
from pf_core.hdf5 import MAX_RATIO, SLACK

__all__ = ["read_zarr"]

METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
WIDTH = 8  # bytes per declared element, about


def read_zarr(path: Path) -> Any:
    """The AnnData of a zarr store.

    Raises:
        DataError: no store, damaged, links to other places, a codec that runs code, or sizes that it cannot hold.
    """
    if not path.is_dir():
        others = [item.name for item in path.parent.glob("*.zarr")] if path.parent.is_dir() else []
        raise DataError(f"{path} is no folder; {nearest(path.name, others)}")
    _check(path)
    import anndata

    try:
        return anndata.read_zarr(path)
    except Exception as error:  # zarr and its codecs raise what they like; all of it means the same here
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is damaged or no zarr store of anndata ({line}); write it again") from error


def _check(path: Path) -> None:
    items = list(path.rglob("*"))
    if links := [item for item in items if item.is_symlink()]:
        raise DataError(f"{links[0]} is a link, perhaps out of the store; copy the store with its files")
    room = SLACK + MAX_RATIO * sum(item.stat().st_size for item in items if item.is_file())
    for item in items:
        if item.name not in METADATA:
            continue
        try:
            tables = list(_tables(json.loads(item.read_text())))
        except (ValueError, RecursionError):
            raise DataError(f"{item} is no JSON; copy or download the store again") from None
        for table in tables:
            if any("pickle" in str(table.get(key, "")).casefold() for key in ("id", "name")):
                raise DataError(f"{item} names a codec that runs code (pickle); write the store again with anndata")
            shape = table.get("shape")
            # Beside an encoding, a shape is an attribute of a sparse matrix and declares no storage.
            sizes = shape if isinstance(shape, list) and "encoding-type" not in table else []
            if WIDTH * math.prod(n for n in sizes if isinstance(n, int)) > room:
                raise DataError(f"{item} declares shape {shape}, more than the store can hold; write it again")


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(inner)
