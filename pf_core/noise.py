"""Named random draws: pure functions of (seed, name, index), the same numbers for either twin.

Philox is counter based: the key is a hash of the seed and the name, the counter is the index (a training step, an
epoch, a condition). A draw therefore never depends on what was drawn before it, and a resumed run needs no generator
state.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """The generator of one named draw.

    Args:
        seed: the run's seed.
        name: what is drawn, for example "vae.eps".
        index: which one, for example the training step; 0 <= index < 2^63.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    # The index sits in the high words, so that streams of neighbouring indices cannot meet.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, 0], dtype=np.uint64)))


def normal(seed: int, name: str, index: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Standard normal draws. float64 draws and float32 draws are the same numbers, rounded."""
    return generator(seed, name, index).standard_normal(shape).astype(dtype, copy=False)


def permutation(seed: int, name: str, index: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1."""
    return generator(seed, name, index).permutation(n)
