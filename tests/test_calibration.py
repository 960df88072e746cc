"""What training says of a change in other contexts, and how decoded means take it up."""

import dataclasses

import numpy as np
import pytest
from scipy import sparse
from small_data import small
from test_response import BASES, SHIFTS, G, known_model, row

from pf_core import data
from pf_core.calibration import Calibration, calibrate, correction, from_arrays, log_rate, measure, to_arrays
from pf_core.config import DataConfig
from pf_core.evaluation import coverage
from pf_core.kriging import Change
from pf_core.labels import CONTROL
from pf_core.library_size import LibraryChanges
from pf_core.noise import generator


def _profiles(rng: np.random.Generator, *shape: int) -> np.ndarray:
    draw = rng.gamma(0.5, 1.0, shape) + 1e-4
    return draw / draw.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def calibrated():
    dataset = data.load(small(), DataConfig())
    groups = [g for g in data.groups(dataset, np.arange(dataset.n_cells)) if g.label != CONTROL]
    rng = generator(41, "test_calibration.decoded")
    before, after, added = _profiles(rng, 3, len(groups), dataset.n_genes)
    added[[group.label != "A+B" for group in groups]] = np.nan
    return dataset, groups, calibrate(dataset, groups, before, after, added)


def test_the_library_of_a_condition_is_measured_and_predicted():
    adata = small(900)
    b = adata.obs["perturbation"].isin(["B", "A+B"]).to_numpy()
    adata.X = sparse.csr_matrix(adata.X.multiply(np.where(b, 3.0, 1.0)[:, None]))
    dataset = data.load(adata, DataConfig(min_counts=0))
    groups = [g for g in data.groups(dataset, np.arange(dataset.n_cells)) if g.label not in (CONTROL, "A+B")]
    before, after = _profiles(generator(67, "test_calibration.library"), 2, len(groups), dataset.n_genes)
    library = calibrate(dataset, groups, before, after, np.full_like(before, np.nan)).library
    assert library.of((("A", 1.0),), ("t1", "x")) == pytest.approx(0.0, abs=0.08)
    assert library.of((("B", 1.0),), ("t1", "x")) == pytest.approx(np.log(3), abs=0.08)
    for unseen in ((("B", 1.0),), (("A", 1.0), ("B", 1.0))):
        assert 0.3 < library.of(unseen, ("t9", "z")) < np.log(3) + 0.08


def test_predicted_cells_have_the_library_of_their_condition():
    model = known_model({"A": row(), "B": row(beta=(1.0,))}, BASES, SHIFTS, tissues=("t1",))
    adata = small(60, n_genes=G)
    adata = adata[adata.obs["tissue"] == "t1"].copy()
    adata.var_names = list(model.vocabulary.genes)
    adata.obs["perturbation"] = "control"
    changes = LibraryChanges({"A": 1.0, "B": 1.0}, {"A": 0.4, "B": -0.1}, {}, {"B": {("t1", "x"): 0.3}})
    model.calibration = Calibration(np.full(G, 1 / G), library=changes)

    def ratio(*then: str, **options):
        counts = model.predict(adata, *then, output="mean", **options).X
        return np.asarray(counts.sum(1)).ravel() / np.asarray(adata.X.sum(1)).ravel()

    x = (adata.obs["cell_type"] == "x").to_numpy()
    np.testing.assert_allclose(ratio("A"), np.exp(0.4), rtol=1e-5)
    np.testing.assert_allclose(ratio("B"), np.exp(np.where(x, 0.2, -0.1)), rtol=1e-5)
    np.testing.assert_allclose(ratio("A", then=["B"]), np.exp(0.4 + np.where(x, 0.2, -0.1)), rtol=1e-5)
    np.testing.assert_allclose(ratio("A+B"), np.exp(0.3), rtol=1e-5)
    np.testing.assert_allclose(ratio("control"), 1.0, rtol=1e-5)
    np.testing.assert_allclose(model.predict(adata, "B").obs["library_change"], np.where(x, 0.2, -0.1))
    halfway = model.trajectory(adata, "A", times=(0.5,), output="mean")
    np.testing.assert_allclose(halfway.X.sum() / adata.X.sum(), np.exp(0.2), rtol=1e-5)
    np.testing.assert_allclose(halfway.obs["library_change"], 0.2)


