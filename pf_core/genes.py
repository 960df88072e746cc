"""Which genes a model sees: highly variable ones, and the alignment of new data to a trained model's genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core.data import Dataset

__all__ = ["align_genes", "highly_variable"]


def highly_variable(dataset: Dataset, cells: np.ndarray, n: int, keep: Sequence[str] = ()) -> list[str]:
    """The n most variable genes of these cells, plus every perturbed gene and `keep`, in the dataset's order."""
    raise NotImplementedError


def align_genes(dataset: Dataset, genes: Sequence[str]) -> tuple[Dataset, dict[str, Any]]:
    """The dataset with exactly these genes in this order; report {"n_genes", "found", "missing": names, "unused"}."""
    raise NotImplementedError
