"""Timing that takes turns: every round, every side once, in rotated order; what others disturbed is done again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pf_bench.case import Side
from pf_bench.machine import QUIET, Load, Patience

__all__ = ["Timing", "take_turns", "timed"]

RETRIES = 3  # of a disturbed turn
REST = 0.01  # seconds between turns, in which the threads of the side before come to rest
LONGEST = 20.0  # seconds of one side's turns after which it takes no more than MIN_ROUNDS
MIN_ROUNDS = 3
MOST = 100_000  # calls in one turn


@dataclass
class Timing:
    """Seconds per step of one side, a number a round.

    Args:
        first: seconds of the first call, compilation included.
        samples: seconds per step of every round.
        disturbed: rounds that others disturbed until the end, and that count all the same.
        repeated: disturbed turns that were done again.
    """

    first: float
    samples: list[float] = field(default_factory=list)
    disturbed: int = 0
    repeated: int = 0

    def summary(self) -> dict[str, float | int]:
        """First call, minimum, median and maximum."""
        return {
            "first": self.first,
            "min": min(self.samples),
            "median": statistics.median(self.samples),
            "max": max(self.samples),
            "rounds": len(self.samples),
            "disturbed": self.disturbed,
            "repeated": self.repeated,
        }


def take_turns(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    sample: float,
    patience: Patience,
    first: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], Load] = Load,
) -> dict[str, Timing]:
    """Time all sides in alternation.

    Args:
        sides: what to time, by name.
        rounds: turns of every side.
        sample: seconds that a turn lasts at least; short calls are repeated within it.
        patience: how long to wait for a quiet machine.
        first: seconds of the first call of each, which compiled it; None for calls so long that there is one a turn,
            none to warm up, and the first turn is the first call.
        clock: seconds.
        load: a watch over what others use.
    """
    timings, repeats = {}, {}
    for name, side in sides.items():
        timings[name] = Timing(first[name] if first else 0.0)
        repeats[name] = max(1, min(MOST, round(sample / max(timed(side, 1, clock), 1e-7)))) if first else 1
    names = list(sides)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            timing, side = timings[name], sides[name]
            if len(timing.samples) >= MIN_ROUNDS and sum(timing.samples) * side.steps * repeats[name] > LONGEST:
                continue
            for attempt in range(RETRIES + 1):
                time.sleep(REST)
                watch = load()
                seconds = timed(side, repeats[name], clock)
                share = watch.others()
                calm = share is None or share <= QUIET
                if calm or attempt == RETRIES:
                    break
                timing.repeated += 1
                if not patience.wait():
                    break
            timing.disturbed += not calm
            timing.samples.append(seconds / repeats[name] / side.steps)
            timing.first = timing.first or seconds
    return timings


def timed(side: Side, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of that many calls."""
    begin = clock()
    for _ in range(repeats):
        side.call()
    return clock() - begin
