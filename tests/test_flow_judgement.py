"""The judgement of held-out time points: who takes part, who declines, and what the numbers are."""

import numpy as np
import pytest
from linear_flow import course, linear_model

from pf_core import metrics, trajectory
from pf_core.flow_judgement import HALVES, INTERPOLATION, MIXTURE, MODEL, NEXT, PREVIOUS, evaluate
from pf_core.time_baselines import mixed
from pf_core.verdict import judge, metrics_json


def left_out(time, model=None, **options):
    """Cells of one time held out, and everything that is said about them."""
    model = model or linear_model()
    found = trajectory.cells(model, course(n=23))
    held = np.isclose(found.course.times, time)
    ruler, judged = evaluate(model, found.dataset, found.course, np.flatnonzero(~held), np.flatnonzero(held), **options)
    return found, held, ruler, judged


def values(judged, label, tissue):
    [one] = [one for one in judged if (one.condition.label, one.condition.tissue) == (label, tissue)]
    return one, {row.method: row for row in one.rows}


def test_every_condition_tissue_and_time_point_is_judged_once():
    _, _, _, judged = left_out(11.0)
    names = [one.condition.name for one in judged]
    assert names == [
        f"{label} at 11 day in {tissue}" for label in ("control", "drug@2") for tissue in ("blood", "skin")
    ]
    assert [one.condition.n_cells for one in judged] == [23] * 4


def test_baselines_are_what_they_say():
    """Each number again from the cells themselves."""
    found, _, ruler, judged = left_out(11.0)
    one, rows = values(judged, "control", "skin")
    dataset, days = found.dataset, found.course.times
    here = (dataset.label == "control") & (dataset.tissue == "skin")
    place = {day: ruler.transform(dataset.rows(np.flatnonzero(here & (days == day)))) for day in (10.0, 11.0, 12.0)}
    for method, day in ((PREVIOUS, 10.0), (NEXT, 12.0)):
        wanted = metrics.energy_distance(place[day], place[11.0])
        assert rows[method].values["energy_pca_u"] == pytest.approx(wanted, rel=1e-10)
    cells = [np.flatnonzero(here & (days == day)) for day in (10.0, 12.0)]
    chosen = np.concatenate(mixed(*cells, 0.5, seed=0, name="control/skin/11", most=2000))
    wanted = metrics.energy_distance(ruler.transform(dataset.rows(chosen)), place[11.0])
    assert rows[MIXTURE].values["energy_pca_u"] == pytest.approx(wanted, rel=1e-10)
    assert {row.kind for row in rows.values() if row.method in (PREVIOUS, NEXT, INTERPOLATION, MIXTURE)} == {"baseline"}
    assert rows[MODEL].kind == "model"
    assert rows[HALVES].kind == "reference"
    assert len(one.neighbours) == 46


def test_a_model_that_does_not_move_cells_scores_what_the_mixture_scores():
    _, _, _, judged = left_out(11.0, linear_model(reach=0.0))
    for one in judged:
        rows = {row.method: row.values for row in one.rows}
        assert rows[MODEL] == rows[MIXTURE]


def test_a_condition_begins_with_the_controls_where_it_has_no_earlier_cells():
    _, rows = values(left_out(11.0)[3], "drug@2", "blood")
    assert np.isfinite(rows[MODEL].values["energy_pca_u"])
    assert np.isfinite(rows[PREVIOUS].values["energy_pca_u"])


def test_the_last_time_point_has_no_later_one_and_every_interpolation_declines():
    model = linear_model()
    _, rows = values(left_out(12.0, model)[3], "control", "blood")
    assert rows[NEXT].declined == "there is no later time point"
    for method in (MODEL, MIXTURE, INTERPOLATION):
        assert rows[method].declined == "there is no later time point to interpolate from"
    assert np.isfinite(rows[PREVIOUS].values["energy_pca_u"])
    assert judge(list(rows.values())).outcome == "unknown"


def test_a_condition_without_seen_cells_declines_throughout():
    model = linear_model()
    found = trajectory.cells(model, course(n=23))
    drugged = found.dataset.label == "drug@2"
    _, judged = evaluate(model, found.dataset, found.course, np.flatnonzero(~drugged), np.flatnonzero(drugged))
    for one in judged:
        assert all(row.declined for row in one.rows if row.method != HALVES)


def test_the_models_draws_and_numbers_depend_on_the_seed_only():
    first, again, other = (left_out(11.0, seed=seed)[3] for seed in (3, 3, 4))
    values = [
        [row.values.get("energy_pca_u") for one in judged for row in one.rows] for judged in (first, again, other)
    ]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_the_json_says_which_time(tmp_path):
    rows = [row for one in left_out(11.0)[3] for row in one.rows]
    assert {row["time"] for row in metrics_json(rows)["metrics"]} == {"11 day"}
