"""A flow model of linear maps, whose every part has a closed form: for tests of what is built on a twin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from pf_core.batches import Vocabulary
from pf_core.config import NORMALISED_TOTAL, Config, DataConfig, FlowConfig, VAEConfig
from pf_core.flow_model import FlowModel
from pf_core.times import Axis

N_GENES, N_LATENT = 11, 3
GENES = tuple(f"GENE{i}" for i in range(N_GENES))
TISSUES = ("<unknown>", "blood", "skin")
PERTURBATIONS = ("<unknown>", "drug", "salt")
FIRST, LAST = 10.0, 12.0  # of training, in days
RATES = np.array([0.8, -0.5, 0.3])  # dz_k/ds = RATES_k z_k + (PUSH code)_k
SCALE = np.array([2.0, 0.5, 1.0])
RNG = np.random.default_rng(7)
ENCODE = RNG.normal(size=(N_GENES, N_LATENT)) / 3.0
DECODE = RNG.normal(size=(N_LATENT, N_GENES)) / 2.0
PUSH = 0.7 * RNG.normal(size=(len(PERTURBATIONS) + len(TISSUES), N_LATENT))


def flowed(z: np.ndarray, code: np.ndarray, ds: Any) -> np.ndarray:
    """Where a cell is after ds, by the solution of the linear equation."""
    grown = np.exp(RATES * np.asarray(ds, float)[..., None] if np.ndim(ds) else RATES * ds)
    return z * grown + code @ PUSH * (grown - 1.0) / RATES


class LinearBackend:
    """What FlowModel asks of a twin, in closed form. It notes the methods that were asked for."""

    name = "linear"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def encode(self, params, counts, tissue, config):
        z = np.log1p(counts) @ ENCODE
        return z, np.zeros_like(z)

    def decode(self, params, z, tissue, library, config):
        return library[:, None] * _share(z)

    def dispersion(self, params, tissue, config):
        return np.full(N_GENES, 2.0)

    def decode_jacobian_vector(self, params, z, direction, tissue, library, config):
        share, pushed = _share(z), direction @ DECODE
        return library[:, None] * share * (pushed - (share * pushed).sum(1, keepdims=True))

    def trajectory(self, params, z, times, condition, graph, config, *, method="rk4", n_steps=20, rtol=0, atol=0):
        steps = np.diff(times)
        assert (steps > 0).all() or (steps < 0).all(), "an integrator takes times of one direction"
        self.asked.append((method, n_steps))
        return np.stack([flowed(z, condition, time - times[0]) for time in times])

    def velocity(self, params, times, z, condition, graph, config):
        return z * RATES + condition @ PUSH

    def endpoint_jacobian(self, params, z, times, condition, graph, config, *, n_steps=20):
        return np.tile(np.diag(np.exp(RATES * (times[-1] - times[0]))), (len(z), 1, 1))

    def endpoint_gradient(self, params, counts, tissue, times, condition, graph, weights, config, *, n_steps=20):
        z = flowed(np.log1p(counts) @ ENCODE, condition, times[-1] - times[0])
        share = _share(z)
        slope = weights * NORMALISED_TOTAL * share / (1.0 + NORMALISED_TOTAL * share)
        at_end = (slope @ DECODE.T) - slope.sum(1, keepdims=True) * (share @ DECODE.T)
        return at_end * np.exp(RATES * (times[-1] - times[0])) @ ENCODE.T


def _share(z: np.ndarray) -> np.ndarray:
    weight = np.exp(z @ DECODE)
    return weight / weight.sum(1, keepdims=True)


def linear_model(**flow: Any) -> FlowModel:
    """A flow model without a run."""
    config = Config(
        system="flow",
        dtype="float64",
        data=DataConfig(genes=0),
        vae=VAEConfig(n_latent=N_LATENT),
        flow=FlowConfig(**{"pace": 0.0, "reach": 1.0, "bend": 0.0, **flow}),
    )
    vocabulary = Vocabulary(GENES, PERTURBATIONS, TISSUES, (), (), (0.0, 2.0, 1.0), (), ())
    params = {"flow.center": np.zeros(N_LATENT), "flow.scale": SCALE}
    run: Any = SimpleNamespace(path=Path("run"))
    return FlowModel(config, vocabulary, params, LinearBackend(), run, Axis(FIRST, LAST, "day"), {})  # type: ignore[arg-type]


def course(
    seed: int = 0, n: int = 17, *, drug: bool = True, tissues: tuple[str, ...] = ("blood", "skin")
) -> anndata.AnnData:
    """Control cells at days 10, 11 and 12, and under the drug at 11 and 12; n cells each, in every tissue."""
    rng = np.random.default_rng(seed)
    keys = [("control", day) for day in (10.0, 11.0, 12.0)] + [("drug@2", day) for day in (11.0, 12.0) if drug]
    rows = [(label, tissue, day) for tissue in tissues for label, day in keys for _ in range(n)]
    obs = pd.DataFrame(rows, columns=["perturbation", "tissue", "time"], index=[f"c{i}" for i in range(len(rows))])
    obs["time_unit"] = "day"
    rate = 2.0 + np.where(obs["perturbation"] == "control", 0.0, 1.0)[:, None] * np.arange(N_GENES) / 3.0
    rate = rate + (obs["time"].to_numpy()[:, None] - 10.0) * np.arange(N_GENES)[::-1] / 4.0
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(GENES)))
