"""Where training starts: the decoder at the mean profile, the operators at the shifts of the training conditions.

A random start leaves the condition encoder to find the size of every shift. Here the shifts (or, with
"least_squares", whole affine operators) of all training conditions are factorised into the bases, and the last layers
of alpha and beta are solved so that each condition begins with its own coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from pf_core.backends import Arrays
from pf_core.config import R_MAX, OperatorConfig, VAEConfig
from pf_core.data import Dataset, Group
from pf_core.initial import Parameters
from pf_core.labels import CONTROL

RIDGE = 1e-3  # of the mean squared hidden activation, for the last layers
START_R_MIN, START_R_MAX = 0.1, 100.0  # moment estimates beyond are noise
SHRINKAGE = 0.1  # covariances of a condition towards the pooled covariance


def start_vae(
    params: Parameters,
    dataset: Dataset,
    cells: np.ndarray,
    config: VAEConfig,
    *,
    prefix: str = "vae",
    also: Sequence[np.ndarray] = (),
) -> Parameters:
    """The VAE's parameters with the decoder's bias at the mean profile and log_r at its moment estimate.

    A gene's bias and dispersion would otherwise have to travel from 0 at the optimiser's step length.

    Args:
        params: initial values, canonical names.
        dataset: with the model's genes.
        cells: training cells.
        config: the VAE's settings.
        prefix: of the VAE's parameters, "vae" or "cvae".
        also: (n_cells,) arrays that part contexts further, beside condition, tissue and cell type.
    """
    params = dict(params)
    library = dataset.library()
    depth = library[cells].mean()
    names = [name[cells] for name in (dataset.label, dataset.tissue, dataset.cell_type, *also)]
    _, context = np.unique(
        np.stack([np.unique(name, return_inverse=True)[1] for name in names]), axis=1, return_inverse=True
    )
    n = np.bincount(context)[:, None]
    first, second, poisson = np.zeros((3, len(n), dataset.n_genes))
    place = 0
    for block, rows in dataset.blocks(cells):
        scale = (depth / library[block])[:, None]
        scaled = rows.multiply(scale).tocsr()
        here = context[place : place + len(block)]
        member = sparse.csr_matrix((np.ones(len(block)), (here, np.arange(len(block)))), (len(n), len(block)))
        first += (member @ scaled).toarray()
        second += (member @ scaled.multiply(scaled)).toarray()
        poisson += (member @ scaled.multiply(scale)).toarray()
        place += len(block)
    # Half a count over all cells keeps genes that training cells never show away from log(0).
    mean = np.maximum(first.sum(0), 0.5) / len(cells)
    if config.scale == "library":
        params[f"{prefix}.decoder.mean.bias"] = np.log(mean / mean.sum())
    else:
        params[f"{prefix}.decoder.mean.bias"] = mean + np.log(-np.expm1(-mean))  # inverse of softplus
    # Variance within contexts beyond Poisson's is sum m^2 / r: what differs between contexts is for z to explain.
    squares = (first**2 / n).sum(0)
    excess = np.maximum((second - first**2 / n - poisson).sum(0), squares / R_MAX)
    log_r = np.log(np.clip(squares / np.maximum(excess, 1e-300), START_R_MIN, START_R_MAX))
    name = f"{prefix}.decoder.log_r"
    params[name] = np.broadcast_to(log_r, params[name].shape).copy()
    return params


def start_operators(
    params: Parameters,
    latents: np.ndarray,
    groups: Sequence[Group],
    inputs: Arrays,
    config: OperatorConfig,
) -> Parameters:
    """The parameters of condition encoder and operators with bases and last layers solved.

    Args:
        params: initial values, canonical names.
        latents: (n_cells, n_latent) posterior means.
        groups: training conditions, control groups included.
        inputs: batches.conditions(groups), the rows that the condition encoder reads.
        config: start = "identity" leaves params as they are; "shift" starts at A = I and the mean shift of every
            condition; "least_squares" starts at the affine map between the (shrunk) Gaussians of both sides.
    """
    if config.start == "identity":
        return dict(params)
    params = dict(params)
    n_latent = latents.shape[1]
    theta = _theta(params, inputs)
    pooled = np.cov(latents.T) + 1e-6 * np.eye(n_latent)
    maps, shifts = [], []
    for group in groups:
        x, y = latents[group.controls], latents[group.cells]
        matrix = np.eye(n_latent)
        if config.start == "least_squares" and group.label != CONTROL:
            matrix = gaussian_map(covariance(x, pooled), covariance(y, pooled))
        maps.append((matrix - np.eye(n_latent)).ravel())
        shifts.append(y.mean(0) - matrix @ x.mean(0) if group.label != CONTROL else np.zeros(n_latent))
    weights = np.sqrt([float(len(group.cells)) for group in groups])
    u, beta = _factorise(np.array(shifts), config.n_bases, params["operators.u"])
    params["operators.u"] = u
    _solve_last_layer(params, "operators.beta", theta, beta, weights)
    if config.start == "least_squares":
        bases, alpha = _factorise(np.array(maps), config.n_bases, params["operators.B"].reshape(config.n_bases, -1))
        params["operators.B"] = bases.reshape(config.n_bases, n_latent, n_latent)
    else:
        alpha = np.zeros((len(groups), config.n_bases))
    _solve_last_layer(params, "operators.alpha", theta, alpha, weights)
    return params


def _theta(params: Parameters, inputs: Arrays) -> np.ndarray:
    """The condition encoder at its initial values, in NumPy."""
    if "conditions.perturbation.map" in params:
        table = params["conditions.features"] @ params["conditions.perturbation.map"]
    else:
        table = params["conditions.perturbation.table"]
    perturbation = (table[inputs["perturbations"]] * inputs["doses"][..., None]).sum(1)
    tissue = params["conditions.tissue.table"][inputs["tissue"]]
    joined = np.concatenate([perturbation, tissue, inputs["batch"], inputs["covariates"]], axis=1)
    return joined @ params["conditions.theta.weight"] + params["conditions.theta.bias"]


def covariance(z: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """A condition's covariance, shrunk towards the pooled one, more so where cells are few."""
    n, d = z.shape
    share = max(SHRINKAGE, d / (d + n))
    return (1.0 - share) * (np.cov(z.T) if n > 1 else pooled) + share * pooled


