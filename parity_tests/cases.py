"""Every case of the suite, and the public names that are covered otherwise."""

from __future__ import annotations

from functools import cache

from parity_tests import cases_flow, cases_math, cases_models
from parity_tests.case import QUANTITIES, Case

__all__ = ["QUANTITIES", "Case", "all_cases", "by_name"]


@cache
def all_cases() -> tuple[Case, ...]:
    cases = (*cases_math.all_cases(), *cases_models.all_cases(), *cases_flow.all_cases())
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two cases are called {sorted(twice)}")
    return cases


def by_name(name: str) -> Case:
    return next(case for case in all_cases() if case.name == name)
