"""Times of cells: columns of every kind, time points and bins, series, splits; bad ones are one line."""

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small_data import real

from pf_core import times
from pf_core.config import Config, DataConfig, FlowConfig
from pf_core.data import load
from pf_core.errors import ConfigError, DataError

CONFIG = Config(system="flow")


def cells(**columns) -> anndata.AnnData:
    """Cells with distinct counts and these obs columns."""
    n = len(next(iter(columns.values())))
    counts = np.random.default_rng(0).poisson(3.0, (n, 11)).astype(np.float32) + 1.0
    obs = pd.DataFrame({"perturbation": ["control"] * n, **columns}, index=[f"c{i}" for i in range(n)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(11)]))


def config(flow=None, **data) -> Config:
    return Config(system="flow", data=DataConfig(**data), flow=FlowConfig(**(flow or {})))


def course(adata, settings=CONFIG):
    dataset = load(adata, settings.data, contrasts=False)
    return dataset, times.read(dataset, settings)


def refused(adata, says, settings=CONFIG, kind=DataError):
    with pytest.raises(kind, match=says) as caught:
        course(adata, settings)
    assert "\n" not in str(caught.value)


# --- reading -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [
        [10.5, 9, 10.5, 2],
        ["10.5", "9", "10.50", "2.0"],
        pd.Categorical(["10.5", "9", "10.5", "2"]),
        pd.Categorical([10.5, 9.0, 10.5, 2.0]),
        pd.array([10.5, 9, 10.5, 2], dtype="Float64"),
        np.array([10.5, 9, 10.5, 2], np.float32),
    ],
)
def test_times_are_numbers_in_columns_of_any_kind(values):
    _, found = course(cells(time=values))
    np.testing.assert_array_equal(found.points, [2.0, 9.0, 10.5])
    np.testing.assert_array_equal(found.index, [2, 1, 2, 0])
    np.testing.assert_array_equal(found.times, [10.5, 9.0, 10.5, 2.0])
    assert (found.names, found.unit, found.empty) == (("2", "9", "10.5"), "", ())


def test_a_time_point_that_no_cell_has_is_named_and_left_out():
    column = pd.Categorical([1.0, 3.0, 3.0], categories=[1.0, 2.0, 3.0])
    _, found = course(cells(time=column))
    assert (found.names, found.empty) == (("1", "3"), ("2.0",))


def test_the_unit_comes_from_its_column_and_two_are_refused():
    _, found = course(cells(time=[0, 1], time_unit=["hour", "hour"]))
    assert (found.unit, found.shown(1)) == ("hour", "1 hour")
    refused(cells(time=[0, 1], time_unit=["hour", "day"]), "holds 2 units, day, hour; bring times to one unit")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"age": [1, 2]}, r"no column 'time'; there is perturbation, age \(setting data.time\)"),
        ({"tim": [1, 2]}, "did you mean 'tim'"),
        ({"time": [1.0, np.nan, 2.0]}, "1 values that are no finite number, such as nan; leave out these cells"),
        ({"time": [1.0, np.inf]}, "such as inf"),
        ({"time": ["day 3", "day 4"]}, "2 values that are no finite number, such as 'day 3'"),
        ({"time": [None, 1.0]}, "1 values that are no finite number"),
        ({"time": [3.0, 3.0], "time_unit": ["day", "day"]}, "has one time point only, 3 day; a flow needs two"),
        (
            {"time": np.arange(30.0)},
            "has 30 distinct times, with 1 cells at the rarest; group them with --set flow.bins",
        ),
    ],
)
def test_times_that_make_no_course_are_one_line(columns, says):
    refused(cells(**columns), says)


