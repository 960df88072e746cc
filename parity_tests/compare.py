"""Two sides and an oracle: a verdict per leaf (docs/parity.md rules 1 to 4).

Exact first: names, shapes, dtypes, NaN and infinity masks, "no gradient" against "zero gradient". Then every entry's
error against the oracle in units of its floor u S (float64) or gamma_n S (float32), where S is the running sum of
absolute terms. An entry whose S is 0 must be exactly what the oracle says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from parity_tests.case import Case
from parity_tests.sides import ANOTHER_WAY, TIERS, Evaluation, Side, evaluate_oracle

EQUAL, NOISE = "equal", "both at noise"
JAX_WRONG, TORCH_WRONG, BOTH_WRONG = "JAX wrong", "PyTorch wrong", "both wrong"
RULE_2 = 3.0  # the twins' float32 errors may differ by this factor above the floor
CAP = 30.0  # no float32 error may be more floors than this, however alike the twins are
VACUOUS = 1e3  # a gradient must be this many floors, or be declared zero


@dataclass(frozen=True)
class Result:
    """The verdict on one leaf of one quantity."""

    case: str
    quantity: str
    leaf: str
    tier: str
    sides: tuple[str, str]
    verdict: str
    detail: str = ""
    errors: tuple[float, float] = (0.0, 0.0)  # worst of each side, in floors
    index: tuple[int, ...] = ()
    values: tuple[Any, ...] = ()  # first side, second side, oracle at the worst entry

    @property
    def passed(self) -> bool:
        return self.verdict in (EQUAL, NOISE)

    def line(self) -> str:
        text = f"{self.case} | {self.quantity} {self.leaf} | {self.tier} | {self.verdict}"
        if self.values:
            names = (*self.sides, "oracle")  # a pair without an oracle has two values
            named = zip(names, self.values, strict=False)
            worst = ", ".join(f"{name} {value!r}" for name, value in named)
            floors = " and ".join(f"{error:.3g}" for error in self.errors)
            text += f" at {list(self.index)}: {worst}; {floors} floors"
        return text + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """All results of a run, and why it failed."""

    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.passed]

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failures

    def __str__(self) -> str:
        if self.passed:
            return f"{len(self.results)} leaves agree"
        lines = [result.line() for result in self.failures]
        return "\n".join([f"{len(lines)} of {len(self.results)} leaves disagree:", *lines])


def floor_unit(tier: str, terms: int) -> float:
    """gamma_n = n u / (1 - n u), or u itself in float64, where the threshold has its own constant."""
    u = TIERS[tier][1]
    return u if tier == "float64" else terms * u / max(1 - terms * u, 0.5)


def structural(expected: Any, got: Any, dtype: str | None) -> str:
    """What differs before any number is looked at; "" if nothing does."""
    if expected.shape != got.shape:
        return f"shape {got.shape}, not {expected.shape}"
    if dtype is not None and str(got.dtype) != dtype:
        return f"dtype {got.dtype}, not {dtype}"
    if got.dtype.kind != "f":
        return "" if np.array_equal(expected, got) else "integers differ"
    for mask, name in ((np.isnan, "NaN"), (np.isposinf, "+inf"), (np.isneginf, "-inf")):
        if not np.array_equal(mask(expected), mask(got)):
            return f"{name} in {int(mask(got).sum())} places, not in {int(mask(expected).sum())}"
    return ""


def entry_errors(oracle: Any, scale: Any, got: Any, unit: float, underflow: float = 0.0) -> np.ndarray:
    """Errors in floors, entry by entry; infinite where the floor is 0 and the numbers differ.

    Rounding is relative only above the smallest normal number: `underflow` is added to a floor that is not 0.
    """
    finite = np.isfinite(oracle)
    distance = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, oracle, 0)), 0).astype(np.float64)
    scale = np.asarray(scale, dtype=np.float64)
    floor = unit * scale + np.where(scale > 0, underflow, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / floor)


def judge(errors: tuple[float, float], tier: str, c: float) -> str:
    """The verdict of rules 1 and 2 on two worst errors, both in floors."""
    first, second = errors
    if tier == "float64":
        bad = (first > c, second > c)
    else:
        bad = (first > min(RULE_2 * max(second, 1.0), CAP), second > min(RULE_2 * max(first, 1.0), CAP))
    if all(bad):
        return BOTH_WRONG
    if any(bad):
        return JAX_WRONG if bad[0] else TORCH_WRONG
    return EQUAL if max(first, second) <= (c if tier == "float64" else 1.0) else NOISE


def compare(
    case: Case,
    sides: tuple[Side, Side],
    found: tuple[Evaluation, Evaluation],
    oracle: Evaluation,
    skip: tuple[str, ...] = (),
) -> list[Result]:
    """A Result per leaf and quantity of a case. The first side is JAX's, the second PyTorch's."""
    tier, names = sides[0].tier, (sides[0].name, sides[1].name)
    results = []

    def add(quantity: str, leaf: str, verdict: str, **more: Any) -> None:
        results.append(Result(case.name, quantity, leaf, tier, names, verdict, **more))

    for quantity in case.quantities:
        if quantity in skip:
            continue
        if quantity != "value" and not case.active():
            continue
        wanted = oracle.quantity(quantity)
        got = tuple(side.quantity(quantity) for side in found)
        odd = [set(wanted) ^ set(one) for one in got]
        if any(odd):
            verdict = BOTH_WRONG if all(odd) else JAX_WRONG if odd[0] else TORCH_WRONG
            add(quantity, "*", verdict, detail=f"leaves differ: {sorted(odd[0] | odd[1])}")
        for leaf in wanted:
            if any(leaf not in one for one in got):
                continue
            _leaf(case, quantity, leaf, sides, (got[0][leaf], got[1][leaf]), wanted[leaf], oracle, add)
    for place, (quantity, way) in enumerate(ANOTHER_WAY[side.framework] for side in sides):
        if quantity in skip:
            continue
        for leaf, value in found[place].again.get(quantity, {}).items():
            if any(leaf not in one.quantity(quantity) for one in (*found, oracle)):
                continue  # said above
            pair = [side.quantity(quantity)[leaf] for side in found]
            pair[place] = value
            label = partial(_labelled, add, way)
            _leaf(case, quantity, leaf, sides, (pair[0], pair[1]), oracle.quantity(quantity)[leaf], oracle, label)
    return results


def _labelled(add: Any, way: str, quantity: str, leaf: str, verdict: str, **more: Any) -> None:
    add(quantity, f"{leaf}, {way}", verdict, **more)


def _leaf(
    case: Case,
    quantity: str,
    leaf: str,
    sides: tuple[Side, Side],
    got: tuple[Any, Any],
    expected: Any,
    oracle: Evaluation,
    add: Any,
) -> None:
    tier = sides[0].tier
    expected = np.asarray(expected)
    scale = oracle.errors.get(quantity, {}).get(leaf, np.zeros(expected.shape))
    paths = _paths(case, quantity, leaf, got)
    if paths:
        verdict, detail = paths
        add(quantity, leaf, verdict, detail=detail)
        return
    arrays: Any = tuple(np.zeros(expected.shape, sides[0].dtype) if one is None else np.asarray(one) for one in got)
    wanted = None if expected.dtype.kind != "f" else sides[0].dtype
    faults = [structural(expected, one, wanted) for one in arrays]
    if any(faults):
        verdict = BOTH_WRONG if all(faults) else JAX_WRONG if faults[0] else TORCH_WRONG
        add(quantity, leaf, verdict, detail="; ".join(fault for fault in faults if fault))
        return
    if expected.dtype.kind != "f":
        add(quantity, leaf, EQUAL)
        return
    # XLA flushes what lies below the smallest normal number to zero; directions and weights then multiply the loss.
    underflow = 2.0**8 * float(np.finfo(sides[0].dtype).tiny)
    entries = [entry_errors(expected, scale, one, floor_unit(tier, case.terms), underflow) for one in arrays]
    worst = (float(entries[0].max(initial=0.0)), float(entries[1].max(initial=0.0)))
    verdict, detail = judge(worst, tier, case.c), ""
    if verdict in (EQUAL, NOISE):
        verdict, detail = _demands(case, quantity, leaf, expected, scale, arrays, tier) or (verdict, "")
    culprit = int(worst[1] > worst[0])
    index = np.unravel_index(int(entries[culprit].argmax()), expected.shape) if expected.size else ()
    place = tuple(int(i) for i in index)
    values = tuple(one[place].item() for one in arrays) + (float(expected[place]),) if expected.size else ()
    add(quantity, leaf, verdict, detail=detail, errors=worst, index=place, values=values)


def _paths(case: Case, quantity: str, leaf: str, got: tuple[Any, Any]) -> tuple[str, str] | None:
    """Rule 3 for gradients: none and zero are different things."""
    if quantity != "gradient":
        return None
    absent = tuple(one is None for one in got)
    declared = case.declared(leaf)
    data = case.declared(leaf) == "zero" and leaf in ("wx", "wy")
    if data and all(one is None or not np.any(one) for one in got):
        return EQUAL, "data: no gradient"
    if absent == (declared == "none",) * 2:
        return (EQUAL, "no path on either side") if declared == "none" else None
    want = "no gradient path" if declared == "none" else "a gradient path"
    wrong = tuple(flag != (declared == "none") for flag in absent)
    verdict = BOTH_WRONG if all(wrong) else JAX_WRONG if wrong[0] else TORCH_WRONG
    return verdict, f"{want} was wanted"


def _demands(
    case: Case, quantity: str, leaf: str, expected: np.ndarray, scale: np.ndarray, arrays: tuple[Any, Any], tier: str
) -> tuple[str, str] | None:
    """Rule 4, declared zeros, and the accuracy that a case requires of float32."""
    if quantity == "gradient" and case.declared(leaf) == "zero":
        wrong = [bool(np.any(one)) for one in arrays]
        if any(wrong):
            return (BOTH_WRONG if all(wrong) else JAX_WRONG if wrong[0] else TORCH_WRONG), "declared exactly zero"
    if quantity == "gradient" and case.declared(leaf) == "flows" and expected.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.nanmax(np.where(scale > 0, np.abs(expected) / (TIERS["float64"][1] * case.c * scale), 0))
        if not size > VACUOUS:
            return BOTH_WRONG, "vacuous: the gradient is below 1e3 floors and not declared zero"
    if case.accuracy is not None and tier == "float32" and quantity in ("value", "gradient"):
        size = float(np.abs(expected).max(initial=0.0))
        gaps = [float(np.abs(one - expected).max(initial=0.0)) / (size or math.inf) for one in arrays]
        wrong = [gap > case.accuracy for gap in gaps]
        if any(wrong):
            verdict = BOTH_WRONG if all(wrong) else JAX_WRONG if wrong[0] else TORCH_WRONG
            return verdict, f"relative errors {gaps[0]:.2g} and {gaps[1]:.2g}, required {case.accuracy:g}"
    return None


_ORACLES: dict[str, Evaluation] = {}


def oracle_of(case: Case) -> Evaluation:
    """The oracle of a case, computed once per process."""
    if case.name not in _ORACLES:
        _ORACLES[case.name] = evaluate_oracle(case)
    return _ORACLES[case.name]


def run_case(case: Case, sides: tuple[Side, Side], *, skip: tuple[str, ...] = ()) -> list[Result]:
    """Evaluate both sides and compare, without the quantities in `skip`; a side that raises has every leaf wrong."""
    found: list[Evaluation] = []
    for side in sides:
        try:
            found.append(side.evaluate(case, skip))
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            verdict = JAX_WRONG if side.framework == "jax" else TORCH_WRONG
            detail = f"{side.name} raised {type(error).__name__}: {first}"
            return [Result(case.name, "value", "*", side.tier, (sides[0].name, sides[1].name), verdict, detail)]
    return compare(case, sides, (found[0], found[1]), oracle_of(case), skip)
