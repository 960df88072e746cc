"""Regulatory networks: a CSV of edges becomes a graph over the genes of a model, with a report of what was kept.

Columns `source` and `target` name genes; `sign` is -1 or 1, `weight` at least 0, and either is 1 where it is absent.
The value of an edge is sign times weight. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pf_core.backends import Arrays
from pf_core.errors import DataError, nearest

__all__ = ["Network", "load_network"]


@dataclass(frozen=True)
class Network:
    """Edges between genes, sorted by target and source, each pair once, no self loops."""

    source: np.ndarray  # (n_edges,) int32 index of the regulator
    target: np.ndarray  # (n_edges,) int32 index of the regulated gene
    sign: np.ndarray  # (n_edges,) float64 sign times weight
    report: dict[str, Any]  # plain values: what was read, kept, merged and left out

    def arrays(self, dtype: str) -> Arrays:
        """The graph as a vector field reads it."""
        return {"source": self.source, "target": self.target, "sign": self.sign.astype(dtype)}


def load_network(path: str | Path, genes: Sequence[str] | np.ndarray) -> Network:
    """Read a network and align it to the genes of a model by name.

    An edge needs both ends among the genes. Where no edge has them, names are compared without regard to case, and the
    report says so. Edges that name the same pair become one with their mean; self loops are dropped.

    Args:
        path: CSV with a header.
        genes: (n_genes,) names, in the order of the model.

    Raises:
        DataError: no such file, no CSV with these columns, a sign or weight out of range, or no edge among the genes.
    """
    table = _read(path)
    value = _values(table, path)
    names = [table[end].astype(str).str.strip().to_numpy(object) for end in ("source", "target")]
    genes = [str(gene) for gene in genes]
    ends, exact = _positions(names, genes)
    within = (ends >= 0).all(axis=0)
    if not within.any():
        raise DataError(_strangers(path, names, genes, ends))
    loops = within & (ends[0] == ends[1])
    kept = within & ~loops
    # Distinct pairs, sorted by target and then source.
    pair, place = np.unique(ends[1, kept] * len(genes) + ends[0, kept], return_inverse=True)
    if not len(pair):
        raise DataError(f"all {int(loops.sum())} edges of {path} among the genes are self loops; give other edges")
    sign = np.bincount(place, value[kept]) / np.bincount(place)
    source, target = (pair % len(genes)).astype(np.int32), (pair // len(genes)).astype(np.int32)
    report = {
        "file": Path(path).name,
        "edges_read": len(table),
        "edges_kept": len(pair),
        "edges_outside": int((~within).sum()),
        "duplicates_merged": int(kept.sum()) - len(pair),
        "self_loops_dropped": int(loops.sum()),
        "regulators": len(np.unique(source)),
        "targets": len(np.unique(target)),
        "genes_without_edges": len(genes) - len(np.union1d(source, target)),
        "names_matched": "exactly" if exact else "without regard to case",
    }
    return Network(source, target, sign, report)


def _read(path: str | Path) -> Any:
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise DataError(f"network file {path} does not exist; give the path of a CSV") from None
    except (ValueError, OSError) as error:  # pandas' own errors and UnicodeDecodeError are ValueErrors
        line = " ".join(str(error).split())
        raise DataError(f"network file {path} is no CSV: {line}; save it as text with a header") from None
    table.columns = [str(name).strip().casefold() for name in table.columns]
    for name in ("source", "target"):
        if list(table.columns).count(name) != 1:
            raise DataError(
                f"network file {path} needs one column {name!r}; {nearest(name, table.columns)}. source, target, and"
                " sign or weight are read"
            )
        if blank := int((table[name].str.strip() == "").sum()):
            raise DataError(f"network file {path} has {blank} edges without a {name}; remove these rows")
    if table.empty:
        raise DataError(f"network file {path} has no edges; give another, or train without a network")
    return table


def _values(table: Any, path: str | Path) -> np.ndarray:
    """(n_edges,) sign times weight."""
    signs, weights = (_numbers(table, name, path) for name in ("sign", "weight"))
    _refuse(table, "sign", np.abs(signs) != 1.0, path, "-1 or 1 was wanted")
    _refuse(table, "weight", weights < 0, path, "at least 0 was wanted; put -1 into a column sign for repression")
    return signs * weights


def _numbers(table: Any, name: str, path: str | Path) -> np.ndarray:
    import pandas as pd

    if name not in table.columns:
        return np.ones(len(table))
    values = np.asarray(pd.to_numeric(table[name], errors="coerce"), np.float64)
    _refuse(table, name, ~np.isfinite(values), path, "a finite number was wanted")
    return values


def _refuse(table: Any, name: str, wrong: np.ndarray, path: str | Path, wanted: str) -> None:
    if wrong.any():
        row = table.iloc[int(np.flatnonzero(wrong)[0])]
        raise DataError(
            f"network file {path} has {int(wrong.sum())} edges with such a {name} as {row.get(name)!r}"
            f" ({row['source']} to {row['target']}); {wanted}"
        )


def _positions(names: list[np.ndarray], genes: list[str]) -> tuple[np.ndarray, bool]:
    """(2, n_edges) indices of sources and targets, -1 where unknown, and whether names were matched exactly."""
    exact = {gene: index for index, gene in enumerate(genes)}
    ends = _look_up(names, exact)
    if (ends >= 0).all(axis=0).any():
        return ends, True
    folded: dict[str, int] = {}
    for gene, index in exact.items():
        folded[gene.casefold()] = -1 if gene.casefold() in folded else index  # two genes of one name: neither
    return _look_up([np.array([name.casefold() for name in end], object) for end in names], folded), False


def _look_up(names: list[np.ndarray], position: dict[str, int]) -> np.ndarray:
    return np.array([[position.get(name, -1) for name in end] for end in names], np.int64)


def _strangers(path: str | Path, names: list[np.ndarray], genes: list[str], ends: np.ndarray) -> str:
    """Why no edge was kept, with examples of both sets of names."""
    distinct = list(dict.fromkeys([*names[0], *names[1]]))
    theirs, ours = (", ".join(map(repr, some[:4])) for some in (distinct, genes))
    sources, targets = (len({*end[found >= 0]}) for end, found in zip(names, ends, strict=True))
    among = (
        f"{sources} of its regulators and {targets} of its targets are among the {len(genes)} genes, never both"
        if sources or targets
        else f"none of its names is among the {len(genes)} genes"
    )
    return (
        f"network file {path} has no edge within the model's genes: {among}. The network has {theirs}, the data {ours};"
        " name genes alike, or train without a network"
    )
