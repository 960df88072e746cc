"""What is known of a change in other contexts, measured on training conditions and brought into predictions.

Changes are those of log(PSEUDO + 1e4 p) of the mean profile p: fold changes where a gene is expressed, since these
carry over between contexts of unequal levels, and not where it is hardly measured.

A decoder with few latents blurs the change of single genes, most of all in contexts that training did not see under
perturbation. Two answers are made for the change and averaged:

1. The decoded change, and what it missed elsewhere: the difference between the observed and the decoded change of the
   training contexts, pooled like the mean shift of the baselines. With an operator that changes nothing this is the
   mean shift; what the operator knows about the context comes on top.
2. The observed changes alone, carried over by kriging over the contexts' control profiles (kriging.py): contexts
   that are more alike count for more, as far as the data say that likeness matters.

The first is right in direction and too timid in size where the context is unlike the others; the errors of the second
are of another kind. What is predicted is then the cells' own profile with this change of their mean: decoded means of
the controls are brought to the controls' level by a factor for each gene, and what the mean rises or falls by is added
to every cell alike.

Counts per cell change too; library_size.py measures that, and says something of combinations that training did not see.
The decoded change of such a combination is left as it is: corrections of its members do not add, they share the noise
of the same controls. How far it may be off is taken from combinations that training did see, as they are predicted by
something of about the same accuracy that has not seen them, the sum of their members' mean shifts in latent space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pf_core.baselines import Context
from pf_core.config import MIN_MATCHED, NORMALISED_TOTAL
from pf_core.data import Dataset, Group
from pf_core.kriging import Change, corrected_squares, krige, likely_variance, mean_change, shrink, strata
from pf_core.labels import Members, condition_label, parse_condition
from pf_core.library_size import LibraryChanges, Observed, from_json, library_changes, to_json
from pf_core.outputs import Csr

MAX_CELLS = 500  # per condition, for its decoded change
PSEUDO = 0.3  # counts per 10,000
SPREAD_CELLS = 10.0  # as many cells the common spread of the log library counts as
MIN_SPREAD = 1e-3  # variance of the log library between cells
PRIOR_SHAPE = 0.5  # of a gene's rate around its typical one, where its error is asked for


@dataclass(frozen=True)
class LogProfile:
    """log(PSEUDO + 1e4 p) of the mean profile p of some cells, (n_genes,), and two variances of its sampling error."""

    value: np.ndarray
    error: np.ndarray  # at least that of Poisson counts at a likely rate: no gene is known without error
    noise: np.ndarray  # from the spread of the cells alone; 0 for a single cell, of which it is not known


def log_rate(profile: np.ndarray) -> np.ndarray:
    """log(PSEUDO + 1e4 p), the scale on which changes are carried over."""
    return np.log(PSEUDO + NORMALISED_TOTAL * profile)


def typical_profile(counts: Csr, library: np.ndarray) -> np.ndarray:
    """(n_genes,) mean of counts / library, at least that of one count among all of the cells."""
    inverse = 1.0 / np.asarray(library, np.float64)
    n = len(inverse)
    return np.maximum(np.asarray(counts.T @ inverse).ravel() / n, inverse.mean() / n)


def measure(counts: Csr, library: np.ndarray, typical: np.ndarray) -> LogProfile:
    """The log profile of cells.

    The error of few cells cannot be told from their own counts: a gene without any would seem to be known exactly, or,
    with the slope of the logarithm at 0, not at all. It is taken at the rate p' that is expected given the counts and a
    Gamma prior around the typical rate, p' = (a + n) / (a / typical + N) for n counts among N in all. The variance is
    that of the cells, at least Poisson's at p'; log(PSEUDO + 1e4 p) of a mean with this variance is spread as if
    PSEUDO + 1e4 p were log-normal.

    Args:
        counts: (n_cells, n_genes) CSR.
        library: (n_cells,) counts per cell.
        typical: (n_genes,) rates of all training cells, positive.
    """
    inverse = 1.0 / np.asarray(library, np.float64)
    n, per_count = len(inverse), inverse.mean()
    mean = np.asarray(counts.T @ inverse).ravel() / n
    spread = (np.asarray(counts.multiply(counts).T @ inverse**2).ravel() / n - mean**2) * n / max(n - 1, 1)
    likely = (PRIOR_SHAPE + mean * n / per_count) / (PRIOR_SHAPE / typical + n / per_count)
    variance = np.maximum(spread, per_count * likely) / n

    def of_log(variance: np.ndarray, rate: np.ndarray) -> np.ndarray:
        return np.log1p(variance * (NORMALISED_TOTAL / (PSEUDO + NORMALISED_TOTAL * rate)) ** 2)

    return LogProfile(log_rate(mean), of_log(variance, likely), of_log(spread / n, mean))


@dataclass(frozen=True)
class Known:
    """What was observed of a training condition in one context."""

    residual: np.ndarray  # (n_genes,) observed less decoded change
    change: Change  # observed, with its sampling error
    weight: float  # in a mean over contexts


@dataclass(frozen=True)
class Carried:
    """What training contexts say of one condition in one context: both answers' parts."""

    residual: np.ndarray
    change: Change


