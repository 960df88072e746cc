"""What the decoder does not show of a known change, measured on training conditions and added to predictions.

A decoder with few latents blurs the change of single genes, most of all in contexts that training did not see under
perturbation. For every training condition the change of the log1p mean profile that was observed is compared with the
one that its operator decodes to. The difference, pooled over contexts like the mean shift of the baselines, is carried
over to the predicted condition: prediction = decoded change there + mean of (observed - decoded) change elsewhere. With
an operator that changes nothing this is the mean shift; what the operator knows about the context comes on top.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pf_core.baselines import Context, Declined, Shift, Shifts, log_profile
from pf_core.config import MIN_MATCHED, NORMALISED_TOTAL
from pf_core.data import Dataset, Group
from pf_core.labels import Members, condition_label

MAX_CELLS = 500  # per condition, for its decoded change


@dataclass(frozen=True)
class Calibration:
    """Differences between observed and decoded changes of training conditions, on log1p of profiles at 1e4."""

    shifts: Shifts
    separator: str = "+"

    def of(self, members: Members, context: Context) -> np.ndarray | None:
        """The correction (n_genes,) of a condition in a context (tissue, cell type).

        None for a condition that training did not see: corrections of its members do not add, they share the noise of
        the same controls.
        """
        found = self.shifts.of(condition_label(members, self.separator), context)
        return None if isinstance(found, Declined) else found.value


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


def calibrate(dataset: Dataset, groups: Sequence[Group], before: np.ndarray, after: np.ndarray) -> Calibration:
    """Measure the corrections of all training conditions.

    Args:
        dataset: with the model's genes.
        groups: training conditions without control; batches of one condition and context are pooled.
        before, after: (n_groups, n_genes) mean decoded profiles of each group's controls, as they are and moved.
    """
    library = dataset.library()
    decoded = log_profile(after) - log_profile(before)
    parts: dict[tuple[str, Context], list[tuple[float, np.ndarray]]] = {}
    for group, change in zip(groups, decoded, strict=True):
        observed = _observed(dataset, library, group.cells) - _observed(dataset, library, group.controls)
        n = len(group.cells) * len(group.controls) / (len(group.cells) + len(group.controls))
        parts.setdefault((group.label, (group.tissue, group.cell_type)), []).append((n, observed - change))
    shifts = Shifts(())
    for (label, context), found in parts.items():
        n = float(sum(size for size, _ in found))
        value = np.average([difference for _, difference in found], axis=0, weights=[size for size, _ in found])
        shift = Shift(value, n / (n + MIN_MATCHED), "own context")
        shifts.by_label.setdefault(label, {})[context] = shift
    return Calibration(shifts, dataset.config.separator)


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
    names = json.dumps({"separator": calibration.separator, "rows": [row[:3] for row in rows]}).encode()
    return {
        "values": np.array([row[3].value for row in rows], np.float32),
        "weights": np.array([row[3].weight for row in rows]),
        "names": np.frombuffer(names, np.uint8),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Calibration:
    """The calibration that to_arrays wrote."""
    shifts = Shifts(())
    names = json.loads(arrays["names"].tobytes())
    for (label, tissue, cell_type), value, weight in zip(
        names["rows"], arrays["values"], arrays["weights"], strict=True
    ):
        shifts.by_label.setdefault(label, {})[tissue, cell_type] = Shift(
            value.astype(np.float64), float(weight), "own context"
        )
    return Calibration(shifts, names["separator"])
