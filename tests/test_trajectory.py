"""From a file to cells at other times: who starts, what comes out, the page, and the command."""

import anndata
import numpy as np
import pytest
from linear_flow import GENES, course, flowed, linear_model

from pf_core import cli, trajectory
from pf_core.errors import DataError, PredictionError
from pf_core.flow_model import FlowModel
from pf_core.sensitivity import sensitivity
from pf_core.trajectory_page import View, changes, write_page
from pf_core.trajectory_plots import squares


@pytest.fixture(scope="module")
def model():
    return linear_model()


@pytest.fixture(scope="module")
def cells(model):
    return trajectory.cells(model, course())


# --- who starts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", ["11", 11.0, "11.0"])
def test_cells_start_at_a_time_point_by_name_or_number(model, cells, start):
    time, chosen = trajectory.starting(model, cells, start, "drug@2", tissue="skin")
    assert time == 11.0
    assert set(cells.dataset.label[chosen]) == {"drug@2"}
    assert set(cells.dataset.tissue[chosen]) == {"skin"}
    assert len(chosen) == 17


def test_control_cells_start_where_the_condition_has_none(model, cells):
    _, chosen = trajectory.starting(model, cells, "10", "drug@2")
    assert set(cells.dataset.label[chosen]) == {"control"}


def test_a_draw_of_the_starting_cells_is_a_part_of_them(model, cells):
    _, every = trajectory.starting(model, cells, "10", "control")
    _, some = trajectory.starting(model, cells, "10", "control", most=7)
    assert len(some) == 7
    assert set(some) < set(every)


@pytest.mark.parametrize(
    ("start", "condition", "options", "message"),
    [
        ("10.2", "control", {}, "no cell was measured at time 10.2; measured are 10 day, 11 day, 12 day"),
        ("10", "drigg", {}, "condition 'drigg' was not in training; did you mean 'drug'?"),
        ("10", "control", {"tissue": "skim"}, "tissue 'skim' was not in training; did you mean 'skin'?"),
        ("10", "control", {"keep": {"tisue": "skin"}}, "column 'tisue' is not in obs; did you mean 'tissue'?"),
        ("10", "control", {"keep": {"tissue": "skim"}}, "no cell has tissue=skim; did you mean 'skin'?"),
        ("10", "control", {"keep": {"perturbation": "drug@2"}}, "no cell at 10 day is 'control' or control"),
    ],
)
def test_bad_starts_say_what_there_is(model, cells, start, condition, options, message):
    with pytest.raises(PredictionError) as error:
        trajectory.starting(model, cells, start, condition, **options)
    assert message in str(error.value)


def test_a_file_with_one_time_point_is_enough_to_start_from(model):
    adata = course()
    found = trajectory.cells(model, adata[adata.obs["time"] == 11.0].copy())
    way = trajectory.trajectory(model, found, "control", [12.0], start="11")
    assert way.points[0].cells.size == 34


def test_foreign_genes_are_refused(model):
    adata = course()
    adata.var_names = [f"X{name}" for name in adata.var_names]
    with pytest.raises(DataError, match="of the model's 11 genes are in the data"):
        trajectory.cells(model, adata)


# --- what comes out -----------------------------------------------------------------------------------------------
def test_a_trajectory_has_every_cell_at_every_time_in_real_units(model):
    adata = model.trajectory(course(), "drug@2", [10.0, 11.0, 10.5], start="10", tissue="blood")
    assert adata.shape == (51, 11)
    assert adata.obs["time"].tolist() == [10.0] * 17 + [11.0] * 17 + [10.5] * 17
    assert set(adata.obs["perturbation"]) == {"drug@2"}
    assert set(adata.obs["from_time"]) == {10.0}
    assert adata.obs_names.is_unique
    assert list(adata.var_names) == list(GENES)
    source = course()
    np.testing.assert_array_equal(adata.X[:17].toarray(), source[adata.obs["from_cell"][:17]].X.toarray())
    code = model.code("drug@2", "blood")
    start = adata.obsm["X_start_latent"][:17]
    for block, ds in enumerate((0.0, 0.5, 0.25)):
        np.testing.assert_allclose(adata.obsm["X_latent"][17 * block : 17 * block + 17], flowed(start, code, ds))


def test_a_trajectory_survives_a_file(model, tmp_path):
    model.trajectory(course(), "drug@2", [10.0, 12.0], start="10").write_h5ad(tmp_path / "way.h5ad")
    again = anndata.read_h5ad(tmp_path / "way.h5ad")
    assert again.uns["pf"]["from_time"] == 10.0


def test_counterfactual_cells_are_the_same_with_the_same_draws(model):
    one, other = model.counterfactual(course(), "control", "drug@2", [10.0, 12.0], start="10")
    assert one.obs["from_cell"].tolist() == other.obs["from_cell"].tolist()
    first = one.obs["time"] == 10.0
    np.testing.assert_array_equal(one[first].X.toarray(), other[first].X.toarray())
    assert not np.array_equal(one[~first].X.toarray(), other[~first].X.toarray())
    same, again = model.counterfactual(course(), "control", "control", [12.0], start="10")
    np.testing.assert_array_equal(same.X.toarray(), again.X.toarray())


