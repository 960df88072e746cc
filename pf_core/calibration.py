"""What the decoder does not show of a known change, measured on training conditions and added to predictions.

A decoder with few latents blurs the change of single genes, most of all in contexts that training did not see under
perturbation. For every training condition the change of the log1p mean profile that was observed is compared with the
one that its operator decodes to. The difference, pooled over contexts like the mean shift of the baselines, is carried
over to the predicted condition: prediction = decoded change there + mean of (observed - decoded) change elsewhere. With
an operator that changes nothing this is the mean shift; what the operator knows about the context comes on top.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pf_core.baselines import Context, Declined, Shift, Shifts, log_profile
from pf_core.config import MIN_MATCHED, NORMALISED_TOTAL
from pf_core.data import Dataset, Group
from pf_core.labels import CONTROL, Members, condition_label

MAX_CELLS = 500  # per condition, for its decoded change
Decoded = Callable[[Group, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(group, its control cells) -> mean decoded profiles (n_genes,) before and after, each of sum 1."""


@dataclass(frozen=True)
class Calibration:
    """Differences between observed and decoded changes of training conditions, on log1p of profiles at 1e4."""

    shifts: Shifts

    def of(self, members: Members, context: Context) -> np.ndarray | None:
        """The correction (n_genes,) of a condition in a context (tissue, cell type).

        A condition that training did not see gets the sum of its members' corrections, as far as these were seen
        alone; None where nothing is known.
        """
        found = self.shifts.of(condition_label(members), context)
        if isinstance(found, Shift):
            return found.value
        singles = [self.shifts.of(condition_label((member,)), context) for member in members]
        known = [shift.value for shift in singles if not isinstance(shift, Declined)]
        return np.sum(known, axis=0) if known else None


def apply(mu: np.ndarray, library: np.ndarray, correction: np.ndarray) -> np.ndarray:
    """Means with a correction added to log1p of their profile, at unchanged sums.

    Args:
        mu: (n_cells, n_genes) means in counts.
        library: (n_cells,) counts per cell, by which means become profiles.
        correction: (n_genes,) or (n_cells, n_genes).
    """
    scale = NORMALISED_TOTAL / np.asarray(library, np.float64)[:, None]
    moved = np.maximum(np.expm1(np.log1p(scale * mu) + correction), 0.0) / scale
    total = moved.sum(1, keepdims=True)
    return moved * np.divide(mu.sum(1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)


def calibrate(dataset: Dataset, groups: Sequence[Group], decoded: Decoded) -> Calibration:
    """Measure the corrections of all training conditions.

    Args:
        dataset: with the model's genes.
        groups: training conditions; batches of one condition and context are pooled.
        decoded: mean decoded profiles of some control cells of a group, before and after its operator.
    """
    library = dataset.library()
    parts: dict[tuple[str, Context], list[tuple[int, np.ndarray]]] = {}
    for group in groups:
        if group.label == CONTROL:
            continue
        observed = _observed(dataset, library, group.cells) - _observed(dataset, library, group.controls)
        step = max(1, len(group.controls) // MAX_CELLS)
        before, after = decoded(group, group.controls[::step])
        difference = observed - (log_profile(after) - log_profile(before))
        key = (group.label, (group.tissue, group.cell_type))
        n = len(group.cells) * len(group.controls) / (len(group.cells) + len(group.controls))
        parts.setdefault(key, []).append((n, difference))
    shifts = Shifts(())
    for (label, context), found in parts.items():
        n = float(sum(size for size, _ in found))
        value = np.average([difference for _, difference in found], axis=0, weights=[size for size, _ in found])
        shift = Shift(value, n / (n + MIN_MATCHED), "own context")
        shifts.by_label.setdefault(label, {})[context] = shift
    return Calibration(shifts)


def _observed(dataset: Dataset, library: np.ndarray, cells: np.ndarray) -> np.ndarray:
    total = np.zeros(dataset.n_genes)
    for block, rows in dataset.blocks(cells):
        total += np.asarray(rows.T @ (1.0 / library[block])).ravel()
    return log_profile(total / len(cells))


def to_arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    """What from_arrays reads: the corrections, their weights, and their names as JSON bytes."""
    rows = [
        (label, *context, shift)
        for label, found in sorted(calibration.shifts.by_label.items())
        for context, shift in sorted(found.items())
    ]
    names = json.dumps([row[:3] for row in rows]).encode()
    return {
        "values": np.array([row[3].value for row in rows], np.float32),
        "weights": np.array([row[3].weight for row in rows]),
        "names": np.frombuffer(names, np.uint8),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Calibration:
    """The calibration that to_arrays wrote."""
    shifts = Shifts(())
    names = json.loads(arrays["names"].tobytes())
    for (label, tissue, cell_type), value, weight in zip(names, arrays["values"], arrays["weights"], strict=True):
        shifts.by_label.setdefault(label, {})[tissue, cell_type] = Shift(
            value.astype(np.float64), float(weight), "own context"
        )
    return Calibration(shifts)
