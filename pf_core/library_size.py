"""How the counts of a cell change with a condition, which decoders that are given the library cannot say.

The mean log library of the cells of condition l in context c differs from that of the context's controls by

    y_lc = sum_m dose_m e_m + f_l + g_lc + error_lc,   e_m ~ N(0, s_e^2), f_l ~ N(0, s_f^2), g_lc ~ N(0, s_g^2)

with m the perturbations in l, doses relative to the largest in training, and error_lc of known sampling variance. The
effects are their posterior means (Henderson 1975, doi:10.2307/2529430), averaged over the three variances by likelihood
on a grid. What is small against its error is shrunk towards no change. A condition takes to another context
e and f; a combination that training did not see takes the e of its members. What the training conditions cannot tell
apart (e and f without combinations, f and g in a single context) shares alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pf_core.labels import Members, condition_label

__all__ = ["LibraryChanges", "Observed", "library_changes"]

Context = tuple[str, str]  # tissue, cell type
VARIANCES = (1e-5, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # of the log library, for each kind of effect


@dataclass(frozen=True)
class Observed:
    """The change of the mean log library of one condition in one context, and its sampling variance."""

    members: Members
    context: Context
    value: float
    variance: float


@dataclass(frozen=True)
class LibraryChanges:
    """Effects on the log library: of perturbations at the largest dose, of conditions, of conditions in a context."""

    largest: dict[str, float] = field(default_factory=dict)  # dose of each perturbation
    perturbation: dict[str, float] = field(default_factory=dict)
    condition: dict[str, float] = field(default_factory=dict)
    own: dict[str, dict[Context, float]] = field(default_factory=dict)

    def of(self, members: Members, context: Context) -> float:
        """The change of the log library of cells of this context; 0 for what training did not see."""
        label = condition_label(members)
        parts = [self.perturbation.get(name, 0.0) * dose / self.largest.get(name, 1.0) for name, dose in members]
        return sum(parts) + self.condition.get(label, 0.0) + self.own.get(label, {}).get(context, 0.0)


def library_changes(observed: Sequence[Observed]) -> LibraryChanges:
    """Fit the mixed model.

    Args:
        observed: one entry per condition and context, sampling variances positive.
    """
    from scipy import sparse

    if not observed:
        return LibraryChanges()
    largest: dict[str, float] = {}
    for one in observed:
        for name, dose in one.members:
            largest[name] = max(largest.get(name, 0.0), dose)
    names = {name: column for column, name in enumerate(sorted(largest))}
    labels = [condition_label(one.members) for one in observed]
    columns = {label: len(names) + column for column, label in enumerate(sorted(set(labels)))}
    entries = [
        (row, names[name], dose / largest[name]) for row, one in enumerate(observed) for name, dose in one.members
    ]
    entries += [(row, columns[label], 1.0) for row, label in enumerate(labels)]
    rows, cols, weights = (np.array(part) for part in zip(*entries, strict=True))
    design: Any = sparse.csr_matrix((weights, (rows, cols)), shape=(len(observed), len(names) + len(columns)))
    y, errors = (np.array([getattr(one, name) for one in observed]) for name in ("value", "variance"))
    sizes = np.array([len(names), len(columns)])

    fits = []
    for variances in itertools.product(VARIANCES, repeat=3):
        evidence, effects = _given(design, y, errors, sizes, np.array(variances))
        rest = variances[2] / (variances[2] + errors) * (y - design @ effects)
        fits.append((evidence, np.concatenate([effects, rest])))
    weights = np.exp(np.array([evidence for evidence, _ in fits]) - max(evidence for evidence, _ in fits))
    effects = np.average([found for _, found in fits], axis=0, weights=weights)
    rest = effects[sizes.sum() :]
    own: dict[str, dict[Context, float]] = {}
    for label, one, value in zip(labels, observed, rest, strict=True):
        own.setdefault(label, {})[one.context] = float(value)
    return LibraryChanges(
        largest,
        {name: float(effects[column]) for name, column in names.items()},
        {label: float(effects[column]) for label, column in columns.items()},
        own,
    )


def _given(
    design: Any, y: np.ndarray, errors: np.ndarray, sizes: np.ndarray, variances: np.ndarray
) -> tuple[float, np.ndarray]:
    """Log likelihood and effects at variances (s_e^2, s_f^2, s_g^2), by the mixed model equations."""
    from scipy import sparse
    from scipy.sparse.linalg import splu

    noise, prior = errors + variances[2], np.repeat(variances[:2], sizes)
    weighted = design.multiply(1.0 / noise[:, None]).tocsr()
    factors = splu((design.T @ weighted + sparse.diags(1.0 / prior)).tocsc())
    right = weighted.T @ y
    effects = factors.solve(right)
    size = np.log(np.abs(factors.U.diagonal())).sum() + np.log(prior).sum() + np.log(noise).sum()
    return -0.5 * float(y @ (y / noise) - right @ effects + size), effects


def to_json(changes: LibraryChanges) -> Mapping[str, Any]:
    """What from_json reads."""
    own = [[label, *context, value] for label, found in changes.own.items() for context, value in found.items()]
    return {
        "largest": changes.largest,
        "perturbation": changes.perturbation,
        "condition": changes.condition,
        "own": own,
    }


def from_json(table: Mapping[str, Any]) -> LibraryChanges:
    """The changes that to_json wrote."""
    own: dict[str, dict[Context, float]] = {}
    for label, tissue, cell_type, value in table["own"]:
        own.setdefault(label, {})[tissue, cell_type] = value
    return LibraryChanges(table["largest"], table["perturbation"], table["condition"], own)