@dataclass(frozen=True)
class Calibration:
    """What was observed of the training conditions."""

    typical: np.ndarray  # (n_genes,) rates of all training cells
    known: dict[str, dict[Context, Known]] = field(default_factory=dict)
    controls: dict[Context, LogProfile] = field(default_factory=dict)
    separator: str = "+"
    library: LibraryChanges = field(default_factory=LibraryChanges)
    unseen: np.ndarray | None = None  # (n_genes,) variance of the error of the decoded change of an unseen combination

    def of(self, members: Members, context: Context, controls: LogProfile) -> Carried | None:
        """What is carried over to a condition in a context (tissue, cell type) with these controls.

        None for a condition that training did not see.
        """
        known = self.known.get(condition_label(members, self.separator))
        if known is None:
            return None
        places = [self.controls[where] for where in known]
        squares = corrected_squares(
            np.stack([place.value for place in (*places, controls)]),
            np.stack([place.noise for place in (*places, controls)]),
        )
        shares = np.array([one.weight for one in known.values()])
        if context in known:  # the same place, whichever of its cells are given
            row = list(known).index(context)
            squares[-1, :-1] = squares[:-1, -1] = squares[row, :-1]
            own = shares[row] if len(known) > 1 else 1.0
            shares[row] = 0.0
            shares *= (1.0 - own) / max(shares.sum(), 1e-300)
            shares[row] = own
        shares /= shares.sum()
        changes = np.stack([one.change.mean for one in known.values()])
        errors = np.stack([one.change.variance for one in known.values()])
        residual = shares @ np.stack([one.residual for one in known.values()])
        residual = shrink(residual, shares**2 @ errors, strata(mean_change(changes, errors)))
        return Carried(residual.mean, krige(changes, errors, squares))

    def variance(self, members: Members, carried: Carried | None) -> np.ndarray | None:
        """(n_genes,) variance of what is not known of the change of a condition; None where nothing says how large.

        Args:
            members: the condition.
            carried: from `of`.
        """
        if carried is not None:
            return carried.change.variance
        met = all(name in self.library.largest for name, _ in members)
        return self.unseen if met and len(members) > 1 else None


@dataclass(frozen=True)
class Correction:
    """What makes decoded means of the controls of one context the means before and after."""

    factor: np.ndarray  # (n_genes,) multiplies decoded means before
    shift: np.ndarray  # (n_genes,) added to them, times the library, after
    change: np.ndarray  # (n_genes,) of log_rate of the mean profile


def correction(
    controls: LogProfile, before: np.ndarray, after: np.ndarray, carried: Sequence[Carried | None]
) -> Correction | None:
    """The correction for these controls; None where nothing is known of any condition.

    Args:
        controls: of the cells that are moved.
        before, after: (n_genes,) means over these cells of decoded means divided by library.
        carried: of every condition applied, one after the other; None where nothing is known.
    """
    known = [one for one in carried if one is not None]
    if not known:
        return None
    change = log_rate(after) - log_rate(before) + sum(one.residual for one in known)
    if len(known) == len(carried):
        change = 0.5 * change + 0.5 * sum(one.change.mean for one in known)
    rate = log_rate(before)
    responding = strata(np.sum([one.change.mean for one in known], axis=0))
    rate = rate + shrink(controls.value - rate, controls.error, responding).mean
    profile, moved = (np.maximum(np.exp(value) - PSEUDO, 0.0) / NORMALISED_TOTAL for value in (rate, rate + change))
    moved *= np.divide(profile.sum(), moved.sum(), out=np.ones(()), where=moved.sum() > 0)
    factor = np.divide(profile, before, out=np.ones_like(before), where=before > 0)
    return Correction(factor, moved - profile, log_rate(moved) - log_rate(profile))


