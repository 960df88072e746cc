"""Which cells train, which validate, which are held out, and the proof that held-out cells were not seen."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core import noise
from pf_core.config import DataConfig
from pf_core.dataset import Dataset
from pf_core.errors import DataError, nearest
from pf_core.labels import CONTROL, condition_label, parse_condition, text, texts

__all__ = ["Split", "held_out", "leak_audit", "split", "validation_share"]

TRIVIAL_COUNTS = 20  # cells with fewer counts can be equal by chance
ROLES = ("perturbation", "tissue", "cell_type", "batch")


@dataclass(frozen=True)
class Split:
    """Sorted, disjoint index arrays, and what was held out."""

    train: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray
    conditions: list[tuple[str, str, str]]  # what was held out: (label, tissue, cell type, or time point in a course)


def split(dataset: Dataset, config: DataConfig, seed: int) -> Split:
    """Held-out conditions by expression and by share, then a validation share of every condition that is left.

    `held_out` reads the expressions. holdout_share draws from the conditions (label, tissue, cell type) other than
    control.

    Args:
        dataset: all cells.
        config: holdout, holdout_share, validation_share.
        seed: the same seed gives the same split.

    Raises:
        DataError: a column, value or combination that no cell has, or nothing left to train on.
    """
    held = held_out(dataset, config)
    conditions, index = _conditions(dataset)
    if config.holdout_share:
        perturbed = [row for row, condition in enumerate(conditions) if condition[0] != CONTROL]
        n_drawn = max(1, round(config.holdout_share * len(perturbed)))
        drawn = noise.permutation(seed, "split.holdout", 0, len(perturbed))[:n_drawn]
        held |= np.isin(index, np.asarray(perturbed)[drawn])
    kept = ~held
    if not (kept & dataset.is_control).any() or not (kept & ~dataset.is_control).any():
        side = "perturbed" if (kept & dataset.is_control).any() else "control"
        raise DataError(f"the held-out conditions leave no {side} cell to train on; hold out less")
    validation = validation_share(np.where(kept, index, -1), config.validation_share, seed)
    return Split(
        train=np.flatnonzero(kept & ~validation),
        validation=np.flatnonzero(validation),
        heldout=np.flatnonzero(held),
        conditions=sorted({conditions[row] for row in np.unique(index[held & ~dataset.is_control])}),
    )


def _conditions(dataset: Dataset) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """The distinct (label, tissue, cell_type), sorted, and the index of every cell's own."""
    rows = list(zip(dataset.label, dataset.tissue, dataset.cell_type, strict=True))
    conditions = sorted(set(rows))
    position = {condition: place for place, condition in enumerate(conditions)}
    return conditions, np.fromiter((position[row] for row in rows), dtype=np.int64, count=len(rows))


