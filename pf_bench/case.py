"""What is compared: a case has sides that do the same work, and targets for the ratios between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["DEVICES", "OURS", "SUITES", "Absent", "Case", "Context", "Side", "Skipped", "Target"]

OURS = "jax"  # the side every ratio is taken over
SUITES = ("ceilings", "distances", "likelihood", "spectral", "batches", "steps", "inference", "training")
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Args:
        call: does it once, and returns when it is done.
        output: what it computed, by name, from a fresh start; None where it computes something of its own.
        steps: steps in one call; times are per step.
        note: what a reader must know, above all where output is None.
    """

    call: Callable[[], Any]
    output: Callable[[], Mapping[str, np.ndarray]] | None
    steps: int = 1
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A side that cannot be measured here, and why."""

    reason: str


Kind = Literal["faster", "within", "memory", "seconds", "growth"]


@dataclass(frozen=True)
class Target:
    """A number that the JAX twin is meant to reach in a case.

    "faster": the time of `side` over its own is at least `value`; "within": its own over that of `side` is at most
    `value`; "memory": MiB beyond what it held before; "seconds": per step, of `side` where there is one; "growth": its
    time over that of case `side` is at most `value`.
    """

    kind: Kind
    value: float
    side: str = ""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: what is computed, unique within its suite together with sizes.
        sizes: what its size is, by name.
        build: makes the sides; a first one named OURS is what the others are held against.
        tolerance: largest difference of every compared array, relative to its norm.
        targets: what is meant to be reached.
        memory: extra memory is measured too, a fresh process for every side.
        series: plots join the cases of one series over the size of this name.
        heavy: calls take minutes: none is made to warm up, and agreement is judged on what the timed calls computed.
        flop: floating-point operations of the large matrix products in one step; 0 where they do not rule.
        bytes: bytes that one step must read and write, where it does nothing else.
    """

    name: str
    sizes: Mapping[str, int]
    build: Callable[[], dict[str, Side | Absent]]
    tolerance: float = 1e-4
    targets: tuple[Target, ...] = ()
    memory: bool = False
    series: str = ""
    heavy: bool = False
    flop: float = 0.0
    bytes: float = 0.0

    @property
    def key(self) -> str:
        """name, size=number, ..."""
        return ", ".join([self.name, *(f"{name}={size}" for name, size in self.sizes.items())])


@dataclass(frozen=True)
class Context:
    """What was asked for.

    Args:
        device: "cpu" or "gpu".
        quick: tiny sizes and few repeats, to see that everything runs.
        peers: measure other packages too.
        data: h5ad file for whole trainings.
        rounds: turns of every side.
        sample: seconds that one turn lasts at least.
        wait: seconds that are waited in all for a quiet machine.
    """

    device: str = "cpu"
    quick: bool = False
    peers: bool = True
    data: str = ""
    rounds: int = 7
    sample: float = 0.2
    wait: float = 600.0


class Skipped(Exception):
    """A suite that cannot run as asked; the message says why."""
