"""CellFlow (Klein et al. 2025, doi:10.1101/2025.04.11.648220) behind benchmarks/peers.py, in an environment of its own.

    python -m venv CELLFLOW && CELLFLOW/bin/pip install cellflow-tools requests

Cells are 50 principal components of log1p of counts per 10,000; conditions are sets of one-hot perturbations; controls
are those of the cell type (split covariate), which the velocity sees through the cells alone, so that a type that was
never perturbed has an answer. Flow matching with minibatch optimal transport, as by default; layers are 256 wide
instead of 2,048 and 4,096, batches 256 instead of 1,024 and steps STEPS, which is what a processor without an
accelerator trains in minutes. "before" is the cells' own reconstruction from the components.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from cellflow.model import CellFlow  # pyright: ignore[reportMissingImports]  (an environment of its own)
from sklearn.decomposition import PCA

TOTAL = 1e4
STEPS = 10_000
WIDTH = (256, 256)


def log_normalised(path: Path) -> Any:
    data: Any = anndata.read_h5ad(path)
    dense = data.X.toarray() * (TOTAL / data.obs["library"].to_numpy()[:, None])
    data.X = np.log1p(dense).astype(np.float32)
    return data


def members(labels: pd.Series, most: int) -> pd.DataFrame:
    """One column per member of a condition, "control" where there is none."""
    parts = [label.split("+") for label in labels]
    rows = [[*part, *["control"] * (most - len(part))] for part in parts]
    frame = pd.DataFrame(rows, index=labels.index, columns=pd.Index([f"member{i}" for i in range(most)]))
    return frame.astype("category")


def main(given: Path, out: Path, seed: int) -> None:
    conditions = json.loads((given / "conditions.json").read_text())
    train = log_normalised(given / "train.h5ad")
    labels = [*train.obs["label"].unique(), *(one["label"] for one in conditions)]
    names = sorted({name for label in labels for name in label.split("+")} - {"control"})
    most = max(label.count("+") + 1 for label in labels)
    columns = members(train.obs["label"], most)
    train.obs = train.obs.join(columns)
    train.obs["is_control"] = (train.obs["label"] == "control").to_numpy()
    train.obs["cell_type"] = train.obs["cell_type"].astype("category")
    seen = set(np.unique(columns.astype(str).to_numpy()))
    components = PCA(50, svd_solver="randomized", random_state=seed).fit(train.X)
    train.obsm["X_pca"] = components.transform(train.X).astype(np.float32)
    one_hot = np.eye(len(names), dtype=np.float32)
    train.uns["members"] = dict(zip(names, one_hot, strict=True)) | {"control": np.zeros(len(names), np.float32)}
    # A type whose perturbed cells are all held out teaches nothing; its controls have no partner.
    perturbed = set(train.obs.loc[~train.obs["is_control"], "cell_type"])
    train = train[train.obs["cell_type"].isin(perturbed)].copy()
    train.obs["cell_type"] = train.obs["cell_type"].cat.remove_unused_categories()

    model = CellFlow(train, solver="otfm")
    model.prepare_data(
        sample_rep="X_pca",
        control_key="is_control",
        perturbation_covariates={"perturbation": list(columns.columns)},
        perturbation_covariate_reps={"perturbation": "members"},
        split_covariates=["cell_type"],
    )
    model.prepare_model(
        condition_embedding_dim=64,
        time_encoder_dims=WIDTH,
        hidden_dims=WIDTH,
        decoder_dims=WIDTH,
        seed=seed,
    )
    model.train(num_iterations=STEPS, batch_size=256, valid_freq=STEPS + 1)

    def rates(points: np.ndarray) -> np.ndarray:
        return np.expm1(np.clip(components.inverse_transform(points), 0.0, np.log1p(TOTAL)))

    for number, condition in enumerate(conditions):
        unknown = [name for name in condition["label"].split("+") if name not in seen]
        if unknown:
            (out / f"{number}.txt").write_text(f"{', '.join(unknown)} is not among the training perturbations\n")
            continue
        controls = log_normalised(given / f"controls-{number}.h5ad")
        controls.obs["is_control"] = True
        controls.uns["members"] = train.uns["members"]
        controls.obsm["X_pca"] = components.transform(controls.X).astype(np.float32)
        wanted = members(pd.Series([condition["label"]], index=["wanted"]), most)
        wanted["is_control"] = False
        # The split covariate only names the population that is moved.
        for table in (controls.obs, wanted):
            table["cell_type"] = pd.Categorical([train.obs["cell_type"].cat.categories[0]] * len(table))
        [moved] = model.predict(controls, wanted, sample_rep="X_pca").values()
        before, after = rates(controls.obsm["X_pca"]), rates(np.asarray(moved))
        np.savez(out / f"{number}.npz", before=before, after=after)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
