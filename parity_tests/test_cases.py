"""Every case on the CPU: rules 1 to 5 and 7.

JAX compiles a program per case, precision and derivative. The fast tier has values and gradients: of every case in
float64, and of the first case of every function in float32. All quantities of all cases in both precisions are the slow
tier, and `pf parity`.
"""

from __future__ import annotations

from typing import Any

import pytest

from parity_tests.bisect import first_divergence
from parity_tests.cases import Case, all_cases
from parity_tests.compare import Report, run_case
from parity_tests.sides import Side

SECOND = ("jvp", "hvp")


def pairs() -> list[Any]:
    """(case, dtype, quantities to skip), the slow ones marked."""
    functions, found = set(), []
    for case in all_cases():
        for dtype in case.dtypes:
            if dtype == "float64" or case.function not in functions:
                found.append(pytest.param(case, dtype, SECOND, id=f"{case.name}-{dtype}-first derivatives"))
            found.append(pytest.param(case, dtype, (), id=f"{case.name}-{dtype}", marks=pytest.mark.slow))
        functions.add(case.function)
    return found


@pytest.mark.parametrize(("case", "dtype", "skip"), pairs())
def test_twins_agree_with_each_other_and_with_the_oracle(case: Case, dtype: str, skip: tuple[str, ...]) -> None:
    sides = (Side("jax", tier=dtype), Side("torch", tier=dtype))
    report = Report(run_case(case, sides, skip=skip))
    if not report.passed:
        pytest.fail(f"{report}\nfirst divergence: {first_divergence(case, sides)}", pytrace=False)
