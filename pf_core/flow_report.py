"""The report of a flow run: its course, its network, tissue left in the latents, and what the report of any run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pf_core import report
from pf_core.backends import Backend
from pf_core.checkpoint import Run
from pf_core.config import Config
from pf_core.errors import RunError
from pf_core.history import read_history
from pf_core.page import Section, Table

__all__ = ["payload", "read_latents"]


def payload(run: Run, config: Config, twin: Backend, **judged: Any) -> report.Report:
    """What the report shows, from the files of a trained run.

    Args:
        run: with data.json and latents.json.
        config: of the run.
        twin: the backend that computed.
        judged: further fields of report.Report, such as metrics and cells; sections come after those of the run.
    """
    facts, path = run.read_json("data.json"), run.path / "history.jsonl"
    source = Path(facts["source"]).name if facts["source"] else "AnnData object"
    sections = (_course(facts), *_latents(run, facts), *_network(facts["network"]))
    summary, cells = facts["summary"], facts["cells"]
    return report.Report(
        title=source,
        config=config,
        origin="neighbouring time points",
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
        versions=twin.describe(),
        facts={"backend": twin.name, "system": "flow", **judged.pop("facts", {})},
        sections=(*sections, *judged.pop("sections", ())),
        **judged,
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
