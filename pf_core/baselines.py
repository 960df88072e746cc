"""What a prediction has to beat: predictors without a model, or with no more than a mean shift in its latent space.

A predictor, be it a baseline or the model, maps a `Task` to a `Prediction` (the mean of every control cell before and
after the perturbation) or to `Declined` with a reason. `pf_core.outputs.predicted_counts` turns any prediction into
cells, so that all lines of a table differ by their means alone. A predictor that lacks what it needs declines, and
the table shows the reason; it never falls back on another one silently.

Baselines see what the model sees: the training cells, summarised as one mean per condition and context (`profiles`),
and the controls of the task. They are made as strong as they can be while they stay what they are:

- Shifts are pooled over contexts. One of n_c controls and n_p perturbed cells weighs n / (n + MIN_MATCHED) with
  n = n_c n_p / (n_c + n_p): contexts count alike once they are large, and one of three cells, whose shift is noise,
  hardly counts. The shift of the task's own context, where it is known, counts with that weight against the rest.
  (On kang2018 without the stimulated CD4 T cells this halves the distance of the mean shift, against counting every
  context alike and against counting every cell alike.)
- A shift of profiles acts on each cell's own rate, not on the mean of its context: see `mean_shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from pf_core.config import MIN_MATCHED, NORMALISED_TOTAL
from pf_core.kriging import Change
from pf_core.labels import CONTROL
from pf_core.outputs import BLOCK, Csr, Means

Context = tuple[str, str]  # tissue, cell type


MEAN_PROFILE_R = 1.0  # cells scatter around the mean profile of their type by more than around a decoded mean


@dataclass(frozen=True)
class Task:
    """One condition to be predicted from the control cells of its context.

    members are the names of the perturbations in it, singles the labels that their conditions have when each is given
    alone (with its dose: "A@0.5"); counts (n_controls, n_genes) CSR and library (n_controls,) are the control cells'.
    """

    label: str
    tissue: str
    cell_type: str
    members: tuple[str, ...]
    singles: tuple[str, ...]
    counts: Csr
    library: np.ndarray

    @property
    def context(self) -> Context:
        return self.tissue, self.cell_type


@dataclass(frozen=True)
class Prediction:
    """Means of the control cells before and after, by rows; None says that nothing changes. `basis` says from what."""

    means: Means | None
    basis: str = ""
    r: float | None = None  # inverse dispersion of cells around these means; None for that of the model
    change: Change | None = None  # of the log of the mean profile, with its variance, where that is known


@dataclass(frozen=True)
class Declined:
    """No prediction, and why. The reason is shown in the table."""

    reason: str


Predictor = Callable[[Task], Prediction | Declined]


@dataclass(frozen=True)
class Profile:
    """Mean over the training cells of one condition in one context.

    mean (n_genes,) of counts / library, or (n_latent,) of latent means; n_cells is how many cells it is the mean of.
    """

    label: str
    tissue: str
    cell_type: str
    n_cells: int
    mean: np.ndarray


@dataclass(frozen=True)
class Shift:
    """A difference of means (n_genes,) or (n_latent,), how much it weighs in a mean, and what it is taken from."""

    value: np.ndarray
    weight: float
    basis: str


def profiles(
    values: Csr | Callable[[slice], Csr | np.ndarray],
    label: Iterable[str],
    tissue: Iterable[str],
    cell_type: Iterable[str],
    *,
    library: np.ndarray | None = None,
) -> list[Profile]:
    """Means of training cells by condition and context.

    Args:
        values: (n_cells, n_genes) CSR counts, or a function from rows to (n_rows, n_latent) latent means.
        label: (n_cells,) canonical condition labels, "control" for controls.
        tissue, cell_type: (n_cells,) names.
        library: (n_cells,) counts per cell, by which counts are divided; None leaves values as they are (latents).

    Returns:
        One profile per (label, tissue, cell_type), sorted, float64.
    """
    keys = list(zip(label, tissue, cell_type, strict=True))
    index = {key: number for number, key in enumerate(sorted(set(keys)))}
    group = np.array([index[key] for key in keys], dtype=np.int64)
    n_cells = np.bincount(group, minlength=len(index))
    weight = np.ones(len(keys)) if library is None else 1.0 / np.asarray(library, dtype=np.float64)
    total: Any = 0.0
    for start in range(0, len(keys), BLOCK):
        rows = slice(start, min(start + BLOCK, len(keys)))
        size = rows.stop - rows.start
        member = sparse.csr_matrix((weight[rows], (group[rows], np.arange(size))), shape=(len(index), size))
        part: Any = member @ (values(rows) if callable(values) else values[rows])
        total = total + (part.toarray() if sparse.issparse(part) else np.asarray(part))
    return [Profile(*key, int(n_cells[i]), total[i] / n_cells[i]) for key, i in index.items()]


def log_profile(profile: np.ndarray) -> np.ndarray:
    """log1p(1e4 p) of a mean profile p that sums to 1."""
    return np.log1p(NORMALISED_TOTAL * profile)


class Shifts:
    """Differences of training means between a condition and the controls of the same context, pooled over contexts.

    Args:
        known: from `profiles`.
        transform: applied to both means before the difference; `log_profile` for profiles, nothing for latents.
    """

    def __init__(self, known: Iterable[Profile], transform: Callable[[np.ndarray], np.ndarray] = np.asarray) -> None:
        known = list(known)
        controls = {(item.tissue, item.cell_type): item for item in known if item.label == CONTROL}
        self.controls = {context: transform(item.mean) for context, item in controls.items()}
        self.by_label: dict[str, dict[Context, Shift]] = {}
        for item in known:
            control = controls.get((item.tissue, item.cell_type))
            if item.label != CONTROL and control is not None:
                n = control.n_cells * item.n_cells / (control.n_cells + item.n_cells)
                shift = Shift(transform(item.mean) - transform(control.mean), n / (n + MIN_MATCHED), "own context")
                self.by_label.setdefault(item.label, {})[item.tissue, item.cell_type] = shift

    def of(self, label: str, context: Context) -> Shift | Declined:
        """The shift of a condition for a context: the mean over the others, and its own as far as it can be trusted."""
        known = self.by_label.get(label)
        if not known:
            return Declined(f"{label} is not among the training conditions")
        own, others = known.get(context), [shift for where, shift in known.items() if where != context]
        if not others:
            return known[context]
        rest = _mean(others, f"mean over other contexts ({len(others)})")
        if own is None:
            return rest
        value = own.weight * own.value + (1.0 - own.weight) * rest.value
        return Shift(value, max(own.weight, rest.weight), f"own context, and {rest.basis}")

    def sum_of(self, labels: Sequence[str], context: Context) -> Shift | Declined:
        """The sum of the shifts of several conditions."""
        parts: list[Shift] = []
        for label in labels:
            part = self.of(label, context)
            if isinstance(part, Declined):
                return part
            parts.append(part)
        basis = "; ".join(f"{label}: {part.basis}" for label, part in zip(labels, parts, strict=True))
        return Shift(np.sum([part.value for part in parts], axis=0), min(part.weight for part in parts), basis)

    def average(self, context: Context, *, without: str) -> Shift | Declined:
        """The mean over the training conditions, each as in `of`, but for one."""
        parts = [self.of(label, context) for label in self.by_label if label != without]
        found = [part for part in parts if isinstance(part, Shift)]
        if not found:
            return Declined("there is no other training condition")
        return _mean(found, f"mean over conditions ({len(found)})")


def _mean(shifts: list[Shift], basis: str) -> Shift:
    weights = np.array([shift.weight for shift in shifts])
    value = np.average([shift.value for shift in shifts], axis=0, weights=weights)
    return Shift(value, float(weights.max()), basis)


def no_change() -> Predictor:
    """The control cells themselves, under every output."""
    return lambda task: Prediction(None, "controls")


def mean_shift(shifts: Shifts) -> Predictor:
    """The shift of log1p mean profiles, added to the mean profile of the task's controls.

    p0 is the controls' mean profile, and p1 = expm1(log1p(1e4 p0) + shift), scaled to the sum of p0; mu0 = library p0
    and mu1 = library p1. A cell's own rates are taken to scatter around library p0 as a Gamma of shape 1.
    Declines where the label has no training cells.

    Args:
        shifts: of profiles, `Shifts(known, log_profile)`.
    """
    return lambda task: _shifted_profile(task, shifts.of(task.label, task.context))


def additive(shifts: Shifts) -> Predictor:
    """As `mean_shift`, by the sum of the members' own shifts; for combinations only.

    Declines for single perturbations, and where a member was never given alone in training.
    """

    def predict(task: Task) -> Prediction | Declined:
        if len(task.singles) < 2:
            return Declined("not a combination")
        return _shifted_profile(task, shifts.sum_of(task.singles, task.context))

    return predict


def perturbation_mean(shifts: Shifts) -> Predictor:
    """As `mean_shift`, by the mean shift of all other training conditions: what perturbations have in common.

    The baseline to beat for a perturbation never seen, where most others decline (Ahlmann-Eltze, Huber and Anders
    2025, doi:10.1038/s41592-025-02772-6). Declines where there is no other training condition.
    """
    return lambda task: _shifted_profile(task, shifts.average(task.context, without=task.label))


def nearest_context(shifts: Shifts) -> Predictor:
    """As `mean_shift`, by the shift of the one training context whose controls are most like the task's.

    Likeness is the Euclidean distance of the controls' log1p mean profiles; the own context is the nearest where the
    label was trained there. Declines where the label has no training cells.

    Args:
        shifts: of profiles, `Shifts(known, log_profile)`.
    """

    def predict(task: Task) -> Prediction | Declined:
        known = shifts.by_label.get(task.label)
        if not known:
            return Declined(f"{task.label} is not among the training conditions")
        here = log_profile(control_profile(task))
        far = {where: float(np.linalg.norm(shifts.controls[where] - here)) for where in known}
        nearest = min(far, key=lambda where: (where != task.context, far[where], where))
        return shifted(task, known[nearest].value, f"context {nearest[1]}, {nearest[0]}")

    return predict


def latent_shift(
    shifts: Shifts,
    encode: Callable[[Csr, str], np.ndarray],
    decode: Callable[[np.ndarray, str, np.ndarray], np.ndarray],
) -> Predictor:
    """The mean shift in latent space, added to every control cell and decoded (scGen: Lotfollahi et al. 2019).

    A combination that has no training cells is the sum of its members' shifts. Declines where neither is known.

    Args:
        shifts: of latent means, `Shifts(known)`.
        encode: (counts, tissue) -> (n_cells, n_latent) latent means.
        decode: (z, tissue, library) -> (n_cells, n_genes) means in counts.
    """

    def predict(task: Task) -> Prediction | Declined:
        found = shifts.of(task.label, task.context)
        if isinstance(found, Declined) and len(task.singles) > 1:
            found = shifts.sum_of(task.singles, task.context)
        if isinstance(found, Declined):
            return found
        shift, basis = found.value, found.basis

        def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            z, library = encode(task.counts[rows], task.tissue), task.library[rows]
            return decode(z, task.tissue, library), decode(z + shift.astype(z.dtype), task.tissue, library)

        return Prediction(means, basis)

    return predict


def control_profile(task: Task) -> np.ndarray:
    """(n_genes,) mean over the control cells of counts / library."""
    return np.asarray(task.counts.T @ (1.0 / np.asarray(task.library, dtype=np.float64))).ravel() / len(task.library)


def shifted(task: Task, change: np.ndarray, basis: str) -> Prediction | Declined:
    """The controls' mean profile with a change (n_genes,) of log1p(1e4 p) added, as in `mean_shift`."""
    library = np.asarray(task.library, dtype=np.float64)
    p0 = control_profile(task)
    p1 = np.maximum(np.expm1(log_profile(p0) + change), 0.0)
    if not p1.sum() > 0:
        return Declined("the controls hold no counts")
    p1 *= p0.sum() / p1.sum()

    def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return library[rows, None] * p0, library[rows, None] * p1

    return Prediction(means, basis, MEAN_PROFILE_R)


def _shifted_profile(task: Task, found: Shift | Declined) -> Prediction | Declined:
    return found if isinstance(found, Declined) else shifted(task, found.value, found.basis)
