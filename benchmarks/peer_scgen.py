"""scGen (Lotfollahi et al. 2019, doi:10.1038/s41592-019-0494-8), as pertpy ships it, behind benchmarks/peers.py.

    pip install "perturb-forecast[torch,bench]"

Settings are those of its tutorial: log1p of counts per 10,000, 100 epochs of batches of 32, early stopping after 25
epochs without gain. The labels whose cells are balanced in the latent arithmetic are the cell types. scGen adds one
mean shift; it has no answer for a condition without training cells, so none for combinations never seen. pertpy draws
the cells of the arithmetic without a seed: repeated calls differ a little.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pertpy  # pyright: ignore[reportMissingImports]  (extra "bench")
import scanpy  # pyright: ignore[reportMissingImports]
import scvi  # pyright: ignore[reportMissingImports]

TOTAL = 1e4


def log_normalised(path: Path) -> Any:
    data: Any = anndata.read_h5ad(path)
    dense = data.X.toarray() * (TOTAL / data.obs["library"].to_numpy()[:, None])
    data.X = np.log1p(dense).astype(np.float32)
    return data


def rates(decoded: np.ndarray) -> np.ndarray:
    return np.expm1(np.maximum(decoded, 0.0))


def main(given: Path, out: Path, seed: int) -> None:
    scvi.settings.seed = seed
    scanpy.settings.verbosity = 0
    train = log_normalised(given / "train.h5ad")
    pertpy.tl.Scgen.setup_anndata(train, batch_key="label", labels_key="cell_type")
    model = pertpy.tl.Scgen(train)
    model.train(
        max_epochs=100, batch_size=32, early_stopping=True, early_stopping_patience=25, enable_progress_bar=False
    )
    known = set(train.obs["label"])
    for number, condition in enumerate(json.loads((given / "conditions.json").read_text())):
        if condition["label"] not in known:
            (out / f"{number}.txt").write_text(f"{condition['label']} is not among the training conditions\n")
            continue
        controls = log_normalised(given / f"controls-{number}.h5ad")
        moved, _ = model.predict(ctrl_key="control", stim_key=condition["label"], adata_to_predict=controls)
        before = np.asarray(model.module.as_bound().generative(model.get_latent_representation(controls))["px"])
        np.savez(out / f"{number}.npz", before=rates(before), after=rates(np.asarray(moved.X)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