def gaussian_map(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The optimal-transport map between centred Gaussians, symmetric positive definite."""

    def root(matrix: np.ndarray, power: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.maximum(values, 1e-12) ** power) @ vectors.T

    half, inverse = root(source, 0.5), root(source, -0.5)
    return inverse @ root(half @ target @ half, 0.5) @ inverse


def _factorise(rows: np.ndarray, n_bases: int, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, p) as coefficients (n, n_bases) times bases (n_bases, p); bases beyond the rank keep their values."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    rank = min(n_bases, int((values > 1e-8 * max(values.max(initial=0.0), 1e-12)).sum()))
    bases, coefficients = rest.copy(), np.zeros((len(rows), n_bases))
    # Both factors carry the root of the singular value, so that neither side's gradient dwarfs the other's.
    root = np.sqrt(values[:rank])
    bases[:rank] = root[:, None] * right[:rank]
    coefficients[:, :rank] = left[:, :rank] * root
    return bases, coefficients


def _solve_last_layer(
    params: Parameters, name: str, theta: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> None:
    """Ridge regression of the targets on the hidden units, written into the layer's weight and bias."""
    hidden = np.maximum(theta @ params[f"{name}.hidden.weight"] + params[f"{name}.hidden.bias"], 0.0)
    design = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1) * weights[:, None]
    ridge = RIDGE * np.mean(design**2) * np.eye(design.shape[1])
    solution = np.linalg.solve(design.T @ design + ridge, design.T @ (targets * weights[:, None]))
    params[f"{name}.out.weight"], params[f"{name}.out.bias"] = solution[:-1], solution[-1]
