"""The simulated flow: a known field whose cells branch, a network that counts follow, counts as expected."""

import numpy as np
import pytest

from benchmarks import known_flow
from pf_core import times
from pf_core.config import Config, DataConfig
from pf_core.data import load
from pf_core.networks import load_network
from pf_core.simulate_flow import (
    draw,
    log_profile_velocity,
    network,
    profile,
    simulate_flow,
    trajectory,
    velocity,
)


@pytest.fixture(scope="module")
def adata():
    return simulate_flow(3, n_genes=43, n_cells=97, n_tissues=2, n_regulators=7)


def test_the_design_has_three_times_two_conditions_and_controls_alone_at_the_start(adata):
    table = adata.obs.groupby(["tissue", "perturbation", "time"], observed=True).size()
    assert set(table) == {97}
    expected = {("control", 0.0), ("control", 12.0), ("control", 24.0), ("drug", 12.0), ("drug", 24.0)}
    assert set(table.index) == {(tissue, *rest) for tissue in ("tissue1", "tissue2") for rest in expected}
    dataset = load(adata, DataConfig(), contrasts=False)
    course = times.read(dataset, Config(system="flow"))
    assert course.unit == "hour"
    pairs = times.intervals(times.series(dataset, course, np.arange(dataset.n_cells)))
    assert len(pairs) == 8
    assert all((i.start.label == "control") == (i.label == "control" or i.start.time == 0) for i in pairs)


def test_the_same_seed_gives_the_same_cells_and_another_others(adata):
    again = simulate_flow(3, n_genes=43, n_cells=97, n_tissues=2, n_regulators=7)
    other = simulate_flow(4, n_genes=43, n_cells=97, n_tissues=2, n_regulators=7)
    assert (adata.X != again.X).nnz == 0
    np.testing.assert_array_equal(adata.obsm["latent"], again.obsm["latent"])
    assert (adata.X != other.X).nnz > 0


def test_control_cells_part_into_both_branches_and_the_drug_sends_them_to_the_upper_one(adata):
    late = adata[adata.obs["time"] == 24]
    branches = late.obs.groupby("perturbation", observed=True)["cell_type"].value_counts(normalize=True)
    assert 0.3 < branches["control", "upper"] < 0.7
    assert 0.3 < branches["control", "lower"] < 0.7
    assert branches["drug", "upper"] > 0.95
    assert (adata[adata.obs["time"] == 0].obs["cell_type"] == "progenitor").all()


def test_trajectories_solve_the_field_and_lead_back(adata):
    truth = adata.uns["truth"]
    z = adata.obsm["latent"][:31]
    hours = [3.0, 4.0, 9.0]
    way = trajectory(truth, z, hours, "drug")
    np.testing.assert_array_equal(way[0], z)
    np.testing.assert_allclose(trajectory(truth, way[-1], hours[::-1], "drug")[-1], z, atol=1e-6)
    h = 1e-3  # hours; the velocity is per 24 hours
    ahead = trajectory(truth, z, [0.0, h], "drug")[1]
    np.testing.assert_allclose((ahead - z) / (h / 24.0), velocity(truth, z, "drug"), atol=2e-2)
    np.testing.assert_allclose(way[-1][:, 0] - z[:, 0], 2.0 * 6.0 / 24.0, rtol=1e-12)


def test_genes_show_the_flow_by_the_derivative_of_their_log_profile(adata):
    truth, z, h = adata.uns["truth"], adata.obsm["latent"][:23], 1e-5
    for condition in ("control", "drug"):
        ahead, behind = (profile(truth, z + sign * h * velocity(truth, z, condition), 1) for sign in (1, -1))
        numeric = (np.log(ahead) - np.log(behind)) / (2 * h)
        np.testing.assert_allclose(log_profile_velocity(truth, z, condition, 1), numeric, atol=1e-7)
    assert not np.allclose(log_profile_velocity(truth, z, "control", 0), log_profile_velocity(truth, z, "drug", 0))


def test_counts_lie_around_the_profile_of_their_latents(adata):
    truth = adata.uns["truth"]
    counts, z = draw(truth, "drug", 24.0, 1, 3000, 5)
    shares = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    np.testing.assert_allclose(shares, profile(truth, z, 1).mean(0), rtol=0.15)
    assert np.corrcoef(shares, profile(truth, z, 0).mean(0))[0, 1] < 0.95  # tissues differ


def test_edges_say_how_expression_goes_together_and_are_read_as_a_network(adata, tmp_path):
    table = network(adata.uns["truth"])
    assert set(table["sign"]) == {-1, 1}
    table.to_csv(tmp_path / "network.csv", index=False)
    found = load_network(tmp_path / "network.csv", list(adata.var_names))
    assert found.report["edges_kept"] == len(table)
    assert found.report["regulators"] == 7
    weight = adata.uns["truth"]["decoder_weight"]
    agreement = np.sum(weight[:, found.source] * weight[:, found.target], axis=0) * found.sign
    assert (agreement > 0).mean() > 0.8


def test_a_course_without_a_network_or_with_more_times_is_possible():
    adata = simulate_flow(0, n_genes=11, n_cells=5, n_regulators=0, times=(1, 2, 5, 9))
    assert len(network(adata.uns["truth"])) == 0
    assert sorted(set(adata.obs["time"])) == [1, 2, 5, 9]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_learned_field_points_where_the_true_one_does(backend, tmp_path):
    course = simulate_flow(0, n_cells=500)
    model = known_flow.trained(course, tmp_path / "run", backend, 0)
    places = [(condition, hour) for condition in ("control", "drug") for hour in known_flow.TIMES]
    found = np.array([known_flow.cosines(model, course, *place).mean() for place in places])
    assert found.mean() > 0.9
    assert found.min() > 0.8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_latent": 1}, "n_latent=1"),
        ({"n_regulators": 200}, "fewer regulators than genes"),
        ({"times": (3, 3)}, "rising"),
    ],
)
def test_sizes_that_do_not_allow_the_design_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        simulate_flow(0, **settings)


def test_the_truth_survives_a_file(adata, tmp_path):
    import anndata

    adata.write_h5ad(tmp_path / "cells.h5ad")
    truth = anndata.read_h5ad(tmp_path / "cells.h5ad").uns["truth"]
    z = adata.obsm["latent"][:5]
    np.testing.assert_array_equal(velocity(truth, z, "drug"), velocity(adata.uns["truth"], z, "drug"))
    one, other = (draw(source, "control", 7.0, 0, 9, 0) for source in (truth, adata.uns["truth"]))
    assert (one[0] != other[0]).nnz == 0
    np.testing.assert_array_equal(one[1], other[1])
    assert network(truth).equals(network(adata.uns["truth"]))
