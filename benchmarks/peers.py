"""Other packages on the splits of a task that was run, judged like the baselines, in one table with the model.

    python benchmarks/peers.py --task TASK --data DATA RUNS --out OUT \\
        --peer "scGen=python benchmarks/peer_scgen.py" \\
        --peer "CellFlow=CELLFLOW/bin/python benchmarks/peer_cellflow.py"

RUNS is the directory that `pf evaluate --task TASK --out RUNS` filled: each of its trainings is one training of every
peer, on the same cells and the same genes. OUT gets task.json, task.md and task.svg like those of `pf evaluate`, and
what the peers wrote; what is there is not made again.

A peer is a command, in whatever environment it lives, that is called with two directories and a seed:

    COMMAND IN OUT SEED

IN/train.h5ad: training cells; X counts, obs "label" (canonical: "control", "A", "A+B"), "cell_type", "tissue",
"library" (counts per cell over all genes).
IN/controls-K.h5ad: the control cells that condition K is predicted from, of the same form.
IN/conditions.json: [{"label", "cell_type", "tissue"}], in the order K = 0, 1, ...
OUT/K.npz, written by the peer: "before" and "after", (n_controls, n_genes) expected counts per 10,000 of library of
these cells, as they are and perturbed; or OUT/K.txt: why the peer has no answer, one line.

Means become cells as for every other method: by count transport, so that methods differ by their means alone. What a
package gives by itself are often these means without the noise of cells; "NAME, as it comes" is that, its distance to
real cells the one that it would be judged by without transport.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import sparse

from pf_core import task_run, tasks
from pf_core.baselines import Declined, Prediction, Predictor
from pf_core.baselines import Task as Question
from pf_core.config import NORMALISED_TOTAL
from pf_core.dataset import Dataset
from pf_core.evaluation import Reference, control_cells, evaluate, held_out_keys
from pf_core.model import Model
from pf_core.outputs import Csr
from pf_core.task_report import Result, Score, write
from pf_core.task_run import Finished
from pf_core.verdict import metrics_json

Key = tuple[str, str, str]  # label, tissue, cell type


def seen_cells(one: Finished) -> np.ndarray:
    return np.sort(np.concatenate([one.split.train, one.split.validation]))


def cells_of(dataset: Dataset, cells: np.ndarray):
    """AnnData of counts with the columns that a peer is given."""
    import anndata
    import pandas as pd

    obs = pd.DataFrame(
        {name: getattr(dataset, name)[cells].astype(str) for name in ("label", "cell_type", "tissue")}
        | {"library": dataset.library()[cells].astype(np.float64)}
    )
    obs.index = pd.Index(dataset.cells[cells].astype(str))
    return anndata.AnnData(dataset.rows(cells), obs=obs, var=pd.DataFrame(index=pd.Index(dataset.genes.astype(str))))


def export(one: Finished, folder: Path) -> list[Key]:
    """Write what a peer is given; the held-out conditions in their order."""
    seen = seen_cells(one)
    keys = held_out_keys(one.dataset, one.split.heldout)
    conditions = folder / "conditions.json"
    if not conditions.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cells_of(one.dataset, seen).write_h5ad(folder / "train.h5ad")
        for number, key in enumerate(keys):
            controls = control_cells(one.dataset, seen, key, seed=one.seed)
            cells_of(one.dataset, controls).write_h5ad(folder / f"controls-{number}.h5ad")
        named = [dict(zip(("label", "tissue", "cell_type"), key, strict=True)) for key in keys]
        conditions.write_text(json.dumps(named, indent=1) + "\n")
    return keys


def answers(command: str, given: Path, out: Path, seed: int, n: int) -> list[dict[str, np.ndarray] | str]:
    """What a peer says of the conditions, run where its answers are not there yet.

    Raises:
        RuntimeError: the command failed, or left a condition without an answer.
    """

    def complete() -> bool:
        return all((out / f"{number}.npz").exists() or (out / f"{number}.txt").exists() for number in range(n))

    if not complete():
        out.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*shlex.split(command), str(given), str(out), str(seed)], check=False)
        if done.returncode or not complete():
            raise RuntimeError(f"{command} ended with code {done.returncode} and left {out} incomplete")
    found: list[dict[str, np.ndarray] | str] = []
    for number in range(n):
        path = out / f"{number}.npz"
        found.append(dict(np.load(path)) if path.exists() else path.with_suffix(".txt").read_text().strip())
    return found


def predictor(name: str, answer: Callable[[Key], dict[str, np.ndarray] | str]) -> Predictor:
    """A peer's means behind the interface of the baselines."""

    def predict(question: Question) -> Prediction | Declined:
        given = answer((question.label, question.tissue, question.cell_type))
        if isinstance(given, str):
            return Declined(given)
        before, after = given["before"], given["after"]
        if before.shape != question.counts.shape or after.shape != before.shape:
            raise ValueError(f"{name} gave {before.shape} and {after.shape} for {question.counts.shape} control cells")
        if not all(np.isfinite(part).all() and (part >= 0).all() for part in (before, after)):
            raise ValueError(f"{name} gave means that are negative or not finite for {question.label}")
        scale = np.asarray(question.library, np.float64)[:, None] / NORMALISED_TOTAL
        return Prediction(lambda rows: (before[rows] * scale[rows], after[rows] * scale[rows]), name)

    return predict


