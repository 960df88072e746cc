"""Each package's E-distance against a loop from its formula; the packages themselves are in test_eval_peers.py."""

import math

import numpy as np
import pytest

from pf_core.edistance import KINDS, edistance
from pf_core.metrics import energy_distance
from pf_core.noise import generator


def _cells():
    rng = generator(19, "test_edistance.cells")
    x, y = rng.standard_normal((13, 5)), rng.standard_normal((11, 5)) + 0.5
    y[3] = x[2]  # coincident cells
    return x, y


def _distance(a, b):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _loop(x, y, pair, *, diagonal):
    within = [_mean(pair(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if diagonal or i != j) for s in (x, y)]
    return 2 * _mean(pair(a, b) for a in x for b in y) - sum(within)


# From the formulas in the packages' sources; versions in pf_core/edistance.py. rapids averages the upper triangle.
LOOPS = {
    "scperturb": lambda x, y: _loop(x, y, lambda a, b: _distance(a, b) ** 2, diagonal=False),
    "pertpy": lambda x, y: _loop(x, y, _distance, diagonal=True),
    "rapids": lambda x, y: (
        2 * _mean(_distance(a, b) for a in x for b in y)
        - sum(_mean(_distance(s[i], s[j]) for i in range(len(s)) for j in range(i + 1, len(s))) for s in (x, y))
    ),
    "cell-eval": lambda x, y: _loop(x, y, _distance, diagonal=True),
    "cellflow": lambda x, y: _loop(x, y, lambda a, b: _distance(a, b) ** 2, diagonal=True),
    "state": lambda x, y: 0.5 * _loop(x, y, lambda a, b: math.sqrt(max(_distance(a, b) ** 2, 1e-8)), diagonal=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_a_loop_from_its_formula(kind):
    x, y = _cells()
    assert edistance(x, y, kind=kind) == pytest.approx(LOOPS[kind](x.tolist(), y.tolist()), rel=1e-12)


def test_cellflows_distance_sees_means_only():
    x, y = _cells()
    wanted = 2 * np.sum((x.mean(0) - y.mean(0)) ** 2)
    assert edistance(x, y, kind="cellflow") == pytest.approx(wanted, rel=1e-12)


def test_scperturbs_distance_is_cellflows_less_the_variance_of_the_means():
    x, y = _cells()
    variance = sum(2 * s.var(axis=0, ddof=1).sum() / len(s) for s in (x, y))
    assert edistance(x, y, kind="scperturb") == pytest.approx(edistance(x, y, kind="cellflow") - variance, rel=1e-12)


@pytest.mark.parametrize(("kind", "estimator", "power"), [("rapids", "u", 1), ("pertpy", "v", 1), ("cellflow", "v", 2)])
def test_kinds_without_a_factor_are_our_energy_distance(kind, estimator, power):
    x, y = _cells()
    assert edistance(x, y, kind=kind) == energy_distance(x, y, estimator=estimator, power=power)


def test_pertpys_distance_exceeds_rapids_by_the_mean_distance_within_over_the_number_of_cells():
    x, y = _cells()
    within = [_mean(_distance(s[i], s[j]) for i in range(len(s)) for j in range(i)) / len(s) for s in (x, y)]
    difference = edistance(x, y, kind="pertpy") - edistance(x, y, kind="rapids")
    assert difference == pytest.approx(sum(within), rel=1e-12)


def test_bad_input_is_refused():
    x, y = _cells()
    with pytest.raises(ValueError, match="one of 'scperturb'"):
        edistance(x, y, kind="pertpy2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="shapes"):
        edistance(x, y[:, :3], kind="pertpy")
    with pytest.raises(ValueError, match="needs 2 of each"):
        edistance(x, y[:1], kind="rapids")
    with pytest.raises(ValueError, match="not finite"):
        edistance(x, y * np.nan, kind="pertpy")
