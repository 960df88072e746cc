"""The command line as a user meets it: what works, and what one line says when it does not."""

import json

import anndata
import numpy as np
import pytest

from pf_core import cli
from pf_core.simulate import simulate

QUICK = [
    part
    for setting in (
        "data.genes=0",
        "vae.n_hidden=9",
        "vae.n_latent=4",
        "operator.cells_per_condition=11",
        "stage_vae.max_steps=8",
        "stage_vae.steps_per_call=4",
        "stage_operator.max_steps=8",
        "stage_operator.steps_per_call=4",
    )
    for part in ("--set", setting)
]


def run(monkeypatch, *arguments: object) -> int:
    """pf ARGUMENTS in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["pf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    simulate(3, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--holdout", "perturbation=TF1+TF2", "--backend", "torch", *QUICK]
        assert run(patch, "train", cells, "--out", out, *arguments) == 0
    return out


def test_training_judges_the_held_out_conditions(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {row["label"] for row in metrics["metrics"]} == {"TF1+TF2"}
    assert {"operator model", "no change", "latent shift", "additive"} <= {row["method"] for row in metrics["metrics"]}
    assert "TF1+TF2" in (trained / "report.html").read_text()


def test_prediction_writes_an_h5ad_of_counts(monkeypatch, trained, cells, tmp_path):
    out = tmp_path / "predicted.h5ad"
    options = ["--perturbation", "TF2+TF1", "--cells", "cell_type=type1", "--out", out, "--backend", "torch"]
    assert run(monkeypatch, "predict", trained, cells, *options) == 0
    predicted = anndata.read_h5ad(out)
    assert set(predicted.obs["cell_type"]) == {"type1"}
    assert set(predicted.obs["perturbation"]) == {"TF2+TF1"}
    assert (predicted.X.data == np.rint(predicted.X.data)).all()
    assert predicted.obsm["X_latent"].shape == (predicted.n_obs, 4)


def test_a_trajectory_starts_at_the_controls(monkeypatch, trained, cells, tmp_path):
    out = tmp_path / "path.h5ad"
    options = ["--perturbation", "TF3", "--times", "0:1:0.5", "--out", out, "--backend", "torch"]
    assert run(monkeypatch, "predict", trained, cells, *options) == 0
    path = anndata.read_h5ad(out)
    assert sorted(set(path.obs["time"])) == [0.0, 0.5, 1.0]
    start = path[path.obs["time"] == 0.0]
    source = anndata.read_h5ad(cells)
    controls = source[source.obs["perturbation"] == "control"]
    np.testing.assert_array_equal(start.X.toarray(), controls.X.toarray())
    np.testing.assert_array_equal(start.obsm["X_latent"], start.obsm["X_control_latent"])


def test_a_counterfactual_pairs_the_same_cells(monkeypatch, trained, cells, tmp_path):
    out = tmp_path / "pair.h5ad"
    options = ["--perturbation", "TF3", "--counterfactual", "TF5", "--out", out, "--backend", "torch"]
    assert run(monkeypatch, "predict", trained, cells, *options) == 0
    pair = anndata.read_h5ad(out)
    assert set(pair.obs["counterfactual"]) == {"TF3", "TF5"}


def test_evaluation_again_in_another_output_mode(monkeypatch, trained, capsys):
    before = (trained / "metrics.json").read_bytes()
    assert run(monkeypatch, "evaluate", trained, "--output", "mean", "--backend", "torch") == 0
    assert (trained / "metrics.json").read_bytes() != before
    assert "operator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no data: give an h5ad file"),
        (["train", "{missing}"], "no file"),
        (["train", "{cells}", "--out", "{trained}"], "nothing was written"),
        (["train", "{cells}", "--set", "vae.n_latnt=3"], "did you mean n_latent"),
        (["train", "{cells}", "--set", "vae.n_latent"], "KEY=VALUE was wanted"),
        (["train", "{cells}", "--holdout", "cell_typ=type1"], "cell_type"),
        (["train", "{cells}", "--holdout", "cell_type=type9"], "type9"),
        (["train", "{cells}", "--perturbation-column", "perturbatio"], "did you mean 'perturbation'"),
        (["train", "{cells}", "--control", "nothing"], "control"),
        (["train", "{cells}", "--device", "gpu", "--backend", "torch"], "gpu"),
        (["train", "--resume", "{missing}"], "not a run directory"),
        (["predict", "{trained}", "{cells}", "--perturbation", "TF99"], "was not in training and has no features"),
        (["predict", "{trained}", "{cells}", "--perturbation", "TF1", "--cells", "tisue=a"], "did you mean 'tissue'"),
        (["predict", "{trained}", "{cells}", "--perturbation", "TF1", "--times", "1"], "START:STOP:STEP"),
        (["predict", "{missing}", "{cells}", "--perturbation", "TF1"], "not a run directory"),
        (["replay", "{trained}"], "not a crash bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, cells, trained, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"cells": cells, "trained": trained, "missing": tmp_path / "missing"}
    code = run(monkeypatch, *(argument.format(**names) for argument in arguments))
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("pf: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert not [path for path in tmp_path.iterdir() if path.name != "run"], "nothing is written on bad input"


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("pf ")
