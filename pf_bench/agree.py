"""Whether sides compute the same: what does not agree is not timed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pf_bench.case import OURS, Side

__all__ = ["compare", "difference"]


def difference(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest |found - wanted| / |wanted| of any array, and its name; infinite where names or shapes differ."""
    if set(found) != set(wanted):
        return float("inf"), ", ".join(sorted(set(found) ^ set(wanted)))
    worst, where = 0.0, ""
    for name, array in wanted.items():
        a, b = np.asarray(found[name], np.float64), np.asarray(array, np.float64)
        if a.shape != b.shape:
            return float("inf"), f"{name} of shape {a.shape} and {b.shape}"
        scale = max(float(np.linalg.norm(b)), float(np.finfo(np.float32).tiny))
        off = float(np.linalg.norm(a - b)) / scale
        if not off <= worst:  # also where off is not a number
            worst, where = (off if np.isfinite(off) else float("inf")), name
    return worst, where


def compare(sides: Mapping[str, Side], tolerance: float) -> tuple[dict[str, float], dict[str, str]]:
    """The difference of every side from OURS, and why those beyond the tolerance are refused.

    Args:
        sides: by name; OURS among them.
        tolerance: largest difference.
    """
    ours = sides[OURS].output
    if ours is None:
        raise ValueError(f"side {OURS!r} has no output to hold the others against")
    wanted = dict(ours())
    differences, refused = {}, {}
    bad = [name for name, array in wanted.items() if not np.isfinite(np.asarray(array)).all()]
    if bad:
        refused[OURS] = f"{', '.join(bad)} not finite"
    for name, side in sides.items():
        if name == OURS or side.output is None:
            continue
        off, where = difference(side.output(), wanted)
        differences[name] = off
        if off > tolerance:
            refused[name] = f"differs by {off:.2g} in {where}, where {tolerance:g} is allowed"
    return differences, refused
