"""What limits the predictions of finished runs: the same cells moved with parts of the answer given away.

    python benchmarks/limits.py RUN [RUN ...] [--out FILE]
    python benchmarks/limits.py --task TASK --data DATA RUNS [--seeds N] [--out FILE]

The second form takes all finished trainings of a task, from the directory that `pf evaluate --task TASK --out RUNS`
filled.

Beside the model, its baselines and real cells against real cells, every held-out condition is predicted

- with the *true mean change*: the real cells' mean change of log1p, carried by count transport like that of the mean
  shift. Its distance is what transport leaves when the mean is right;
- by the *true affine map*: the Gaussian transport map between the latents of control and real cells, decoded and
  carried by count transport. Its distance is what latents, decoder and an affine operator leave when the operator is
  right,

and by the baselines with the model's change of the counts per cell (pf_core/library_size.py) on top of their own means:
whether what the model wins is that alone.

The first two know the sampling noise of the very cells they are judged on, so that with few cells they can be below 0.
Means over the held-out conditions of all runs, in Markdown; where real cells differ from the controls (p at most 0.05
by relabelling) apart from where they do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pf_core import baselines, fit, task_run, tasks
from pf_core.baselines import Declined, Prediction, Predictor, Task
from pf_core.config import NORMALISED_TOTAL
from pf_core.data import Dataset
from pf_core.evaluation import MAX_CELLS, Reference, baseline_predictors, evaluate
from pf_core.model import Model
from pf_core.noise import generator
from pf_core.outputs import Csr, predicted_counts
from pf_core.splits import Split
from pf_core.start import covariance, gaussian_map
from pf_core.task_report import EFFECT, LEVEL
from pf_core.verdict import DECIDING_METRIC, number

COLUMNS = {"energy_pca_u": "Energy distance, PCA (U)", "pearson_delta": "Pearson of mean change"}
PARTS = {"with effect": True, "without": False}


def references(model: Model, dataset: Dataset, split: Split) -> dict[str, Reference]:
    """Cells predicted with the true mean change, and by the true affine map."""
    seed = model.config.seed
    known = np.sort(np.concatenate([split.train, split.validation]))

    def sides(label: str, tissue: str, cell_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Controls that training knows (at most MAX_CELLS), held-out cells, and the tissue's codes of the controls."""
        place = (dataset.tissue == tissue) & (dataset.cell_type == cell_type)
        controls = known[(place & dataset.is_control)[known]]
        if len(controls) > MAX_CELLS:
            controls = np.sort(generator(seed, "limits.controls").permutation(controls)[:MAX_CELLS])
        cells = split.heldout[(place & (dataset.label == label))[split.heldout]]
        return controls, cells, np.repeat(model.vocabulary.codes("tissues", [tissue]), len(controls))

    def cells_of(counts: Csr, means, r, *key: str) -> Csr:
        return predicted_counts(counts, means, seed=seed, name="/".join(key), r=r)

    def true_mean(label: str, tissue: str, cell_type: str, _: int) -> Csr:
        controls, cells, _codes = sides(label, tissue, cell_type)
        task = Task(label, tissue, cell_type, (), (), dataset.rows(controls), dataset.library()[controls])
        before = baselines.control_profile(task)
        weights = 1.0 / dataset.library()[cells]
        after = np.asarray(dataset.rows(cells).T @ weights).ravel() / len(cells)
        change = np.log1p(NORMALISED_TOTAL * after) - np.log1p(NORMALISED_TOTAL * before)
        answer = baselines.shifted(task, change, "truth")
        assert not isinstance(answer, Declined)
        return cells_of(task.counts, answer.means, answer.r, label, tissue, cell_type)

    def true_map(label: str, tissue: str, cell_type: str, _: int) -> Csr:
        controls, cells, codes = sides(label, tissue, cell_type)
        z0, z = (model.encode(dataset, some).astype(np.float64) for some in (controls, cells))
        pooled = np.cov(model.encode(dataset, known).T.astype(np.float64))
        matrix = gaussian_map(covariance(z0, pooled), covariance(z, pooled))
        z1 = (z.mean(0) + (z0 - z0.mean(0)) @ matrix.T).astype(model.config.dtype)
        z0, library = z0.astype(model.config.dtype), dataset.library()[controls].astype(model.config.dtype)

        def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            rest = codes[rows], library[rows]
            return model.decode(z0[rows], *rest), model.decode(z1[rows], *rest)

        return cells_of(dataset.rows(controls), means, model.dispersion(), label, tissue, cell_type)

    return {"true mean change": true_mean, "true affine map": true_map}


Opened = tuple[Path, Dataset, Split]


def opened(arguments: argparse.Namespace) -> Iterator[Opened]:
    if arguments.task is None:
        for path in arguments.runs:
            _, _, dataset, split = fit.reopen(path)
            yield path, dataset, split
        return
    [folder], task = arguments.runs, tasks.load(arguments.task)
    seeds = task.seeds[: arguments.seeds or len(task.seeds)]
    for one in task_run.finished(task, out=folder, data=arguments.data):
        if one.seed in seeds:
            yield one.path, one.dataset, one.split


def with_library(model: Model, dataset: Dataset, split: Split) -> dict[str, Predictor]:
    """The baselines, their means after the perturbation multiplied by the model's change of the library."""
    seen = np.sort(np.concatenate([split.train, split.validation]))

    def scaled(predictor: Predictor) -> Predictor:
        def predict(task: Task) -> Prediction | Declined:
            answer = predictor(task)
            if isinstance(answer, Declined) or answer.means is None or model.calibration is None:
                return answer
            factor = np.exp(model.calibration.library.of(model.members(task.label), task.context))
            means = answer.means

            def after(rows: slice) -> tuple[np.ndarray, np.ndarray]:
                mu0, mu1 = means(rows)
                return mu0, mu1 * factor

            return replace(answer, means=after)

        return predict

    every = baseline_predictors(model, dataset, seen)
    return {f"{name}, library": scaled(one) for name, one in every.items() if name != "no change"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; with --task, the directory of its results")
    parser.add_argument("--task", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the task's data")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds of the task")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.task is not None and len(arguments.runs) > 1:
        parser.error("with --task, one directory is wanted")
    found: dict[str, list[tuple[Mapping[str, float], bool]]] = {}
    conditions = 0
    for path, dataset, split in opened(arguments):
        model = Model.load(path)
        seen = np.sort(np.concatenate([split.train, split.validation]))
        given = references(model, dataset, split)
        more = with_library(model, dataset, split)
        _, judged = evaluate(model, dataset, seen, split.heldout, seed=model.config.seed, references=given, peers=more)
        conditions += len(judged)
        for one in judged:
            effect = any(row.values.get(EFFECT, 1.0) <= LEVEL for row in one.rows)
            for row in one.rows:
                if not row.declined:
                    found.setdefault(row.method, []).append((row.values, effect))
    heads = ["method", "conditions", *COLUMNS.values(), *(f"{COLUMNS[DECIDING_METRIC]}, {some}" for some in PARTS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method, rows in found.items():
        cells = [_mean(values[name] for values, _ in rows) for name in COLUMNS]
        cells += [_mean(values[DECIDING_METRIC] for values, some in rows if some == part) for part in PARTS.values()]
        lines.append(f"| {method} | {len(rows)} of {conditions} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


def _mean(values: Iterable[float]) -> str:
    finite = [value for value in values if np.isfinite(value)]
    return number(float(np.mean(finite))) if finite else "n/a"


if __name__ == "__main__":
    main()
