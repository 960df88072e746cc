"""From a data set to a finished run: data, split, three stages, judgement, report. A killed run continues here too."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from pf_core import backends, data, genes, splits
from pf_core.backends import Backend
from pf_core.baselines import Shift, Shifts, profiles
from pf_core.batches import CellSource, ConditionSource, JointSource, Vocabulary, conditions
from pf_core.calibration import MAX_CELLS, calibrate, to_arrays
from pf_core.checkpoint import Run
from pf_core.config import Config, Output
from pf_core.console import Reporter, reporter
from pf_core.data import Dataset, Group
from pf_core.ensemble import member_seed, merged
from pf_core.errors import ConfigError, DataError, RunError, nearest
from pf_core.evaluation import Judged, Reference
from pf_core.initial import Parameters, Sizes, operator_parameters, vae_parameters
from pf_core.judgement import judge_run
from pf_core.labels import CONTROL, UNKNOWN, condition_label, parse_condition, vocabulary
from pf_core.model import Model, read_config, read_vocabulary, vocabulary_json
from pf_core.outputs import BLOCK
from pf_core.splits import Split
from pf_core.start import start_operators, start_vae
from pf_core.training import run_stage

if TYPE_CHECKING:
    from rich.console import Console


def fit(
    source: Any,
    *,
    out: str | Path,
    backend: str = "jax",
    config: Config,
    device: str = "cpu",
    compile: bool = False,
    features: str | Path | None = None,
    backed: bool = False,
    references: Mapping[str, Reference] | None = None,
    console: Console | None = None,
) -> Model:
    """Train, judge the held-out conditions, write the run directory. Model.train describes the arguments.

    Args:
        features: CSV of fixed features, one row per perturbation, its name first: the condition encoder reads these
            instead of a learned table, so that perturbations never seen can be predicted.
        backed: leave the counts in the file and read the cells of each batch.
        compile: torch.compile the steps of the PyTorch twin.
        references: cells shown beside the predictions for scale (pf_core.evaluation.evaluate).
    """
    if config.system != "operator":
        raise ConfigError(f"system is {config.system!r}; pf_core.flow_fit.fit_flow trains it")
    twin = backends.load(backend, dtype=config.dtype, precision=config.precision, device=device, compile=compile)
    dataset = data.load(source, config.data, backed=backed)
    fingerprint = dataset.fingerprint()
    split = splits.split(dataset, config.data, config.seed)
    audit = splits.leak_audit(dataset, split)
    if config.data.genes:
        dataset = dataset.select_genes(genes.highly_variable(dataset, split.train, config.data.genes))
    groups = training_groups(dataset, split)
    table = read_features(features, groups, dataset) if features is not None else {}
    names = make_vocabulary(dataset, groups, tuple(table))
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
        "contexts": context_table(groups),
    }
    run = Run.create(
        out,
        {
            "config.toml": config.to_toml(),
            "vocabulary.json": vocabulary_json(names),
            "data.json": json.dumps(facts, indent=1) + "\n",
            "split.safetensors": {name: getattr(split, name) for name in ("train", "validation", "heldout")},
            **({"features.safetensors": {"features": feature_matrix(table, names)}} if table else {}),
        },
    )
    return _fit(run, config, dataset, split, names, twin, console, references)


def resume(
    path: str | Path,
    *,
    source: Any = None,
    backend: str = "jax",
    device: str = "cpu",
    compile: bool = False,
    console: Console | None = None,
) -> Model:
    """Continue a run, bit for bit in the same twin, from its last checkpoint.

    Args:
        path: the run directory.
        source: the data, where they have moved or were an AnnData object; they must be the same.

    Raises:
        RunError: not a run directory, damaged, or the data are not those it was started with.
    """
    run, config, dataset, split = reopen(path, source)
    if config.system != "operator":
        raise RunError(f"{path} is a run of the {config.system} system; pf_core.flow_fit.resume_flow continues it")
    twin = backends.load(backend, dtype=config.dtype, precision=config.precision, device=device, compile=compile)
    return _fit(run, config, dataset, split, read_vocabulary(run), twin, console)


def judge_again(
    path: str | Path,
    *,
    source: Any = None,
    backend: str = "jax",
    device: str = "cpu",
    output: Output = "transport",
    console: Console | None = None,
) -> list[Judged]:
    """Judge the held-out conditions of a finished run, in another output mode or by the other twin."""
    _, _, dataset, split = reopen(path, source)
    model = Model.load(path, backend=backend, device=device)
    return judge_run(model, dataset, split, output=output, console=console)


def reopen(path: str | Path, source: Any = None) -> tuple[Run, Config, Dataset, Split]:
    """A run with its data and its split, as they were when it began.

    Args:
        path: the run directory.
        source: the data, where they have moved or were an AnnData object.

    Raises:
        RunError: not a run directory, damaged, or the data are not those it was started with.
    """
    run = Run.open(path)
    config = read_config(run)
    facts = run.read_json("data.json")
    if source is None and facts["source"] is None:
        raise RunError(f"{path} was trained from an AnnData object in memory; pass the same object again")
    if source is None:
        source = run.path / facts["source"]
        if not source.exists():
            raise RunError(f"{path} was trained on {source}, which is not there any more; give the file again")
    dataset = data.load(source, config.data, backed=facts["backed"], contrasts=config.system == "operator")
    if dataset.fingerprint() != facts["fingerprint"]:
        raise RunError(f"the data are not those that {path} was started with (cells, genes or counts differ)")
    arrays = run.read_arrays("split.safetensors")
    held = [(label, tissue, cell_type) for label, tissue, cell_type in facts["heldout"]]
    split = Split(arrays["train"], arrays["validation"], arrays["heldout"], held)
    return run, config, dataset.select_genes(read_vocabulary(run).genes), split


def training_groups(dataset: Dataset, split: Split) -> list[Group]:
    """Conditions of the training cells with their controls; controls against themselves anchor K at the identity."""
    found = data.groups(dataset, split.train, include_control=True)
    found = [group for group in found if group.label != CONTROL or len(group.cells) >= 2]
    if not any(group.label != CONTROL for group in found):
        raise DataError("no perturbed cell is left for training; hold out less")
    return found


def make_vocabulary(dataset: Dataset, groups: Sequence[Group], featured: Sequence[str] = ()) -> Vocabulary:
    """Names that training gives a meaning to; everything else is unknown to the model."""
    members = {dataset.perturbations[i] for g in groups for i, dose in zip(g.members, g.doses, strict=True) if dose}
    batches = sorted({group.batch for group in groups} - {"", UNKNOWN})
    perturbations = vocabulary(sorted({*members, *featured}))
    largest: dict[str, float] = {}
    for group in groups:
        for index, dose in zip(group.members, group.doses, strict=True):
            name = dataset.perturbations[index]
            largest[name] = max(largest.get(name, 0.0), float(dose))
    covariates = np.stack([group.covariates for group in groups]).astype(np.float64)
    means, scales = covariates.mean(axis=0), covariates.std(axis=0)
    varies = scales > 1e-6 * np.maximum(np.abs(means), 1e-12)  # below, it is the rounding of a mean
    return Vocabulary(
        genes=tuple(map(str, dataset.genes)),
        perturbations=perturbations,
        tissues=vocabulary([group.tissue for group in groups]),
        batches=(UNKNOWN, *batches) if batches else (),
        covariates=dataset.config.covariates,
        dose_units=tuple(largest.get(name, 0.0) or 1.0 for name in perturbations),
        covariate_means=tuple(map(float, means)),
        covariate_scales=tuple(map(float, np.where(varies, scales, 1.0))),
    )


def context_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Which training condition is compared with how many controls of which context."""
    return [
        {
            "label": group.label,
            "tissue": group.tissue,
            "cell_type": group.cell_type,
            "batch": group.batch,
            "cells": len(group.cells),
            "controls": len(group.controls),
        }
        for group in groups
    ]