def as_it_comes(answer: Callable[[Key], dict[str, np.ndarray] | str]) -> Reference:
    """A peer's means themselves as cells."""

    def cells(label: str, tissue: str, cell_type: str, _: int) -> Csr:
        given = answer((label, tissue, cell_type))
        assert not isinstance(given, str)
        return sparse.csr_matrix(np.asarray(given["after"], np.float64))

    return cells


def judge(one: Finished, peers: dict[str, str], out: Path, min_cells: int) -> list[Score]:
    """Scores of model, baselines and peers in one training's held-out conditions."""
    place = out / f"fold-{one.fold.index + 1}" / f"seed-{one.seed}"
    keys = export(one, place / "given")
    predictors: dict[str, Predictor] = {}
    references: dict[str, Reference] = {}
    for name, command in peers.items():
        found = dict(zip(keys, answers(command, place / "given", place / name, one.seed, len(keys)), strict=True))
        predictors[name] = predictor(name, found.__getitem__)
        if not any(isinstance(answer, str) for answer in found.values()):
            references[f"{name}, as it comes"] = as_it_comes(found.__getitem__)
    model = Model.load(one.path)
    _, judged = evaluate(
        model,
        one.dataset,
        seen_cells(one),
        one.split.heldout,
        seed=one.seed,
        references=references,
        peers=predictors,
    )
    rows = [row for condition in judged for row in condition.rows]
    return task_run.scores_of(metrics_json(rows)["metrics"], one.fold.index + 1, one.seed, min_cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    arguments = parser.parse_args()
    peers = dict(text.partition("=")[::2] for text in arguments.peer)
    task = tasks.load(arguments.task)
    seeds = task.seeds[: arguments.seeds or len(task.seeds)]
    scores: list[Score] = []
    facts: dict[int, dict] = {}
    for one in task_run.finished(task, out=arguments.runs, data=arguments.data):
        if one.seed not in seeds:
            continue
        number = one.fold.index + 1
        print(f"fold {number} ({one.fold.name}), seed {one.seed}", flush=True)
        scores += judge(one, peers, arguments.out, task.min_cells)
        fold = facts.setdefault(
            number,
            {"fold": number, "name": one.fold.name, "holdout": list(one.fold.holdout), "audit": [], "choice": None},
        )
        fold["audit"].append(json.loads((one.path / "data.json").read_text())["audit"])
    found = sorted({score.seed for score in scores})
    write(arguments.out, Result(task.name, task.described(), "jax", found, list(facts.values()), scores))
    print(arguments.out / "task.md")


if __name__ == "__main__":
    main()
