"""What ends a run: its held-out conditions judged, metrics.json and report.html written, the table on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import report
from pf_core.config import Output
from pf_core.data import Dataset
from pf_core.evaluation import Judged, Reference, evaluate
from pf_core.history import read_history
from pf_core.labels import CONTROL
from pf_core.metrics import PCA
from pf_core.model import Model
from pf_core.splits import Split
from pf_core.verdict import Condition, metrics_json, print_metrics

if TYPE_CHECKING:
    from rich.console import Console


def judge_run(
    model: Model,
    dataset: Dataset,
    split: Split,
    *,
    output: Output = "transport",
    references: Mapping[str, Reference] | None = None,
    console: Console | None = None,
) -> list[Judged]:
    """Judge a model on the held-out cells of its own run and write metrics.json and report.html.

    Args:
        model: a trained model; its run receives the files.
        dataset: with the model's genes.
        split: the run's split.
        output: the output mode of model and baselines.
        references: further cells shown for scale.
        console: where the table is printed.
    """
    seen = np.sort(np.concatenate([split.train, split.validation]))
    ruler, judged = evaluate(
        model, dataset, seen, split.heldout, output=output, seed=model.config.seed, references=references
    )
    rows = tuple(row for one in judged for row in one.rows)
    model.run.write("metrics.json", json.dumps(metrics_json(rows), indent=1) + "\n")
    model.run.write("report.html", report.render(_payload(model, judged, ruler, output)))
    model.run.commit()
    if console is not None:
        print_metrics(console, rows)
    return judged


def _payload(model: Model, judged: list[Judged], ruler: PCA, output: Output) -> report.Report:
    facts = model.run.read_json("data.json")
    history_path = model.run.path / "history.jsonl"
    versions = model.backend.describe()
    return report.Report(
        title=_source(facts),
        config=model.config,
        metrics=tuple(row for one in judged for row in one.rows),
        cells=tuple(
            report.HeldOutCells(one.condition, one.control, one.real, one.predicted)
            for one in judged
            if one.predicted is not None
        ),
        data=_summary(facts),
        audit=_audit(facts["audit"], facts["cells"]),
        history=read_history(history_path) if history_path.exists() else (),
        operators=_operators(model, facts),
        versions=versions,
        facts={"backend": model.backend.name, "output": output},
        explained=(float(ruler.share[0]), float(ruler.share[1])) if len(ruler.share) > 1 else None,
    )


def _source(facts: Mapping[str, Any]) -> str:
    return Path(facts["source"]).name if facts["source"] else "AnnData object"


def _summary(facts: Mapping[str, Any]) -> report.DataSummary:
    summary = facts["summary"]
    cells = facts["cells"]
    groups = tuple(
        report.Group(
            Condition(row["label"], row["tissue"], row["cell_type"], row["cells"]),
            row["cells"],
            row["controls"],
            row["batch"],
        )
        for row in facts["contexts"]
        if row["label"] != CONTROL
    )
    return report.DataSummary(
        source=_source(facts),
        n_cells=sum(cells.values()),
        n_genes=facts["n_genes"],
        n_control=facts["n_control"],
        n_train=cells["train"],
        n_validation=cells["validation"],
        n_heldout=cells["heldout"],
        dropped=summary.get("dropped", {}),
        facts={key: value for key, value in summary.items() if isinstance(value, str | int | float)},
        groups=groups,
    )


def _audit(audit: Mapping[str, Any], cells: Mapping[str, int]) -> report.Audit:
    return report.Audit(
        n_seen=cells["train"] + cells["validation"],
        n_heldout=cells["heldout"],
        shared_names=audit["shared_names"],
        shared_contents=audit["shared_contents"],
        trivial=audit["trivial"],
        shared_trivial=audit["shared_trivial"],
    )


def _operators(model: Model, facts: Mapping[str, Any]) -> tuple[report.Operator, ...]:
    """The operator of every distinct condition and tissue, held-out ones included, batches pooled."""
    held = {(label, tissue) for label, tissue, _ in facts["heldout"]}
    trained = {(row["label"], row["tissue"]) for row in facts["contexts"] if row["label"] != CONTROL}
    found = []
    for label, tissue in sorted(trained | held):
        try:
            operator = model.operator(label, tissue=tissue)
        except ValueError:
            continue  # an unseen perturbation without features: the metric table says why it was declined
        condition = Condition(label, tissue)
        found.append(
            report.Operator(
                condition, operator.A, operator.b, operator.alpha, operator.beta, (label, tissue) not in trained
            )
        )
    return tuple(found)
