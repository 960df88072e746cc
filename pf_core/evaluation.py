"""The judgement of a run: predict its held-out conditions, beside the simple answers, in one output mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pf_core import baselines, metrics, noise, regressions
from pf_core.baselines import Declined, Prediction, Predictor, Shifts, Task
from pf_core.calibration import LogProfile, measure
from pf_core.ceiling import resample
from pf_core.config import Output
from pf_core.data import Dataset
from pf_core.errors import PredictionError
from pf_core.kriging import Change
from pf_core.labels import condition_label, parse_condition
from pf_core.latent import ENCODE_BLOCK
from pf_core.metrics import PCA
from pf_core.model import Model
from pf_core.outputs import Csr, predicted_counts
from pf_core.verdict import Condition, MetricRow

MAX_CELLS = 2000  # per side and condition, chosen by a named draw: distances are quadratic in it
MAX_PCA_CELLS = 20_000
MAX_PERMUTED = 500  # per side, for the test of an effect
NORMAL_90 = 1.6448536269514722  # half width of the central 90 % of a standard normal
TOP_GENES = 200
CEILING_REPEATS = 10  # splits of the real cells into halves
MODEL = "operator model"
HALVES = "real cells, half against half"
Reference = Callable[[str, str, str, int], Csr]


@dataclass(frozen=True)
class Judged:
    """One held-out condition: its scores, and the cells in the plane of the first two components."""

    condition: Condition
    rows: tuple[MetricRow, ...]
    control: np.ndarray  # (n, 2)
    real: np.ndarray  # (n, 2)
    predicted: np.ndarray | None  # (n, 2); None where the model declined


def evaluate(
    model: Model,
    dataset: Dataset,
    seen: np.ndarray,
    heldout: np.ndarray,
    *,
    output: Output = "transport",
    seed: int = 0,
    references: Mapping[str, Reference] | None = None,
    peers: Mapping[str, Predictor] | None = None,
) -> tuple[PCA, list[Judged]]:
    """Judge every condition among the held-out cells.

    Args:
        model: a trained model.
        dataset: with the model's genes.
        seen: indices of the cells training has seen; baselines are made from them, controls are taken from them.
        heldout: indices of the cells to be predicted.
        output: the output mode, the same for the model and for every baseline.
        seed: of the draws.
        references: cells shown for scale, from (label, tissue, cell type, n): where the truth is known, fresh draws.
        peers: further predictors by name, judged as the baselines are; their tasks hold the cells of `control_cells`.

    Returns:
        The principal components that all were measured in, and one entry per (label, tissue, cell type) among the
        held-out perturbed cells, in that order.
    """
    ruler = metrics.real_pca(dataset.rows(_some(np.arange(dataset.n_cells), MAX_PCA_CELLS, seed, "pca")))
    predictors = {**baseline_predictors(model, dataset, seen), **(peers or {})}
    perturbed = heldout[~dataset.is_control[heldout]]
    keys = held_out_keys(dataset, heldout)
    return ruler, [
        _judge(model, dataset, seen, perturbed, key, predictors, references or {}, ruler, output=output, seed=seed)
        for key in keys
    ]


def held_out_keys(dataset: Dataset, heldout: np.ndarray) -> list[tuple[str, str, str]]:
    """(label, tissue, cell type) of the perturbed cells among the held-out ones, sorted."""
    perturbed = heldout[~dataset.is_control[heldout]]
    return sorted({(str(dataset.label[i]), str(dataset.tissue[i]), str(dataset.cell_type[i])) for i in perturbed})


def control_cells(dataset: Dataset, seen: np.ndarray, key: tuple[str, str, str], *, seed: int = 0) -> np.ndarray:
    """Indices of the controls that the condition `key` is predicted from: those of its context, MAX_CELLS at most."""
    _, tissue, cell_type = key
    context = dataset.is_control & (dataset.tissue == tissue) & (dataset.cell_type == cell_type)
    return _some(seen[context[seen]], MAX_CELLS, seed, f"{'/'.join(key)}.control")


def _some(cells: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    if len(cells) <= most:
        return cells
    return np.sort(noise.generator(seed, f"evaluation.{name}").permutation(cells)[:most])


def baseline_predictors(model: Model, dataset: Dataset, seen: np.ndarray) -> dict[str, Predictor]:
    """All baselines by name, made from the cells that training has seen; the model lends its encoder and decoder."""
    names = (dataset.label[seen], dataset.tissue[seen], dataset.cell_type[seen])
    known = baselines.profiles(dataset.rows(seen), *names, library=dataset.library()[seen])
    shifts = Shifts(known, baselines.log_profile)
    members = {item.label: tuple(name for name, _ in parse_condition(item.label, model.config.data)) for item in known}
    features = _features(model)
    latents = model.encode(dataset, seen)
    latent_shifts = Shifts(baselines.profiles(lambda rows: latents[rows], *names))

    def tissue_codes(tissue: str, n: int) -> np.ndarray:
        return np.repeat(model.vocabulary.codes("tissues", [tissue]), n)

    def encode(counts: Csr, tissue: str) -> np.ndarray:
        return model.encode_counts(counts, tissue_codes(tissue, counts.shape[0]))

    def decode(z: np.ndarray, tissue: str, library: np.ndarray) -> np.ndarray:
        dtype = model.config.dtype
        return model.decode(z.astype(dtype), tissue_codes(tissue, len(z)), library.astype(dtype))

    return {
        "no change": baselines.no_change(),
        "perturbation mean": baselines.perturbation_mean(shifts),
        "mean shift": baselines.mean_shift(shifts),
        "nearest context": baselines.nearest_context(shifts),
        "latent shift": baselines.latent_shift(latent_shifts, encode, decode),
        "additive": baselines.additive(shifts),
        "linear": regressions.linear(known, members, dataset.genes, features=features),
        "kernel ridge": regressions.kernel_ridge(known, members, features=features),
    }


def _features(model: Model) -> dict[str, np.ndarray] | None:
    """The perturbation features that the model was trained with, if any: baselines see what the model sees."""
    table = model.params.get("conditions.features")
    if table is None:
        return None
    return dict(zip(model.vocabulary.perturbations[1:], np.asarray(table, np.float64)[1:], strict=True))


def _model_predictor(model: Model, dataset: Dataset, controls: np.ndarray) -> Predictor:
    """The model as a predictor of the same kind as the baselines, for these control cells."""

    def predict(task: Task) -> Prediction | Declined:
        try:
            forecast = model.forecast(dataset, controls, [model.members(task.label)])
        except PredictionError as error:
            return Declined(str(error))
        [(_, means)] = forecast.points
        return Prediction(means, "operator", change=forecast.changes.get(task.context))

    return predict


def _judge(
    model: Model,
    dataset: Dataset,
    seen: np.ndarray,
    perturbed: np.ndarray,
    key: tuple[str, str, str],
    predictors: Mapping[str, Predictor],
    references: Mapping[str, Reference],
    ruler: PCA,
    *,
    output: Output,
    seed: int,
) -> Judged:
    label, tissue, cell_type = key
    here = (dataset.label == label) & (dataset.tissue == tissue) & (dataset.cell_type == cell_type)
    name = "/".join(key)
    cells = _some(perturbed[here[perturbed]], MAX_CELLS, seed, f"{name}.real")
    controls = control_cells(dataset, seen, key, seed=seed)
    condition = Condition(label, tissue, cell_type, len(cells))
    members = parse_condition(label, model.config.data)
    task = Task(
        label,
        tissue,
        cell_type,
        tuple(member for member, _ in members),
        tuple(condition_label((member,), model.config.data.separator) for member in members),
        dataset.rows(controls),
        dataset.library()[controls],
    )
    real = dataset.rows(cells)
    z_real = model.encode(dataset, cells)
    rows, planes = [], {}
    for method, predictor in {MODEL: _model_predictor(model, dataset, controls), **predictors}.items():
        kind = "model" if method == MODEL else "baseline"
        answer = predictor(task)
        if isinstance(answer, Declined):
            if answer.reason != "not a combination":
                rows.append(MetricRow(condition, method, kind=kind, declined=answer.reason))
            continue
        r = model.dispersion() if answer.r is None else answer.r
        counts = predicted_counts(task.counts, answer.means, seed=seed, name=name, output=output, r=r)
        values = metrics.score(real, counts, task.counts, ruler)
        values |= _latent_energies(model, counts, tissue, z_real)
        if answer.means is None and min(len(cells), len(controls)) > 1:
            values["effect_p"] = _effect_p(real, task.counts, ruler, seed=seed, name=name)
        if answer.change is not None and model.calibration is not None and len(cells) > 1:
            typical = model.calibration.typical
            before = measure(task.counts, task.library, typical)
            values |= coverage(answer.change, measure(real, dataset.library()[cells], typical), before)
        rows.append(MetricRow(condition, method, values, kind))
        if method == MODEL:
            planes["predicted"] = ruler.transform(counts)[:, :2]
    if len(cells) >= 4:
        values = _halves(real, z_real, task.counts, ruler, seed=seed, name=name)
        rows.append(MetricRow(condition, HALVES, values, "reference"))
    for method, reference in references.items():
        counts = reference(label, tissue, cell_type, len(cells))
        values = metrics.score(real, counts, task.counts, ruler) | _latent_energies(model, counts, tissue, z_real)
        rows.append(MetricRow(condition, method, values, "reference"))
    planes |= {"control": ruler.transform(task.counts)[:, :2], "real": ruler.transform(real)[:, :2]}
    return Judged(condition, tuple(rows), planes["control"], planes["real"], planes.get("predicted"))


def _effect_p(real: Csr, control: Csr, ruler: PCA, *, seed: int, name: str) -> float:
    """Do the real cells differ from the controls at all? p of their energy distance under relabelling."""
    rows = [_some(np.arange(some.shape[0]), MAX_PERMUTED, seed, f"{name}.effect") for some in (real, control)]
    x, y = (ruler.transform(some[chosen]) for some, chosen in zip((real, control), rows, strict=True))
    return metrics.permutation_p(x, y, noise.generator(seed, f"evaluation.{name}.effect_p"))


def coverage(change: Change, real: LogProfile, controls: LogProfile) -> dict[str, float]:
    """Share of genes whose observed mean change lies in the predicted 90 % interval.

    The interval is that of a measurement: uncertainty of the prediction and sampling error of both measured means.

    Returns:
        coverage_90 over all genes, coverage_90_top over the TOP_GENES with the largest predicted change.
    """
    error = np.sqrt(change.variance + real.error + controls.error)
    inside = np.abs(real.value - controls.value - change.mean) <= NORMAL_90 * error
    top = np.argsort(-np.abs(change.mean), kind="stable")[:TOP_GENES]
    return {"coverage_90": float(inside.mean()), "coverage_90_top": float(inside[top].mean())}


def _halves(real: Csr, z: np.ndarray, control: Csr, ruler: PCA, *, seed: int, name: str) -> dict[str, float]:
    """The ceiling: every metric between disjoint halves of the real cells, mean over CEILING_REPEATS splits."""
    found: list[dict[str, float]] = []
    for index in range(CEILING_REPEATS):
        first, second = resample(real.shape[0], seed=seed, name=f"evaluation.{name}", index=index)
        values = metrics.score(real[first], real[second], control, ruler)
        for estimator in ("u", "v"):
            values[f"energy_latent_{estimator}"] = metrics.energy_distance(z[second], z[first], estimator=estimator)
        found.append(values)
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


def _latent_energies(model: Model, counts: Csr, tissue: str, z_real: np.ndarray) -> dict[str, float]:
    blocks = []
    for start in range(0, counts.shape[0], ENCODE_BLOCK):
        rows = counts[start : start + ENCODE_BLOCK]
        code = np.repeat(model.vocabulary.codes("tissues", [tissue]), rows.shape[0])
        blocks.append(model.encode_counts(rows, code))
    z = np.concatenate(blocks)
    return {
        f"energy_latent_{estimator}": metrics.energy_distance(z, z_real, estimator=estimator)
        if min(len(z), len(z_real)) > 1 or estimator == "v"
        else float("nan")
        for estimator in ("u", "v")
    }
