"""Several operator models as one: the mean of their operators.

A combination is predicted by a condition encoder that never saw it, and trainings from different seeds disagree there
by more than they do on validation cells. Their mean is steadier than one of them. It needs no code of its own:
condition encoder, coefficients and bases side by side are an operator model of as many times the width, whose
operators are the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import block_diag

from pf_core.initial import Parameters
from pf_core.noise import generator

__all__ = ["member_seed", "merged"]


def member_seed(seed: int, member: int) -> int:
    """The seed of a member; the first has that of the run."""
    return int(generator(seed, "operator.member", member).integers(2**31)) if member else seed


def merged(members: Sequence[Parameters]) -> Parameters:
    """One model whose operators are the means of those of the members, and whose profile is theirs side by side.

    Args:
        members: canonical parameters of equal shapes, the VAE and fixed features the same in all.

    Returns:
        Parameters of the same names; those of one member as they are.
    """
    first, n = members[0], len(members)
    if n == 1:
        return dict(first)

    def all_of(name: str) -> list[np.ndarray]:
        return [np.asarray(one[name], np.float64) for one in members]

    def diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(block_diag(*blocks), np.float64)

    out = {name: value for name, value in first.items() if name.startswith("vae.") or name == "conditions.features"}
    embeddings = ["conditions.perturbation.map" if "conditions.features" in first else "conditions.perturbation.table"]
    embeddings += ["conditions.tissue.table"]
    for name in embeddings:
        out[name] = np.concatenate(all_of(name), axis=1)
    # Rows of theta's weight: an embedding of each kind, then what all members read alike.
    widths = [first[name].shape[1] for name in embeddings]
    pieces = [np.split(weight, np.cumsum(widths)) for weight in all_of("conditions.theta.weight")]
    own = [diagonal([one[row] for one in pieces]) for row in range(len(widths))]
    shared = np.concatenate([one[-1] for one in pieces], axis=1)
    out["conditions.theta.weight"] = np.concatenate([*own, shared])
    out["conditions.theta.bias"] = np.concatenate(all_of("conditions.theta.bias"))
    for name in ("operators.A0", "operators.b0"):
        out[name] = np.mean(all_of(name), axis=0)
    for name in ("operators.B", "operators.u"):
        out[name] = np.concatenate(all_of(name))
    for name in ("operators.alpha", "operators.beta"):
        out[f"{name}.hidden.weight"] = diagonal(all_of(f"{name}.hidden.weight"))
        out[f"{name}.hidden.bias"] = np.concatenate(all_of(f"{name}.hidden.bias"))
        out[f"{name}.out.weight"] = diagonal(all_of(f"{name}.out.weight")) / n
        out[f"{name}.out.bias"] = np.concatenate(all_of(f"{name}.out.bias")) / n
    if set(out) != set(first):
        raise ValueError(f"members have parameters {sorted(set(first) ^ set(out))} that have no mean here")
    return {name: np.asarray(value, first[name].dtype) for name, value in out.items()}