@pytest.mark.parametrize(("n", "expected"), [(53, 3000.0), (17, 700.0)])
def test_the_error_of_a_log_profile_is_the_spread_of_repeated_measurements(n, expected):
    rng = generator(43, "test_calibration.measure")
    p, library = _profiles(rng, 1009), np.full(n, expected)
    found = [measure(sparse.csr_matrix(rng.poisson(expected * p, (n, 1009))), library, p) for _ in range(101)]
    spread = np.var([one.value for one in found], axis=0, ddof=1)
    error, noise = (np.mean([getattr(one, key) for one in found], axis=0) for key in ("error", "noise"))
    np.testing.assert_allclose(error.mean(), spread.mean(), rtol=0.2)
    often = p * expected * n > 30
    np.testing.assert_allclose(error[often].mean(), spread[often].mean(), rtol=0.1)
    np.testing.assert_allclose(noise[often].mean(), spread[often].mean(), rtol=0.1)


def test_a_gene_without_counts_is_known_as_well_as_its_typical_rate_allows():
    counts, library = sparse.csr_matrix(np.array([[300.0, 0.0, 0.0], [500.0, 0.0, 0.0]])), np.array([300.0, 500.0])
    found = measure(counts, library, np.array([0.9, 1e-6, 1e-2]))
    np.testing.assert_allclose(found.value[1:], np.log(0.3))
    assert 0 < found.error[1] < found.error[2]
    assert (found.noise[1:] == 0).all()


def test_means_take_up_the_mean_of_both_answers_and_a_well_measured_level(calibrated):
    dataset, _, calibration = calibrated
    rng = generator(47, "test_calibration.correction")
    controls = np.flatnonzero(dataset.is_control)
    here = measure(dataset.rows(controls), dataset.library()[controls], calibration.typical)
    here = dataclasses.replace(here, error=np.full_like(here.error, 1e-9))
    before, after = _profiles(rng, 2, dataset.n_genes)
    carried = calibration.of((("A", 1.0),), ("t1", "x"), here)
    assert carried is not None
    found = correction(here, before, after, [carried])
    assert found is not None
    p0 = before * found.factor
    p1 = p0 + found.shift
    np.testing.assert_allclose(log_rate(p0), here.value, atol=1e-4)
    np.testing.assert_allclose(log_rate(p1) - log_rate(p0), found.change, atol=1e-9)
    np.testing.assert_allclose(p1.sum(), p0.sum())
    answers = log_rate(after) - log_rate(before) + carried.residual, carried.change.mean
    wanted = np.maximum(np.exp(here.value + sum(answers) / 2) - 0.3, 0.0)
    np.testing.assert_allclose(p1, wanted / wanted.sum() * p0.sum(), rtol=1e-4, atol=1e-8)


def test_a_level_that_is_not_measured_is_the_decoded_one(calibrated):
    dataset, _, calibration = calibrated
    here = measure(dataset.rows(np.arange(5)), dataset.library()[:5], calibration.typical)
    before, after = _profiles(generator(61, "test_calibration.level"), 2, dataset.n_genes)
    here = dataclasses.replace(here, value=log_rate(before) + 1.0, error=np.full_like(before, 1e6))
    carried = calibration.of((("A", 1.0),), ("t1", "x"), here)
    found = correction(here, before, after, [carried])
    assert found is not None
    np.testing.assert_allclose(log_rate(before * found.factor), log_rate(before) + 1.0, atol=1e-6)


def test_what_is_not_known_changes_nothing(calibrated):
    dataset, _, calibration = calibrated
    here = measure(dataset.rows(np.arange(5)), dataset.library()[:5], calibration.typical)
    assert calibration.of((("C", 1.0),), ("t1", "x"), here) is None
    assert correction(here, np.ones(3), np.ones(3), [None]) is None


def test_a_condition_that_is_not_known_among_two_leaves_the_decoded_change_in_full(calibrated):
    dataset, _, calibration = calibrated
    here = measure(dataset.rows(np.arange(50)), dataset.library()[:50], calibration.typical)
    before, after = _profiles(generator(53, "test_calibration.two"), 2, dataset.n_genes)
    carried = calibration.of((("A", 1.0),), ("t1", "x"), here)
    assert carried is not None
    alone, both = (correction(here, before, after, some) for some in ([carried], [carried, None]))
    assert alone is not None
    assert both is not None
    assert not np.allclose(alone.change, both.change)


def test_contexts_are_pooled_by_their_sizes_and_the_own_one_counts_with_its_weight(calibrated, monkeypatch):
    dataset, _, calibration = calibrated
    monkeypatch.setattr("pf_core.calibration.shrink", lambda values, errors, parts: Change(values, errors))
    here = measure(dataset.rows(np.arange(50)), dataset.library()[:50], calibration.typical)
    known = calibration.known["A"]
    assert len(known) > 1
    for context in (*known, ("t9", "z")):
        total, weights = np.zeros(dataset.n_genes), 0.0
        for where, one in known.items():
            if where != context:
                total, weights = total + one.weight * one.residual, weights + one.weight
        wanted = total / weights
        if context in known:
            own = known[context]
            wanted = own.weight * own.residual + (1 - own.weight) * wanted
        found = calibration.of((("A", 1.0),), context, here)
        assert found is not None
        np.testing.assert_allclose(found.residual, wanted, atol=1e-12)