def test_time_points_of_a_column_lie_at_the_mean_time_of_their_cells():
    adata = cells(time=[9.0, 1.0, 2.0, 8.0, 0.1, 0.1, 0.1], bin=["late", "mid", "mid", "late", "a", "a", "a"])
    _, found = course(adata, config(timepoint="bin"))
    assert found.names == ("a", "mid", "late")
    np.testing.assert_array_equal(found.points, [0.1, 1.5, 8.5])
    np.testing.assert_array_equal(found.index, [2, 1, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(found.times, adata.obs["time"])
    assert found.shown(2) == "late"


def test_a_column_of_time_points_must_name_one_for_every_cell_and_tell_them_apart():
    refused(cells(time=[0, 1], bin=["a", None]), "1 cells without a time point", config(timepoint="bin"))
    refused(cells(time=[0, 0, 1], bin=["a", "b", "c"]), "'a' and 'b' .* have one mean", config(timepoint="bin"))
    refused(cells(time=[0, 1], bin=["a", "a"]), "'bin' has one time point only, a;", config(timepoint="bin"))
    refused(cells(time=[0, 1]), "no column 'bin'.*data.timepoint", config(timepoint="bin"))
    both = config({"bins": 2}, timepoint="bin")
    refused(cells(time=[0, 1], bin=["a", "b"]), "set one of them", both, ConfigError)


def test_bins_hold_about_equally_many_cells_and_never_part_equal_times():
    values = np.concatenate([np.arange(20.0), np.full(20, 20.0), 21.0 + np.arange(20.0)])
    _, found = course(cells(time=values), config({"bins": 3}))
    assert np.bincount(found.index).tolist() == [20, 20, 20]
    np.testing.assert_array_equal(found.points, [9.5, 20.0, 30.5])
    assert found.names == ("0 to 19", "20 to 20", "21 to 40")
    _, found = course(cells(time=[1, 1, 1, 1, 2, 3]), config({"bins": 5}))
    assert found.index.tolist() == [0, 0, 0, 0, 1, 2]
    refused(cells(time=[1, 2, 3]), "one time point only", config({"bins": 1}))


# --- series and axis ---------------------------------------------------------------------------------------------
def shown(found):
    return [(one.label, one.tissue, [(p.label, p.time, p.cells.tolist()) for p in one.points]) for one in found]


def test_a_condition_without_an_earlier_point_begins_with_the_latest_controls_of_its_tissue():
    rows = [
        ("control", "t1", 0), ("control", "t1", 6), ("control", "t1", 24), ("A", "t1", 12), ("A", "t1", 24),
        ("A", "t2", 12), ("B", "t1", 0), ("B", "t1", 6), ("A", "t1", 12), ("control", "t2", 12),
    ]  # fmt: skip
    label, tissue, time = (list(column) for column in zip(*rows, strict=True))
    dataset, found = course(cells(perturbation=label, tissue=tissue, time=time))
    courses = times.series(dataset, found, np.arange(dataset.n_cells))
    assert shown(courses) == [
        ("A", "t1", [("control", 6.0, [1]), ("A", 12.0, [3, 8]), ("A", 24.0, [4])]),
        ("A", "t2", [("A", 12.0, [5])]),  # no control before 12
        ("B", "t1", [("B", 0.0, [6]), ("B", 6.0, [7])]),  # measured at the earliest time itself
        ("control", "t1", [("control", 0.0, [0]), ("control", 6.0, [1]), ("control", 24.0, [2])]),
        ("control", "t2", [("control", 12.0, [9])]),
    ]
    pairs = times.intervals(courses)
    assert [(i.label, i.start.time, i.stop.time) for i in pairs] == [
        ("A", 6.0, 12.0), ("A", 12.0, 24.0), ("B", 0.0, 6.0), ("control", 0.0, 6.0), ("control", 6.0, 24.0),
    ]  # fmt: skip
    part = pairs[0].within(np.array([1, 8]))
    assert part is not None
    assert (part.start.cells.tolist(), part.stop.cells.tolist()) == ([1], [8])
    assert pairs[0].within(np.array([3, 8])) is None


def test_a_held_out_point_is_bridged_by_its_neighbours():
    dataset, found = course(cells(time=[0, 0, 1, 1, 2, 2]))
    cells_left = np.flatnonzero(found.times != 1)
    [interval] = times.intervals(times.series(dataset, found, cells_left))
    assert (interval.start.time, interval.stop.time) == (0.0, 2.0)
    assert interval.stop.cells.tolist() == [4, 5]


def test_a_condition_whose_first_point_is_held_out_still_begins_with_the_controls_before_that_point():
    columns = {"perturbation": ["control", "control", "A", "A"], "time": [0, 12, 12, 24]}
    dataset, found = course(cells(**columns))
    drug = times.series(dataset, found, np.array([0, 1, 3]))[0]
    assert [(p.label, p.time) for p in drug.points] == [("control", 0.0), ("A", 24.0)]


def test_conditions_at_one_time_each_make_no_flow():
    dataset, found = course(cells(perturbation=["A", "B"], tissue=["x", "y"], time=[0, 1]))
    with pytest.raises(DataError, match="no condition has training cells at two time points: 'A' in tissue 'x' has 0"):
        times.intervals(times.series(dataset, found, np.arange(2)))


def test_the_axis_runs_from_0_to_1_over_the_cells_that_are_seen():
    _, found = course(cells(time=[2, 6, 10, 30], time_unit=["day"] * 4))
    axis = times.axis_of(found, np.array([0, 1, 2]))
    assert axis == times.Axis(2.0, 10.0, "day")
    np.testing.assert_array_equal(axis.scaled([2, 4, 10, 30]), [0.0, 0.25, 1.0, 3.5])
    np.testing.assert_array_equal(axis.real(axis.scaled([2.0, 30.0])), [2.0, 30.0])
    with pytest.raises(DataError, match="one time point is left for training, 6 day; hold out less"):
        times.axis_of(found, np.array([1]))


# --- split -------------------------------------------------------------------------------------------------------
def test_a_held_out_time_leaves_training_and_validation_and_every_point_gives_its_share():
    values = np.repeat([10.0, 10.5, 11.0], 40)
    adata = cells(time=values, tissue=np.tile(["x", "y"], 60))
    settings = dataclasses.replace(CONFIG, data=DataConfig(holdout=("time=10.5,tissue=x",), validation_share=0.1))
    dataset, found = course(adata, settings)
    cut = times.split(dataset, found, settings.data, 0)
    np.testing.assert_array_equal(cut.heldout, np.flatnonzero((values == 10.5) & (dataset.tissue == "x")))
    everything = np.sort(np.concatenate([cut.train, cut.validation, cut.heldout]))
    np.testing.assert_array_equal(everything, np.arange(120))
    assert np.bincount(found.index[cut.validation]).tolist() == [4, 2, 4]
    assert cut.conditions == [("control", "x", "10.5")]
    again = times.split(dataset, found, settings.data, 0)
    np.testing.assert_array_equal(cut.validation, again.validation)
    assert not np.array_equal(cut.validation, times.split(dataset, found, settings.data, 1).validation)


@pytest.mark.parametrize(
    ("data", "says", "kind"),
    [
        ({"holdout": ("time=10.7",)}, "holdout names time=10.7; did you mean '10.5'", DataError),
        ({"holdout": ("time=10", "time=10.5", "time=11")}, "every cell is held out", DataError),
        ({"holdout_share": 0.2}, "holds out what --holdout names, such as time=10.5", ConfigError),
    ],
)
def test_holding_out_what_is_not_there_is_one_line(data, says, kind):
    settings = config(**data)
    dataset, found = course(cells(time=np.repeat([10.0, 10.5, 11.0], 5)), settings)
    with pytest.raises(kind, match=says):
        times.split(dataset, found, settings.data, 0)


def test_what_a_run_tells_of_its_course_counts_cells_per_point():
    column = pd.Categorical(np.repeat([0.0, 6.0, 12.0], 20), categories=[0.0, 3.0, 6.0, 12.0])
    adata = cells(time=column, perturbation=np.repeat(["control", "A", "A"], 20))
    settings = config(holdout=("time=6",))
    dataset, found = course(adata, settings)
    cut = times.split(dataset, found, settings.data, 0)
    courses = times.series(dataset, found, cut.train)
    table = times.facts(found, courses, cut)
    assert table["points"][1] == {"name": "6", "time": 6.0, "train": 0, "validation": 0, "heldout": 20}
    assert table["points_without_cells"] == ["3.0"]
    assert table["points_with_few_cells"] == []
    assert table["series"] == [
        {"label": "A", "tissue": "all", "points": ["0", "12"], "cells": [18, 18], "starts_from_control": True},
        {"label": "control", "tissue": "all", "points": ["0"], "cells": [18], "starts_from_control": False},
    ]


# --- real courses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "settings", "points", "series", "pairs"),
    [
        ("schiebinger2019_reprogramming_d10_d11", {}, [10.0, 10.5, 11.0], 1, 2),
        ("semrau2017_mesc_ra_timecourse", {"min_counts": 1}, [0, 6, 12, 24, 48, 72, 96], 2, 6),
        ("kameneva2021_sympathoadrenal_timecourse", {}, [0, 8, 32, 64, 80], 1, 4),
    ],
)
def test_real_courses_have_the_known_points_and_intervals(name, settings, points, series, pairs):
    dataset, found = course(real(f"{name}.h5ad"), config(**settings))
    np.testing.assert_array_equal(found.points, points)
    courses = times.series(dataset, found, np.arange(dataset.n_cells))
    assert (len(courses), len(times.intervals(courses))) == (series, pairs)
    assert found.unit in ("day", "hour", "repository units")


def test_semraus_drug_begins_with_the_controls_of_0_hours_and_its_empty_cells_are_counted():
    path = real("semrau2017_mesc_ra_timecourse.h5ad")
    with pytest.raises(DataError, match="8 of 1842 cells have no counts; leave them out with min_counts=1"):
        load(path, DataConfig(), contrasts=False)
    dataset, found = course(path, config(min_counts=1))
    assert dataset.summary["dropped"] == {"fewer than min_counts": 8}
    drug = times.series(dataset, found, np.arange(dataset.n_cells))[1]
    assert (drug.label, drug.points[0].label, drug.points[0].time, len(drug.points)) == (
        "retinoic acid", "control", 0.0, 7,
    )  # fmt: skip


def test_packers_many_times_need_bins_or_their_column():
    path = real("packer2019_celegans_neurons_timecourse.h5ad")
    refused(path, "56 distinct times, with 1 cells at the rarest; group them with --set flow.bins=8")
    _, found = course(path, config(timepoint="timepoint"))
    assert found.names == ("210-270", "270-330", "390-450", "450-510", "510-580", "580-650", "> 650")
    assert (np.diff(found.points) > 30).all()
    _, found = course(path, config({"bins": 6}))
    sizes = np.bincount(found.index)
    assert len(sizes) == 6
    assert sizes.min() > 150
    np.testing.assert_array_equal(np.argsort(found.times, kind="stable"), np.lexsort((found.times, found.index)))
