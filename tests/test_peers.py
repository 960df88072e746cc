"""Another package on the splits of a task, as a command: what it is given, and what is refused of its answer."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tasks import TYPES, folder, plain_report, written  # noqa: F401  (fixtures)

from pf_core import task_run, tasks
from pf_core.errors import RunError

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"

COMMAND = """
import json, sys
from pathlib import Path
import anndata, numpy as np

given, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with (out / "calls.txt").open("a") as calls:
    calls.write("called;")
train = anndata.read_h5ad(given / "train.h5ad")
shares = train.X.toarray() / train.obs["library"].to_numpy()[:, None]
for number, one in enumerate(json.loads((given / "conditions.json").read_text())):
    controls = anndata.read_h5ad(given / f"controls-{number}.h5ad")
    assert set(controls.obs["label"]) == {"control"} and set(controls.obs["cell_type"]) == {one["cell_type"]}
    held = (train.obs["label"] == one["label"]) & (train.obs["cell_type"] == one["cell_type"])
    assert not held.any() and seed == 0
    if one["label"] == "TF5" and one["tissue"] == "tissue1":
        (out / f"{number}.txt").write_text("not today")
        continue
    before = np.tile(1e4 * shares[train.obs["label"] == "control"].mean(0), (controls.n_obs, 1))
    after = np.tile(1e4 * shares[train.obs["label"] == one["label"]].mean(0), (controls.n_obs, 1))
    np.savez(out / f"{number}.npz", before=before, after=after SPOILED)
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("peers")


@pytest.fixture
def ran(folder, tmp_path, plain_report):  # noqa: F811
    path = written(folder, TYPES + 'values = ["type1"]\nseeds = [0]', name="peers.toml")
    task_run.run(tasks.load(path), out=tmp_path / "runs", backend="torch", folds=[1])
    return path


def _command(tmp_path, spoiled=""):
    path = tmp_path / "peer.py"
    path.write_text(COMMAND.replace(" SPOILED", spoiled))
    return f"{sys.executable} {path}"


def _call(peers, monkeypatch, folder, tmp_path, task, command):  # noqa: F811
    arguments = ["--task", task, "--data", folder, tmp_path / "runs", "--out", tmp_path / "out", "--peer"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, arguments), f"Mean={command}"])
    peers.main()


def test_a_peer_is_judged_beside_the_model_and_not_run_twice(peers, monkeypatch, folder, tmp_path, ran):  # noqa: F811
    _call(peers, monkeypatch, folder, tmp_path, ran, _command(tmp_path))
    first = (tmp_path / "out/task.json").read_bytes()
    scores = json.loads(first)["scores"]
    mine = [one for one in scores if one["method"] == "Mean"]
    assert {one["kind"] for one in mine} == {"baseline"}
    assert {one["condition"]: one["declined"] for one in mine if one["declined"]} == {
        "TF5 in type1, tissue1": "not today"
    }
    model = {one["condition"]: one["values"] for one in scores if one["method"] == "operator model"}
    judged = json.loads((tmp_path / "runs/task.json").read_text())["scores"]
    before = {one["condition"]: one["values"] for one in judged if one["method"] == "operator model"}
    assert model.keys() == before.keys()
    for condition, values in model.items():
        assert values["energy_pca_u"] == pytest.approx(before[condition]["energy_pca_u"], rel=1e-4)
    assert np.isfinite([one["values"]["energy_pca_u"] for one in mine if not one["declined"]]).all()
    assert "Mean" in (tmp_path / "out/task.md").read_text()
    _call(peers, monkeypatch, folder, tmp_path, ran, _command(tmp_path))
    assert (tmp_path / "out/task.json").read_bytes() == first
    assert (tmp_path / "out/fold-1/seed-0/Mean/calls.txt").read_text() == "called;"


@pytest.mark.parametrize(("spoiled", "message"), [("[:-1]", "control cells"), (" - 1e6", "negative or not finite")])
def test_an_answer_that_is_none_is_refused(peers, monkeypatch, folder, tmp_path, ran, spoiled, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        _call(peers, monkeypatch, folder, tmp_path, ran, _command(tmp_path, spoiled))


def test_a_peer_that_fails_and_runs_that_are_not_there_are_named(peers, monkeypatch, folder, tmp_path, ran):  # noqa: F811
    with pytest.raises(RuntimeError, match="ended with code 3"):
        _call(peers, monkeypatch, folder, tmp_path, ran, f"{sys.executable} -c exit(3)")
    with pytest.raises(RunError, match="no finished training"):
        next(task_run.finished(tasks.load(ran), out=tmp_path / "elsewhere"))
