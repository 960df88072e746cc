"""Where two twins part: the first recorded intermediate, or cotangent on the way back, that differs.

Both twins pass every layer's output through `probe.record`. Here record is replaced, in every module that imported it,
by one that keeps the value and lets its cotangent be read.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.case import Case
from parity_tests.sides import Side
from parity_tests.trees import flatten

Trace = dict[str, np.ndarray]
GAP = {"float64": 1e-9, "float32": 1e-3}  # relative to the largest entry: a fault, not rounding


@contextlib.contextmanager
def _replaced(side: Side, record: Callable[[str, Any], Any]) -> Iterator[None]:
    package = side.package or f"pf_{side.framework}"
    original = side.namespace.probe.record
    users = [
        m for name, m in sys.modules.items() if name.startswith(package + ".") and vars(m).get("record") is original
    ]
    try:
        for module in users:
            vars(module)["record"] = record
        yield
    finally:
        for module in users:
            vars(module)["record"] = original


class _Names:
    """A name met again gets a running number."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        self.count[name] = n = self.count.get(name, 0) + 1
        return name if n == 1 else f"{name}.{n}"


def trace(side: Side, case: Case) -> tuple[Trace, Trace]:
    """Recorded intermediates in order, and the cotangent of <w, outputs> at each of them."""
    return (_trace_jax if side.framework == "jax" else _trace_torch)(side, case)


def _trace_jax(side: Side, case: Case) -> tuple[Trace, Trace]:
    import jax
    import jax.numpy as jnp

    with side.context():
        leaves = {name: side.array(value) for name, value in case.leaves().items()}
        values: dict[str, Any] = {}

        def run(taps: dict[str, Any]) -> Any:
            names = _Names()

            def record(name: str, value: Any) -> Any:
                key = names(name)
                if key not in taps:
                    values[key] = value
                    return value
                return value + taps[key]

            with _replaced(side, record):
                outputs = flatten(case.call(side.namespace, leaves))
            parts = [
                jnp.sum(v * side.array(case.weight(k, v.shape))) for k, v in outputs.items() if "float" in str(v.dtype)
            ]
            return sum(parts[1:], parts[0])

        run({})
        taps = {name: jnp.zeros_like(value) for name, value in values.items()}
        cotangents = jax.grad(run)(taps) if taps else {}
        return ({k: np.asarray(v) for k, v in values.items()}, {k: np.asarray(cotangents[k]) for k in values})


def _trace_torch(side: Side, case: Case) -> tuple[Trace, Trace]:
    import torch

    active = case.active()
    with side.context():
        leaves = {name: side.array(value) for name, value in case.leaves().items()}
        leaves |= {name: leaves[name].requires_grad_() for name in active}
        names, values = _Names(), {}

        def record(name: str, value: Any) -> Any:
            values[names(name)] = value
            return value

        with _replaced(side, record):
            outputs = flatten(case.call(side.namespace, leaves))
        parts = [
            (v * side.array(case.weight(k, tuple(v.shape)))).sum() for k, v in outputs.items() if v.is_floating_point()
        ]
        total: Any = sum(parts[1:], parts[0])
        moving = {name: value for name, value in values.items() if value.requires_grad}
        found: tuple[Any, ...] = ()
        if moving and total.requires_grad:
            found = torch.autograd.grad(total, list(moving.values()), allow_unused=True)
        given = dict(zip(moving, found, strict=False))
        zero = lambda value: np.zeros(tuple(value.shape), side.dtype)
        cotangents = {k: zero(v) if given.get(k) is None else given[k].numpy(force=True) for k, v in values.items()}
        return {name: value.numpy(force=True) for name, value in values.items()}, cotangents


def first_divergence(case: Case, sides: tuple[Side, Side]) -> str:
    """One sentence: the first operation at which the two sides differ."""
    (first, back_first), (second, back_second) = (trace(side, case) for side in sides)
    if not first and not second:
        return f"{case.function} records no intermediates: the fault is in its own few lines"
    for name in [name for name in first if name not in second] + [name for name in second if name not in first]:
        return f"only one side records {name}"
    before = "the inputs"
    for name in second:
        gap = _gap(first[name], second[name], sides[0].tier)
        if gap:
            return f"forward, between {before} and {name}: {gap}"
        before = name
    after = "the outputs"
    for name in reversed(second):
        gap = _gap(back_first[name], back_second[name], sides[0].tier)
        if gap:
            return f"backward, between {after} and the cotangent of {name}: {gap}"
        after = name
    return f"all {len(second)} intermediates and cotangents agree: before {next(iter(second))}, or after {before}"


def _gap(one: np.ndarray, two: np.ndarray, tier: str) -> str:
    if one.shape != two.shape:
        return f"shapes {one.shape} and {two.shape}"
    if not np.array_equal(np.isfinite(one), np.isfinite(two)):
        return "one side is not finite"
    gap = np.nan_to_num(np.abs(one.astype(np.float64) - two))
    if gap.size and gap.max() > GAP.get(tier, 0.05) * max(np.nan_to_num(np.abs(two)).max(), 1e-300):
        place = np.unravel_index(int(gap.argmax()), gap.shape)
        return f"{one[place]!r} and {two[place]!r} at {[int(i) for i in place]}"
    return ""
