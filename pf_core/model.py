"""The public face: train a model, load a run, predict cells for conditions that were not measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pf_core import backends, data, genes
from pf_core.backends import Arrays, Backend
from pf_core.baselines import Context
from pf_core.batches import Vocabulary
from pf_core.calibration import Calibration, Correction, correction, from_arrays, log_rate, measure
from pf_core.checkpoint import Run
from pf_core.config import Config, Output, from_dict
from pf_core.errors import PredictionError, RunError, nearest
from pf_core.kriging import Change
from pf_core.labels import Members, parse_condition, texts
from pf_core.latent import ENCODE_BLOCK, LatentModel
from pf_core.operator import Operator
from pf_core.outputs import Means, predicted_counts

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Model"]


class Forecast(NamedTuple):
    """Where cells go."""

    z0: np.ndarray  # (n, n_latent) latents before
    points: list[tuple[np.ndarray, Means]]  # per time: latents there, means of a block of cells before and there
    changes: dict[Context, Change]  # of log mean profiles, where it is known how far they may be off
    library: np.ndarray  # (n,) change of each cell's log library at the end, 0 where nothing is known


class Model(LatentModel):
    """A trained model and the run it lives in."""

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        params: Mapping[str, np.ndarray],
        backend: Backend,
        run: Run,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(config, vocabulary, params, backend, run)
        self.calibration = calibration

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def train(
        cls,
        source: Any,
        *,
        out: str | Path = "pf-run",
        backend: str = "jax",
        config: Config | None = None,
        holdout: Sequence[str] = (),
        device: str = "cpu",
        **settings: Any,
    ) -> Model:
        """Train on an AnnData object or an h5ad file, judge the held-out conditions, and write the run directory.

        Args:
            source: AnnData, or the path of an h5ad file or zarr store.
            out: the run directory, which must not exist or be empty.
            backend: "jax" or "torch".
            config: all settings; the default ones otherwise.
            holdout: conditions kept out of training, "column=value,column=value" each.
            device: "cpu", "gpu" or, for JAX, "tpu".
            settings: further arguments of pf_core.fit.fit (features, backed, console).

        Returns:
            The trained model.

        Raises:
            DataError: the data cannot be used.
            RunError: `out` holds something already.
            TrainingError: values stayed non-finite.
        """
        from pf_core.fit import fit

        config = config or Config()
        if holdout:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=tuple(holdout)))
        return fit(source, out=out, backend=backend, config=config, device=device, **settings)

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "jax", device: str = "cpu") -> Model:
        """A trained model from its run directory, in either twin whichever wrote it.

        Raises:
            RunError: not a run directory, damaged, its training has not ended, or a run of the flow system.
        """
        run = Run.open(path)
        config = read_config(run)
        if config.system != "operator":
            raise RunError(f"{path} is a run of the {config.system} system, for cells in time; use pf trajectory")
        twin = backends.load(backend, dtype=config.dtype, device=device)
        params, name = run.read_arrays("model.safetensors"), "calibration.safetensors"
        calibration = from_arrays(run.read_arrays(name)) if run.has(name) else None
        return cls(config, read_vocabulary(run), params, twin, run, calibration)

    # --- operators ----------------------------------------------------------------------------------------------
    def members(self, label: str) -> Members:
        """The perturbations of a label and their doses, checked against what the model can represent.

        Raises:
            PredictionError: a perturbation that was not in training and has no features.
        """
        members = parse_condition(label, self.config.data)
        for name, _ in members:
            if name not in self.vocabulary.perturbations[1:]:
                raise PredictionError(
                    f"perturbation {name!r} was not in training and has no features"
                    f" ({nearest(name, self.vocabulary.perturbations[1:])}); train with --features FILE to predict"
                    " perturbations that were never seen"
                )
        return members

    def conditions(
        self,
        members: Members,
        tissues: Sequence[str],
        batches: Sequence[str] | None = None,
        covariates: np.ndarray | None = None,
    ) -> Arrays:
        """What the condition encoder reads for one list of (perturbation, dose) in several contexts."""
        rows, dtype = len(tissues), self.config.dtype
        codes = self.vocabulary.codes("perturbations", [name for name, _ in members])
        width = max(len(members), 1)
        perturbations, doses = np.zeros((rows, width), np.int32), np.zeros((rows, width), dtype)
        perturbations[:, : len(members)] = codes
        doses[:, : len(members)] = self.vocabulary.relative_doses(codes, np.array([dose for _, dose in members]))
        onehot = np.zeros((rows, len(self.vocabulary.batches)), dtype)
        if batches is not None:
            batch = self.vocabulary.codes("batches", batches)
            known = np.flatnonzero(batch)
            onehot[known, batch[known]] = 1.0
        if covariates is None:  # those of an average training condition
            covariates = np.tile(self.vocabulary.covariate_means, (rows, 1))
        return {
            "perturbations": perturbations,
            "doses": doses,
            "tissue": self.vocabulary.codes("tissues", tissues),
            "batch": onehot,
            "covariates": self.vocabulary.standardised(covariates).astype(dtype),
        }

    def operators(self, conditions: Arrays, labels: Sequence[str]) -> list[Operator]:
        """The operators of prepared condition rows."""
        found = self.backend.operators(self.params, conditions, self.config)
        return [
            Operator(label, *(found[name][row] for name in ("A", "b", "alpha", "beta")))
            for row, label in enumerate(labels)
        ]

    def operator(self, perturbation: str, *, tissue: str | None = None, batch: str = "") -> Operator:
        """The operator of one condition. A perturbation "A@0.5+B" carries its doses; "control" has dose 0 throughout.

        Args:
            perturbation: the label.
            tissue: may be left out where the model knows one tissue only.
            batch: "" for pooled batches.
        """
        rows = self.conditions(self.members(perturbation), [self._tissue(tissue)], [batch])
        return self.operators(rows, [perturbation])[0]

    def response_profile(self, perturbations: Sequence[str], *, tissue: str | None = None) -> np.ndarray:
        """(n, 2 n_bases): alpha and beta of each perturbation side by side."""
        found = [self.operator(label, tissue=tissue) for label in perturbations]
        return np.stack([np.concatenate([one.alpha, one.beta]) for one in found])

    def interpolate(self, first: str, second: str, weight: float, *, tissue: str | None = None) -> Operator:
        """The operator between two conditions: theta = (1 - weight) theta_first + weight theta_second."""
        parts = [(name, dose * (1.0 - weight)) for name, dose in self.members(first)]
        parts += [(name, dose * weight) for name, dose in self.members(second)]
        rows = self.conditions(tuple(parts), [self._tissue(tissue)])
        return self.operators(rows, [f"{first} to {second} at {weight:g}"])[0]

    def _tissue(self, tissue: str | None) -> str:
        known = self.vocabulary.tissues[1:] or self.vocabulary.tissues  # cells without a tissue are "unknown" ones
        if tissue is None and len(known) == 1:
            return known[0]
        if tissue is None:
            raise PredictionError(f"the model knows {len(known)} tissues; name one of {', '.join(known)}")
        if tissue not in known:
            raise PredictionError(f"tissue {tissue!r} was not in training; {nearest(tissue, known)}")
        return tissue

    # --- prediction ---------------------------------------------------------------------------------------------
    def controls(self, source: Any, *, keep: Mapping[str, str] | None = None) -> tuple[data.Dataset, dict[str, Any]]:
        """The cells to predict from: read, aligned to the model's genes, control cells only where there are any.

        Args:
            source: AnnData or a path.
            keep: column -> value, only these cells.

        Returns:
            The data set and a report (genes found and missing, cells used).

        Raises:
            DataError: the data cannot be used; PredictionError: no cell is left, or a tissue was not in training.
        """
        dataset = data.load(source, dataclasses.replace(self.config.data, min_counts=0), training=False)
        dataset, report = genes.align_genes(dataset, self.vocabulary.genes)
        mask = dataset.is_control.copy() if dataset.is_control.any() else np.ones(dataset.n_cells, bool)
        for column, value in (keep or {}).items():
            if column not in dataset.obs:
                raise PredictionError(f"column {column!r} is not in obs; {nearest(column, list(dataset.obs))}")
            labels, _ = texts(dataset.obs[column], column)
            if value not in labels:
                raise PredictionError(f"no cell has {column}={value}; {nearest(value, sorted(set(labels)))}")
            mask &= labels == value
        if not mask.any():
            raise PredictionError(
                f"no control cell is left of {dataset.n_cells}; check the columns that were asked for"
            )
        report = {**report, "cells": int(mask.sum()), "cells_in_file": dataset.n_cells}
        return dataset.select_cells(np.flatnonzero(mask)), report

    def move(self, dataset: data.Dataset, z: np.ndarray, cells: np.ndarray, members: Members) -> np.ndarray:
        """Latents of these cells under a condition; cells of one tissue and batch share one operator."""
        tissue, batch = dataset.tissue[cells], dataset.batch[cells]
        contexts = sorted(set(zip(tissue, batch, strict=True)))
        for name in {name for name, _ in contexts}:
            self._tissue(name)
        masks = [(tissue == name) & (batch == where) for name, where in contexts]
        covariates = np.stack([dataset.covariates[cells][mask].mean(0) for mask in masks])
        rows = self.conditions(members, [t for t, _ in contexts], [b for _, b in contexts], covariates)
        moved = np.empty_like(z)
        for operator, mask in zip(self.operators(rows, [""] * len(masks)), masks, strict=True):
            moved[mask] = operator(z[mask])
        return moved

    def forecast(
        self,
        dataset: data.Dataset,
        cells: np.ndarray,
        steps: Sequence[Members],
        *,
        times: Sequence[float] = (1.0,),
    ) -> Forecast:
        """Where these cells go under conditions applied one after the other.

        Args:
            dataset: with the model's genes.
            cells: (n,) indices of control cells.
            steps: the conditions.
            times: points of the way from the start (0) to the end (1), z_t = (1 - t) z + t K(z).

        Returns:
            Latents before; per time the latents there with the means (mu0, mu1) of a block of the cells, decoded when
            asked for and calibrated; the changes of the mean profiles; and how the log library of each cell changes.
        """
        z0 = z1 = self.encode(dataset, cells)
        for members in steps:
            z1 = self.move(dataset, z1, cells, members)
        tissue = self.vocabulary.codes("tissues", dataset.tissue[cells])
        library = dataset.library()[cells].astype(self.config.dtype)
        rows_of, corrections, changes, depths = self._corrections(dataset, cells, steps, z0, z1)
        deeper = depths[rows_of]

        def at(time: float) -> tuple[np.ndarray, Means]:
            z = z0 + z0.dtype.type(time) * (z1 - z0)

            def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
                rest = (tissue[rows], library[rows])
                mu0, mu1 = self.decode(z0[rows], *rest), self.decode(z[rows], *rest)
                for row, found in enumerate(corrections.values()):
                    here = rows_of[rows] == row
                    if found is not None and here.any():
                        mu0[here] *= found.factor
                        added = library[rows][here, None] * (time * found.shift)
                        mu1[here] = np.maximum(mu0[here] + added, 0.0)
                return mu0, mu1 * np.exp(time * deeper[rows]).astype(mu1.dtype)[:, None]

            return z, means

        return Forecast(z0, [at(time) for time in times], changes, deeper)

    def _corrections(
        self, dataset: data.Dataset, cells: np.ndarray, steps: Sequence[Members], z0: np.ndarray, z1: np.ndarray
    ) -> tuple[np.ndarray, dict[Context, Correction | None], dict[Context, Change], np.ndarray]:
        """Context of every cell; of each context the correction, the change, and that of the log library."""
        keys = list(zip(dataset.tissue[cells], dataset.cell_type[cells], strict=True))
        found: dict[Context, Correction | None] = dict.fromkeys(sorted(set(keys)))
        place = {context: row for row, context in enumerate(found)}
        rows_of = np.array([place[key] for key in keys])
        changes: dict[Context, Change] = {}
        depths = np.zeros(len(found))
        if self.calibration is None:
            return rows_of, found, changes, depths
        for context, row in place.items():
            depths[row] = sum(self.calibration.library.of(members, context) for members in steps)
            here = np.flatnonzero(rows_of == row)
            library = dataset.library()[cells[here]]
            controls = measure(dataset.rows(cells[here]), library, self.calibration.typical)
            carried = [self.calibration.of(members, context, controls) for members in steps]
            found_variances = (self.calibration.variance(*step) for step in zip(steps, carried, strict=True))
            variances = [variance for variance in found_variances if variance is not None]
            if not variances:  # nor is anything carried
                continue
            tissue = self.vocabulary.codes("tissues", dataset.tissue[cells[here]])
            before, after = (self._mean_profile(z[here], tissue, library) for z in (z0, z1))
            one = found[context] = correction(controls, before, after, carried)
            if len(variances) == len(steps):
                change = log_rate(after) - log_rate(before) if one is None else one.change
                changes[context] = Change(change, np.sum(variances, axis=0))
        return rows_of, found, changes, depths

    def _mean_profile(self, z: np.ndarray, tissue: np.ndarray, library: np.ndarray) -> np.ndarray:
        """(n_genes,) mean over cells of decoded means divided by library."""
        total = np.zeros(len(self.vocabulary.genes))
        for start in range(0, len(z), ENCODE_BLOCK):
            rows = slice(start, start + ENCODE_BLOCK)
            sizes = library[rows].astype(self.config.dtype)
            total += (self.decode(z[rows], tissue[rows], sizes) / sizes[:, None]).sum(0, dtype=np.float64)
        return total / len(z)

    def predict(
        self,
        controls: Any,
        perturbation: str,
        *,
        then: Sequence[str] = (),
        output: Output = "transport",
        seed: int = 0,
        keep: Mapping[str, str] | None = None,
    ) -> AnnData:
        """Predicted cells, one for each control cell.

        Args:
            controls: AnnData or a path; where it has control cells, those are used, else all of its cells.
            perturbation: "A", "A+B" or with doses "A@0.5+B".
            then: perturbations applied one after the other to the result.
            output: "transport" (the control cell's own counts, moved), "sample" (negative-binomial draws) or "mean".
            seed: of the draws.
            keep: column -> value, only these control cells.

        Returns:
            AnnData with predicted counts in X, obs of the controls with the new perturbation, latents before and after
            in obsm["X_control_latent"] and obsm["X_latent"], and in obs["library_change"] the change of the log of the
            counts per cell that the means were given (library_size.py). Where training saw the perturbation, in this
            context or another, varm["change"] holds the predicted change of log(0.3 + counts per 10,000) of the mean
            profile, one column per context of uns["pf"]["contexts"], and varm["change_sd"] its standard deviation; so
            too for unseen combinations of perturbations that training saw (docs/math.md 11 says when).

        Raises:
            DataError, PredictionError: as `controls`, and for perturbations that the model cannot represent.
        """
        dataset, report = self.controls(controls, keep=keep)
        steps = [self.members(step) for step in (perturbation, *then)]
        z0, [(z1, means)], changes, library = self.forecast(dataset, np.arange(dataset.n_cells), steps)
        label = " then ".join((perturbation, *then))
        adata = self._cells(dataset, z0, z1, means, label, report, output=output, seed=seed)
        adata.obs["library_change"] = library
        adata.uns["pf"]["contexts"] = [", ".join(context) for context in changes]
        if changes:
            adata.varm["change"] = np.stack([one.mean for one in changes.values()], axis=1)
            adata.varm["change_sd"] = np.sqrt(np.stack([one.variance for one in changes.values()], axis=1))
        return adata

    def trajectory(
        self,
        controls: Any,
        perturbation: str,
        *,
        times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        output: Output = "transport",
        seed: int = 0,
        keep: Mapping[str, str] | None = None,
    ) -> AnnData:
        """Cells on the way from control (time 0) to the perturbed state (time 1), z_t = (1 - t) z + t K(z).

        Returns:
            AnnData with len(times) rows per control cell and the time in obs["time"].
        """
        import anndata

        dataset, report = self.controls(controls, keep=keep)
        steps = [self.members(perturbation)]
        z0, points, _, library = self.forecast(dataset, np.arange(dataset.n_cells), steps, times=times)
        parts = []
        for time, (z, means) in zip(times, points, strict=True):
            part = self._cells(dataset, z0, z, means, perturbation, report, output=output, seed=seed)
            part.obs["time"], part.obs["library_change"] = float(time), time * library
            part.obs_names = [f"{name}-t{time:g}" for name in part.obs_names]
            parts.append(part)
        return anndata.concat(parts, merge="same", uns_merge="same")

    def counterfactual(self, controls: Any, first: str, second: str, **options: Any) -> tuple[AnnData, AnnData]:
        """The same control cells under two conditions, with the same draws."""
        return self.predict(controls, first, **options), self.predict(controls, second, **options)

    def _cells(
        self,
        dataset: data.Dataset,
        z0: np.ndarray,
        z1: np.ndarray,
        means: Means,
        label: str,
        report: Mapping[str, Any],
        *,
        output: Output,
        seed: int,
    ) -> AnnData:
        import anndata
        import pandas as pd

        counts = predicted_counts(
            dataset.rows(np.arange(dataset.n_cells)),
            means,
            seed=seed,
            name=label,
            output=output,
            r=self.dispersion(),
        )
        obs = dataset.obs.copy()
        obs[self.config.data.perturbation] = label
        var = pd.DataFrame(index=pd.Index(self.vocabulary.genes))
        adata = anndata.AnnData(counts, obs=obs, var=var)
        adata.obsm["X_control_latent"], adata.obsm["X_latent"] = z0, z1
        adata.uns["pf"] = {"output": output, "seed": seed, "n_genes_missing": len(report["missing"])}
        return adata


def read_config(run: Run) -> Config:
    """The configuration of a run."""
    import tomllib

    return from_dict(Config, tomllib.loads(run.read_text("config.toml")))


def read_vocabulary(run: Run) -> Vocabulary:
    """The names behind the indices of a run's model."""
    table = run.read_json("vocabulary.json")
    return Vocabulary(**{key: tuple(value) for key, value in table.items()})


def vocabulary_json(vocabulary: Vocabulary) -> str:
    """What read_vocabulary reads."""
    return json.dumps(dataclasses.asdict(vocabulary), indent=1) + "\n"
