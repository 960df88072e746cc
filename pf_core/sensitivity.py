"""How the end of a way depends on its beginning: latent directions that grow or shrink, and genes that matter.

J is the derivative of a cell's last latent in its first, in units of the latents' standard deviations. Directions at
the start are eigenvectors of the mean of J^T J over cells: a push of one unit along the first grows most until the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pf_core.data import Dataset
from pf_core.errors import PredictionError, nearest

if TYPE_CHECKING:
    from pf_core.flow_model import FlowModel

__all__ = ["Direction", "Sensitivity", "sensitivity"]

N_DIRECTIONS = 4


@dataclass(frozen=True)
class Direction:
    """A latent direction at the start, what becomes of it, and the genes it stands for."""

    gain: float  # root mean square over cells of its length at the end, for length 1 at the start
    start: np.ndarray  # (n_latent,) in standard deviations
    end: np.ndarray  # (n_latent,) mean over cells, in standard deviations
    start_genes: np.ndarray  # (n_genes,) change of log1p counts per 10,000 for length 1, mean over cells
    end_genes: np.ndarray  # (n_genes,) the same at the end


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives of the end of a way."""

    n_cells: int
    singular: np.ndarray  # (n_cells, n_latent) singular values of J of every cell, the largest first
    log_volume: np.ndarray  # (n_cells,) log |det J|: above 0 neighbouring cells move apart, below 0 together
    directions: tuple[Direction, ...]
    target: str  # what `gradient` is the derivative of
    gradient: np.ndarray  # (n_genes,) mean over cells of d target / d log1p(counts at the start)
    spread: np.ndarray  # (n_genes,) standard deviation of it over cells
    varies: np.ndarray  # (n_genes,) standard deviation of log1p(counts) over the cells

    @property
    def effect(self) -> np.ndarray:
        """(n_genes,) change of the target where a gene's log1p counts are one standard deviation higher."""
        return self.gradient * self.varies

    def top(self, genes: Sequence[str], n: int = 20) -> list[tuple[str, float, float, float]]:
        """The n genes of the largest effect: (gene, effect, gradient, its spread)."""
        order = np.argsort(-np.abs(self.effect), kind="stable")[:n]
        return [(str(genes[i]), float(self.effect[i]), float(self.gradient[i]), float(self.spread[i])) for i in order]


def sensitivity(
    model: FlowModel,
    dataset: Dataset,
    cells: np.ndarray,
    from_time: float,
    to_time: float,
    condition: str,
    *,
    genes: Sequence[str] = (),
) -> Sensitivity:
    """Derivatives of where cells end in where they begin.

    Args:
        model: a trained flow model.
        dataset: with the model's genes.
        cells: (n,) indices; the cost is that of n_latent trajectories each.
        from_time, to_time: real units.
        condition: under which they move.
        genes: whose mean at the end the gradient is of; by default it is of how far cells come along the mean way from
            start to end (log1p counts per 10,000, projected on the mean change).

    Raises:
        PredictionError: an unknown gene, condition or tissue, or a time outside the trained range.
    """
    names = np.asarray(model.vocabulary.genes)
    for gene in genes:
        if gene not in names:
            raise PredictionError(f"gene {gene!r} is not one of the model; {nearest(gene, names)}")
    way = model.scaled([from_time, to_time])
    codes, tissue = (
        model.codes(condition, dataset.tissue[cells]),
        model.vocabulary.codes("tissues", dataset.tissue[cells]),
    )
    z0 = model.encode(dataset, cells)
    z1 = model.flow(z0, codes, way[0], way[1:])[0]
    before, after = model.log_profiles(z0, tissue), model.log_profiles(z1, tissue)
    if genes:
        weights, target = np.isin(names, list(genes)) / len(set(genes)), f"mean of {', '.join(genes)} at the end"
    else:
        change = (after - before).mean(0)
        length = float(np.linalg.norm(change))
        if not length > 0:
            raise PredictionError("the cells do not move, so nothing at the end depends on a direction; name genes")
        weights, target = change / length, "how far cells come along the mean way"
    counts = dataset.dense(cells, model.config.dtype)
    rest = (model.graph, weights.astype(model.config.dtype), model.config)
    gradient = np.concatenate(
        [
            model.backend.endpoint_gradient(
                model.params, counts[rows], tissue[rows], way.astype(z0.dtype), codes[rows], *rest
            )
            for rows in _blocks(len(cells))
        ]
    ).astype(np.float64)
    jacobian = np.concatenate(
        [
            model.backend.endpoint_jacobian(
                model.params, z0[rows], way.astype(z0.dtype), codes[rows], model.graph, model.config
            )
            for rows in _blocks(len(cells))
        ]
    ).astype(np.float64)
    scale = np.asarray(model.params["flow.scale"], np.float64)
    jacobian = jacobian * scale[None, None, :] / scale[None, :, None]
    singular = np.linalg.svd(jacobian, compute_uv=False)
    return Sensitivity(
        len(cells),
        singular,
        np.log(np.maximum(singular, np.finfo(float).tiny)).sum(1),
        _directions(model, jacobian, z0, z1, tissue, scale),
        target,
        gradient.mean(0),
        gradient.std(0),
        np.log1p(counts.astype(np.float64)).std(0),
    )


BLOCK = 64  # cells whose Jacobians are made at once


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _directions(
    model: FlowModel, jacobian: np.ndarray, z0: np.ndarray, z1: np.ndarray, tissue: np.ndarray, scale: np.ndarray
) -> tuple[Direction, ...]:
    values, vectors = np.linalg.eigh(np.einsum("nij,nik->jk", jacobian, jacobian) / len(jacobian))
    found = []
    for k in np.argsort(-values, kind="stable")[:N_DIRECTIONS]:
        start = vectors[:, k]
        start = start * np.sign(start[np.abs(start).argmax()])  # the sign of an eigenvector is free
        ends = jacobian @ start
        pushed = [
            model.slopes(z, direction * scale, tissue).mean(0)
            for z, direction in ((z0, np.tile(start, (len(z0), 1))), (z1, ends))
        ]
        found.append(Direction(float(np.sqrt(max(values[k], 0.0))), start, ends.mean(0), *pushed))
    return tuple(found)
