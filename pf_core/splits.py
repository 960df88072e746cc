"""Which cells train, which validate, which are held out, and the proof that held-out cells were not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.config import DataConfig
from pf_core.data import Dataset

__all__ = ["Split", "leak_audit", "split"]


@dataclass(frozen=True)
class Split:
    """Sorted, disjoint index arrays, and what was held out."""

    train: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray
    conditions: list[tuple[str, str, str]]  # (label, tissue, cell_type), perturbed ones, of the held-out cells


def split(dataset: Dataset, config: DataConfig, seed: int) -> Split:
    """Held-out conditions by expression and by share, then a validation share of the cells of every condition."""
    raise NotImplementedError


def leak_audit(dataset: Dataset, split: Split, *, seen: np.ndarray | None = None) -> dict[str, Any]:
    """Compare held-out cells with the cells seen (train and validation, or `seen`) by name and by content."""
    raise NotImplementedError
