"""Verdicts on gradients, once for both twins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pf_core.config import ADAM_EPS

__all__ = ["HUGE", "TINY", "Health", "health_of", "judge"]

# Adam divides by |g| + eps: where every entry is far below eps, the parameter moves slower than the learning rate says.
TINY = ADAM_EPS
# Relative to the parameter's own norm, or to 1 where that is smaller: one plain gradient step of 1e-6 would replace it.
HUGE = 1e6


@dataclass(frozen=True)
class Health:
    """The state of one gradient.

    verdict is "none" (no path from the parameter to the loss), "zero" (a path, and exactly zero), "tiny", "huge",
    "non-finite" or "ok". norm is the Euclidean norm and max_abs the largest magnitude, over finite entries.
    """

    verdict: str
    norm: float
    max_abs: float
    n_nonfinite: int


def judge(norm: float, max_abs: float, n_nonfinite: int, param_norm: float, has_path: bool) -> Health:
    """The verdict on a gradient from four numbers.

    Args:
        norm: Euclidean norm of its finite entries.
        max_abs: largest magnitude among them.
        n_nonfinite: how many entries are NaN or infinite.
        param_norm: Euclidean norm of the parameter.
        has_path: whether the loss depends on the parameter at all.
    """
    if not has_path:
        verdict = "none"
    elif n_nonfinite or not math.isfinite(norm):
        verdict = "non-finite"
    elif max_abs == 0.0:
        verdict = "zero"
    elif max_abs < TINY:
        verdict = "tiny"
    elif norm > HUGE * max(1.0, param_norm):
        verdict = "huge"
    else:
        verdict = "ok"
    return Health(verdict, float(norm), float(max_abs), int(n_nonfinite))


def health_of(grad: np.ndarray | None, param: np.ndarray) -> Health:
    """The verdict on a gradient as NumPy holds it; None where no path leads to the parameter."""
    if grad is None:
        return judge(0.0, 0.0, 0, 0.0, False)
    values = np.asarray(grad, np.float64)
    finite = np.isfinite(values)
    values = values[finite]
    norm = float(np.linalg.norm(values))
    max_abs = float(np.abs(values).max(initial=0.0))
    param_norm = float(np.linalg.norm(np.asarray(param, np.float64)))
    return judge(norm, max_abs, int(np.size(finite) - np.count_nonzero(finite)), param_norm, True)
