"""A small AnnData with every kind of column, for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"
LABELS = ("control", "A", "B", "A+B", "GENE3")


def small(n_cells: int = 211, n_genes: int = 23, seed: int = 0) -> anndata.AnnData:
    """Counts CSR float32, 2 tissues, 2 cell types, 3 batches; every context has controls; no empty cell."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.7, (n_cells, n_genes)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.resize(LABELS, n_cells), categories=[*LABELS, "unused"]),
            "tissue": np.resize(["t1", "t2"], n_cells),
            "cell_type": pd.Categorical(np.resize(["x", "x", "y"], n_cells)),
            "batch": np.resize([1, 2, 3], n_cells),
            "time": np.resize([10.0, 10.5, 11.0], n_cells),
            "age": rng.normal(size=n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def written(adata: anndata.AnnData, folder: Path, name: str = "small.h5ad", **options: Any) -> Path:
    path = folder / name
    adata.write_h5ad(path, **options)
    return path


def real(name: str) -> Path:
    """A file of real data; the test is skipped, and says so, where there is none."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"not run: the real data set {name} is not beside the repository")
    return path
