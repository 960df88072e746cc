"""Counts of cells on a known flow that branches: a time course whose velocity field, network and decoder are known.

Cells are points z of a latent space that move by dz/ds = v(z, condition), s from 0 at the first to 1 at the last time:

    v_0 = SPEED                                     progress
    v_1 = RATE z_1 (z_0 - z_1^2) + push             a pitchfork: one stable branch while z_0 < 0, then +-sqrt(z_0)
    v_k = -RELAX z_k                                the other dimensions

push is 0 for control, whose cells part into both branches, and positive for the drug, which sends cells to the upper
one. All cells start at N(START, SPREAD^2) as control cells; the conditions part from there, so that the first time
point has controls only. Every time point is a fresh sample, because measuring destroys a cell. Counts are negative
binomial around library * softmax(z W + bias + tissue). Columns of W follow a signed network: a target's column is the
signed mean of its regulators' columns plus noise of its own, so that an edge says how expression goes together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core.labels import CONTROL
from pf_core.noise import generator
from pf_core.outputs import BLOCK, Csr, sample
from pf_core.simulate import LIBRARY_SIGMA

__all__ = ["draw", "log_profile_velocity", "network", "profile", "simulate_flow", "trajectory", "velocity"]

DRUG = "drug"
CONDITIONS = (CONTROL, DRUG)
HOURS = (0.0, 12.0, 24.0)
SPEED, RATE, RELAX, PUSH = 2.0, 6.0, 1.0, 1.5
START, SPREAD = -0.3, 0.25  # of progress at the first time, and of all latents there
STEPS = 200  # of Runge-Kutta over the whole course: its error is far below the counts' noise
Truth = dict[str, Any]


def simulate_flow(
    seed: int = 0,
    *,
    n_genes: int = 120,
    n_latent: int = 4,
    n_cells: int = 150,
    n_tissues: int = 1,
    n_regulators: int = 12,
    times: Sequence[float] = HOURS,
    library: float = 1000.0,
) -> Any:
    """Counts of a simulated time course under two conditions.

    Args:
        seed: the same seed gives the same cells.
        n_genes: the first n_regulators of them are the network's regulators.
        n_latent: at least 2.
        n_cells: per time, condition and tissue.
        n_tissues: each shifts the expression of every gene by an amount of its own.
        n_regulators: 0 for no network.
        times: rising, in hours.
        library: median counts per cell.

    Returns:
        AnnData with CSR float32 counts, shuffled; obs: perturbation ("control" at every time, "drug" after the first),
        time, time_unit, tissue, cell_type (progenitor, upper, lower); obsm["latent"]: true latents (n, n_latent);
        uns["truth"]: plain arrays, what `velocity`, `trajectory`, `profile` and `draw` take.

    Raises:
        ValueError: sizes or times that do not allow the design.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    hours = np.asarray(times, np.float64)
    if n_latent < 2 or not 0 <= n_regulators < n_genes or min(n_cells, n_tissues) < 1:
        raise ValueError(
            f"n_latent={n_latent}, n_regulators={n_regulators}, n_genes={n_genes}, n_cells={n_cells},"
            f" n_tissues={n_tissues}; 2 latents, fewer regulators than genes, and a cell and a tissue were wanted"
        )
    if len(hours) < 2 or not (np.diff(hours) > 0).all():
        raise ValueError(f"times={list(times)}; at least two rising times were wanted")
    truth = _truth(seed, n_genes, n_latent, n_tissues, n_regulators, hours, library)
    counts, latents, rows = [], [], []
    for tissue in range(n_tissues):
        for hour in hours:
            for condition in CONDITIONS if hour > hours[0] else (CONTROL,):
                cells, z = _cells(truth, condition, hour, tissue, n_cells, seed, "simulate_flow")
                counts.append(cells)
                latents.append(z)
                rows += [(condition, hour, "hour", f"tissue{tissue + 1}", _branch(one)) for one in z]
    order = generator(seed, "simulate_flow.order").permutation(len(rows))
    obs = pd.DataFrame([rows[index] for index in order])
    obs.columns = pd.Index(["perturbation", "time", "time_unit", "tissue", "cell_type"])
    obs.index = pd.Index([f"cell{number}" for number in range(len(rows))])
    genes = [f"TF{number + 1}" for number in range(n_regulators)]
    genes += [f"gene{number}" for number in range(n_regulators, n_genes)]
    stacked: Csr = sparse.vstack(counts, format="csr")
    adata = anndata.AnnData(stacked[order], obs=obs, var=pd.DataFrame(index=pd.Index(genes)), uns={"truth": truth})
    adata.obsm["latent"] = np.concatenate(latents)[order]
    return adata


def velocity(truth: Truth, z: np.ndarray, condition: str) -> np.ndarray:
    """dz/ds (n, n_latent) of latents z under a condition; s is 0 at the first and 1 at the last time."""
    if condition not in CONDITIONS:
        raise ValueError(f"{condition!r} is none of {', '.join(CONDITIONS)}")
    z, field = np.asarray(z, np.float64), truth["field"]
    v = -float(field["relax"]) * z
    v[:, 0] = field["speed"]
    v[:, 1] = field["rate"] * z[:, 1] * (z[:, 0] - z[:, 1] ** 2) + (field["push"] if condition == DRUG else 0.0)
    return v


