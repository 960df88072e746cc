"""Other packages that compute what a twin computes. Each is optional, and where it is missing the result says so."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from pf_bench.case import Absent, Side
from pf_bench.frameworks import names, torch_grad

__all__ = ["geomloss_energy", "pertpy_energy", "scperturb_energy", "scvi_step"]

EXTRA = 'pip install "perturb-forecast[bench]"'


def guarded(make: Callable[..., Side | Absent]) -> Callable[..., Side | Absent]:
    """A peer that cannot be set up is absent, and says why: other packages break without our doing."""

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Side | Absent:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make(*args, **options)
        except Exception as error:
            return Absent(f"failed: {type(error).__name__}: {error}")

    return made


def missing(*modules: str) -> Absent | None:
    """Absent when one of the modules is not installed."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return Absent(f"{', '.join(lacking)} not installed: {EXTRA}") if lacking else None


@guarded
def geomloss_energy(x: np.ndarray, y: np.ndarray, *, backend: str, device: str) -> Side | Absent:
    """geomloss SamplesLoss("energy"), which is half the energy distance; backend "tensorized" or "online"."""
    lacking = missing("geomloss", *(["pykeops"] if backend == "online" else []))
    if lacking:
        return lacking
    from geomloss import SamplesLoss  # type: ignore[import-not-found]

    loss = SamplesLoss("energy", backend=backend)
    return torch_grad(lambda x, y: 2.0 * loss(x, y), x, y, of=(0, 1), device=device)


def _cpu(call: Callable[[], Any], note: str) -> Side:
    return Side(call, lambda: names(call()), note=note)


@guarded
def pertpy_energy(x: np.ndarray, y: np.ndarray) -> Side | Absent:
    """The class behind pertpy's Distance("edistance")."""
    lacking = missing("pertpy")
    if lacking:
        return lacking
    from pertpy.tools import Distance  # type: ignore[import-not-found]

    distance = Distance("edistance")
    return _cpu(lambda: distance(x, y), "in NumPy, on the processor")


@guarded
def scperturb_energy(x: np.ndarray, y: np.ndarray) -> Side | Absent:
    """scPerturb's edist of an AnnData with two groups: squared distances, unbiased."""
    lacking = missing("scperturb")
    if lacking:
        return lacking
    import anndata
    import pandas as pd
    from scperturb import edist  # type: ignore[import-not-found]

    groups = np.repeat(["x", "y"], [len(x), len(y)])
    labels = pd.DataFrame({"group": groups}, index=np.arange(len(groups)).astype(str))
    adata = anndata.AnnData(np.zeros((len(labels), 1), np.float32), obs=labels)
    adata.obsm["X_pca"] = np.concatenate([x, y])

    def call() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(edist(adata, obs_key="group", verbose=False).loc["x", "y"])

    return _cpu(call, "in scikit-learn, on the processor")


@guarded
def scvi_step(batch: dict[str, np.ndarray], n_hidden: int, n_latent: int, *, device: str) -> Side | Absent:
    """A training step of scvi-tools' SCVI on the same counts: its module and loss, torch.optim.Adam, no loader."""
    lacking = missing("scvi")
    if lacking:
        return lacking
    import torch
    from scvi.module import VAE  # type: ignore[import-not-found]

    place = "cuda" if device == "gpu" else device
    torch.manual_seed(0)
    x = torch.tensor(batch["counts"], device=place)
    module: Any = VAE(
        n_input=x.shape[1],
        n_hidden=n_hidden,
        n_latent=n_latent,
        n_layers=1,
        dropout_rate=0.0,
        gene_likelihood="nb",
        use_observed_lib_size=True,
    ).to(place)
    module.train()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    zeros = torch.zeros((len(x), 1), dtype=torch.long, device=place)
    tensors = {"X": x, "batch": zeros, "labels": zeros}

    def call() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss = module(tensors)[2].loss
        loss.backward()
        optimiser.step()
        if device == "gpu":
            torch.cuda.synchronize()

    return Side(call, None, note="SCVI with one hidden layer of the same width: a like model, not the same function")
