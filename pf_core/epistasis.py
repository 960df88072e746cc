"""Combinations: does the order matter to the operators, and do real pairs do what their members do together?

Two different questions, side by side. The commutator asks the model whether A after B ends where B after A does; it is
0 for pure shifts, however they combine. The observed deviation asks the cells whether a pair is the sum of its members
on log-normalised means. Pairs with a large commutator are the ones whose effect depends on the cell's state, and there
addition has no reason to hold; but a deviation can also come without one (saturation), and the page says how the two
go together in the data at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pf_core.dataset import Dataset
from pf_core.errors import PredictionError
from pf_core.labels import CONTROL, condition_label
from pf_core.metrics import normalise
from pf_core.response import Controls, move, tissue_operators

if TYPE_CHECKING:
    from pf_core.model import Model

__all__ = ["Epistasis", "epistasis", "measured_pairs"]

LEAST = 5  # cells of a group in a context, for a mean and its error


@dataclass(frozen=True)
class Epistasis:
    """Two perturbations: what the operators and what the measured pair say. Unmeasured values are NaN."""

    first: str
    second: str
    commutator: float  # Frobenius norm of K_a K_b - K_b K_a as affine maps, mean over tissues
    relative: float  # rms over control cells of |K_a K_b z - K_b K_a z|, over the sum of the rms displacements
    predicted: float  # rms of |D_ab - D_a - D_b|, over the same: what the operator of the pair departs from the sum
    observed: float  # |m_ab - m_a - m_b + m_0|, noise removed, over |m_a - m_0| + |m_b - m_0|, noise removed
    excess: float  # squared deviation over its expectation under addition; about 1 where the pair is the sum
    n_cells: int  # cells of the measured pair that took part

    @property
    def measured(self) -> bool:
        return self.n_cells > 0


def measured_pairs(model: Model, dataset: Dataset) -> list[tuple[str, str]]:
    """Pairs in the data, at dose 1, whose members and controls are there too, and which the model can represent."""
    known, labels = set(model.vocabulary.perturbations[1:]), set(dataset.label)
    found = []
    for label in sorted(labels):
        parts = label.split(model.config.data.separator) if model.config.data.separator else [label]
        if len(parts) == 2 and set(parts) <= known and set(parts) <= labels:
            found.append((parts[0], parts[1]))
    return found


def epistasis(
    model: Model, pairs: Sequence[tuple[str, str]], controls: Controls, dataset: Dataset | None = None
) -> list[Epistasis]:
    """Commutators of pairs, beside the measured combination effects.

    Observed, per tissue and cell type with LEAST cells of A+B, A, B and control each: d = m_ab - m_a - m_b + m_0 of
    log-normalised means. The squared norm of d contains the variances of the four means, which are estimated from the
    cells and subtracted; `excess` is the ratio of the two. Contexts are weighted by their cells of the pair.

    Args:
        model: a trained model.
        pairs: two different single perturbations each.
        controls: from `control_cells`.
        dataset: cells with the model's genes; None leaves the observed part NaN.

    Raises:
        PredictionError: a pair of one perturbation, or a name that the model does not know.
    """
    for first, second in pairs:
        if first == second:
            raise PredictionError(f"{first!r} was given twice; two different perturbations make a pair")
    separator, z, tissue = model.config.data.separator, controls.z, controls.tissue
    together = {pair: f"{pair[0]}{separator}{pair[1]}" for pair in pairs}
    labels = list(dict.fromkeys([CONTROL, *(name for pair in pairs for name in pair), *together.values()]))
    found = tissue_operators(model, labels, controls.tissues)
    still = move(found, CONTROL, z, tissue)

    def rms(moved: np.ndarray) -> float:
        return float(np.sqrt((moved**2).sum(1).mean()))

    means = {} if dataset is None else _means(dataset, set(labels) | _canonical(model, together))
    out = []
    for pair in pairs:
        a, b = pair
        da, db, dab = (move(found, label, z, tissue) - still for label in (a, b, together[pair]))
        order = move(found, a, move(found, b, z, tissue), tissue) - move(found, b, move(found, a, z, tissue), tissue)
        scale = rms(da) + rms(db)
        norms = [found[a, name].commutator_norm(found[b, name]) for name in controls.tissues]
        label = condition_label(model.members(together[pair]), separator)
        observed, excess, n = _observed(means, a, b, label)
        relative, predicted = (rms(part) / scale if scale > 0 else float("nan") for part in (order, dab - da - db))
        out.append(Epistasis(a, b, float(np.mean(norms)), relative, predicted, observed, excess, n))
    return out


def _canonical(model: Model, together: dict[tuple[str, str], str]) -> set[str]:
    return {condition_label(model.members(label), model.config.data.separator) for label in together.values()}


Mean = tuple[np.ndarray, np.ndarray, int]  # mean (n_genes,), variance of the mean (n_genes,), cells


def _means(dataset: Dataset, labels: set[str]) -> dict[tuple[str, str, str], Mean]:
    """(label, tissue, cell type) -> mean of log-normalised cells, with its variance."""
    out: dict[tuple[str, str, str], Mean] = {}
    keys = list(zip(dataset.label, dataset.tissue, dataset.cell_type, strict=True))
    rows: dict[tuple[str, str, str], list[int]] = {}
    for place, key in enumerate(keys):
        if key[0] in labels:
            rows.setdefault(key, []).append(place)
    for key, places in rows.items():
        n = len(places)
        if n >= LEAST:
            cells = normalise(dataset.rows(np.array(places)))
            mean = np.asarray(cells.mean(0)).ravel()
            square = np.asarray(cells.multiply(cells).mean(0)).ravel()
            out[key] = (mean, (square - mean**2).clip(0) / (n - 1), n)
    return out


def _observed(means: dict[tuple[str, str, str], Mean], a: str, b: str, label: str) -> tuple[float, float, int]:
    deviation = noise = size_a = size_b = weight = 0.0
    n_cells = 0
    for (name, *context), (m_ab, v_ab, n) in means.items():
        keys = [(other, context[0], context[1]) for other in (a, b, CONTROL)]
        if name != label or not all(key in means for key in keys):
            continue
        (m_a, v_a, _), (m_b, v_b, _), (m_0, v_0, _) = (means[key] for key in keys)
        deviation += n * float(((m_ab - m_a - m_b + m_0) ** 2).sum())
        noise += n * float((v_ab + v_a + v_b + v_0).sum())
        size_a += n * float(((m_a - m_0) ** 2 - v_a - v_0).sum())
        size_b += n * float(((m_b - m_0) ** 2 - v_b - v_0).sum())
        weight, n_cells = weight + n, n_cells + n
    if not n_cells:
        return float("nan"), float("nan"), 0
    scale = np.sqrt(max(size_a, 0.0) / weight) + np.sqrt(max(size_b, 0.0) / weight)
    departure = np.sqrt(max(deviation - noise, 0.0) / weight)
    return (
        float(departure / scale) if scale > 0 else float("nan"),
        deviation / noise if noise > 0 else float("nan"),
        n_cells,
    )
