"""The mixed model of library sizes against plain linear algebra, and what it says of conditions it has not seen."""

import itertools

import numpy as np
import pytest

from pf_core import library_size
from pf_core.labels import condition_label
from pf_core.library_size import LibraryChanges, Observed, from_json, library_changes, to_json
from pf_core.noise import generator

HERE, THERE, NEW = ("t1", "x"), ("t1", "y"), ("t2", "x")


def _members(label):
    return tuple((name, 1.0) for name in label.split("+"))


def _observed(effects, *, contexts=(HERE, THERE), error=0.02, seed=3):
    """Changes of the combinations of `effects` (name -> effect), which add, measured in every context."""
    rng = generator(seed, "test_library_size")
    labels = [*effects, *("+".join(pair) for pair in itertools.combinations(sorted(effects), 2))]
    return [
        Observed(
            _members(label),
            context,
            sum(effects[name] for name in label.split("+")) + error * rng.standard_normal(),
            error**2,
        )
        for label in labels
        for context in contexts
    ]


def test_effects_are_those_of_the_dense_model(monkeypatch):
    monkeypatch.setattr(library_size, "VARIANCES", (0.02,))
    observed = [
        Observed((("A", 1.0),), HERE, 0.31, 0.01),
        Observed((("A", 0.5),), HERE, 0.11, 0.02),
        Observed((("B", 1.0),), HERE, -0.2, 0.015),
        Observed((("A", 1.0), ("B", 1.0)), HERE, 0.25, 0.01),
        Observed((("A", 1.0), ("B", 1.0)), THERE, 0.05, 0.04),
    ]
    found = library_changes(observed)
    labels = sorted({condition_label(one.members) for one in observed})
    design = np.array(
        [
            [*(dict(one.members).get(name, 0.0) for name in "AB"), *(condition_label(one.members) == x for x in labels)]
            for one in observed
        ],
        float,
    )
    y, errors = np.array([one.value for one in observed]), np.array([one.variance for one in observed])
    covariance = 0.02 * design @ design.T + np.diag(errors + 0.02)
    solved = np.linalg.solve(covariance, y)
    effects = 0.02 * design.T @ solved
    np.testing.assert_allclose([found.perturbation[name] for name in "AB"], effects[:2], rtol=1e-10)
    np.testing.assert_allclose([found.condition[label] for label in labels], effects[2:], rtol=1e-10)
    for one, value in zip(observed, design @ effects + 0.02 * solved, strict=True):
        assert found.of(one.members, one.context) == pytest.approx(value, rel=1e-10)


def test_the_likelihood_is_the_dense_one():
    rng = generator(5, "test_library_size.likelihood")
    design = np.concatenate([rng.integers(0, 2, (7, 3)), np.eye(7)], axis=1).astype(float)
    y, errors, variances = rng.standard_normal(7), rng.uniform(0.1, 1.0, 7), np.array([0.3, 0.2, 0.5])
    from scipy import sparse
    from scipy.stats import multivariate_normal

    prior = np.repeat(variances[:2], (3, 7))
    covariance = design @ (prior[:, None] * design.T) + np.diag(errors + variances[2])
    wanted = multivariate_normal.logpdf(y, np.zeros(7), covariance)
    found, _ = library_size._given(sparse.csr_matrix(design), y, errors, np.array([3, 7]), variances)
    assert found + 7 * -0.5 * np.log(2 * np.pi) == pytest.approx(wanted, rel=1e-12)


def test_an_unseen_combination_adds_the_effects_of_its_members():
    effects = {"A": 0.4, "B": -0.3, "C": 0.0, "D": 0.2}
    observed = [one for one in _observed(effects) if condition_label(one.members) != "A+D"]
    found = library_changes(observed)
    assert found.of(_members("A+D"), HERE) == pytest.approx(0.6, abs=0.05)
    assert found.of(_members("A"), NEW) == pytest.approx(0.4, abs=0.05)
    assert abs(found.of(_members("C"), NEW)) < 0.03


def test_what_is_small_against_its_error_becomes_smaller():
    rng = generator(7, "test_library_size.noise")
    noise = [Observed(((f"P{i}", 1.0),), HERE, 0.1 * rng.standard_normal(), 0.01) for i in range(40)]
    found = library_changes(noise)
    kept = np.array([found.of(one.members, NEW) for one in noise])
    assert np.abs(kept).mean() < 0.25 * np.abs([one.value for one in noise]).mean()


def test_a_context_keeps_what_is_its_own():
    values = {HERE: 0.5, THERE: 0.1, NEW: 0.1}
    found = library_changes([Observed((("A", 1.0),), context, value, 1e-4) for context, value in values.items()])
    for context, value in values.items():
        assert found.of((("A", 1.0),), context) == pytest.approx(value, abs=0.02)
    assert 0.1 < found.of((("A", 1.0),), ("elsewhere", "z")) < 0.4


def test_doses_are_relative_to_the_largest():
    observed = [Observed((("A", dose),), HERE, 0.01 * dose, 1e-6) for dose in (10.0, 20.0, 40.0)]
    found = library_changes(observed)
    assert found.of((("A", 30.0),), HERE) == pytest.approx(0.3, abs=0.02)


def test_nothing_seen_changes_nothing():
    assert library_changes([]) == LibraryChanges()
    assert LibraryChanges().of((("A", 1.0),), HERE) == 0.0
    assert library_changes(_observed({"A": 0.4, "B": 0.1})).of((), HERE) == 0.0


def test_changes_survive_the_disk():
    import json

    found = library_changes(_observed({"A": 0.4, "B": -0.1}))
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
