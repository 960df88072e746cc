"""The trained flow model, on a backend with a closed form: codes, times, moves in both directions, interpolation."""

import numpy as np
import pytest
from linear_flow import N_GENES, RATES, SCALE, course, flowed, linear_model
from scipy import sparse

from pf_core import trajectory
from pf_core.baselines import Declined
from pf_core.errors import PredictionError
from pf_core.sensitivity import sensitivity
from pf_core.time_baselines import clock, curve_over_line, gap, mixed, path_lengths, reading
from pf_core.times import series


@pytest.fixture(scope="module")
def model():
    return linear_model()


@pytest.fixture(scope="module")
def found(model):
    return trajectory.cells(model, course())


def control_series(found, tissue="blood"):
    [one] = [
        one
        for one in series(found.dataset, found.course, np.arange(found.dataset.n_cells))
        if (one.label, one.tissue) == ("control", tissue)
    ]
    return one


# --- codes and times ----------------------------------------------------------------------------------------------
def test_a_code_is_the_relative_dose_of_each_perturbation_and_the_tissue(model):
    np.testing.assert_array_equal(model.code("control", "skin"), [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(model.code("drug@1+salt", "blood"), [0, 0.5, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("condition", "tissue", "message"),
    [
        ("drig", "blood", "condition 'drig' was not in training; did you mean 'drug'?"),
        ("contrl", "blood", "condition 'contrl' was not in training; did you mean 'control'?"),
        ("drug", "blod", "tissue 'blod' was not in training; did you mean 'blood'?"),
    ],
)
def test_a_name_that_training_did_not_have_is_refused_with_the_nearest(model, condition, tissue, message):
    with pytest.raises(PredictionError) as error:
        model.code(condition, tissue)
    assert str(error.value) == message


def test_times_are_scaled_to_the_trained_range_and_refused_beyond(model):
    np.testing.assert_allclose(model.scaled([10.0, 10.5, 12.0]), [0.0, 0.25, 1.0])
    assert model.scaled([12.0 + 1e-10])[0] == 1.0  # rounding of a grid is no extrapolation
    for time in (9.9, 12.1, np.nan):
        with pytest.raises(PredictionError, match="is outside of what training has seen, 10 day to 12 day"):
            model.scaled([11.0, time])


# --- moving -------------------------------------------------------------------------------------------------------
def test_cells_move_to_times_on_both_sides_in_the_order_asked_for(model, found):
    cells = np.flatnonzero((found.dataset.tissue == "skin") & (found.course.times == 11.0))[:7]
    at = [12.0, 11.0, 10.0, 11.5, 12.0]
    latents = model.move(found.dataset, cells, 11.0, at, "drug@2")
    z0, code = model.encode(found.dataset, cells), model.code("drug@2", "skin")
    for time, z in zip(at, latents, strict=True):
        np.testing.assert_allclose(z, flowed(z0, code, (time - 11.0) / 2.0), rtol=1e-12)
    np.testing.assert_array_equal(latents[1], z0)


def test_each_cell_moves_under_the_code_of_its_own_tissue(model, found):
    cells = np.array([3, 95, 4, 96])
    assert set(found.dataset.tissue[cells]) == {"blood", "skin"}
    [z] = model.move(found.dataset, cells, 10.0, [12.0], "control")
    for row, cell in enumerate(cells):
        code = model.code("control", found.dataset.tissue[cell])
        np.testing.assert_allclose(z[row], flowed(model.encode(found.dataset, cells[[row]]), code, 1.0)[0], rtol=1e-12)


def test_more_cells_than_a_block_move_as_they_do_alone():
    model = linear_model()
    many = trajectory.cells(model, course(n=120))
    cells = np.arange(600)
    [z] = model.move(many.dataset, cells, 10.0, [11.0], "control")
    [last] = model.move(many.dataset, cells[-3:], 10.0, [11.0], "control")
    np.testing.assert_allclose(z[-3:], last, rtol=1e-12)


def test_a_fine_grid_of_times_takes_fewer_steps_between_them(model, found):
    model.backend.asked.clear()
    model.move(found.dataset, np.arange(3), 10.0, [11.0], "control", method="dopri5")
    model.move(found.dataset, np.arange(3), 10.0, np.linspace(10, 12, 41), "control")
    assert model.backend.asked == [("dopri5", 10), ("rk4", 2)]


def test_velocity_is_the_field_at_one_time(model, found):
    z = model.encode(found.dataset, np.arange(5))
    codes = model.codes("drug@2", found.dataset.tissue[:5])
    h = 1e-6
    slope = (flowed(z, codes, h) - z) / h
    np.testing.assert_allclose(model.velocity(z, codes, 0.3), slope, atol=1e-5)


# --- interpolation ------------------------------------------------------------------------------------------------
def test_both_sides_meet_in_proportion_to_closeness(model, found):
    between = model.interpolate(found.dataset, gap(control_series(found), 11.25), seed=3, name="x")
    share = np.mean(between.start == 12.0)
    assert abs(share - 0.25) < 0.03
    code = model.code("control", "blood")
    for time in (11.0, 12.0):
        rows = between.start == time
        np.testing.assert_allclose(between.z1[rows], flowed(between.z0[rows], code, (11.25 - time) / 2.0), rtol=1e-12)


def test_one_side_takes_all_its_cells(model, found):
    one = control_series(found)
    before = model.interpolate(found.dataset, gap(one, 11.25), sides="previous")
    after = model.interpolate(found.dataset, gap(one, 11.25), sides="next")
    np.testing.assert_array_equal(before.cells, one.points[1].cells)
    np.testing.assert_array_equal(after.cells, one.points[2].cells)


def test_reach_is_the_share_of_the_way_that_cells_are_moved(found):
    model = linear_model(reach=0.5)
    hole = gap(control_series(found), 11.5)
    half = model.interpolate(found.dataset, hole, sides="previous")
    np.testing.assert_allclose(half.z1, flowed(half.z0, model.code("control", "blood"), 0.125), rtol=1e-12)
    whole = model.interpolate(found.dataset, hole, sides="previous", reach=1.0)
    np.testing.assert_allclose(whole.z1, flowed(half.z0, model.code("control", "blood"), 0.25), rtol=1e-12)


def test_reach_zero_is_the_plain_mixture_of_the_neighbours(model, found):
    hole = gap(control_series(found), 10.5)
    still = model.interpolate(found.dataset, hole, seed=5, name="d", reach=0.0)
    first, second = mixed(hole.before.cells, hole.after.cells, 0.5, seed=5, name="d", most=2000)
    np.testing.assert_array_equal(still.cells, np.concatenate([first, second]))
    np.testing.assert_array_equal(still.counts.toarray(), found.dataset.rows(still.cells).toarray())


@pytest.mark.parametrize("pace", [0.5, 1.0])
def test_at_a_pace_of_the_cells_share_and_target_are_those_of_the_clock(pace):
    model = linear_model(pace=pace)
    cells = trajectory.cells(model, uneven())
    [one] = [s for s in series(cells.dataset, cells.course, np.arange(cells.dataset.n_cells)) if s.label == "control"]
    hole = gap(one, 11.5)
    latents = [model.encode(cells.dataset, point.cells) / SCALE for point in one.points]
    readings = clock([10.0, 11.0, 12.0], path_lengths(latents), pace)
    place = (reading([10.0, 11.0, 12.0], readings, 11.5) - readings[1]) / (readings[2] - readings[1])
    assert abs(place - 0.5) > 0.03
    between = model.interpolate(cells.dataset, hole)
    assert (between.start == 12.0).mean() == pytest.approx(place, abs=0.02)
    code = model.code("control", "blood")
    rows = between.start == 11.0
    np.testing.assert_allclose(between.z1[rows], flowed(between.z0[rows], code, place * 0.5), rtol=1e-12)


def test_bend_takes_means_from_the_line_between_neighbours_to_the_curve():
    model = linear_model(reach=0.0)
    cells = trajectory.cells(model, uneven())
    [one] = series(cells.dataset, cells.course, np.arange(cells.dataset.n_cells))
    hole = gap(one, 11.5)
    readings, now = model.clock(cells.dataset, hole)
    library = cells.dataset.library()
    shares = [cells.dataset.rows(p.cells).toarray() / library[p.cells, None] for p in one.points]
    factor = curve_over_line(readings, np.stack([share.mean(0) for share in shares]), now)
    straight = model.interpolate(cells.dataset, hole).counts.toarray().sum(0)
    assert (straight * np.abs(factor - 1) > 8**2).any()  # a change of twice what is allowed below
    for bend in (0.5, 1.0):
        bent = model.interpolate(cells.dataset, hole, bend=bend).counts.toarray().sum(0)
        wanted = straight * (1 + bend * (factor - 1))
        assert (np.abs(bent - wanted) < 4 * np.sqrt(straight * np.abs(factor - 1)) + 1e-9).all()


def uneven():
    """Control cells of one tissue that change much from day 10 to 11 and little from 11 to 12."""
    adata = course(n=60, drug=False, tissues=("blood",))
    late = (adata.obs["time"] == 12.0).to_numpy()
    middle = (adata.obs["time"] == 11.0).to_numpy()
    counts = adata.X.toarray()
    counts[middle, 0] += 3000
    counts[late, 0] += 3100
    adata.X = sparse.csr_matrix(counts)
    return adata


def test_no_time_point_on_one_side_is_declined(model, found):
    assert isinstance(model.interpolate(found.dataset, gap(control_series(found), 12.0)), Declined)


def test_predicted_counts_follow_the_decoded_change_on_average():
    """Count transport has the decoded mean as its expectation where cells scatter around it as the dispersion says."""
    model = linear_model()
    rng = np.random.default_rng(1)
    cells = trajectory.cells(model, course(n=400, drug=False, tissues=("blood",)))
    z0 = rng.normal(size=(400, 3)) / 5
    z1 = z0 + [0.8, -0.4, 0.2]
    index = np.arange(400)
    library = cells.dataset.library()[index]
    mu0, mu1 = (model.decode(z, np.ones(400, np.int32), library) for z in (z0, z1))
    counts = model.predicted(cells.dataset, index, z0, z1, output="transport", seed=0, name="").toarray()
    before = cells.dataset.rows(index).toarray()
    falls = (mu1 < mu0).all(0)
    assert falls.any()
    np.testing.assert_allclose(counts[:, falls].mean(0), (before * mu1 / mu0)[:, falls].mean(0), rtol=0.1)
    assert (counts[:, falls] <= before[:, falls]).all()
    rises = (mu1 > mu0).all(0)
    assert (counts[:, rises] >= before[:, rises]).all()
    assert counts.shape == (400, N_GENES)


# --- sensitivity --------------------------------------------------------------------------------------------------
def test_singular_values_are_those_of_the_linear_flow_in_standard_deviations(model, found):
    result = sensitivity(model, found.dataset, np.arange(9), 10.0, 12.0, "control")
    grown = np.exp(RATES)  # the flow is diagonal, so scaling changes nothing
    np.testing.assert_allclose(result.singular, np.tile(np.sort(grown)[::-1], (9, 1)), rtol=1e-10)
    np.testing.assert_allclose(result.log_volume, RATES.sum(), rtol=1e-10)
    first = result.directions[0]
    np.testing.assert_allclose(np.abs(first.start), [1, 0, 0], atol=1e-10)
    assert first.gain == pytest.approx(np.exp(0.8))
    np.testing.assert_allclose(first.end, first.start * np.exp(0.8), atol=1e-10)


def test_genes_of_a_direction_are_what_a_small_push_changes(model, found):
    cells = np.arange(9)
    first = sensitivity(model, found.dataset, cells, 10.0, 12.0, "control").directions[0]
    z, tissue, h = model.encode(found.dataset, cells), np.ones(9, np.int32), 1e-6
    pushed = (model.log_profiles(z + h * first.start * SCALE, tissue) - model.log_profiles(z, tissue)).mean(0) / h
    np.testing.assert_allclose(first.start_genes, pushed, atol=1e-4)


def test_the_gradient_in_genes_is_the_change_of_the_end_by_finite_differences(model, found):
    cells = np.arange(6)
    result = sensitivity(model, found.dataset, cells, 10.0, 12.0, "control", genes=["GENE4"])
    assert result.target == "mean of GENE4 at the end"
    log = np.log1p(found.dataset.dense(cells, "float64"))
    code, tissue, h = model.code("control", "blood"), np.ones(6, np.int32), 1e-6

    def end(values):
        z, _ = model.backend.encode({}, np.expm1(values), tissue, model.config)
        return model.log_profiles(flowed(z, code, 1.0), tissue)[:, 4]

    for gene in (0, 4, 10):
        push = h * (np.arange(N_GENES) == gene)
        assert result.gradient[gene] == pytest.approx(((end(log + push) - end(log)) / h).mean(), abs=1e-4)


def test_without_a_gene_the_target_is_the_mean_way(model, found):
    cells = np.arange(6)
    result = sensitivity(model, found.dataset, cells, 10.0, 12.0, "control")
    assert result.target == "how far cells come along the mean way"
    assert len(result.top(model.vocabulary.genes, 3)) == 3
    assert result.top(model.vocabulary.genes, 1)[0][1] == pytest.approx(result.effect[np.abs(result.effect).argmax()])


def test_an_unknown_gene_is_named(model, found):
    with pytest.raises(PredictionError, match="gene 'GEN4' is not one of the model; did you mean 'GENE4'"):
        sensitivity(model, found.dataset, np.arange(3), 10.0, 12.0, "control", genes=["GEN4"])