def read_features(path: str | Path, groups: Sequence[Group], dataset: Dataset) -> dict[str, np.ndarray]:
    """Fixed features by perturbation name, from CSV; every training perturbation must have them.

    Raises:
        DataError: the file is missing or not numeric, a name occurs twice, or a training perturbation has no row.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(path, index_col=0)
        values = frame.to_numpy(np.float64)
    except FileNotFoundError:
        raise DataError(f"features file {path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"features file {path} is not a CSV of name and numbers: {error}") from None
    names = [str(name) for name in frame.index]
    if not np.isfinite(values).all():
        raise DataError(f"features file {path} has missing or infinite values; fill them in")
    if len(set(names)) < len(names) or not values.size:
        raise DataError(f"features file {path} has {len(names)} rows, {len(set(names))} names; one row each is wanted")
    table = dict(zip(names, values, strict=True))
    for group in groups:
        for index, dose in zip(group.members, group.doses, strict=True):
            name = dataset.perturbations[index]
            if dose and name not in table:
                raise DataError(f"features file {path} has no row for {name!r}; {nearest(name, table)}")
    return table


def feature_matrix(table: dict[str, np.ndarray], names: Vocabulary) -> np.ndarray:
    """(n_perturbations, n_features), standardised per feature; row 0, unknown, is zero."""
    rows = np.stack([table[name] for name in names.perturbations[1:]])
    spread = rows.std(axis=0)
    rows = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.concatenate([np.zeros((1, rows.shape[1])), rows])


def _fit(
    run: Run,
    config: Config,
    dataset: Dataset,
    split: Split,
    names: Vocabulary,
    twin: Backend,
    console: Console | None,
    references: Mapping[str, Reference] | None = None,
) -> Model:
    description = ", ".join(f"{key} {value}" for key, value in twin.describe().items())
    run.log(f"training with {description}")
    with reporter(console) as show:
        params = _train(run, config, dataset, split, names, twin, show)
    model = Model(config, names, params, twin, run)
    run.write("model.safetensors", params)
    if config.operator.calibrate:
        seen = np.sort(np.concatenate([split.train, split.validation]))  # as for the baselines
        groups = [group for group in data.groups(dataset, seen) if group.label != CONTROL]
        model.calibration = calibrate(dataset, groups, *decoded_profiles(model, dataset, groups))
        run.write("calibration.safetensors", to_arrays(model.calibration))
    run.commit()
    with console.status("judging the held-out conditions") if console and console.is_terminal else nullcontext():
        judge_run(model, dataset, split, references=references, console=console)
    return model


def _train(
    run: Run, config: Config, dataset: Dataset, split: Split, names: Vocabulary, twin: Backend, show: Reporter
) -> Parameters:
    last = run.last()
    run.truncate_history(last.position["history_length"] if last else 0)
    features = run.read_arrays("features.safetensors")["features"] if run.has("features.safetensors") else None
    sizes = Sizes(
        n_genes=len(names.genes),
        n_tissues=len(names.tissues),
        n_perturbations=len(names.perturbations),
        n_batches=len(names.batches),
        n_covariates=len(names.covariates),
        n_features=0 if features is None else features.shape[1],
    )
    cells = partial(CellSource, dataset, split.train, split.validation, names, config)
    params = start_vae(vae_parameters(config.vae, sizes, config.seed), dataset, split.train, config.vae)

    stage = partial(run_stage, twin, config=config, run=run, last=last, progress=show)
    params = stage("vae", cells(config.stage_vae.batch_size), params, trainable=lambda name: True, carry={})
    latents = Model(config, names, params, twin, run).encode(dataset)
    groups = training_groups(dataset, split)
    held = validation_groups(dataset, split)
    inputs = conditions(groups, dataset.perturbations, names, "float64")

    def operator_part(name: str) -> bool:
        return not name.startswith("vae.") and name != "conditions.features"

    def member(index: int) -> Parameters:
        own = dataclasses.replace(config, seed=member_seed(config.seed, index))
        start = operator_parameters(config.operator, config.vae.n_latent, sizes, own.seed)
        if features is not None:
            start["conditions.features"] = features
        start = start_operators(start, latents.astype(np.float64), groups, inputs, config.operator)
        source = ConditionSource(latents, groups, held, dataset.perturbations, names, own)
        carry = source.carry(sizes.n_tissues, config.operator.n_bases)
        return stage("operator", source, {**params, **start}, trainable=operator_part, carry=carry, member=index)

    params = merged([member(index) for index in range(config.operator.ensemble)])
    joint = JointSource(cells(config.stage_joint.batch_size), latents, groups, held, names, config)
    carry = joint.carry(sizes.n_tissues, len(params["operators.B"]))
    return stage("joint", joint, params, trainable=lambda name: name != "conditions.features", carry=carry)


def decoded_profiles(
    model: Model, dataset: Dataset, groups: Sequence[Group]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean decoded profiles (n_groups, n_genes) of the controls of each group.

    As they are; moved by the group's operator; and moved by the sum of the mean latent shifts of a combination's
    members, NaN where the group is no combination or a member was never given alone.
    """
    found = model.backend.operators(
        model.params, conditions(groups, dataset.perturbations, model.vocabulary, model.config.dtype), model.config
    )
    chosen = [group.controls[:: max(1, len(group.controls) // MAX_CELLS)] for group in groups]
    cells, row = np.concatenate(chosen), np.repeat(np.arange(len(groups)), [len(some) for some in chosen])
    distinct, place = np.unique(cells, return_inverse=True)
    z0 = model.encode(dataset, distinct)[place]
    moved, added = np.empty_like(z0), np.empty_like(z0)
    for index, shift in enumerate(summed_shifts(model, dataset, groups)):
        here = row == index
        moved[here] = z0[here] @ found["A"][index].T + found["b"][index]
        added[here] = z0[here] + shift
    tissue = model.vocabulary.codes("tissues", dataset.tissue)[cells]
    library = dataset.library()[cells].astype(model.config.dtype)
    ways = (z0, moved, added) if np.isfinite(added).any() else (z0, moved)
    totals = np.zeros((len(ways), len(groups), dataset.n_genes))
    for start in range(0, len(cells), BLOCK):
        rows = slice(start, start + BLOCK)
        weight = sparse.csr_matrix(
            (1.0 / library[rows], (row[rows], np.arange(len(row[rows])))), (len(groups), len(row[rows]))
        )
        for total, z in zip(totals, ways, strict=True):
            total += weight @ model.decode(z[rows], tissue[rows], library[rows])
    before, after, *rest = totals / np.bincount(row)[:, None]
    return before, after, rest[0] if rest else np.full_like(before, np.nan)


def summed_shifts(model: Model, dataset: Dataset, groups: Sequence[Group]) -> np.ndarray:
    """(n_groups, n_latent) sum of the mean latent shifts of the members of each combination, NaN where not known."""
    sums = np.full((len(groups), model.config.vae.n_latent), np.nan, model.config.dtype)
    members = [parse_condition(group.label, dataset.config) for group in groups]
    if max(map(len, members), default=0) < 2:
        return sums
    cells = np.unique(np.concatenate([part for group in groups for part in (group.cells, group.controls)]))
    latents = model.encode(dataset, cells)
    names = (dataset.label[cells], dataset.tissue[cells], dataset.cell_type[cells])
    shifts = Shifts(profiles(lambda rows: latents[rows], *names))
    for row, group, several in zip(sums, groups, members, strict=True):
        alone = [condition_label((member,), dataset.config.separator) for member in several]
        found = shifts.sum_of(alone, (group.tissue, group.cell_type))
        if len(alone) > 1 and isinstance(found, Shift):
            row[:] = found.value
    return sums


def validation_groups(dataset: Dataset, split: Split) -> list[Group]:
    """Validation cells of the training conditions against the training controls of their context."""
    perturbed = split.validation[~dataset.is_control[split.validation]]
    controls = split.train[dataset.is_control[split.train]]
    return data.groups(dataset, perturbed, controls=controls)
