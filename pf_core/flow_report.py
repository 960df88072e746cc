"""What ends a flow run: held-out time points judged, and a report of its course, its network and its latents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import report
from pf_core.checkpoint import Run
from pf_core.config import Output
from pf_core.data import Dataset
from pf_core.errors import RunError
from pf_core.flow_judgement import Judged, evaluate
from pf_core.history import read_history
from pf_core.metrics import PCA
from pf_core.page import Section, Table
from pf_core.splits import Split
from pf_core.times import Course
from pf_core.verdict import metrics_json, print_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from pf_core.flow_model import FlowModel

__all__ = ["judge_run", "payload", "read_latents"]


def judge_run(
    model: FlowModel,
    dataset: Dataset,
    course: Course,
    split: Split,
    *,
    output: Output = "transport",
    console: Console | None = None,
) -> list[Judged]:
    """Judge a model on the held-out time points of its own run and write metrics.json and report.html.

    Args:
        model: a trained flow model; its run receives the files.
        dataset: with the model's genes.
        course: its times.
        split: the run's split.
        output: the output mode of the model.
        console: where the table is printed.
    """
    seen = np.union1d(split.train, split.validation)
    ruler, judged = evaluate(model, dataset, course, seen, split.heldout, output=output, seed=model.config.seed)
    rows = tuple(row for one in judged for row in one.rows)
    model.run.write("metrics.json", json.dumps(metrics_json(rows), indent=1) + "\n")
    model.run.write("report.html", report.render(payload(model, judged, ruler, output)))
    model.run.commit()
    if console is not None:
        print_metrics(console, rows)
    return judged


def payload(model: FlowModel, judged: Sequence[Judged], ruler: PCA, output: Output) -> report.Report:
    """What the report shows: the judgement, and the files of the run, data.json and latents.json among them."""
    run = model.run
    facts, path = run.read_json("data.json"), run.path / "history.jsonl"
    source = Path(facts["source"]).name if facts["source"] else "AnnData object"
    sections = (_course(facts), *_latents(run, facts), *_network(facts["network"]))
    summary, cells = facts["summary"], facts["cells"]
    return report.Report(
        title=source,
        config=model.config,
        metrics=tuple(row for one in judged for row in one.rows),
        cells=tuple(
            report.HeldOutCells(one.condition, one.neighbours, one.real, one.predicted)
            for one in judged
            if one.predicted is not None
        ),
        origin="neighbouring time points",
        explained=(float(ruler.share[0]), float(ruler.share[1])) if len(ruler.share) > 1 else None,
        data=report.DataSummary(
            source=source,
            n_cells=sum(cells.values()),
            n_genes=facts["n_genes"],
            n_control=facts["n_control"],
            n_train=cells["train"],
            n_validation=cells["validation"],
            n_heldout=cells["heldout"],
            dropped=summary.get("dropped", {}),
            facts={key: value for key, value in summary.items() if isinstance(value, str | int | float)},
        ),
        audit=report.Audit.of(facts["audit"]),
        history=read_history(path) if path.exists() else (),
        versions=model.backend.describe(),
        facts={"backend": model.backend.name, "system": "flow", "output": output},
        sections=sections,
    )


def read_latents(run: Run) -> dict[str, Any]:
    """What a finished flow run knows of its latents.

    Raises:
        RunError: no finished flow run.
    """
    if not run.has("latents.json"):
        raise RunError(f"{run.path} is no finished run of the flow system (it has no latents.json); give another")
    return run.read_json("latents.json")


def _course(facts: Mapping[str, Any]) -> Section:
    course, axis = facts["course"], facts["time"]
    unit = f" {axis['unit']}" if axis["unit"] else ""
    texts = [f"The flow's own time runs from 0 at {axis['first']:g}{unit} to 1 at {axis['last']:g}{unit}."]
    for key, what in (("points_without_cells", "no cell at"), ("points_with_few_cells", "few training cells at")):
        if course[key]:
            texts.append(f"There are {what} {', '.join(course[key])}.".replace("are no cell", "is no cell"))
    alone = [f"{one['label']} in {one['tissue']}" for one in course["series"] if len(one["points"]) < 2]
    if alone:
        texts.append(f"One time point only, nothing to learn a flow from: {', '.join(alone)}.")
    points = Table(
        "Cells per time point.",
        ("time point", f"time ({axis['unit']})" if unit else "time", "training", "validation", "held out"),
        tuple(
            (point["name"], float(point["time"]), point["train"], point["validation"], point["heldout"])
            for point in course["points"]
        ),
    )
    series = Table(
        "Series that are coupled: training cells at each time point. A condition begins with controls where it has no "
        "earlier cells of its own.",
        ("condition", "tissue", "begins with", "time points (training cells)"),
        tuple(
            (
                one["label"],
                one["tissue"],
                "control" if one["starts_from_control"] else one["label"],
                ", ".join(f"{name} ({n:,})" for name, n in zip(one["points"], one["cells"], strict=True)),
            )
            for one in course["series"]
        ),
        words=(1, 2, 3),
    )
    return Section("Time course", tuple(texts), tables=(points, series))


def _latents(run: Run, facts: Mapping[str, Any]) -> tuple[Section, ...]:
    """Tissue left in the latents; nothing where there is one tissue."""
    found = read_latents(run)["tissue"]
    if found["accuracy"] is None:
        return ()
    rows = [("this run", found["accuracy"], found["majority"], found["cells"])]
    if facts["beside"]:
        path = run.path / facts["beside"]
        other = read_latents(Run.open(path))["tissue"]
        rows.append((path.resolve().name, other["accuracy"], other["majority"], other["cells"]))
    text = (
        "A classifier that was not part of training reads the tissue from the latents of training and validation "
        "cells. An accuracy at the share of the commonest tissue means that nothing is left to be read."
    )
    table = Table(
        "Accuracy of a fresh classifier (support vectors, Gaussian kernel, five folds).",
        ("latents", "accuracy", "commonest tissue's share", "cells"),
        tuple(rows),
    )
    return (Section("Tissue left in the latents", (text,), tables=(table,)),)


def _network(found: Mapping[str, Any] | None) -> tuple[Section, ...]:
    if found is None:
        return ()
    rows = tuple((key.replace("_", " "), value) for key, value in found.items())
    return (Section("Network", tables=(Table("What was kept of the network.", ("fact", "value"), rows, words=()),)),)
