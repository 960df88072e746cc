"""Task files, their folds, and what a run of a task says: nothing leaks, nothing is done twice."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_cli import run as pf

from pf_core import data, fit, splits, task_report, task_run, tasks
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.simulate import simulate
from pf_core.task_report import Result, Score
from pf_core.verdict import METRICS

TRAIN = """
[train]
data.genes = 0
vae = {n_hidden = 9, n_latent = 4}
operator = {n_bases = 2, n_hidden = 5, cells_per_condition = 11}
stage_vae = {max_steps = 4, steps_per_call = 4, batch_size = 16}
stage_operator = {max_steps = 4, steps_per_call = 4}
"""
TYPES = 'kind = "leave-one-out"\nby = "cell_type"\nperturbations = ["TF1", "TF5"]\nmin_cells = 5\n'
INNER = "[inner]\nfolds = 1\n[inner.grid]\noperator.shrinkage = [0.1, 0.5]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    cells = simulate(3, n_genes=23, n_control=12, n_single=7, n_pair=6)
    cells.obs["donor"] = np.resize(["d1", "d2"], cells.n_obs)
    cells.write_h5ad(path / "cells.h5ad")
    weights = cells.uns["truth"]["weights"]
    pd.DataFrame(weights, index=list(cells.uns["truth"]["perturbations"])).to_csv(path / "features.csv")
    return path


def written(folder, body, rest=TRAIN, name="task.toml"):
    (folder / name).write_text(f'[task]\ndata = "cells.h5ad"\n{body}\n{rest}')
    return folder / name


def files(out) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


@pytest.fixture
def plain_report(monkeypatch):
    monkeypatch.setattr("pf_core.report.render", lambda payload: payload.title)


# --- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks/tasks").glob("*.toml")), ids=str)
def test_the_committed_tasks_are_read(path):
    task = tasks.load(path)
    assert len(task.seeds) == 5
    assert not Path(task.data).is_absolute()


@pytest.mark.parametrize(
    ("body", "rest", "message"),
    [
        ('kind = "leave-one-out"', "", "task.by is missing"),
        ("", "", "task.kind is missing"),
        ('kind = "leave-one-in"', "", "'leave-one-in'"),
        (TYPES + "valeus = []", "", "did you mean values"),
        (TYPES + "folds = 3", "", "task.folds does not go with"),
        (TYPES + "seeds = []", "", "task.seeds is []"),
        (TYPES + "seeds = [1, 1]", "", "different whole numbers"),
        (TYPES + "seeds = 3", "", "task.seeds is 3"),
        (TYPES + 'values = ["a"]\nlargest = 2', "", "exclude each other"),
        ('kind = "combinations"', "", "task.folds is 0"),
        ('kind = "combinations"\nfolds = 2\nby = "x"', "", "task.by does not go with"),
        ('kind = "unseen"\nfolds = 2', "", "task.features is missing"),
        (TYPES, "[trian]", "did you mean 'train'"),
        (TYPES, "[train]\nvae.n_laten = 3", "did you mean 'n_latent'"),
        (TYPES, "[train]\nseed = 3", "train.seed"),
        (TYPES, '[train]\ndata.holdout = ["a=b"]', "train.data.holdout"),
        (TYPES, "[inner]\nfolds = 2", "inner.grid is missing"),
        (TYPES, "[inner.grid]\noperator.shrinkage = 0.1", "a list of values"),
        (TYPES, "[inner.grid]\noperator.shrinkage = [-1.0]", "shrinkage is -1.0"),
        (TYPES, "[inner.grid]\noperator.shrink = [1.0]", "did you mean 'shrinkage'"),
        (TYPES, "[inner.grid]\ndata.genes = [10]", "only settings of the model"),
        ("kind =", "", "not valid TOML"),
    ],
)
def test_a_bad_task_file_is_refused_by_name(tmp_path, body, rest, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        tasks.load(written(tmp_path, body, rest))
    assert len(str(caught.value).splitlines()) == 1


# --- folds ----------------------------------------------------------------------------------------------------------
def folds(folder, body):
    task = tasks.load(written(folder, body, ""))
    bench = task_run._bench(task, None, "torch", "cpu", None)
    found = tasks.folds(task, bench.dataset)
    held = [splits.split(bench.dataset, task_run._config(task, f, 0, {}).data, 0).heldout for f in found]
    return bench.dataset, found, held


def test_leave_one_out_holds_out_the_named_perturbations_of_one_value(folder):
    dataset, found, held = folds(folder, TYPES)
    assert sorted(fold.name for fold in found) == ["type1", "type2", "type3"]
    for fold, cells in zip(found, held, strict=True):
        wanted = (dataset.cell_type == fold.name) & np.isin(dataset.label, ["TF1", "TF5"])
        np.testing.assert_array_equal(cells, np.flatnonzero(wanted))


def test_a_held_out_replicate_keeps_its_controls_as_a_context_of_their_own(folder):
    dataset, found, held = folds(folder, 'kind = "replicate"\nby = "donor"')
    assert {fold.name for fold in found} == {"d1", "d2"}
    assert sorted(set(dataset.cell_type))[:2] == ["type1 d1", "type1 d2"]
    donor = dataset.obs["donor"].astype(str).to_numpy()
    for fold, cells in zip(found, held, strict=True):
        np.testing.assert_array_equal(cells, np.flatnonzero((donor == fold.name) & ~dataset.is_control))


def test_every_combination_is_held_out_once(folder):
    dataset, found, held = folds(folder, 'kind = "combinations"\nfolds = 3\nmin_cells = 5')
    assert len(found) == 3
    pairs = np.array(["+" in label for label in dataset.label])
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.flatnonzero(pairs))


def test_an_unseen_perturbation_is_held_out_in_every_condition(folder):
    dataset, found, held = folds(folder, 'kind = "unseen"\nfolds = 4\nfeatures = "features.csv"\nmin_cells = 5')
    singles = set()
    for cells in held:
        out = {label for label in dataset.label[cells] if "+" not in label}
        singles |= out
        rest = np.setdiff1d(np.arange(dataset.n_cells), cells)
        assert not {name for label in dataset.label[rest] for name in label.split("+")} & out
    assert singles == {f"TF{i}" for i in range(1, 9)}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('kind = "leave-one-out"\nby = "cel_type"', "did you mean 'cell_type'"),
        (TYPES + 'values = ["type9"]', "did you mean"),
        ('kind = "leave-one-out"\nby = "cell_type"\nperturbations = ["TF99"]', "'TF99'"),
        ('kind = "leave-one-out"\nby = "cell_type"\nmin_cells = 5000', "no value of 'cell_type' has 5000"),
        ('kind = "combinations"\nfolds = 99', "for 99 folds"),
        ('kind = "combinations"\nfolds = 2\nvalues = ["TF1"]', "not among the combinations"),
    ],
)
def test_a_task_that_does_not_fit_the_data_is_refused(folder, tmp_path, body, message):
    task = tasks.load(written(folder, body, ""))
    with pytest.raises(DataError, match=re.escape(message)):
        task_run.run(task, out=tmp_path / "out", backend="torch")
    assert not (tmp_path / "out").exists()


def test_a_fold_that_leaves_nothing_to_train_on_is_refused_before_training(tmp_path):
    cells = simulate(3, n_genes=11, n_control=9, n_single=7, n_pair=6)
    cells[cells.obs["cell_type"] == "type1"].copy().write_h5ad(tmp_path / "cells.h5ad")
    body = 'kind = "leave-one-out"\nby = "cell_type"'
    with pytest.raises(DataError, match=r"fold 1 \(type1\): the held-out conditions leave no perturbed cell"):
        task_run.run(tasks.load(written(tmp_path, body)), out=tmp_path / "out", backend="torch")


def test_inner_folds_that_do_not_exist_are_refused_before_training(folder, tmp_path):
    task = tasks.load(written(folder, 'kind = "replicate"\nby = "donor"', TRAIN + INNER))
    with pytest.raises(DataError, match=r"inner folds of fold 1 \(d[12]\)"):
        task_run.run(task, out=tmp_path / "out", backend="torch")


# --- runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("plain_report")
def test_a_killed_task_is_continued_to_the_files_of_an_undisturbed_one(folder, tmp_path, monkeypatch):
    task = tasks.load(written(folder, TYPES + "seeds = [0, 1]", TRAIN + INNER))
    options = {"backend": "torch", "folds": [1]}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    seen, trained, original = [], [], fit.fit

    def watched(source, *, out, **rest):
        seen.append((str(out), data.load(source, rest["config"].data) if not isinstance(source, Path) else None))
        return original(source, out=out, **rest)

    monkeypatch.setattr(fit, "fit", watched)
    result = task_run.run(task, out=tmp_path / "whole/out", **options)
    # No inner training holds a cell of the outer fold.
    whole = data.load(folder / "cells.h5ad", task.config().data)
    outer = (whole.cell_type == result.folds[0]["name"]) & np.isin(whole.label, ["TF1", "TF5"])
    names = set(whole.cells[outer])
    inner = [dataset for path, dataset in seen if "inner" in path]
    assert len(inner) == 2
    assert all(not names & set(dataset.cells) for dataset in inner)
    assert all(dataset.n_cells == whole.n_cells - len(names) for dataset in inner)
    choice = result.folds[0]["choice"]
    means = [row["mean"] for row in choice["candidates"]]
    assert choice["chosen"] == choice["candidates"][int(np.argmin(means))]["settings"]
    assert all(audit["clean"] for audit in result.folds[0]["audit"])

    def dies(source, *, out, **rest):
        trained.append(Path(out).name)
        if len(trained) in (2, 4):
            raise KeyboardInterrupt
        return original(source, out=out, **rest)

    monkeypatch.setattr(fit, "fit", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            task_run.run(task, out=tmp_path / "killed/out", **options)
    # A run whose training ended and whose judgement did not is continued too.
    monkeypatch.setattr("pf_core.fit.judge_run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        task_run.run(task, out=tmp_path / "killed/out", **options)
    monkeypatch.undo()
    monkeypatch.setattr("pf_core.report.render", lambda payload: payload.title)
    task_run.run(task, out=tmp_path / "killed/out", **options)
    assert files(tmp_path / "killed/out") == files(tmp_path / "whole/out")
    monkeypatch.setattr(fit, "fit", lambda *_, **__: pytest.fail("trained again"))
    task_run.run(task, out=tmp_path / "whole/out", **options)
    other = tasks.load(written(folder, TYPES + "largest = 1", TRAIN))
    with pytest.raises(RunError, match="other settings, other data or another backend"):
        task_run.run(other, out=tmp_path / "whole/out", backend="torch")


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize(
    "body",
    [
        'kind = "replicate"\nby = "donor"\nperturbations = ["TF1"]\nmin_cells = 4',
        'kind = "unseen"\nfolds = 4\nfeatures = "features.csv"\nmin_cells = 5',
        'kind = "combinations"\nfolds = 5\nmin_cells = 5',
    ],
)
def test_the_other_kinds_run_from_the_command_line(folder, tmp_path, monkeypatch, capsys, body):
    path = written(tmp_path, body)
    out = tmp_path / "out"
    options = ["--data", folder, "--out", out, "--backend", "torch", "--folds", "1"]
    assert pf(monkeypatch, "evaluate", "--task", path, *options) == 0
    shown = capsys.readouterr().out
    assert "leak audit: clean in every fold" in shown
    assert "n/a" in shown, "one seed has no standard error"
    found = json.loads((out / "task.json").read_text())
    [model] = [s for s in found["summary"] if s["kind"] == "model" and s["metric"] == "energy_pca_u"]
    assert model["se_seeds"] is None
    assert {"no change", "perturbation mean", "kernel ridge"} <= {test["baseline"] for test in found["tests"]}
    assert "kernel ridge" in (out / "task.md").read_text()
    assert (out / "task.svg").read_text().startswith("<svg")
    assert str(tmp_path) not in (out / "task.md").read_text() + (out / "task.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "neither of a run directory and --task"),
        (["evaluate", "run", "--task", "{task}"], "both of a run directory and --task"),
        (["evaluate", "run", "--seeds", "2"], "--seeds goes with --task"),
        (["evaluate", "--task", "{task}", "--output", "mean"], "--output goes with a run"),
        (["evaluate", "--task", "{task}", "--folds", "a"], "numbers with commas"),
        (["evaluate", "--task", "{task}", "--folds", "9"], "folds 1 to 3"),
        (["evaluate", "--task", "{task}", "--seeds", "2"], "the task has 1"),
        (["evaluate", "--task", "{task}", "--data", "nowhere"], "there is no cells.h5ad in nowhere"),
        (["evaluate", "--task", "nothing.toml"], "there is no task file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    task = written(folder, TYPES)
    monkeypatch.chdir(tmp_path)
    assert pf(monkeypatch, *(argument.format(task=task) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error
    assert not list(tmp_path.iterdir())


# --- arithmetic -----------------------------------------------------------------------------------------------------
def _scores():
    rng = np.random.default_rng(7)
    values = rng.normal(size=(3, 2, 5, 2))  # folds, conditions, seeds, methods
    values[..., 1] += 1
    found = []
    for (f, c, s, m), value in np.ndenumerate(values):
        method, kind = (("model", "model"), ("base", "baseline"))[m]
        found.append(Score(f + 1, s, f"c{c}", 9, method, kind, None, {"energy_pca_u": float(value)}))
    return values, found


def test_means_and_standard_errors_are_over_seeds_and_over_conditions():
    values, scores = _scores()
    ours = next(s for s in task_report.summarise(scores) if s.method == "model")
    model = values[..., 0].reshape(6, 5)
    assert ours.mean == pytest.approx(model.mean())
    assert ours.se_seeds == pytest.approx(stats.sem(model.mean(axis=0)))
    assert ours.se_conditions == pytest.approx(stats.sem(model.mean(axis=1)))
    one = next(s for s in task_report.summarise([s for s in scores if s.seed == 0]) if s.method == "model")
    assert math.isnan(one.se_seeds)


def test_the_paired_test_is_scipys_over_conditions_and_seeds():
    values, scores = _scores()
    [found] = task_report.compare(scores, METRICS[0])
    difference = (values[..., 0] - values[..., 1]).reshape(6, 5)
    assert (found.n, found.n_conditions, found.n_folds) == (30, 6, 3)
    assert found.p == pytest.approx(stats.wilcoxon(difference.ravel()).pvalue)
    assert found.p_conditions == pytest.approx(stats.wilcoxon(difference.mean(axis=1)).pvalue)
    assert found.wins == np.sum(difference.mean(axis=1) < 0)
    assert found.folds_won == np.sum(difference.reshape(3, -1).mean(axis=1) < 0)


def test_declined_conditions_are_left_out_of_the_pairs_and_named():
    _, scores = _scores()
    gone = [s for s in scores if not (s.method == "base" and s.condition == "c0")]
    gone += [Score(1, 0, "c0", 9, "base", "baseline", "knows nothing", {})]
    [found] = task_report.compare(gone, METRICS[0])
    assert found.n == 15
    audit = {"shared_names": 0, "shared_contents": 0, "seen": 5, "heldout": 2, "clean": True}
    facts = [{"fold": f, "name": "x", "holdout": [], "audit": [audit], "choice": None} for f in (1, 2, 3)]
    text = task_report.markdown(Result("t", {}, "torch", [0, 1, 2, 3, 4], facts, gone))
    assert "base: knows nothing" in text


def test_equal_predictions_have_no_p_value():
    scores = [Score(1, 0, "c", 9, m, k, None, {"energy_pca_u": 1.0}) for m, k in (("m", "model"), ("b", "baseline"))]
    [found] = task_report.compare(scores, METRICS[0])
    assert math.isnan(found.p)
    assert found.wins == 0


def test_intervals_and_false_effects_are_means_over_conditions():
    rows = []
    for condition, p, ours, cover in (("a", 0.01, 1.0, 0.8), ("b", 0.03, 3.0, 0.9), ("c", 0.4, 0.5, 1.0)):
        for seed in (0, 1):
            shift = 0.1 * (2 * seed - 1)
            values = {"energy_pca_u": ours + shift, "coverage_90": cover + shift / 10}
            rows.append(Score(1, seed, condition, 9, "m", "model", None, values))
            values = {"energy_pca_u": 2 * ours, "effect_p": p + shift / 100}
            rows.append(Score(1, seed, condition, 9, "no change", "baseline", None, values))
            rows.append(Score(1, seed, condition, 9, "shy", "baseline", "no" if condition == "a" else None, values))
    heads, found = task_report.by_effect([row for row in rows if row.method != "shy"])
    assert heads[1:] == ["2 conditions with effect", "1 condition without"]
    assert found == [["m", "2.00", "0.500"], ["no change", "4.00", "1.00"]]
    assert [row[0] for row in task_report.by_effect(rows)[1]] == ["m", "no change"]
    assert task_report.by_effect([row for row in rows if row.condition != "c"]) == ([], [])
    assert "cover 90.0 % of all genes (80.0 to 100.0)" in task_report.coverage_line(rows)
