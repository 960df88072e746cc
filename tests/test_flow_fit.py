"""A flow from data to report in both twins: what the run holds, what it must not see, resuming, errors."""

import dataclasses
import json

import anndata
import numpy as np
import pytest
from scipy import sparse
from small_data import real
from test_training import Interrupted, files_of

from pf_core import backends, cli, fit, flow_fit
from pf_core.config import AdversaryConfig, Config, DataConfig, FlowConfig, StageConfig, VAEConfig
from pf_core.coupling import standard
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.initial import running_statistics
from pf_core.simulate_flow import log_profile_velocity, network, simulate_flow
from pf_core.tissue_left import tissue_left

TWINS = ("jax", "torch")


def settings(*, flow=None, adversary=None, data=None, **stage) -> Config:
    # Every call takes four steps, so that the JAX twin compiles one shape per stage.
    steps = {"max_steps": 12, "evaluate_every": 8, "checkpoint_every": 4, "steps_per_call": 4, **stage}
    steps.setdefault("batch_size", 32)
    return Config(
        system="flow",
        data=DataConfig(**{"genes": 0, "holdout": ("time=12,perturbation=drug",), **(data or {})}),
        vae=VAEConfig(n_hidden=11, n_latent=5, kl_warmup=10),
        adversary=AdversaryConfig(**{"n_hidden": 7, **(adversary or {})}),
        flow=FlowConfig(n_embedding=3, n_time=4, n_condition=4, n_hidden=9, **(flow or {})),
        stage_cvae=StageConfig(**steps),
        stage_flow=StageConfig(**steps),
    )


@pytest.fixture(scope="module")
def adata():
    return simulate_flow(3, n_genes=29, n_cells=41, n_tissues=2, n_regulators=5)