def test_a_calibration_survives_the_disk(calibrated):
    dataset, _, calibration = calibrated
    again = from_arrays(to_arrays(calibration))
    here = measure(dataset.rows(np.arange(50)), dataset.library()[:50], calibration.typical)
    one, two = (some.of((("A", 1.0), ("B", 1.0)), ("t2", "y"), here) for some in (calibration, again))
    assert one is not None
    assert two is not None
    np.testing.assert_allclose(one.residual, two.residual, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.change.mean, two.change.mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(again.unseen, calibration.unseen, rtol=1e-6)
    none = dataclasses.replace(calibration, unseen=None)
    assert from_arrays(to_arrays(none)).unseen is None


def test_the_error_of_unseen_combinations_is_that_of_sums_of_members_in_training():
    adata = small(900)
    dataset = data.load(adata, DataConfig(min_counts=0))
    groups = [g for g in data.groups(dataset, np.arange(dataset.n_cells)) if g.label != CONTROL]
    measured = np.array([_observed(dataset, group) for group in groups])
    before = _profiles(generator(71, "test_calibration.unseen"), dataset.n_genes)[None].repeat(len(groups), 0)
    pairs = np.array([group.label == "A+B" for group in groups])

    def error(off: float) -> np.ndarray:
        wrong = off * generator(73, "test_calibration.wrong").choice([-1.0, 1.0], measured.shape)
        added = (np.exp(log_rate(before) + measured + wrong) - 0.3) / 1e4
        added[~pairs] = np.nan
        found = calibrate(dataset, groups, before, before, added)
        assert found.variance((("A", 1.0),), None) is None
        assert found.variance((("A", 1.0), ("Z", 1.0)), None) is None
        assert found.variance((("A", 1.0), ("GENE3", 1.0)), None) is found.unseen
        return np.sqrt(found.unseen)

    assert error(0.0).mean() < 0.2
    assert 1.2 < np.median(error(1.5)) < 1.8


def test_predictions_of_unseen_combinations_have_a_change_and_its_error():
    model = known_model({"A": row(), "B": row(beta=(1.0,))}, BASES, SHIFTS, tissues=("t1",))
    adata = small(60, n_genes=G)
    adata = adata[adata.obs["tissue"] == "t1"].copy()
    adata.var_names = list(model.vocabulary.genes)
    adata.obs["perturbation"] = "control"
    variance = np.linspace(0.01, 0.04, G)
    model.calibration = Calibration(np.full(G, 1 / G), library=LibraryChanges({"A": 1.0, "B": 1.0}), unseen=variance)
    found, same = (model.predict(adata, name, output="mean") for name in ("A+B", "control"))
    assert list(found.uns["pf"]["contexts"]) == ["t1, x", "t1, y"]
    np.testing.assert_allclose(found.varm["change_sd"], np.sqrt(variance)[:, None].repeat(2, 1))
    library = np.asarray(adata.X.sum(1))
    for column, name in enumerate("xy"):
        here = (adata.obs["cell_type"] == name).to_numpy()
        after, before = (log_rate(np.asarray((cells.X[here] / library[here]).mean(0))) for cells in (found, same))
        np.testing.assert_allclose(found.varm["change"][:, column], (after - before).ravel(), atol=1e-5)
    for known in (("A",), ("A", ["B"]), ("A+B", ["A"])):
        assert "change" not in model.predict(adata, known[0], then=list(*known[1:])).varm


def _observed(dataset, group):
    typical = np.full(dataset.n_genes, 1e-2)
    after, before = (measure(dataset.rows(c), dataset.library()[c], typical) for c in (group.cells, group.controls))
    return after.value - before.value


def test_coverage_counts_genes_inside_the_interval():
    rng = generator(59, "test_calibration.coverage")
    n = 2003
    real, controls = (
        measure(sparse.csr_matrix(np.ones((2, n))), np.full(2, float(n)), np.full(n, 1 / n)) for _ in range(2)
    )
    error = np.sqrt(0.3 + real.error + controls.error)
    right = coverage(Change(error * rng.standard_normal(n), np.full(n, 0.3)), real, controls)
    assert 0.88 < right["coverage_90"] < 0.92
    wrong = coverage(Change(9 * error * rng.standard_normal(n), np.full(n, 0.3)), real, controls)
    assert wrong["coverage_90"] < 0.2
    assert wrong["coverage_90_top"] < wrong["coverage_90"]
