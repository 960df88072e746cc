"""Every case on the CPU: rules 1 to 5 and 7.

JAX compiles a program per case, precision and derivative. The fast tier has all of it for the first case of every
function, and values and gradients in float64 for the others; what is left is in the slow tier, and in `pf parity`.
"""

from __future__ import annotations

from typing import Any

import pytest

from parity_tests.bisect import first_divergence
from parity_tests.cases import Case, all_cases
from parity_tests.compare import Report, run_case
from parity_tests.sides import Side

SECOND = ("jvp", "hvp")


def first_of_every_function() -> set[str]:
    first: dict[str, str] = {}
    for case in all_cases():
        first.setdefault(case.function, case.name)
    return set(first.values())


def pairs() -> list[Any]:
    """(case, dtype, quantities to skip), the slow ones marked."""
    first, found = first_of_every_function(), []
    for case in all_cases():
        for dtype in case.dtypes:
            fast = case.name in first
            if not fast and dtype == "float64":
                found.append(pytest.param(case, dtype, SECOND, id=f"{case.name}-{dtype}-first derivatives"))
            marks = () if fast else pytest.mark.slow
            found.append(pytest.param(case, dtype, (), id=f"{case.name}-{dtype}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype", "skip"), pairs())
def test_twins_agree_with_each_other_and_with_the_oracle(case: Case, dtype: str, skip: tuple[str, ...]) -> None:
    sides = (Side("jax", tier=dtype), Side("torch", tier=dtype))
    report = Report(run_case(case, sides, skip=skip))
    if not report.passed:
        pytest.fail(f"{report}\nfirst divergence: {first_divergence(case, sides)}", pytrace=False)


def test_the_fast_tier_has_every_function_and_every_case() -> None:
    fast = [parameters.values for parameters in pairs() if not parameters.marks]
    assert {case.name for case, _, _ in fast} == {case.name for case in all_cases() if "float64" in case.dtypes} | (
        first_of_every_function()
    )
    assert {case.function for case, _, skip in fast if not skip} == {case.function for case in all_cases()}
