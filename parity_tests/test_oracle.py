"""The oracle itself: its derivatives against its function, and its special functions against mpmath."""

from __future__ import annotations

import numpy as np
import pytest

from parity_tests.cases import Case, all_cases
from parity_tests.compare import oracle_of
from parity_tests.jets import WIDE
from parity_tests.sides import evaluate_oracle
from parity_tests.special import polygamma_difference

pytestmark = pytest.mark.skipif(np.finfo(WIDE).nmant <= 52, reason="no extended precision here: no room for remainders")
STEPS = {2: 2.0**-22, 3: 2.0**-16}  # small enough to stay between kinks, large enough for the remainder to be seen

DIFFERENTIATED = [case for case in all_cases() if case.taylor and "gradient" in case.quantities and case.active()]


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=lambda case: case.name)
def test_taylor_remainder_of_the_oracle_falls_with_the_square(case: Case) -> None:
    """Rule 8. Both twins equal the oracle's derivatives, so what holds for it holds for them."""
    base = evaluate_oracle(case, derivatives=False).value["value"]
    known = oracle_of(case)
    directions = case.directions()
    slope = sum(np.sum(known.gradient[name] * directions[name]) for name in case.active())
    curve = sum(np.sum(known.hvp[name] * directions[name]) for name in case.active()) if known.hvp else None
    # Eigenvalues come from LAPACK, in float64.
    precision = 2.0**-52 if case.group == "generator_penalty" else float(np.finfo(WIDE).eps)
    noise = float(known.errors["scalar"]["value"]) * precision
    for order, step in STEPS.items():
        remainders = []
        for h in (WIDE(step), WIDE(step) / 2):
            gap = evaluate_oracle(case, shift=float(h), derivatives=False).value["value"] - base - h * slope
            remainders.append(abs(gap - h**2 / 2 * curve) if order == 3 and curve is not None else abs(gap))
        if order == 2 or curve is not None:
            check_slope(remainders, order, noise)


def check_slope(remainders: list[np.ndarray], order: int, noise: float) -> None:
    if remainders[1] <= 100 * noise:  # linear, or beyond the precision there is
        return
    slope = float(np.log2(remainders[0] / remainders[1]))
    assert slope > order - 0.2, f"remainders {remainders} have slope {slope:.3f}, not {order}"


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("r", [1e-4, 0.3, 1.0, 7.3, 1999.0, 1e4])
@pytest.mark.parametrize("x", [0, 1, 7, 1021, 1000003])
def test_polygamma_difference_equals_mpmath(x: int, r: float, order: int) -> None:
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed: the special functions are not rechecked")
    with mpmath.workdps(60):
        at = lambda z: mpmath.loggamma(z) if order == 0 else mpmath.polygamma(order - 1, z)
        exact = at(mpmath.mpf(r) + x) - at(mpmath.mpf(r))
        got = polygamma_difference(np.array(x), np.array(r), order)
        # A long double passes through text without loss.
        gap = abs(mpmath.mpf(np.format_float_scientific(WIDE(got), precision=25, unique=False)) - exact)
        assert gap <= abs(exact) * mpmath.mpf(2) ** -56
