"""From a time course to a finished flow: data, split by time, two stages, report. A killed run continues here too."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import backends, coupling, data, fit, flow_report, genes, splits, times
from pf_core.backends import Backend
from pf_core.checkpoint import Run
from pf_core.config import Config, Output
from pf_core.console import Reporter, reporter
from pf_core.data import Dataset
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.flow_batches import CvaeSource, PairSource, course_vocabulary
from pf_core.flow_judgement import Judged, judge_run
from pf_core.flow_model import FlowModel
from pf_core.initial import Parameters, Sizes, cvae_parameters, flow_parameters, running_statistics
from pf_core.latent import LatentModel
from pf_core.model import read_vocabulary, vocabulary_json
from pf_core.networks import Network, load_network
from pf_core.splits import Split
from pf_core.start import start_vae
from pf_core.times import Axis, Course, Interval
from pf_core.tissue_left import tissue_left
from pf_core.training import run_stage

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["fit_flow", "judge_again", "reopen", "resume_flow"]

FROZEN = ("flow.center", "flow.scale")  # units of the latents that the vector field reads


def fit_flow(
    source: Any,
    *,
    out: str | Path,
    backend: str = "jax",
    config: Config,
    network: str | Path | None = None,
    beside: str | Path | None = None,
    device: str = "cpu",
    compile: bool = False,
    backed: bool = False,
    console: Console | None = None,
) -> FlowModel:
    """Train a flow on a time course, judge the held-out time points, write the run directory.

    Args:
        source: AnnData, or the path of an h5ad file or zarr store, with a column of times.
        out: the run directory, which must not exist or be empty.
        backend: "jax" or "torch".
        config: all settings, of system "flow"; data.holdout names time points kept out of training.
        network: CSV of regulatory edges; without one the field has none.
        beside: a finished flow run of the same cells, such as one with adversary.weight=0, whose tissue information is
            shown beside this run's.
        device: "cpu", "gpu" or, for JAX, "tpu".
        compile: torch.compile the steps of the PyTorch twin.
        backed: leave the counts in the file and read the cells of each batch.

    Raises:
        DataError: the data, their times or the network cannot be used.
        ConfigError: settings that the flow system does not have.
        RunError: `out` holds something already, or `beside` is no finished flow run.
        TrainingError: values stayed non-finite.
    """
    _check(config)
    twin = backends.load(backend, dtype=config.dtype, precision=config.precision, device=device, compile=compile)
    couple = coupling.coupler(config.flow, twin)
    if beside is not None:
        flow_report.read_latents(Run.open(beside))  # before anything is trained
    dataset = data.load(source, config.data, backed=backed, contrasts=False)
    course = times.read(dataset, config)
    fingerprint = dataset.fingerprint()
    split = times.split(dataset, course, config.data, config.seed)
    _check_training(split, config)
    axis = times.axis_of(course, split.train)
    courses = times.series(dataset, course, split.train)
    times.intervals(courses)  # raises where there is nothing to learn
    audit = splits.leak_audit(dataset, split)
    if config.data.genes:
        dataset = dataset.select_genes(genes.highly_variable(dataset, split.train, config.data.genes))
    graph = load_network(network, dataset.genes) if network is not None else None
    names = course_vocabulary(dataset, split.train)
    facts = {
        # Relative to the run, so that run and data can be moved together and resumed from anywhere.
        "source": os.path.relpath(source, out) if isinstance(source, str | Path) else None,
        "backed": backed,
        "fingerprint": fingerprint,
        "summary": dataset.summary,
        "n_genes": dataset.n_genes,
        "n_control": int(dataset.is_control.sum()),
        "heldout": [list(condition) for condition in split.conditions],
        "cells": {"train": len(split.train), "validation": len(split.validation), "heldout": len(split.heldout)},
        "audit": audit,
        "time": dataclasses.asdict(axis),
        "course": times.facts(course, courses, split),
        "network": graph.report if graph is not None else None,
        "beside": os.path.relpath(beside, out) if beside is not None else None,
    }
    run = Run.create(
        out,
        {
            "config.toml": config.to_toml(),
            "vocabulary.json": vocabulary_json(names),
            "data.json": json.dumps(facts, indent=1) + "\n",
            "split.safetensors": {name: getattr(split, name) for name in ("train", "validation", "heldout")},
            **({"network.safetensors": graph.arrays(config.dtype)} if graph is not None else {}),
        },
    )
    return _fit(run, config, dataset, course, split, twin, couple, console)


def resume_flow(
    path: str | Path,
    *,
    source: Any = None,
    backend: str = "jax",
    device: str = "cpu",
    compile: bool = False,
    console: Console | None = None,
) -> FlowModel:
    """Continue a flow run, bit for bit in the same twin, from its last checkpoint.

    Args:
        path: the run directory.
        source: the data, where they have moved or were an AnnData object; they must be the same.

    Raises:
        RunError: not a run directory of the flow system, damaged, or the data are not those it was started with.
    """
    run, config, dataset, split, course = reopen(path, source)
    twin = backends.load(backend, dtype=config.dtype, precision=config.precision, device=device, compile=compile)
    return _fit(run, config, dataset, course, split, twin, coupling.coupler(config.flow, twin), console)


def reopen(path: str | Path, source: Any = None) -> tuple[Run, Config, Dataset, Split, Course]:
    """A flow run with its data, split and times, as they were when it began; fit.reopen says what it raises."""
    run, config, dataset, split = fit.reopen(path, source)
    if config.system != "flow":
        raise RunError(f"{path} is a run of the {config.system} system; pf_core.fit.resume continues it")
    return run, config, dataset, split, times.read(dataset, config)


def judge_again(
    path: str | Path,
    *,
    source: Any = None,
    backend: str = "jax",
    device: str = "cpu",
    output: Output = "transport",
    console: Console | None = None,
) -> list[Judged]:
    """Judge the held-out time points of a finished flow run, in another output mode or by the other twin."""
    _, _, dataset, split, course = reopen(path, source)
    model = FlowModel.load(path, backend=backend, device=device)
    return judge_run(model, dataset, course, split, output=output, console=console)


def _check(config: Config) -> None:
    """Settings that the flow system would have to ignore."""
    if config.system != "flow":
        raise ConfigError(f"system is {config.system!r}; set it to 'flow'")
    if config.data.covariates:
        raise ConfigError(f"data.covariates is {list(config.data.covariates)}; the flow system reads no covariates")


def _check_training(split: Split, config: Config) -> None:
    """Batch statistics need two cells a batch and a player."""
    if min(len(split.train), config.stage_cvae.batch_size) < 2:
        raise DataError(
            f"a batch has {min(len(split.train), config.stage_cvae.batch_size)} cells of {len(split.train)} training"
            " cells; batch norm needs two or more. Hold out less, or raise stage_cvae.batch_size"
        )


def _fit(
    run: Run,
    config: Config,
    dataset: Dataset,
    course: Course,
    split: Split,
    twin: Backend,
    couple: coupling.Coupler,
    console: Console | None,
) -> FlowModel:
    run.log("training with " + ", ".join(f"{key} {value}" for key, value in twin.describe().items()))
    with reporter(console) as show:
        params = _train(run, config, dataset, course, split, twin, couple, show)
    graph, axis = _network(run), Axis(**run.read_json("data.json")["time"])
    edges = graph.arrays(config.dtype) if graph is not None else {}
    model = FlowModel(config, read_vocabulary(run), params, twin, run, axis, edges)
    run.write("model.safetensors", params)
    run.write("latents.json", json.dumps(_latent_facts(model, dataset, split), indent=1) + "\n")
    run.commit()
    with console.status("judging the held-out time points") if console and console.is_terminal else nullcontext():
        judge_run(model, dataset, course, split, console=console)
    return model


def _train(
    run: Run,
    config: Config,
    dataset: Dataset,
    course: Course,
    split: Split,
    twin: Backend,
    couple: coupling.Coupler,
    show: Reporter,
) -> Parameters:
    last = run.last()
    run.truncate_history(last.position["history_length"] if last else 0)
    names, axis = read_vocabulary(run), Axis(**run.read_json("data.json")["time"])
    sizes = Sizes(dataset.n_genes, len(names.tissues), len(names.perturbations))
    stage = partial(run_stage, twin, config=config, run=run, last=last, progress=show)

    params = cvae_parameters(config.vae, config.adversary, sizes, config.seed)
    params = start_vae(params, dataset, split.train, config.vae, prefix="cvae", also=[course.index])
    carry = running_statistics(config.vae)
    cells = CvaeSource(dataset, split.train, split.validation, names, config, config.stage_cvae.batch_size)
    params = stage("cvae", cells, params, trainable=lambda name: True, carry=carry)
    best = run.best("cvae")
    params |= {
        name: np.asarray(value, config.dtype) for name, value in (best.group("carry") if best else carry).items()
    }

    latents = LatentModel(config, names, params, twin, run).encode(dataset).astype(np.float64)
    center, scale = coupling.standard(latents[split.train])
    graph = _network(run)
    start = flow_parameters(
        config.flow,
        config.vae.n_latent,
        len(names.perturbations) + len(names.tissues),
        dataset.n_genes,
        config.seed,
        graph=graph is not None,
    )
    found, held = course_intervals(dataset, course, split)
    pairs = PairSource((latents - center) / scale, found, held, names, axis, config, couple=couple, network=graph)
    start |= {"flow.center": center, "flow.scale": scale}
    return stage("flow", pairs, {**params, **start}, trainable=_of_the_field, carry={})


def _of_the_field(name: str) -> bool:
    return name.startswith("flow.") and name not in FROZEN


def course_intervals(dataset: Dataset, course: Course, split: Split) -> tuple[list[Interval], list[Interval]]:
    """The intervals of training with training cells, and those of them that have validation cells on both sides."""
    seen = np.union1d(split.train, split.validation)
    whole = times.intervals(times.series(dataset, course, seen))
    train, held = ([one.within(cells) for one in whole] for cells in (split.train, split.validation))
    return [one for one in train if one], [one for one in held if one]


def _network(run: Run) -> Network | None:
    if not run.has("network.safetensors"):
        return None
    arrays = run.read_arrays("network.safetensors")
    return Network(arrays["source"], arrays["target"], arrays["sign"], run.read_json("data.json")["network"])


def _latent_facts(model: LatentModel, dataset: Dataset, split: Split) -> dict[str, Any]:
    """What latents.json holds: tissue information left in the means of the cells that training has seen."""
    seen = np.union1d(split.train, split.validation)
    return {"tissue": tissue_left(model.encode(dataset, seen), dataset.tissue[seen], model.config.seed)}
