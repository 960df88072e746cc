"""The E-distances of the field: one name, six different numbers.

All are 2 E|X - Y|^p - E|X - X'|^p - E|Y - Y'|^p of two sets of cells, times a factor. They differ in the power p
(Euclidean or squared Euclidean distances), in whether the within terms count a cell's distance to itself (V, divided by
n^2) or not (U, divided by n(n-1)), in the factor, and in what a cell is (principal components, all genes, a latent).
None takes a root. `edistance` reproduces each of them by the package's name; read in the sources of these versions:

| kind        | package and version                     | p | within | factor | cells are                    |
|-------------|-----------------------------------------|---|--------|--------|------------------------------|
| "scperturb" | scperturb 0.1.0, edist                  | 2 | U      | 1      | X_pca                        |
| "pertpy"    | pertpy 1.0.3, Distance                  | 1 | V      | 1      | X_pca                        |
| "rapids"    | rapids-singlecell 0.14.1, Distance      | 1 | U      | 1      | X_pca                        |
| "cell-eval" | cell-eval 0.8.2, pearson_edistance      | 1 | V      | 1      | log-normalised, all genes    |
| "cellflow"  | cellflow-tools 0.0.9, compute_e_distance | 2 | V     | 1      | what the caller passes       |
| "state"     | arc-state 0.11.1 with geomloss 0.3.1    | 1 | V      | 1/2    | the model's output           |

With p = 2 the V form is exactly 2 |mean(x) - mean(y)|^2: it sees means and nothing else; the U form differs from it by
the sampling variance of the two means, and can be negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pf_core.metrics import sum_of_distances

__all__ = ["KINDS", "Definition", "Kind", "edistance"]

Kind = Literal["scperturb", "pertpy", "rapids", "cell-eval", "cellflow", "state"]


@dataclass(frozen=True)
class Definition:
    """What a package computes: `factor` x (2 E|X-Y|^power - E|X-X'|^power - E|Y-Y'|^power).

    estimator "u" or "v" names the within terms; floor is the least distance a pair can have; representation says what
    the package measures by default; source is the package and version it was read in.
    """

    power: Literal[1, 2]
    estimator: Literal["u", "v"]
    representation: str
    source: str
    factor: float = 1.0
    floor: float = 0.0


KINDS: dict[Kind, Definition] = {
    "scperturb": Definition(2, "u", "X_pca", "scperturb 0.1.0"),
    "pertpy": Definition(1, "v", "X_pca", "pertpy 1.0.3"),
    "rapids": Definition(1, "u", "X_pca", "rapids-singlecell 0.14.1"),
    "cell-eval": Definition(1, "v", "log-normalised expression, all genes", "cell-eval 0.8.2"),
    "cellflow": Definition(2, "v", "as passed", "cellflow-tools 0.0.9"),
    # geomloss takes sqrt(max(|x - y|^2, 1e-8)), so a cell is 1e-4 away from itself.
    "state": Definition(1, "v", "the model's output", "arc-state 0.11.1 with geomloss 0.3.1", 0.5, 1e-4),
}


def edistance(x: np.ndarray, y: np.ndarray, *, kind: Kind) -> float:
    """The E-distance of two sets of cells as a package of the field computes it.

    The representation is the caller's: x and y are what the package would be given (see `KINDS[kind].representation`).
    In float64; packages that work in float32 (cellflow, state, rapids on float32 input) differ by their rounding.

    Args:
        x: (n, d) one set of cells.
        y: (m, d) the other.
        kind: whose definition; there is no default, because there is no common one.

    Returns:
        The distance. "scperturb" and "rapids" can be negative.

    Raises:
        ValueError: the kind is unknown, shapes do not match, values are not finite, or there are too few cells.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; one of {', '.join(map(repr, KINDS))} was wanted")
    definition = KINDS[kind]
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; (n, d) and (m, d) were wanted")
    least = 2 if definition.estimator == "u" else 1
    if min(len(x), len(y)) < least:
        raise ValueError(f"x has {len(x)} cells and y {len(y)}; kind={kind!r} needs {least} of each")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("x or y holds values that are not finite")

    def total(a: np.ndarray, b: np.ndarray) -> float:
        return sum_of_distances(a, b, "euclidean" if definition.power == 1 else "sqeuclidean", floor=definition.floor)

    def within(a: np.ndarray) -> float:
        return total(a, a) / (len(a) * (len(a) - 1 if definition.estimator == "u" else len(a)))

    return definition.factor * (2.0 * total(x, y) / (len(x) * len(y)) - within(x) - within(y))