def test_without_a_start_each_time_comes_from_the_measured_points_around_it(model, cells):
    way = trajectory.trajectory(model, cells, "control", [10.0, 10.5, 11.8])
    measured, early, late = way.points
    assert set(cells.course.times[measured.cells]) == {10.0}
    np.testing.assert_array_equal(measured.counts.toarray(), cells.dataset.rows(measured.cells).toarray())
    assert set(early.start) == {10.0, 11.0}
    assert set(late.start) == {11.0, 12.0}
    assert set(cells.dataset.tissue[late.cells]) == {"blood", "skin"}
    assert abs((late.start == 12.0).mean() - 0.8) < 0.03


def test_one_side_alone_can_be_asked_for(model, cells):
    way = trajectory.trajectory(model, cells, "control", [10.5], sides="next")
    assert set(way.points[0].start) == {11.0}


def test_before_the_first_measured_point_of_a_condition_nothing_is_interpolated(model):
    adata = course()
    late = adata[(adata.obs["perturbation"] != "control") | (adata.obs["time"] == 12.0)].copy()
    with pytest.raises(
        PredictionError, match=r"'drug@2' in tissue 'blood' at 10.5 day: there is no earlier time point"
    ):
        trajectory.trajectory(model, trajectory.cells(model, late), "drug@2", [10.5])


def test_a_condition_without_cells_is_named(model, cells):
    with pytest.raises(PredictionError, match=r"no cell of condition 'salt' is left to start from; there is"):
        trajectory.trajectory(model, cells, "salt", [10.5])


# --- the page -----------------------------------------------------------------------------------------------------
def test_arrows_are_the_means_of_the_cells_in_each_square():
    starts = np.array([[0.1, 0.1], [0.2, 0.3], [0.9, 0.9], [7.0, 0.0]])
    arrows = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0], [9.0, 9.0]])
    at, mean = squares(starts, arrows, ((0.0, 1.0), (0.0, 1.0)), n=2)
    np.testing.assert_allclose(at, [[0.15, 0.2], [0.9, 0.9]])
    np.testing.assert_allclose(mean, [[2.0, 1.0], [5.0, 5.0]])


def test_the_page_has_every_section_and_names_the_genes_that_change_most(model, cells, tmp_path):
    at = [10.0, 11.0, 12.0]
    one, other = trajectory.counterfactual(model, cells, "control", "drug@2", at, start="10", tissue="skin")
    found = sensitivity(model, cells.dataset, one.points[0].cells, 10.0, 12.0, "control")
    view = View(model, cells, one, other, found, ("GENE3",))
    write_page(tmp_path / "page.html", view, title="<way>", facts={"run": "r"})
    text = (tmp_path / "page.html").read_text()
    for word in ("Where cells go", "Ways of single cells", "Genes over time", "The field", "What the end depends on"):
        assert word in text
    assert "&lt;way&gt;" in text
    changed = changes(view)
    assert GENES[int(np.abs(changed).argmax())] in text
    assert "10 day to 12 day, control: 17 cells measured at 10 day, moved there" in text


def test_a_page_of_one_time_has_no_curves(model, cells, tmp_path):
    way = trajectory.trajectory(model, cells, "control", [10.5])
    write_page(tmp_path / "page.html", View(model, cells, way, None, None), title="t", facts={})
    assert "Ways of single cells" not in (tmp_path / "page.html").read_text()


# --- the command --------------------------------------------------------------------------------------------------
@pytest.fixture
def command(monkeypatch, tmp_path):
    """pf trajectory on the linear model; the folder, and a function that gives code and error."""
    course().write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(FlowModel, "load", classmethod(lambda cls, path, **options: linear_model()))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pf", "trajectory", "run", "--data", "cells.h5ad", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return run


def test_the_command_writes_cells_and_page(command, tmp_path):
    arguments = [
        "--from",
        "10",
        "--condition",
        "control",
        "--counterfactual",
        "drug@2",
        "--times",
        "10:12:0.5",
        "--page",
    ]
    assert command(*arguments, "--out", "way.h5ad") == 0
    adata = anndata.read_h5ad(tmp_path / "way.h5ad")
    assert sorted(set(adata.obs["time"])) == [10.0, 10.5, 11.0, 11.5, 12.0]
    assert set(adata.obs["counterfactual"]) == {"control", "drug@2"}
    assert "What the end depends on" in (tmp_path / "way.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "10", "--times", "10:13:1"], "time 13 is outside of what training has seen, 10 day to 12 day"),
        (["--from", "9", "--times", "10:12:1"], "no cell was measured at time 9"),
        (["--from", "10", "--condition", "drugg", "--times", "10:12:1"], "did you mean 'drug'?"),
        (["--times", "10:11"], "START:STOP:STEP was wanted"),
        (["--times", "ten"], "times with commas, was wanted"),
        (["--times", "10:12:1", "--counterfactual", "drug"], "--counterfactual needs --from"),
        (["--times", "10:12:1", "--cells", "tissue"], "column=value was wanted"),
        (["--from", "10", "--times", "10:12:1", "--gene", "GENE99", "--page"], "gene 'GENE99' is not one of the model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, capsys, tmp_path, arguments, message):
    assert command(*arguments, "--out", "way.h5ad") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad"}
