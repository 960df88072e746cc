"""The comparer notices faults that are planted in what it is given."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from parity_tests import compare as comparer
from parity_tests.case import Case
from parity_tests.cases import by_name
from parity_tests.compare import (
    BOTH_WRONG,
    EQUAL,
    JAX_WRONG,
    NOISE,
    TORCH_WRONG,
    Report,
    Result,
    compare,
    judge,
    oracle_of,
)
from parity_tests.sides import ANOTHER_WAY, Evaluation, Side

SIDES = (Side("jax"), Side("torch"))
CASE = by_name("elbo_loss/default beta")


def as_side(case: Case) -> Evaluation:
    """A side that computes exactly what the oracle does, rounded to float64."""
    oracle = oracle_of(case)
    rounded = lambda tree: {name: np.asarray(value, np.float64) for name, value in tree.items()}
    gradient = {k: None if case.declared(k) == "none" else v for k, v in rounded(oracle.gradient).items()}
    return Evaluation(rounded(oracle.value), gradient, rounded(oracle.jvp), rounded(oracle.hvp))


def verdicts(one: Evaluation, two: Evaluation, case: Case = CASE) -> list[Result]:
    return compare(case, SIDES, (one, two), oracle_of(case))


def test_the_oracle_agrees_with_itself() -> None:
    assert Report(verdicts(as_side(CASE), as_side(CASE))).passed


def test_a_nan_on_both_sides_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    for side in (one, two):
        side.gradient["mu"][2, 3] = np.nan  # type: ignore[index]
    assert [r.verdict for r in verdicts(one, two) if not r.passed] == [BOTH_WRONG]


def test_a_dropped_leaf_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    del two.gradient["r"]
    failed = Report(verdicts(one, two)).failures
    assert [(r.verdict, r.detail) for r in failed] == [(TORCH_WRONG, "leaves differ: ['r']")]


def test_a_leaf_dropped_on_both_sides_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    del one.gradient["r"], two.gradient["r"]
    assert not Report(verdicts(one, two)).passed


@pytest.mark.parametrize(("place", "verdict"), [(0, JAX_WRONG), (1, TORCH_WRONG)])
def test_what_is_wrong_in_the_other_way_alone_is_noticed(place: int, verdict: str) -> None:
    sides = as_side(CASE), as_side(CASE)
    quantity, way = ANOTHER_WAY[SIDES[place].framework]
    sides[place].again = {quantity: dict(sides[place].quantity(quantity))}
    assert Report(verdicts(*sides)).passed
    leaf = next(iter(sides[place].again[quantity]))
    sides[place].again[quantity][leaf] = sides[place].again[quantity][leaf] * (1.0 + 1e-9)
    failed = Report(verdicts(*sides)).failures
    assert [(r.verdict, r.quantity, r.leaf) for r in failed] == [(verdict, quantity, f"{leaf}, {way}")]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_each_side_goes_the_other_way(framework: str) -> None:
    quantity, _ = ANOTHER_WAY[framework]
    found = Side(framework).evaluate(CASE, ("hvp",))
    assert set(found.again[quantity]) == set(found.quantity(quantity))


def test_a_leaf_of_one_side_alone_is_a_verdict_in_the_other_way_too() -> None:
    one, two = as_side(CASE), as_side(CASE)
    one.value["more"] = np.zeros(())
    one.again = {"value": dict(one.value)}
    assert [r.verdict for r in verdicts(one, two) if not r.passed] == [JAX_WRONG]


def test_a_permuted_gene_axis_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    one.gradient["mu"] = one.gradient["mu"][:, ::-1].copy()  # type: ignore[index]
    (failed,) = Report(verdicts(one, two)).failures
    assert (failed.verdict, failed.leaf) == (JAX_WRONG, "mu")


def test_a_wrong_dtype_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    two.value["0"] = two.value["0"].astype(np.float32)
    assert Report(verdicts(one, two)).failures[0].verdict == TORCH_WRONG


def test_a_wrong_shape_is_noticed() -> None:
    one, two = as_side(CASE), as_side(CASE)
    one.gradient["r"] = one.gradient["r"][None]  # type: ignore[index]
    assert Report(verdicts(one, two)).failures[0].verdict == JAX_WRONG


def test_none_in_the_place_of_zero_is_noticed() -> None:
    case = by_name("spectral_penalty/none above")
    one, two = as_side(case), as_side(case)
    two.gradient["A"] = None
    assert Report(verdicts(one, two, case)).failures[0].verdict == TORCH_WRONG


def test_zero_in_the_place_of_none_is_noticed() -> None:
    case = by_name("nb_log_prob/counts carry no gradient, stable")
    one, two = as_side(case), as_side(case)
    one.gradient["x"] = np.zeros_like(one.gradient["mu"])  # type: ignore[arg-type]
    assert Report(verdicts(one, two, case)).failures[0].verdict == JAX_WRONG


def test_a_gradient_that_is_zero_everywhere_is_vacuous() -> None:
    case = by_name("spectral_penalty/none above")
    undeclared = replace(case, zero=())
    assert "vacuous" in Report(verdicts(as_side(case), as_side(case), undeclared)).failures[0].detail


def test_an_error_within_a_thousandfold_tolerance_is_noticed() -> None:
    """The size of fault that a tolerance multiplied by 1e3 would let pass."""
    one, two = as_side(CASE), as_side(CASE)
    scale = oracle_of(CASE).errors["gradient"]["r"]
    one.gradient["r"] += 10 * CASE.c * 2.0**-53 * scale  # type: ignore[operator]
    assert Report(verdicts(one, two)).failures[0].leaf == "r"


def test_a_tolerance_multiplied_by_1e3_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are the constants of docs/parity.md; a change of one needs a change of this line and of that page."""
    assert (comparer.RULE_2, comparer.CAP, comparer.VACUOUS, Case("", "", {}).c, Case("", "", {}).terms) == (
        3.0,
        30.0,
        1e3,
        100.0,
        4,
    )
    from parity_tests.cases import all_cases

    assert max(case.c for case in all_cases()) <= 100.0
    assert max(case.terms for case in all_cases()) <= 64


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ((0.5, 0.9), EQUAL),
        ((2.0, 2.5), NOISE),
        ((3.5, 0.1), JAX_WRONG),
        ((0.1, 3.5), TORCH_WRONG),
        ((29.0, 11.0), NOISE),
        ((31.0, 30.5), BOTH_WRONG),
        ((float("inf"), 0.0), JAX_WRONG),
    ],
)
def test_rule_2_in_float32(errors: tuple[float, float], verdict: str) -> None:
    assert judge(errors, "float32", 100.0) == verdict


def test_a_side_that_raises_is_wrong() -> None:
    broken = Case(
        "broken/", "likelihood.gaussian_kl", {"mu": np.ones((2, 3)), "logvar": np.ones((2, 5))}, differentiate=("mu",)
    )
    results = comparer.run_case(broken, SIDES)
    assert results[0].verdict == JAX_WRONG
    assert "raised" in results[0].detail


def test_an_empty_report_does_not_pass() -> None:
    assert not Report([]).passed


def test_a_case_without_its_leaf_is_an_error() -> None:
    with pytest.raises(ValueError, match="no float input matches"):
        copy.copy(replace(CASE, differentiate=("mu", "gone"))).active()
