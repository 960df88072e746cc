"""How much latents still say about the tissue: the accuracy of a fresh classifier beside that of a constant guess."""

from __future__ import annotations

from typing import Any

import numpy as np

from pf_core import noise

__all__ = ["tissue_left"]

MAX_CELLS = 3000  # a support-vector classifier is quadratic in them
FOLDS = 5


def tissue_left(latents: np.ndarray, tissue: np.ndarray, seed: int) -> dict[str, Any]:
    """Cross-validated accuracy of a support-vector classifier (Gaussian kernel) that reads the tissue from latents.

    Args:
        latents: (n_cells, n_latent).
        tissue: (n_cells,) names; tissues with fewer than FOLDS cells are left out.
        seed: of the folds, and of the cells where there are more than MAX_CELLS.

    Returns:
        {"tissues", "cells", "accuracy", "majority"}: how many tissues and cells were judged, the share of cells whose
        tissue was found, and the share of the commonest one. The shares are None where there is one tissue only.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    names, index, counts = np.unique(np.asarray(tissue, str), return_inverse=True, return_counts=True)
    cells = np.flatnonzero(counts[index] >= FOLDS)
    if len(cells) > MAX_CELLS:
        cells = np.sort(noise.generator(seed, "tissue_left.cells").permutation(cells)[:MAX_CELLS])
    found = np.bincount(index[cells], minlength=len(names))
    cells = cells[found[index[cells]] >= FOLDS]
    found = np.bincount(index[cells], minlength=len(names))
    result: dict[str, Any] = {
        "tissues": int((found > 0).sum()),
        "cells": len(cells),
        "accuracy": None,
        "majority": None,
    }
    if result["tissues"] < 2:
        return result
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    scores = cross_val_score(make_pipeline(StandardScaler(), SVC()), latents[cells], index[cells], cv=folds)
    return result | {"accuracy": float(scores.mean()), "majority": float(found.max() / len(cells))}
