"""The parts of an h5ad that are used: obs, the names of the genes, and one matrix of counts.

Read with h5py alone: nothing else of the file is touched, no reference is followed and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pf_core.backed import Stored
from pf_core.errors import DataError, nearest
from pf_core.hdf5 import decoded, is_text, opened, values

__all__ = ["matrix_name", "read_h5ad"]

OLD = "write the file again with anndata 0.8 or newer"
AGAIN = "write the file again"


def read_h5ad(path: str | Path, layer: str = "") -> tuple[Any, np.ndarray, Stored, list[str]]:
    """obs, gene names and the stored count matrix, checked but for the matrix's values.

    Args:
        path: the file.
        layer: the layer that holds counts, or "X"; "" takes layers/counts where it exists, else X.

    Returns:
        (obs as a DataFrame indexed by cell name, (n_genes,) names, the matrix, names of obs columns not understood).

    Raises:
        DataError: no such file, no HDF5, damaged, storage outside the file, or sizes that it cannot hold.
    """
    path = Path(path)
    with opened(path) as file:
        layers = list(file["layers"]) if isinstance(file.get("layers"), h5py.Group) else []
        name = matrix_name(layers, "X" in file, layer)
        obs, skipped = _table(_group(file, "obs"))
        genes = _names(_group(file, "var"))
        stored = Stored(path, name, file, (len(obs), len(genes)))
    return obs, genes, stored, skipped


def matrix_name(layers: Sequence[str], has_x: bool, layer: str) -> str:
    """Path of the matrix that holds the counts: "X" or "layers/<name>"."""
    if layer and layer != "X" and layer not in layers:
        raise DataError(f"there is no layer {layer!r}; {nearest(layer, [*layers, 'X'] if has_x else layers)}")
    if layer != "X" and (layer or "counts" in layers):
        return f"layers/{layer or 'counts'}"
    if not has_x:
        raise DataError(
            f"there is no X and no layer 'counts'; name the layer of the counts ({', '.join(layers) or 'none'})"
        )
    return "X"


def _group(file: Any, name: str) -> Any:
    if not isinstance(file.get(name), h5py.Group):
        raise DataError(f"there is no table {name}; {OLD}")
    return file[name]


def _names(table: Any) -> np.ndarray:
    """(n,) the index of a table, as text."""
    name = decoded(table.attrs.get("_index", "_index"))
    if name not in table:
        raise DataError(f"{table.name} has no index {name!r}; {OLD}")
    names = _element(table[name], f"{table.name}/{name}")
    if names is None or names.dtype != object or not all(isinstance(word, str) for word in names):
        raise DataError(f"{table.name}/{name} holds no names; write the file again with text as names")
    return names


def _table(table: Any) -> tuple[Any, list[str]]:
    """A DataFrame of the columns that are understood, and the names of the others."""
    import pandas as pd

    names = _names(table)
    columns, skipped = {}, []
    for key in map(decoded, table.attrs.get("column-order", ())):
        if key not in table:
            raise DataError(f"{table.name} lists column {key!r} but does not hold it; copy or download the file again")
        column = _column(table, key)
        if column is None:
            skipped.append(key)
        elif len(column) != len(names):
            raise DataError(f"{table.name}/{key} has {len(column)} values for {len(names)} rows; {AGAIN}")
        else:
            columns[key] = column
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object)), skipped


def _column(table: Any, key: str) -> Any:
    """One column as an array or a pandas extension array; None for an encoding that is not understood."""
    item, where = table[key], f"{table.name}/{key}"
    if f"__categories/{key}" in table:
        # anndata 0.7 kept categories beside the columns; found by name, its reference attribute is not followed.
        return _categorical(values(item, where), values(table[f"__categories/{key}"], where), where)
    if isinstance(item, h5py.Group) and decoded(item.attrs.get("encoding-type", "")) == "categorical":
        codes, categories = (_element(item.get(part), f"{where}/{part}") for part in ("codes", "categories"))
        return None if codes is None or categories is None else _categorical(codes, categories, where)
    return _element(item, where)


def _element(item: Any, where: str) -> Any:
    """A plain or nullable one-dimensional array; None for anything else."""
    if isinstance(item, h5py.Dataset):
        plain = len(item.shape or ()) == 1 and (item.dtype.kind in "biuf" or is_text(item))
        return values(item, where) if plain else None
    if isinstance(item, h5py.Group) and decoded(item.attrs.get("encoding-type", "")).startswith("nullable-"):
        return _nullable(values(item.get("values"), where), values(item.get("mask"), where), where)
    return None


def _categorical(codes: np.ndarray, categories: np.ndarray, where: str) -> Any:
    import pandas as pd

    low, high = (int(codes.min()), int(codes.max())) if len(codes) and codes.dtype.kind in "iu" else (-1, -1)
    if codes.dtype.kind not in "iu" or low < -1 or high >= len(categories):
        raise DataError(f"{where} has category codes outside -1..{len(categories) - 1}; {AGAIN}")
    if len(set(categories.tolist())) < len(categories):
        raise DataError(f"{where} names a category twice; {AGAIN}")
    return pd.Categorical.from_codes(codes.astype(np.int64), categories=pd.Index(categories))


def _nullable(found: np.ndarray, mask: np.ndarray, where: str) -> Any:
    import pandas as pd

    if mask.dtype.kind != "b" or mask.shape != found.shape:
        raise DataError(f"{where} has a mask of shape {mask.shape} and type {mask.dtype}; {AGAIN}")
    if found.dtype.kind in "iuf":
        return pd.array(np.where(mask, np.nan, found.astype(np.float64)), dtype="Float64")
    column = found.astype(object)
    column[mask] = None
    return pd.array(column, dtype="boolean") if found.dtype.kind == "b" else column