@pytest.fixture(scope="module")
def folder(adata, tmp_path_factory):
    """cells.h5ad and network.csv."""
    folder = tmp_path_factory.mktemp("data")
    adata.write_h5ad(folder / "cells.h5ad")
    network(adata.uns["truth"]).to_csv(folder / "network.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def plain_report(request, monkeypatch):
    """The report takes longer than these trainings, and has tests of its own."""
    if not any(word in request.node.name for word in ("report", "interrupted")):
        monkeypatch.setattr("pf_core.flow_judgement.render", lambda payload: payload.title)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A whole run of each twin, with a network, its report included."""
    out = tmp_path_factory.mktemp("runs")
    return {
        twin: flow_fit.fit_flow(
            folder / "cells.h5ad",
            out=out / twin,
            backend=twin,
            config=settings(),
            network=folder / "network.csv",
        )
        for twin in TWINS
    }


# --- what a run holds --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("twin", TWINS)
def test_a_run_holds_parameters_statistics_units_and_network(trained, folder, twin):
    run = trained[twin].run
    params = run.read_arrays("model.safetensors")
    assert set(running_statistics(settings().vae)) <= set(params)
    assert {"flow.center", "flow.scale", "flow.graph.attention", "discriminator.out.weight"} <= set(params)
    assert all(np.isfinite(value).all() for value in params.values())
    last = run.best("cvae")
    for name in running_statistics(settings().vae):  # those of the parameters that were kept, and no longer the start
        np.testing.assert_array_equal(params[name], last.arrays[f"carry/{name}"])
    assert not np.allclose(params["cvae.encoder.norm1.mean"], 0.0)
    graph = run.read_arrays("network.safetensors")
    assert len(graph["source"]) == len((folder / "network.csv").read_text().splitlines()) - 1
    facts = run.read_json("data.json")
    assert facts["network"]["edges_kept"] == len(graph["sign"])
    assert facts["time"] == {"first": 0.0, "last": 24.0, "unit": "hour"}
    assert facts["heldout"] == [["drug", "tissue1", "12"], ["drug", "tissue2", "12"]]
    assert [point["heldout"] for point in facts["course"]["points"]] == [0, 82, 0]
    series = {(one["label"], one["tissue"]): one for one in facts["course"]["series"]}
    drug, control = series["drug", "tissue1"], series["control", "tissue2"]
    assert (drug["points"], drug["starts_from_control"]) == (["0", "24"], True)
    assert (control["points"], control["starts_from_control"]) == (["0", "12", "24"], False)
    vocabulary = run.read_json("vocabulary.json")
    assert vocabulary["perturbations"] == ["<unknown>", "drug"]
    assert vocabulary["tissues"] == ["<unknown>", "tissue1", "tissue2"]
    metrics = run.read_json("metrics.json")["metrics"]
    assert {(row["label"], row["tissue"]) for row in metrics} == {("drug", "tissue1"), ("drug", "tissue2")}


@pytest.mark.parametrize("twin", TWINS)
def test_center_and_scale_are_those_of_the_training_cells_latents(trained, folder, twin):
    run, _, dataset, split, _ = flow_fit.reopen(trained[twin].run.path)
    center, scale = standard(trained[twin].encode(dataset, split.train))
    params = run.read_arrays("model.safetensors")
    np.testing.assert_allclose(params["flow.center"], center, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params["flow.scale"], scale, rtol=1e-4)


def test_the_history_has_both_stages_and_the_discriminators_accuracy(trained):
    for model in trained.values():
        records = [json.loads(line) for line in (model.run.path / "history.jsonl").read_text().splitlines()]
        stages = [record["stage"] for record in records]
        assert stages == sorted(stages, key=["cvae", "flow"].index)
        first = next(record for record in records if record.get("validation"))
        assert set(first["parts"]) == {"nll", "kl", "adversary", "discriminator", "accuracy"}
        assert 0.0 <= first["validation"]["accuracy"] <= 1.0
        assert set(records[-1]["parts"]) == {"displacement"}
        assert "flow.center" not in records[-1]["grad_norms"]


def test_the_report_shows_course_network_tissue_and_accuracy(folder, tmp_path):
    config = settings(max_steps=8)
    first = flow_fit.fit_flow(folder / "cells.h5ad", out=tmp_path / "plain", backend="torch", config=config)
    page = (first.run.path / "report.html").read_text()
    for words in ("Time course", "Tissue left in the latents", "accuracy of the discriminator", "tissue1", "24 (hour)"):
        assert words.replace("24 (hour)", "time (hour)") in page
    assert "What was kept of the network" not in page
    second = flow_fit.fit_flow(
        folder / "cells.h5ad", out=tmp_path / "second", backend="torch", config=config,
        network=folder / "network.csv", beside=tmp_path / "plain",
    )  # fmt: skip
    page = (second.run.path / "report.html").read_text()
    assert "What was kept of the network" in page
    assert '<th scope="row">plain</th>' in page
    assert second.run.read_json("latents.json")["tissue"]["tissues"] == 2


def test_without_held_out_cells_a_run_is_not_judged_and_without_tissues_nothing_is_to_be_left(tmp_path):
    cells = simulate_flow(1, n_genes=17, n_cells=23)
    config = settings(data={"holdout": ()}, max_steps=4)
    model = flow_fit.fit_flow(cells, out=tmp_path / "run", backend="torch", config=config)
    assert model.run.read_json("metrics.json")["metrics"] == []
    found = model.run.read_json("latents.json")["tissue"]
    assert (found["tissues"], found["accuracy"]) == (1, None)
    assert not model.run.has("network.safetensors")


WAYS = ({"scope": "global"}, {"coupling": "entropic", "unbalanced": 1.0}, {"pairing": "argmax"})


@pytest.mark.parametrize("flow", WAYS)
@pytest.mark.parametrize("twin", TWINS)
def test_every_way_of_coupling_trains(folder, tmp_path, flow, twin):
    if flow.get("coupling") == "entropic":
        pytest.importorskip("ot" if twin == "torch" else "ott", reason="not run: the extra flow is not installed")
    config = settings(flow=flow, max_steps=4)
    model = flow_fit.fit_flow(folder / "cells.h5ad", out=tmp_path / "run", backend=twin, config=config)
    assert np.isfinite(model.params["flow.head.out.weight"]).all()


def test_zero_steps_leave_the_start(folder, tmp_path):
    model = flow_fit.fit_flow(
        folder / "cells.h5ad", out=tmp_path / "run", backend="torch", config=settings(max_steps=0)
    )
    np.testing.assert_array_equal(model.params["cvae.encoder.norm1.var"], 1.0)


# --- what training must not see ----------------------------------------------------------------------------------
def test_held_out_cells_leave_no_trace_in_the_model(adata, tmp_path):
    """Their counts are replaced by others: genes, scaling, pairs and parameters stay what they were."""
    other = adata.copy()
    held = ((adata.obs["time"] == 12) & (adata.obs["perturbation"] == "drug")).to_numpy()
    counts = other.X.toarray()
    counts[held] = np.random.default_rng(0).poisson(30.0, (held.sum(), adata.n_vars))
    other.X = sparse.csr_matrix(counts.astype(np.float32))
    config = settings(data={"genes": 20}, max_steps=8)
    first, second = (
        flow_fit.fit_flow(cells, out=tmp_path / name, backend="torch", config=config)
        for cells, name in ((adata, "first"), (other, "second"))
    )
    assert first.vocabulary == second.vocabulary
    assert len(first.vocabulary.genes) == 20
    for name, value in first.params.items():
        np.testing.assert_array_equal(value, second.params[name])
    assert first.run.read_json("data.json")["audit"]["clean"]
    assert first.run.read_json("data.json")["fingerprint"] != second.run.read_json("data.json")["fingerprint"]


# --- resuming ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("stage", ["cvae", "flow"])
def test_an_interrupted_run_ends_with_the_files_of_an_undisturbed_one(folder, monkeypatch, trained, twin, stage):
    kind = type(backends.load(twin))
    run_steps, calls = kind.run, []

    def interrupted(self, name, *rest):
        calls.append(name)
        if calls.count(stage) == 2:
            raise Interrupted
        return run_steps(self, name, *rest)

    options = {"backend": twin, "config": settings(), "network": folder / "network.csv"}
    out = trained[twin].run.path.parent / f"broken-{twin}-{stage}"  # beside it: data.json has a relative path
    with monkeypatch.context() as patch:
        patch.setattr(kind, "run", interrupted)
        with pytest.raises(Interrupted):
            flow_fit.fit_flow(folder / "cells.h5ad", out=out, **options)
    resumed = flow_fit.resume_flow(out, backend=twin)
    assert files_of(resumed.run.path) == files_of(trained[twin].run.path)


def test_a_run_of_the_other_system_is_refused_by_name(trained, folder, tmp_path):
    path = trained["torch"].run.path
    with pytest.raises(RunError, match=r"is a run of the flow system; pf_core\.flow_fit\.resume_flow continues it"):
        fit.resume(path, backend="torch")
    with pytest.raises(ConfigError, match=r"system is 'flow'; pf_core\.flow_fit\.fit_flow trains it"):
        fit.fit(folder / "cells.h5ad", out=tmp_path / "x", backend="torch", config=settings())
    with pytest.raises(ConfigError, match="system is 'operator'; set it to 'flow'"):
        flow_fit.fit_flow(folder / "cells.h5ad", out=tmp_path / "x", backend="torch", config=Config())


# --- bad input ---------------------------------------------------------------------------------------------------
def one_time(adata):
    adata.obs["time"] = 3.0


def one_time_per_condition(adata):
    adata.obs["perturbation"] = [f"at{time:g}" for time in adata.obs["time"]]


def empty_cells(adata):
    counts = adata.X.toarray()
    counts[:3] = 0
    adata.X = sparse.csr_matrix(counts)


@pytest.mark.parametrize(
    ("spoil", "data", "says"),
    [
        (one_time, {"holdout": ()}, "one time point only, 3 hour; a flow needs two"),
        (one_time_per_condition, {"holdout": ()}, "no condition has training cells at two time points: 'at0'"),
        (empty_cells, {}, "3 of 410 cells have no counts; leave them out with min_counts=1"),
        (None, {"holdout": ("time=12", "time=24")}, "one time point is left for training, 0 hour; hold out less"),
        (None, {"holdout": ("time=13",)}, "holdout names time=13; there is 0, 12, 24"),
        (None, {"time": "day"}, "obs has no column 'day'"),
        (None, {"covariates": ("age",)}, "the flow system reads no covariates"),
        (None, {"perturbation": "drug"}, "obs has no column 'drug'"),
    ],
)
def test_data_that_make_no_flow_are_one_line_and_nothing_is_written(adata, tmp_path, spoil, data, says):
    cells = adata.copy()
    if spoil is not None:
        spoil(cells)
    with pytest.raises((DataError, ConfigError), match=says) as caught:
        flow_fit.fit_flow(cells, out=tmp_path / "run", backend="torch", config=settings(data=data))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_empty_cells_are_left_out_on_request_and_counted(adata, tmp_path):
    cells = adata.copy()
    empty_cells(cells)
    config = settings(data={"min_counts": 1}, max_steps=4)
    run = flow_fit.fit_flow(cells, out=tmp_path / "run", backend="torch", config=config).run
    assert run.read_json("data.json")["summary"]["dropped"] == {"fewer than min_counts": 3}


def test_a_network_or_a_run_beside_that_cannot_be_used_is_refused_before_training(folder, tmp_path, trained):
    (tmp_path / "strangers.csv").write_text("source,target\nX,Y\n")
    options = {"out": tmp_path / "run", "backend": "torch", "config": settings()}
    with pytest.raises(DataError, match=r"none of its names is among the 29 genes.*'X', 'Y', the data 'TF1'"):
        flow_fit.fit_flow(folder / "cells.h5ad", network=tmp_path / "strangers.csv", **options)
    with pytest.raises(RunError, match="is not a run directory"):
        flow_fit.fit_flow(folder / "cells.h5ad", beside=tmp_path, **options)
    with pytest.raises(RunError, match="exists and is not empty"):
        flow_fit.fit_flow(folder / "cells.h5ad", **{**options, "out": trained["torch"].run.path})
    assert not (tmp_path / "run").exists()


def test_too_few_cells_for_batch_statistics_are_refused(adata, tmp_path):
    config = dataclasses.replace(settings(), stage_cvae=StageConfig(batch_size=1))
    with pytest.raises(DataError, match=r"a batch has 1 cells of .*; batch norm needs two or more"):
        flow_fit.fit_flow(adata, out=tmp_path / "run", backend="torch", config=config)


# --- the command line --------------------------------------------------------------------------------------------
def pf(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


QUICK = [
    part
    for setting in (
        "vae.n_hidden=9", "vae.n_latent=4", "stage_cvae.max_steps=4", "stage_cvae.steps_per_call=2",
        "stage_flow.max_steps=4", "stage_flow.steps_per_call=2",
    )
    for part in ("--set", setting)
]  # fmt: skip


def test_the_commands_simulate_train_and_resume_a_course(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--flow", "--network", "net.csv", "--genes", 30, "--tissues", 2]
    assert pf(monkeypatch, "simulate", "cells.h5ad", *options) == 0
    assert "3 time points" in capsys.readouterr().out
    assert set(anndata.read_h5ad("cells.h5ad").obs["tissue"]) == {"tissue1", "tissue2"}
    train = ["train", "cells.h5ad", "--system", "flow", "--backend", "torch", "--grn", "net.csv", *QUICK]
    assert pf(monkeypatch, *train, "--holdout", "time=12", "--out", "run") == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert {row["time"] for row in metrics} == {"12 hour"}
    model = (tmp_path / "run/model.safetensors").read_bytes()
    assert pf(monkeypatch, "train", "--resume", "run", "--backend", "torch") == 0
    assert (tmp_path / "run/model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "cells.h5ad", "--grn", "net.csv"], "--grn does not go with the operator system"),
        (["train", "cells.h5ad", "--system", "flow", "--features", "f.csv"], "--features does not go with the flow"),
        (["train", "cells.h5ad", "--system", "flow", "--set", "flow.unbalanced=2"], "flow.unbalanced is 2, and"),
        (["train", "cells.h5ad", "--system", "flow", "--grn", "none.csv"], "none.csv does not exist"),
        (["train", "cells.h5ad", "--system", "flow", "--time-column", "hours"], "obs has no column 'hours'"),
        (["simulate", "new.h5ad", "--network", "n.csv"], "--network goes with --flow"),
        (["simulate", "new.h5ad", "--flow", "--loy", "0.2"], "--flow and --loy are different cells"),
        (["simulate", "new.h5ad", "--flow", "--genes", "3"], "fewer regulators than genes"),
    ],
)
def test_wrong_options_end_in_one_line(monkeypatch, folder, capsys, arguments, says):
    monkeypatch.chdir(folder)
    assert pf(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "pf-run").exists()


# --- tissue left -------------------------------------------------------------------------------------------------
def test_tissue_information_is_found_where_it_is_and_not_where_it_is_not():
    rng = np.random.default_rng(0)
    tissue = np.array(["a", "b", "b", "c"] * 75 + ["rare"] * 3)
    z = rng.standard_normal((303, 4))
    none = tissue_left(z, tissue, 0)
    assert (none["tissues"], none["cells"], none["majority"]) == (3, 300, 0.5)
    assert none["accuracy"] < 0.58
    ring = z.copy()  # no linear classifier finds this
    ring[tissue == "b", :2] *= 0.05
    assert tissue_left(ring, tissue, 0)["accuracy"] > 0.7
    assert tissue_left(ring, tissue, 0) == tissue_left(ring, tissue, 0)
    assert tissue_left(z, np.full(303, "a"), 0) == {"tissues": 1, "cells": 303, "accuracy": None, "majority": None}


@pytest.mark.slow
def test_the_adversary_takes_the_tissue_out_of_the_latents(tmp_path):
    cells = simulate_flow(0, n_genes=60, n_cells=200, n_tissues=2)
    left = {}
    for weight in (0.0, 30.0):
        config = Config(
            system="flow",
            data=DataConfig(genes=0),
            vae=VAEConfig(n_hidden=64, n_latent=8),
            adversary=AdversaryConfig(weight=weight),
            stage_cvae=StageConfig(max_steps=1500, patience=0),
            stage_flow=StageConfig(max_steps=0),
        )
        run = flow_fit.fit_flow(cells, out=tmp_path / f"{weight}", backend="torch", config=config).run
        left[weight] = run.read_json("latents.json")["tissue"]["accuracy"]
    assert left[0.0] > 0.9
    assert left[30.0] < 0.75


# --- the truth ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS)
def test_the_learned_field_points_where_the_true_one_does(tmp_path, twin):
    """Compared where both can be: in the derivative of the decoded log profile, at the cells themselves."""
    cells = simulate_flow(0, n_genes=120, n_cells=400)
    network(cells.uns["truth"]).to_csv(tmp_path / "network.csv", index=False)
    config = Config(system="flow", data=DataConfig(genes=0), vae=VAEConfig(n_hidden=128, n_latent=8))
    model = flow_fit.fit_flow(
        cells, out=tmp_path / "run", backend=twin, config=config, network=tmp_path / "network.csv"
    )
    cosines = field_cosines(model, cells)
    print({condition: round(float(np.mean(found)), 3) for condition, found in cosines.items()})
    assert np.mean(np.concatenate(list(cosines.values()))) > 0.9


def field_cosines(model, cells) -> dict[str, np.ndarray]:
    """Cosine of the learned and the true d log(profile)/ds at every cell under its own condition."""
    from pf_core import data, times

    dataset = data.load(cells, model.config.data, contrasts=False)
    course = times.read(dataset, model.config)
    z, out = model.encode(dataset), {}
    for condition in ("control", "drug"):
        rows = np.flatnonzero(dataset.label == condition)
        code = model.codes(condition, dataset.tissue[rows])
        s = model.axis.scaled(course.times[rows])
        moved = model.backend.velocity(model.params, s, z[rows], code, model.graph, model.config)
        tissue = model.vocabulary.codes("tissues", dataset.tissue[rows])
        library = np.ones(len(rows), z.dtype)
        args = (tissue, library, model.config)
        slope = model.backend.decode_jacobian_vector(model.params, z[rows], moved, *args)
        found = slope / model.backend.decode(model.params, z[rows], *args)
        truth = log_profile_velocity(cells.uns["truth"], cells.obsm["latent"][rows], condition, 0)
        dots = (found * truth).sum(1)
        out[condition] = dots / (np.linalg.norm(found, axis=1) * np.linalg.norm(truth, axis=1))
    return out


# --- real courses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "holdout", "data", "grn"),
    [
        ("schiebinger2019_reprogramming_d10_d11", "time=10.5", {}, "grn_mouse_dorothea_abc.csv"),
        ("semrau2017_mesc_ra_timecourse", "time=24", {"min_counts": 1}, "grn_mouse_dorothea_abc.csv"),
        ("kameneva2021_sympathoadrenal_timecourse", "time=32", {}, "grn_human_collectri.csv"),
        ("packer2019_celegans_neurons_timecourse", "timepoint=450-510", {"timepoint": "timepoint", "genes": 300}, None),
    ],
)
def test_real_courses_train_and_are_judged_at_the_held_out_point(tmp_path, name, holdout, data, grn):
    config = settings(data={"holdout": (holdout,), **data}, max_steps=4)
    edges = None if grn is None else real(grn)
    model = flow_fit.fit_flow(real(f"{name}.h5ad"), out=tmp_path / "run", backend="torch", config=config, network=edges)
    facts = model.run.read_json("data.json")
    assert facts["audit"]["clean"]
    [point] = [one for one in facts["course"]["points"] if one["heldout"]]
    assert point["train"] == 0
    rows = model.run.read_json("metrics.json")["metrics"]
    assert any(row["method"] == "mixture of neighbours" and "energy_pca_u" in row for row in rows)
