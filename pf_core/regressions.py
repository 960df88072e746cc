"""Regressions of mean changes on what is known of a perturbation: two baselines that can answer for unseen ones.

Both predict the change of the log1p mean profile against the controls of the context, and hand it to the same output as
every other baseline. Both are fitted on the training profiles, one row per condition and context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pf_core.baselines import Declined, Prediction, Predictor, Profile, Task, control_profile, log_profile, shifted
from pf_core.config import MIN_MATCHED
from pf_core.labels import CONTROL

__all__ = ["Vectors", "kernel_ridge", "linear"]

COMPONENTS = 10  # K of the linear baseline
RIDGE = 0.1  # of both baselines
Vectors = Mapping[str, np.ndarray]  # (n_features,) by the name of a single perturbation


def _vector(members: Iterable[str], vectors: Vectors) -> np.ndarray | Declined:
    """The sum of the members' vectors; a combination is the sum of its parts."""
    members = tuple(members)
    for name in members:
        if name not in vectors:
            return Declined(f"{name} is not among the genes and has no features")
    return np.sum([vectors[name] for name in members], axis=0)


def _changes(known: Iterable[Profile]) -> list[tuple[Profile, Profile]]:
    """Training conditions with the controls of their context."""
    known = list(known)
    controls = {(item.tissue, item.cell_type): item for item in known if item.label == CONTROL}
    found = [(item, controls.get((item.tissue, item.cell_type))) for item in known if item.label != CONTROL]
    return [(item, control) for item, control in found if control is not None]


def linear(
    known: Iterable[Profile],
    members: Mapping[str, tuple[str, ...]],
    genes: Iterable[str],
    *,
    features: Vectors | None = None,
    n_components: int = COMPONENTS,
    ridge: float = RIDGE,
) -> Predictor:
    """Y = G W P^T + b of Ahlmann-Eltze, Huber and Anders (2025), doi:10.1038/s41592-025-02772-6.

    Y (n_genes, n_conditions) are the training changes, controls included with change and embedding 0 as in the
    authors' code; b their mean over conditions; G (n_genes, K) the scores of the genes on the leading principal
    components of the training log1p profiles, centred per condition; the row of P of a perturbation is the row of G of
    the gene it is named after, or its features; a combination has the sum of its members' rows.
    W = (G^T G + ridge)^-1 G^T (Y - b) P (P^T P + ridge)^-1.

    Conditions without an embedding are left out of the fit. Declines for them, and where fewer than two remain.

    Args:
        known: profiles of the training cells, over all genes.
        members: names of the single perturbations of every training label.
        genes: (n_genes,) names.
        features: vectors by perturbation, instead of rows of G.
        n_components: K, at most what the training conditions span.
        ridge: of both sides.
    """
    known = list(known)
    controls = [item for item in known if item.label == CONTROL]
    logs = np.stack([log_profile(item.mean) for item in known], axis=1)
    centred = logs - logs.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    n_components = min(n_components, int(np.sum(sizes > 1e-9 * max(sizes[0], 1e-300))))
    G = left[:, :n_components] * sizes[:n_components]
    vectors = dict(zip(genes, G, strict=True)) if features is None else features
    used: list[tuple[np.ndarray, np.ndarray]] = []
    for item, control in _changes(known):
        vector = _vector(members[item.label], vectors)
        if not isinstance(vector, Declined):
            used.append((log_profile(item.mean) - log_profile(control.mean), vector))
    if len(used) < 2:
        return lambda task: Declined("fewer than two training conditions are named after a gene or have features")
    zero = (np.zeros(len(G)), np.zeros(len(used[0][1])))
    Y, P = (np.stack(part) for part in zip(*used, *[zero] * len(controls), strict=True))
    b = Y.mean(axis=0)
    left_side = G.T @ G + ridge * np.eye(G.shape[1])
    right_side = P.T @ P + ridge * np.eye(P.shape[1])
    W = np.linalg.solve(left_side, G.T @ (Y - b).T @ P)
    W = np.linalg.solve(right_side, W.T).T

    def predict(task: Task) -> Prediction | Declined:
        vector = _vector(task.members, vectors)
        if isinstance(vector, Declined):
            return vector
        return shifted(task, G @ (W @ vector) + b, f"linear in {len(used)} training conditions")

    return predict


def kernel_ridge(
    known: Iterable[Profile],
    members: Mapping[str, tuple[str, ...]],
    *,
    features: Vectors | None = None,
    ridge: float = RIDGE,
) -> Predictor:
    """Kernel ridge regression of pseudobulk changes on perturbation and context (scikit-learn's KernelRidge).

    The kernel is k = <p, p'> exp(-gamma |c - c'|^2): p holds a 1 for each member (or is the sum of the members'
    features, divided by their mean length), c is the log1p mean profile of the context's controls, and gamma is one
    over the median squared distance between different training contexts. What is regressed is the change less its
    weighted mean over training. A training condition of n_c control and n_p perturbed cells weighs n / (n +
    MIN_MATCHED), n = n_c n_p / (n_c + n_p), as in `pf_core.baselines.Shifts`.

    Declines where a member has neither training cells nor features.

    Args:
        known: profiles of the training cells.
        members: names of the single perturbations of every training label.
        features: vectors by perturbation.
        ridge: added to the diagonal of the kernel.
    """
    from sklearn.kernel_ridge import KernelRidge

    pairs = [
        (item, control) for item, control in _changes(known) if features is None or _known(item, members, features)
    ]
    if not pairs:
        return lambda task: Declined("there is no training condition with controls in its context")
    if features is None:
        names = sorted({name for item, _ in pairs for name in members[item.label]})
        vectors: Vectors = dict(zip(names, np.eye(len(names)), strict=True))
    else:
        length = float(np.mean([np.linalg.norm(vector) for vector in features.values()])) or 1.0
        vectors = {name: np.asarray(vector) / length for name, vector in features.items()}
    P = np.stack([np.sum([vectors[name] for name in members[item.label]], axis=0) for item, _ in pairs])
    C = np.stack([log_profile(control.mean) for _, control in pairs])
    Y = np.stack([log_profile(item.mean) for item, _ in pairs]) - C
    n = np.array([item.n_cells * control.n_cells / (item.n_cells + control.n_cells) for item, control in pairs])
    weight = n / (n + MIN_MATCHED)
    centre = np.average(Y, axis=0, weights=weight)
    squares = _squares(C, C)
    apart = squares[squares > 1e-9 * max(float(squares.max()), 1e-300)]
    gamma = 1.0 / float(np.median(apart)) if apart.size else 0.0  # one context: nothing to tell apart
    settings: Any = {"alpha": ridge}  # its stub says int
    fitted = KernelRidge(kernel="precomputed", **settings)
    fitted.fit((P @ P.T) * np.exp(-gamma * squares), Y - centre, sample_weight=weight)

    def predict(task: Task) -> Prediction | Declined:
        for name in task.members:
            if name not in vectors:
                return Declined(f"{name} is not among the training perturbations and has no features")
        p = np.sum([vectors[name] for name in task.members], axis=0)
        c = log_profile(control_profile(task))
        kernel = (p @ P.T)[None] * np.exp(-gamma * _squares(c[None], C))
        change = centre + np.asarray(fitted.predict(kernel))[0]
        return shifted(task, change, f"kernel ridge on {len(pairs)} training conditions")

    return predict


def _known(item: Profile, members: Mapping[str, tuple[str, ...]], features: Vectors) -> bool:
    return all(name in features for name in members[item.label])


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) squared Euclidean distances, by differences."""
    from scipy.spatial.distance import cdist

    return cdist(x, y, "sqeuclidean")