def validation_share(index: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n_cells,) mask of the nearest number of cells to the share of every condition; one at least stays for training.

    Args:
        index: (n_cells,) condition of every cell, from 0; -1 for cells that do not take part.

    Raises:
        DataError: a share above 0 that is no cell at all.
    """
    chosen = np.zeros(len(index), dtype=bool)
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(index.max(initial=-1) + 2))
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        cells = order[start:stop]
        n = min(round(share * len(cells)), len(cells) - 1)
        if n > 0:
            chosen[cells[noise.permutation(seed, "split.validation", row, len(cells))[:n]]] = True
    if share and not chosen.any():
        raise DataError(f"validation_share {share:g} of conditions this small is no cell; raise it or set it to 0")
    return chosen


# --- expressions -----------------------------------------------------------------------------------------------------
def held_out(dataset: Dataset, config: DataConfig) -> np.ndarray:
    """(n_cells,) mask of the cells that config.holdout names.

    An expression "column=value,column=value" holds out the cells that meet all of its parts; several expressions add
    up. A part about the perturbation never holds out controls, and "A" stands for A at every dose.
    """
    held = np.zeros(dataset.n_cells, dtype=bool)
    for expression in config.holdout:
        held |= _matching(dataset, expression, config)
    return held


def _matching(dataset: Dataset, expression: str, config: DataConfig) -> np.ndarray:
    """(n_cells,) the cells that meet every part of one expression."""
    mask = np.ones(dataset.n_cells, dtype=bool)
    # A comma separates where "name=" follows, so that values may hold commas.
    for part in re.split(r",(?=[^,=]+=)", expression):
        column, equals, value = (piece.strip() for piece in part.partition("="))
        if not (column and equals and value):
            raise DataError(f"holdout {expression!r} is no 'column=value,column=value'; write one = in each part")
        mask &= _meeting(dataset, column, value, config)
    if not mask.any():
        raise DataError(f"no cell meets all parts of holdout {expression!r}; leave one part out")
    return mask


def _meeting(dataset: Dataset, column: str, value: str, config: DataConfig) -> np.ndarray:
    roles = {getattr(config, role): role for role in ROLES if getattr(config, role)}
    role = roles.get(column) or (column if column in ROLES and column not in dataset.obs.columns else "")
    if role == "perturbation":
        return _perturbed_by(dataset, value, config)
    if role:
        labels = getattr(dataset, role)
    elif column in dataset.obs.columns:
        labels, _ = texts(dataset.obs[column], column)
        if dataset.obs[column].dtype.kind in "iuf":
            value = _number(value)
    else:
        raise DataError(f"holdout names column {column!r}; {nearest(column, dataset.obs.columns)}")
    mask = labels == value
    if not mask.any():
        raise DataError(f"holdout names {column}={value}; {nearest(value, sorted(set(labels)))}")
    return mask


def _perturbed_by(dataset: Dataset, value: str, config: DataConfig) -> np.ndarray:
    """Cells of a perturbation, whatever the order of its members; without "@" at every dose."""
    members = parse_condition(value, config)
    names = sorted(name for name, _ in members)
    any_dose = all(dose == 1.0 for _, dose in members)
    cell_of = {label: cell for cell, label in enumerate(dataset.label) if label != CONTROL}
    matching = [
        label
        for label, cell in cell_of.items()
        if label == condition_label(members, config.separator)
        or (any_dose and sorted(dataset.perturbations[i] for i in dataset.members[cell] if i) == names)
    ]
    if not members and not matching:
        raise DataError(f"holdout names {value!r}, and controls cannot be held out by perturbation; name a context")
    if not matching:
        raise DataError(f"holdout names {config.perturbation}={value}; {nearest(value, sorted(cell_of))}")
    return np.isin(dataset.label, matching)


def _number(value: str) -> str:
    try:
        return text(float(value))
    except ValueError:
        return value


# --- the proof -------------------------------------------------------------------------------------------------------
def leak_audit(dataset: Dataset, split: Split, *, seen: np.ndarray | None = None) -> dict[str, Any]:
    """Compare held-out cells with the cells that training sees, by name and by content.

    Content is a 128-bit hash of a cell's genes and counts. Cells with fewer than TRIVIAL_COUNTS counts can be equal
    by chance and are counted apart.

    Args:
        dataset: what the indices refer to.
        split: the split.
        seen: indices of the cells that were seen; train and validation by default.

    Returns:
        {"seen", "heldout", "shared_names", "shared_contents", "trivial", "shared_trivial", "examples", "clean"}:
        numbers of held-out cells, names of up to five shared ones, and whether nothing but trivial content is shared.
    """
    seen = np.union1d(split.train, split.validation) if seen is None else np.unique(seen)
    known = set(_hashes(dataset, seen))
    equal = np.fromiter((digest in known for digest in _hashes(dataset, split.heldout)), bool, len(split.heldout))
    names = set(dataset.cells[seen])
    named = np.fromiter((name in names for name in dataset.cells[split.heldout]), bool, len(split.heldout))
    trivial = dataset.totals[split.heldout] < TRIVIAL_COUNTS
    shared = named | (equal & ~trivial)
    return {
        "seen": len(seen),
        "heldout": len(split.heldout),
        "shared_names": int(named.sum()),
        "shared_contents": int((equal & ~trivial).sum()),
        "trivial": int(trivial.sum()),
        "shared_trivial": int((equal & trivial).sum()),
        "examples": [str(name) for name in dataset.cells[split.heldout][shared][:5]],
        "clean": not shared.any(),
    }


def _hashes(dataset: Dataset, cells: np.ndarray) -> list[bytes]:
    digests = []
    for _, rows in dataset.blocks(cells):
        indices, values = rows.indices.astype("<i4"), rows.data.astype("<f4")
        for start, stop in itertools.pairwise(rows.indptr):
            content = indices[start:stop].tobytes() + values[start:stop].tobytes()
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
    return digests