def calibrate(
    dataset: Dataset, groups: Sequence[Group], before: np.ndarray, after: np.ndarray, added: np.ndarray
) -> Calibration:
    """Measure all training conditions.

    Args:
        dataset: with the model's genes.
        groups: training conditions without control; batches of one condition and context are pooled.
        before, after, added: (n_groups, n_genes) mean decoded profiles of each group's controls: as they are, moved by
            the operator, and moved by the sum of the latent shifts of the members of a combination; NaN for others.
    """
    decoded, summed = log_rate(after) - log_rate(before), log_rate(added) - log_rate(before)
    cells = np.unique(np.concatenate([part for group in groups for part in (group.cells, group.controls)]))
    typical = typical_profile(dataset.rows(cells), dataset.library()[cells])

    def measured(cells: np.ndarray) -> LogProfile:
        return measure(dataset.rows(cells), dataset.library()[cells], typical)

    depth = np.log(dataset.library())
    sides = [part for group in groups for part in (group.cells, group.controls)]
    common = sum(depth[part].var() * len(part) for part in sides) / sum(len(part) for part in sides)

    def log_library(cells: np.ndarray) -> tuple[float, float]:
        """Mean over cells, and its sampling variance: few cells have the spread of all."""
        n = len(cells)
        spread = (n * depth[cells].var() + SPREAD_CELLS * common) / (n + SPREAD_CELLS)
        return float(depth[cells].mean()), float(max(spread, MIN_SPREAD) / n)

    parts: dict[tuple[str, Context], list[tuple[float, np.ndarray, np.ndarray, Change]]] = {}
    depths: dict[tuple[str, Context], list[tuple[float, float]]] = {}
    controls_of: dict[Context, list[np.ndarray]] = {}
    for group, change, by_sum in zip(groups, decoded, summed, strict=True):
        moved, controls = measured(group.cells), measured(group.controls)
        observed = Change(moved.value - controls.value, moved.error + controls.error)
        n = len(group.cells) * len(group.controls) / (len(group.cells) + len(group.controls))
        context = group.tissue, group.cell_type
        parts.setdefault((group.label, context), []).append((n, change, by_sum, observed))
        controls_of.setdefault(context, []).append(group.controls)
        (after_mean, after_error), (mean, error) = log_library(group.cells), log_library(group.controls)
        depths.setdefault((group.label, context), []).append((after_mean - mean, after_error + error))
    found = Calibration(typical, separator=dataset.config.separator)
    observed, sums = [], []
    for (label, context), several in parts.items():
        sizes = np.array([n for n, *_ in several])
        shares = sizes / sizes.sum()
        change, by_sum, mean = (
            shares @ np.stack(some) for some in zip(*((c, s, one.mean) for _, c, s, one in several), strict=True)
        )
        change_here = Change(mean, shares**2 @ np.stack([one.variance for *_, one in several]))
        weight = float(sizes.sum() / (sizes.sum() + MIN_MATCHED))
        found.known.setdefault(label, {})[context] = Known(mean - change, change_here, weight)
        if np.isfinite(by_sum).all():
            sums.append((by_sum, change_here))
        values, errors = np.array(depths[label, context]).T
        members = parse_condition(label, dataset.config)
        observed.append(Observed(members, context, float(shares @ values), float(shares**2 @ errors)))
    for context, pieces in controls_of.items():
        found.controls[context] = measured(np.unique(np.concatenate(pieces)))
    return replace(found, library=library_changes(observed), unseen=_unseen(sums))


def _unseen(sums: Sequence[tuple[np.ndarray, Change]]) -> np.ndarray | None:
    """The variance of the errors of predicted changes, given beside the observed ones; None where there are none."""
    if not sums:
        return None
    predicted, observed, errors = (
        np.stack(some) for some in zip(*((by_sum, one.mean, one.variance) for by_sum, one in sums), strict=True)
    )
    return likely_variance(observed - predicted, errors, strata(np.abs(predicted).mean(0)))


def to_arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    """What from_arrays reads: values by row, and what the rows are as JSON bytes."""
    rows = [
        (label, *context, one)
        for label, found in sorted(calibration.known.items())
        for context, one in sorted(found.items())
    ]
    contexts = sorted(calibration.controls.items())
    names = {
        "separator": calibration.separator,
        "rows": [row[:3] for row in rows],
        "contexts": [context for context, _ in contexts],
        "library": to_json(calibration.library),
    }
    unseen = {} if calibration.unseen is None else {"unseen": calibration.unseen.astype(np.float32)}
    return unseen | {
        "typical": calibration.typical,
        "residuals": np.array([one.residual for *_, one in rows], np.float32),
        "weights": np.array([one.weight for *_, one in rows]),
        "changes": np.array([one.change.mean for *_, one in rows], np.float32),
        "change_errors": np.array([one.change.variance for *_, one in rows], np.float32),
        "controls": np.array([one.value for _, one in contexts], np.float32),
        "control_errors": np.array([one.error for _, one in contexts], np.float32),
        "control_noise": np.array([one.noise for _, one in contexts], np.float32),
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Calibration:
    """The calibration that to_arrays wrote."""
    names = json.loads(arrays["names"].tobytes())
    values = {key: np.asarray(array, np.float64) for key, array in arrays.items() if key != "names"}
    library = from_json(names["library"])
    found = Calibration(values["typical"], separator=names["separator"], library=library, unseen=values.get("unseen"))
    for index, (label, tissue, cell_type) in enumerate(names["rows"]):
        change = Change(values["changes"][index], values["change_errors"][index])
        one = Known(values["residuals"][index], change, float(values["weights"][index]))
        found.known.setdefault(label, {})[tissue, cell_type] = one
    for index, (tissue, cell_type) in enumerate(names["contexts"]):
        found.controls[tissue, cell_type] = LogProfile(
            values["controls"][index], values["control_errors"][index], values["control_noise"][index]
        )
    return found
