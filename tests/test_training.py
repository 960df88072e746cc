"""The loop: guards, returns, crash bundles, resuming, early stopping. The same decisions in both twins."""

import dataclasses
import json
import shutil
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from rich.console import Console

from pf_core import backends, fit
from pf_core.batches import CellSource
from pf_core.checkpoint import Run, RunError
from pf_core.config import BAD_STEPS_IN_A_ROW, MAX_RETURNS, Config, DataConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.errors import DataError, TrainingError
from pf_core.model import Model
from pf_core.replay import replay
from pf_core.simulate import simulate
from pf_core.training import Ahead, kl_weight, learning_rate, next_stop

TWINS = ("jax", "torch")


def small_config(**stage) -> Config:
    # Every call takes four steps, so that the JAX twin compiles one shape per stage.
    steps = {
        "max_steps": 24,
        "evaluate_every": 8,
        "checkpoint_every": 4,
        "steps_per_call": 4,
        "batch_size": 32,
        **stage,
    }
    return Config(
        data=DataConfig(genes=0, holdout=("perturbation=TF1+TF2",)),
        vae=VAEConfig(n_hidden=11, n_latent=5, kl_warmup=10),
        operator=OperatorConfig(n_bases=3, n_hidden=7, ensemble=2, conditions_per_step=6, cells_per_condition=13),
        stage_vae=StageConfig(**steps),
        stage_operator=StageConfig(**steps),
        stage_joint=StageConfig(**{**steps, "max_steps": 8}),
    )


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    simulate(3, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(path)
    return path


@pytest.fixture(autouse=True)
def plain_report(request, monkeypatch):
    """The report takes longer than these trainings and has tests of its own; identical files are about it, too."""
    if "identical" not in request.node.name:
        monkeypatch.setattr("pf_core.report.render", lambda payload: payload.title)


def files_of(run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


class Interrupted(BaseException):
    """Stands for a killed process: nothing in pf catches it."""


def poison(monkeypatch, is_bad) -> None:
    """Batches of stage 1 hold a count of 1e30, whose square is infinite in float32, where is_bad(step, attempt)."""
    whole = CellSource.batch

    def batch(self, step, attempt):
        values, noise = whole(self, step, attempt)
        if is_bad(step, attempt):
            values["library"] = np.full_like(values["library"], np.nan)
        return values, noise

    monkeypatch.setattr(CellSource, "batch", batch)


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_two_runs_of_one_seed_give_identical_files(cells, tmp_path, monkeypatch, backend):
    load = backends.load

    def scattering(*args, **options):
        twin = load(*args, **options)
        twin.scatters = True  # as on an accelerator
        return twin

    for name in ("first", "second", "scattered"):
        if name == "scattered":
            monkeypatch.setattr(backends, "load", scattering)
        fit.fit(cells, out=tmp_path / name, backend=backend, config=small_config())
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second") == files_of(tmp_path / "scattered")


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize(("stage", "call"), [("vae", 3), ("operator", 3), ("operator", 9), ("joint", 2)])
def test_an_interrupted_run_ends_with_the_files_of_an_undisturbed_one(
    cells, tmp_path, monkeypatch, backend, stage, call
):
    # Each member of the ensemble has six calls of stage "operator", so that the ninth is of the second.
    fit.fit(cells, out=tmp_path / "whole", backend=backend, config=small_config())
    twin = type(backends.load(backend))
    run_steps, calls = twin.run, []

    def interrupted(self, name, *rest):
        calls.append(name)
        if calls.count(stage) == call:
            raise Interrupted
        return run_steps(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(twin, "run", interrupted)
        with pytest.raises(Interrupted):
            fit.fit(cells, out=tmp_path / "broken", backend=backend, config=small_config())
    fit.resume(tmp_path / "broken", backend=backend)
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("jax", "torch"), ("torch", "jax")])
def test_a_run_begun_in_one_twin_is_continued_and_used_by_the_other(cells, tmp_path, monkeypatch, first, second):
    config = dataclasses.replace(small_config(), dtype="float64")
    whole = fit.fit(cells, out=tmp_path / "whole", backend=second, config=config)
    twin = type(backends.load(first))
    run_steps, calls = twin.run, []

    def interrupted(self, name, *rest):
        calls.append(name)
        if calls.count("operator") == 2:
            raise Interrupted
        return run_steps(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(twin, "run", interrupted)
        with pytest.raises(Interrupted):
            fit.fit(cells, out=tmp_path / "both", backend=first, config=config)
    both = fit.resume(tmp_path / "both", backend=second)
    for name, value in whole.params.items():
        np.testing.assert_allclose(both.params[name], value, rtol=1e-7, atol=1e-9, err_msg=name)
    read = Model.load(tmp_path / "both", backend=first)
    controls = cells
    one = read.predict(controls, "TF1+TF2", output="mean")
    other = both.predict(controls, "TF1+TF2", output="mean")
    np.testing.assert_allclose(one.X.toarray(), other.X.toarray(), rtol=1e-5)  # X is float32


@pytest.mark.parametrize("backend", TWINS)
def test_bad_steps_are_not_applied_and_are_counted(cells, tmp_path, monkeypatch, backend):
    poison(monkeypatch, lambda step, attempt: step in (3, 4, 9))
    model = fit.fit(cells, out=tmp_path / "run", backend=backend, config=small_config())
    records = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [record["bad_steps"] for record in records if record["stage"] == "vae"][-1] == 3
    assert not any("event" in record for record in records)
    assert all(np.isfinite(value).all() for value in model.params.values())


@pytest.mark.parametrize("backend", TWINS)
def test_three_bad_steps_in_a_row_return_to_the_last_checkpoint_with_a_smaller_rate(
    cells, tmp_path, monkeypatch, backend
):
    poison(monkeypatch, lambda step, attempt: step >= 14 and attempt == 0)
    fit.fit(cells, out=tmp_path / "run", backend=backend, config=small_config(schedule="constant", warmup=0))
    records = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    vae = [record for record in records if record["stage"] == "vae"]
    events = [record for record in vae if "event" in record]
    assert len(events) == 1
    assert events[0]["step"] == 12  # the last multiple of checkpoint_every before the fault
    assert f"after {BAD_STEPS_IN_A_ROW} non-finite steps, the first at step 14" in events[0]["event"]
    before, after = (record for record in (vae[vae.index(events[0]) - 1], vae[-1]))
    assert after["lr"] == pytest.approx(0.1 * before["lr"], rel=1e-6)
    assert after["step"] == 24


def crash(cells, out, monkeypatch, backend) -> str:
    with monkeypatch.context() as patch:
        poison(patch, lambda step, attempt: step >= 14)
        with pytest.raises(TrainingError) as caught:
            fit.fit(cells, out=out, backend=backend, config=small_config())
    return str(caught.value)


@pytest.mark.parametrize("backend", TWINS)
def test_after_the_last_return_training_stops_with_a_bundle_that_either_twin_replays(
    cells, tmp_path, monkeypatch, backend
):
    message = crash(cells, tmp_path / "run", monkeypatch, backend)
    assert "stage vae, step 14: loss is not finite, first seen in vae.decoder.mean" in message
    assert "pf replay" in message
    facts = json.loads((tmp_path / "run/crash/crash.json").read_text())
    assert (facts["step"], facts["quantity"]) == (14, "loss")
    events = [line for line in (tmp_path / "run/history.jsonl").read_text().splitlines() if "event" in line]
    assert len(events) == MAX_RETURNS
    for twin in TWINS:
        found = replay(tmp_path / "run/crash", backend=twin, device="cpu", console=Console(quiet=True))
        assert found == ("loss", "vae.decoder.mean")


def test_both_twins_take_the_same_decisions(cells, tmp_path, monkeypatch):
    for backend in TWINS:
        crash(cells, tmp_path / backend, monkeypatch, backend)
    events = []
    for backend in TWINS:
        lines = (tmp_path / backend / "history.jsonl").read_text().splitlines()
        events.append([(r["stage"], r["step"], r["bad_steps"], r.get("event")) for r in map(json.loads, lines)])
    assert events[0] == events[1]


def test_a_replay_of_a_healthy_step_says_so(cells, tmp_path, monkeypatch):
    from pf_core.checkpoint import load_arrays, save_arrays

    crash(cells, tmp_path / "run", monkeypatch, "torch")
    bundle = tmp_path / "run/crash"
    batch = load_arrays(bundle / "batch.safetensors")
    batch["library"] = np.full_like(batch["library"], 100.0)
    save_arrays(bundle / "batch.safetensors", batch)
    for twin in TWINS:
        assert replay(bundle, backend=twin, device="cpu", console=Console(quiet=True)) == ("", "")


def test_a_run_is_not_resumed_on_other_data(cells, tmp_path):
    fit.fit(cells, out=tmp_path / "run", backend="torch", config=small_config())
    other = tmp_path / "other.h5ad"
    simulate(4, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(other)
    with pytest.raises(RunError, match="not those"):
        fit.resume(tmp_path / "run", source=other, backend="torch")


def test_a_run_and_its_data_can_be_moved_together(cells, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(cells, tmp_path / "a/cells.h5ad")
    fit.fit(tmp_path / "a/cells.h5ad", out=tmp_path / "a/run", backend="torch", config=small_config())
    (tmp_path / "a").rename(tmp_path / "b")
    fit.resume(tmp_path / "b/run", backend="torch")


def test_early_stopping_keeps_the_best_parameters(cells, tmp_path):
    # A learning rate far too large makes every later evaluation worse than the first one.
    config = small_config(learning_rate=0.3, patience=1, max_steps=400, warmup=0, schedule="constant")
    fit.fit(cells, out=tmp_path / "run", backend="torch", config=config)
    run = Run.open(tmp_path / "run")
    best = run.best("vae")
    assert best is not None
    assert best.position["best_step"] == best.step < 400
    records = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["validation"]["loss"] for r in records if r["stage"] == "vae" and "validation" in r}
    assert min(losses, key=lambda step: losses[step]) == best.step


def test_schedules_follow_their_formulas():
    settings = StageConfig(max_steps=100, warmup=10, learning_rate=0.5)
    assert learning_rate(settings, 4) == pytest.approx(0.5 * 0.5 * 0.5 * (1 + np.cos(np.pi * 0.04)))
    assert learning_rate(settings, 50) == pytest.approx(0.25)
    assert learning_rate(StageConfig(schedule="constant", warmup=0, learning_rate=0.5), 77) == 0.5
    config = Config(vae=VAEConfig(beta=2.0, kl_warmup=10))
    assert [kl_weight(config, "vae", step) for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert kl_weight(config, "joint", 0) == 2.0


def test_calls_of_a_backend_end_at_evaluations_and_checkpoints():
    settings = StageConfig(max_steps=50, evaluate_every=20, checkpoint_every=15)
    stops, step = [], 0
    while step < 50:
        step = next_stop(settings, step, 8)
        stops.append(step)
    assert stops == [8, 15, 16, 20, 24, 30, 32, 40, 45, 48, 50]
    # A resumed run makes the same calls as an undisturbed one.
    assert next_stop(settings, 30, 8) == 32


class Watched:
    """A source that says which thread reads it, and fails where two do at once."""

    def __init__(self):
        self.threads, self.asked, self.busy = set(), [], threading.Lock()

    def batch(self, step, attempt):
        assert self.busy.acquire(blocking=False), "two threads read at once"
        self.threads.add(threading.get_ident())
        self.asked.append((step, attempt))
        time.sleep(0.001)
        self.busy.release()
        return {"x": np.array([[step, attempt]])}, {"e": np.array([step])}

    def validation(self):
        assert self.busy.acquire(blocking=False), "two threads read at once"
        self.threads.add(threading.get_ident())
        self.busy.release()
        return []


def test_batches_are_made_ahead_by_one_thread_and_are_those_that_were_asked_for():
    source = Watched()
    with closing(Ahead(source, dict)) as ahead:
        for start, stop, attempt, following in (
            (0, 3, 0, (3, 5)),
            (3, 5, 0, (5, 8)),
            (3, 5, 1, (5, 8)),
            (5, 8, 1, None),
        ):
            batches, noises = ahead.take(start, stop, attempt)
            if following is not None:
                ahead.begin(*following, attempt)
            ahead.validation()
            assert batches["x"].tolist() == [[[step, attempt]] for step in range(start, stop)]
            assert noises["e"].tolist() == [[step] for step in range(start, stop)]
    assert threading.get_ident() not in source.threads
    assert len(source.threads) == 1
    assert source.asked.count((5, 1)) == 1, "what was made ahead is used"


def test_an_error_of_the_source_reaches_the_training():
    class Broken:
        def batch(self, step, attempt):
            if step == 2:
                raise DataError("the file changed since it was loaded; load it again")
            return {}, {}

    with closing(Ahead(Broken(), dict)) as ahead:
        ahead.take(0, 2, 0)
        ahead.begin(2, 4, 0)
        with pytest.raises(DataError, match="the file changed"):
            ahead.take(2, 4, 0)
