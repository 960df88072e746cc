"""Leaving one time point out in turn: what is left out, what is chosen without it, and going on."""

import dataclasses
import json

import numpy as np
import pytest

from pf_core import leave_one_time_out as module
from pf_core.config import AdversaryConfig, Config, DataConfig, FlowConfig, StageConfig, VAEConfig
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.leave_one_time_out import CANDIDATES, leave_one_time_out
from pf_core.simulate_flow import simulate_flow

STEPS = StageConfig(max_steps=4, evaluate_every=4, checkpoint_every=4, steps_per_call=4, batch_size=32)
CONFIG = Config(
    system="flow",
    data=DataConfig(genes=0),
    vae=VAEConfig(n_hidden=7, n_latent=3),
    adversary=AdversaryConfig(n_hidden=5),
    flow=FlowConfig(n_embedding=3, n_time=4, n_condition=4, n_hidden=7),
    stage_cvae=STEPS,
    stage_flow=STEPS,
)


@pytest.fixture(scope="module")
def adata():
    return simulate_flow(3, n_genes=23, n_cells=31, times=(0.0, 6.0, 12.0, 18.0, 24.0))


@pytest.fixture(autouse=True)
def plain_report(monkeypatch):
    """The report takes longer than these trainings, and has tests of its own."""
    monkeypatch.setattr("pf_core.flow_judgement.render", lambda payload: payload.title)


def test_every_middle_point_is_left_out_and_a_second_call_trains_nothing(adata, tmp_path, monkeypatch):
    options = {"name": "one", "out": tmp_path / "out", "seeds": (0,), "backend": "torch"}
    result = leave_one_time_out(adata, CONFIG, **options)
    assert [fold["name"] for fold in result.folds] == ["6", "12", "18"]
    for point in ("6", "12", "18"):
        run = tmp_path / "out" / point / "seed-0"
        assert {name for _, _, name in json.loads((run / "data.json").read_text())["heldout"]} == {point}
        rows = json.loads((run / "metrics.json").read_text())["metrics"]
        assert np.isfinite([row["energy_pca_u"] for row in rows]).all()
    monkeypatch.setattr(module.flow_fit, "fit_flow", lambda *a, **k: pytest.fail("trained again"))
    assert repr(leave_one_time_out(adata, CONFIG, **options).scores) == repr(result.scores)
    with pytest.raises(RunError, match="holds other settings, other data or another backend"):
        leave_one_time_out(adata, dataclasses.replace(CONFIG, dtype="float64"), **options)


def test_pace_bend_and_reach_are_chosen_by_the_least_mean_on_inner_points_that_never_hold_the_outer_one(
    adata, tmp_path, monkeypatch
):
    seen = []
    scores = module.candidate_scores

    def spy(path, source, backend, device):
        seen.append((sorted(set(source.obs["time"])), json.loads((path / "data.json").read_text())["heldout"]))
        return scores(path, source, backend, device)

    monkeypatch.setattr(module, "candidate_scores", spy)
    result = leave_one_time_out(
        adata, CONFIG, name="inner", out=tmp_path / "out", seeds=(0,), points=("12",), inner=True, backend="torch"
    )
    assert [times for times, _ in seen] == [[0.0, 6.0, 18.0, 24.0]] * 2
    assert [{name for _, _, name in heldout} for _, heldout in seen] == [{"6"}, {"18"}]
    choice = result.folds[0]["choice"]
    means = np.mean([choice["points"]["6"], choice["points"]["18"]], axis=0)
    assert len(means) == len(CANDIDATES)
    assert choice["chosen"] == CANDIDATES[int(means.argmin())]
    used = Config.from_toml(tmp_path / "out/12/seed-0/config.toml").flow
    assert {"flow.pace": used.pace, "flow.bend": used.bend, "flow.reach": used.reach} == choice["chosen"]
    assert not [path for path in (tmp_path / "out/12/inner").iterdir() if path.is_dir()]


def test_what_cannot_be_left_out_is_one_line(adata, tmp_path):
    options = {"name": "bad", "out": tmp_path / "out", "backend": "torch"}
    with pytest.raises(ConfigError, match="'0' is no time point between two others; there are 6, 12, 18"):
        leave_one_time_out(adata, CONFIG, points=("0",), **options)
    bins = dataclasses.replace(CONFIG, flow=dataclasses.replace(CONFIG.flow, bins=3))
    with pytest.raises(ConfigError, match=r"flow\.bins is 3, and bins have no name"):
        leave_one_time_out(adata, bins, **options)
    with pytest.raises(DataError, match="there are 2 time points; one between two others is wanted"):
        leave_one_time_out(adata[adata.obs["time"].isin([0.0, 24.0])].copy(), CONFIG, **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(RunError, match="is not the output of the same call; nothing was written"):
        leave_one_time_out(adata, CONFIG, **options)