def trajectory(truth: Truth, z: np.ndarray, times: Sequence[float], condition: str) -> np.ndarray:
    """(n_times, n, n_latent): where latents that are z at the first of these times, in hours, are at each."""
    hours = np.asarray(truth["times"], np.float64)
    s = (np.asarray(times, np.float64) - hours[0]) / (hours[-1] - hours[0])
    out = [np.asarray(z, np.float64)]
    for before, after in itertools.pairwise(s):
        n_steps = max(1, int(np.ceil(STEPS * abs(after - before))))
        out.append(_runge_kutta(truth, out[-1], (after - before) / n_steps, n_steps, condition))
    return np.stack(out)


def _runge_kutta(truth: Truth, z: np.ndarray, h: float, n_steps: int, condition: str) -> np.ndarray:
    for _ in range(n_steps):
        k1 = velocity(truth, z, condition)
        k2 = velocity(truth, z + 0.5 * h * k1, condition)
        k3 = velocity(truth, z + 0.5 * h * k2, condition)
        k4 = velocity(truth, z + h * k3, condition)
        z = z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return z


def profile(truth: Truth, z: np.ndarray, tissue: int) -> np.ndarray:
    """(n, n_genes) share of each gene in the counts expected of latents z; tissue from 0."""
    logits = np.asarray(z, np.float64) @ truth["decoder_weight"] + truth["decoder_bias"] + truth["tissues"][tissue]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def log_profile_velocity(truth: Truth, z: np.ndarray, condition: str, tissue: int) -> np.ndarray:
    """(n, n_genes) d log(profile)/ds: the flow as genes show it, whatever latent space a model has found."""
    moved = velocity(truth, z, condition) @ truth["decoder_weight"]
    return moved - (profile(truth, z, tissue) * moved).sum(axis=1, keepdims=True)


def network(truth: Truth) -> Any:
    """The signed network as a DataFrame of source, target and sign, as `pf train --grn` reads it from CSV."""
    import pandas as pd

    return pd.DataFrame({name: list(truth["network"][name]) for name in ("source", "target", "sign")})


def draw(truth: Truth, condition: str, time: float, tissue: int, n: int, seed: int) -> tuple[Csr, np.ndarray]:
    """Fresh cells at any time of the course, measured or not: (n, n_genes) CSR counts, (n, n_latent) true latents."""
    return _cells(truth, condition, time, tissue, n, seed, "draw")


def _truth(
    seed: int, n_genes: int, n_latent: int, n_tissues: int, n_regulators: int, hours: np.ndarray, library: float
) -> Truth:
    rng = generator(seed, "simulate_flow.truth")
    weight = 0.5 * rng.standard_normal((n_latent, n_genes))
    edges: list[tuple[int, int, int]] = []
    for gene in range(n_regulators, n_genes) if n_regulators else ():
        regulators = rng.permutation(n_regulators)[: rng.integers(1, min(3, n_regulators) + 1)]
        signs = rng.choice([-1, 1], len(regulators), p=[0.3, 0.7])
        weight[:, gene] = (weight[:, regulators] * signs).mean(axis=1) + 0.3 * weight[:, gene]
        edges += [(int(regulator), gene, int(sign)) for regulator, sign in zip(regulators, signs, strict=True)]
    name = lambda gene: f"TF{gene + 1}" if gene < n_regulators else f"gene{gene}"
    return {
        "field": {"speed": SPEED, "rate": RATE, "relax": RELAX, "push": PUSH},
        "start": np.array([START] + [0.0] * (n_latent - 1)),
        "spread": SPREAD,
        "times": hours,
        "decoder_weight": weight,
        "decoder_bias": rng.standard_normal(n_genes),
        "tissues": 0.7 * rng.standard_normal((n_tissues, n_genes)) * (np.arange(n_tissues) > 0)[:, None],
        "r": np.exp(np.log(4.0) + 0.5 * rng.standard_normal(n_genes)),
        "library": float(library),
        "network": {
            "source": np.array([name(source) for source, _, _ in edges], dtype=object),
            "target": np.array([name(target) for _, target, _ in edges], dtype=object),
            "sign": np.array([sign for _, _, sign in edges], np.int64),
        },
    }


def _cells(
    truth: Truth, condition: str, time: float, tissue: int, n: int, seed: int, name: str
) -> tuple[Csr, np.ndarray]:
    from scipy import sparse

    rng = generator(seed, f"{name}.{condition}.{time:g}.{tissue}")
    start = truth["start"] + truth["spread"] * rng.standard_normal((n, len(truth["start"])))
    first = float(np.asarray(truth["times"])[0])
    z = trajectory(truth, start, [first, time], condition)[-1]
    library = truth["library"] * np.exp(LIBRARY_SIGMA * rng.standard_normal(n))
    blocks = []
    for begin in range(0, n, BLOCK):
        rows = slice(begin, begin + BLOCK)
        blocks.append(sample(library[rows, None] * profile(truth, z[rows], tissue), truth["r"], rng))
    return sparse.csr_matrix(sparse.vstack(blocks)), z


def _branch(z: np.ndarray) -> str:
    if z[0] < 0.5 or abs(z[1]) < 0.5 * np.sqrt(z[0]):  # before the branches part, or between them
        return "progenitor"
    return "upper" if z[1] > 0 else "lower"
