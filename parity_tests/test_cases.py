"""Every case in float64 and float32 on the CPU: rules 1 to 5 and 7."""

from __future__ import annotations

import pytest

from parity_tests.bisect import first_divergence
from parity_tests.cases import Case, all_cases
from parity_tests.compare import Report, run_case
from parity_tests.sides import Side

# Second derivatives of the losses compile for long; the float32 ones are left to `pf parity`.
LONG = ("vae_loss", "operator_loss", "joint_loss", "cvae_loss", "flow_loss", "integrate")


def pairs() -> list[tuple[Case, str]]:
    return [(case, dtype) for case in all_cases() for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), pairs(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_twins_agree_with_each_other_and_with_the_oracle(case: Case, dtype: str) -> None:
    sides = (Side("jax", tier=dtype), Side("torch", tier=dtype))
    skip = ("hvp",) if dtype == "float32" and case.group in LONG else ()
    report = Report(run_case(case, sides, skip=skip))
    if not report.passed:
        pytest.fail(f"{report}\nfirst divergence: {first_divergence(case, sides)}", pytrace=False)
