"""Reading a data set: an h5ad, a zarr store or an AnnData becomes a Dataset, or one line that says why not.

How odd values are treated, in one place:

- a cell without a perturbation is left out and counted; a missing tissue, cell type or batch is a context of its own,
  UNKNOWN (labels.py says what counts as missing);
- a tissue, cell type or batch column at its default name may be absent and is then "all" for every cell; under
  another name it was asked for and must exist;
- covariates and doses must be finite numbers, nothing is imputed;
- counts become float32 CSR with sorted columns and no stored zeros, whatever they were stored as.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pf_core.backed import BackedCounts, Stored
from pf_core.config import DataConfig
from pf_core.counts import from_matrix
from pf_core.dataset import Dataset, Group, groups, totals_of, unique_names
from pf_core.errors import DataError, nearest
from pf_core.h5ad import matrix_name, read_h5ad
from pf_core.labels import codes, condition_label, parse_condition, texts, vocabulary
from pf_core.zarr_store import read_zarr

__all__ = ["DataError", "Dataset", "Group", "groups", "load", "read_cells"]

Read = tuple[Any, np.ndarray, Any, dict[str, Any]]  # obs, gene names, counts, first entries of the summary


def load(
    source: str | Path | Any, config: DataConfig, *, backed: bool = False, training: bool = True, contrasts: bool = True
) -> Dataset:
    """Read and check a data set.

    Args:
        source: path of an h5ad or a zarr store, or an AnnData. Counts of an AnnData that are canonical float32 CSR
            are shared with it, not copied.
        config: which columns hold what.
        backed: leave the counts of an h5ad on disk; they are read through once, to check and to sum them.
        training: False admits one condition, no controls and cells without counts, for a model that is trained.
        contrasts: False admits one condition and no controls in training too, for time courses.

    Raises:
        DataError: whatever makes the data unusable, with the remedy, in one line.
    """
    obs, gene_names, counts, summary = _read(source, config.layer, backed)
    if not all(counts.shape):
        raise DataError(f"the matrix has {counts.shape[0]} cells and {counts.shape[1]} genes; some were wanted")
    cells, genes = unique_names(obs.index, "cell"), unique_names(gene_names, "gene")
    conditions, unlabelled = texts(_column(obs, config.perturbation, "perturbation"), config.perturbation, missing="")
    totals = totals_of(counts)
    labelled = conditions != ""
    keep = labelled & (totals >= config.min_counts)
    n_empty = int((totals[keep] == 0).sum())
    if n_empty and training:
        raise DataError(f"{n_empty} of {len(cells)} cells have no counts; leave them out with min_counts=1")
    if not keep.any():
        raise DataError(
            f"no cell is left: {unlabelled} of {len(cells)} have no {config.perturbation!r} and the others have fewer "
            f"than {config.min_counts} counts; lower min_counts or name another column"
        )
    summary |= {"cells_read": len(cells), "genes_read": len(genes), "empty_cells": n_empty}
    dropped = {"no perturbation": unlabelled, "fewer than min_counts": int((labelled & ~keep).sum())}
    summary["dropped"] = {reason: n for reason, n in dropped.items() if n}
    if not keep.all():
        chosen = np.flatnonzero(keep)
        counts = counts.select(rows=chosen) if isinstance(counts, BackedCounts) else counts[chosen]
        obs, cells, totals, conditions = obs.iloc[chosen], cells[chosen], totals[chosen], conditions[chosen]
    perturbations, members, doses, label = _conditions(obs, conditions, config)
    contexts = {role: _context(obs, role, config, summary) for role in ("tissue", "cell_type", "batch")}
    dataset = Dataset(
        counts=counts,
        totals=totals,
        cells=cells,
        genes=genes,
        perturbations=perturbations,
        members=members,
        doses=doses,
        label=label,
        is_control=(doses == 0).all(axis=1),
        covariates=_covariates(obs, config),
        tissues=vocabulary(contexts["tissue"]),
        batches=vocabulary(contexts["batch"]),
        obs=obs,
        config=config,
        summary=summary,
        **contexts,
    )
    if training and contrasts:
        _check_trainable(dataset)
    return dataset


def _check_trainable(dataset: Dataset) -> None:
    config = dataset.config
    labels, sizes = np.unique(dataset.label, return_counts=True)
    if not dataset.is_control.any():
        common = ", ".join(repr(label) for label in labels[np.argsort(-sizes)][:8])
        raise DataError(
            f"there are no control cells ({' or '.join(config.control)}) in {config.perturbation!r}, only {common}; "
            "name the label of unperturbed cells with the setting control"
        )
    if len(labels) == 1:
        raise DataError(f"{config.perturbation!r} holds a single condition, {labels[0]!r}; add perturbed cells")
    groups(dataset, np.arange(dataset.n_cells))  # raises where a context has no controls


# --- where it comes from ---------------------------------------------------------------------------------------------
def read_cells(source: Any, layer: str = "") -> Any:
    """All cells of a file or an AnnData as they are, checked: an AnnData of obs, gene names and counts in X.

    Raises:
        DataError: whatever makes the file unusable, with the remedy, in one line.
    """
    import anndata
    import pandas as pd

    obs, genes, counts, _ = _read(source, layer, False)
    names = pd.DataFrame(index=pd.Index(unique_names(genes, "gene").astype(str)))
    return anndata.AnnData(counts, obs=obs, var=names)


def _read(source: Any, layer: str, backed: bool) -> Read:
    if not isinstance(source, str | Path):
        return _from_anndata(source, layer, backed)
    path = Path(source)
    if path.suffix == ".zarr":
        if backed:
            raise DataError(f"{path} is a zarr store, and only an h5ad can stay on disk; load it with backed=False")
        return _from_anndata(read_zarr(path), layer, backed)
    obs, genes, stored, skipped = read_h5ad(path, layer)
    counts = BackedCounts(stored) if backed else _whole(stored)
    return obs, genes, counts, {"matrix": stored.name, "columns_not_understood": skipped}


def _whole(stored: Stored) -> Any:
    try:
        return stored.to_memory()
    finally:
        stored.close()


def _from_anndata(adata: Any, layer: str, backed: bool) -> Read:
    if not all(hasattr(adata, name) for name in ("obs", "var_names", "layers", "isbacked")):
        raise DataError(f"source is a {type(adata).__name__}; the path of an h5ad, or an AnnData, was wanted")
    name = matrix_name(list(adata.layers), adata.isbacked or adata.X is not None, layer)
    if name == "X" and adata.isbacked:
        if adata.is_view:
            raise DataError("source is a view of a backed AnnData; give its .to_memory(), or write it to a file")
        _, _, stored, _ = read_h5ad(adata.filename, "X")
        counts = BackedCounts(stored) if backed else _whole(stored)
    elif backed:
        raise DataError("source is an AnnData in memory; give the path of an h5ad, or backed=False")
    else:
        counts = from_matrix(adata.X if name == "X" else adata.layers[name.removeprefix("layers/")], name)
    shape = (len(adata.obs), len(adata.var_names))
    if counts.shape != shape:
        raise DataError(f"{name} has shape {counts.shape} but obs and var have {shape}; build the AnnData again")
    return adata.obs, np.asarray(adata.var_names, dtype=object), counts, {"matrix": name, "columns_not_understood": []}


# --- what its columns say --------------------------------------------------------------------------------------------
def _column(obs: Any, name: str, role: str) -> Any:
    if name not in obs.columns:
        raise DataError(f"obs has no column {name!r}; {nearest(name, obs.columns)} (setting {role})")
    column = obs[name]
    if column.ndim != 1:
        raise DataError(f"obs has {column.shape[1]} columns named {name!r}; rename all but one")
    return column


def _context(obs: Any, role: str, config: DataConfig, summary: dict[str, Any]) -> np.ndarray:
    """(n_cells,) labels of the tissue, cell type or batch."""
    name = getattr(config, role)
    if not name or (name == getattr(DataConfig(), role) and name not in obs.columns):
        return np.full(len(obs), "all", dtype=object)
    values, summary[f"without_{role}"] = texts(_column(obs, name, role), name)
    return values


def _conditions(
    obs: Any, conditions: np.ndarray, config: DataConfig
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Vocabulary, members, doses and labels; every distinct pair of condition and dose is parsed once."""
    amounts = np.full(len(obs), None, dtype=object)  # labels may carry doses themselves: "A@0.5"
    if config.dose:
        amounts, _ = texts(_column(obs, config.dose, "dose"), config.dose, missing="nan")
    pairs = list(zip(conditions.tolist(), amounts.tolist(), strict=True))
    position = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
    index = np.fromiter((position[pair] for pair in pairs), dtype=np.int64, count=len(pairs))
    parsed = [parse_condition(condition, config, dose) for condition, dose in position]
    names = vocabulary([name for pairs in parsed for name, _ in pairs])
    width = max(1, max(len(pairs) for pairs in parsed))
    members, doses = np.zeros((len(parsed), width), np.int32), np.zeros((len(parsed), width), np.float32)
    for row, found in enumerate(parsed):
        members[row, : len(found)] = codes([name for name, _ in found], names)
        doses[row, : len(found)] = [dose for _, dose in found]
    label = np.array([condition_label(found, config.separator) for found in parsed], dtype=object)
    return names, members[index], doses[index], label[index]


def _covariates(obs: Any, config: DataConfig) -> np.ndarray:
    import pandas as pd

    columns = np.zeros((len(obs), len(config.covariates)), np.float32)
    for place, name in enumerate(config.covariates):
        column = _column(obs, name, "covariates").astype(object)
        values = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
        with np.errstate(over="ignore"):  # beyond float32 is not finite either
            columns[:, place] = values
        if n_bad := int((~np.isfinite(columns[:, place])).sum()):
            raise DataError(
                f"covariate {name!r} has {n_bad} values that are no finite number; leave out these cells or it"
            )
    return columns
