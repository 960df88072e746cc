"""The run report: one self-contained HTML file, written from plain records.

The same payload gives the same bytes: no times, no random ids. The page needs no script and fetches nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pf_core import plots
from pf_core.backends import stage_of
from pf_core.checkpoint import write_atomic
from pf_core.config import Config
from pf_core.history import Record, bad_steps, by_stage, read_history
from pf_core.page import Section, cell, template
from pf_core.verdict import (
    SHOWN,
    Condition,
    MetricRow,
    best,
    by_condition,
    columns,
    count,
    judge,
    largest,
    metrics_json,
    number,
    print_metrics,
)

__all__ = [
    "Audit",
    "Condition",
    "DataSummary",
    "Group",
    "HeldOutCells",
    "MetricRow",
    "Operator",
    "Record",
    "Report",
    "metrics_json",
    "print_metrics",
    "read_history",
    "write_report",
]

STAGES = {
    "vae": "Stage 1, latent model",
    "operator": "Stage 2, operators",
    "joint": "Stage 3, joint",
    "cvae": "Stage 1, latent model and discriminator",
    "flow": "Stage 2, vector field",
}
PARTS = {
    "nll": "negative log-likelihood (nats)",
    "kl": "KL divergence (nats)",
    "energy": "energy distance, latent",
    "gene_energy": "energy distance, decoded profiles",
    "spectral": "spectral penalty",
    "shrinkage": "shrinkage, |A − I|² weighted",
    "sigma_max": "largest operator norm",
    "discriminator": "cross-entropy of the discriminator (nats)",
    "accuracy": "accuracy of the discriminator",
    "adversary": "adversary, before its weight (nats)",
    "displacement": "loss of a field that is zero",
}
PROFILE_ROWS = 60  # conditions in the heat map of response profiles
ROWS_OPEN = 24  # rows of a table that stand open; a longer one is folded


@dataclass(frozen=True)
class HeldOutCells:
    """Cells of one held-out condition on the first two principal components, each (n, 2).

    `predicted` is None where the model declined. `control` holds the cells that it starts from, see `Report.origin`.
    """

    condition: Condition
    control: np.ndarray
    real: np.ndarray
    predicted: np.ndarray | None


@dataclass(frozen=True)
class Group:
    """Cells of one condition, and in one batch where `batch` names it, with the controls matched to them."""

    condition: Condition
    n_cells: int
    n_controls: int
    batch: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class DataSummary:
    """What was read. `dropped` counts what was left out by reason; `facts` are further lines, shown as they are."""

    source: str
    n_cells: int
    n_genes: int
    n_control: int
    n_train: int
    n_validation: int
    n_heldout: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Audit:
    """Held-out cells looked up among the training and validation cells, by name and by content.

    `trivial` counts the held-out cells with too few counts for equal content to mean anything; `shared_trivial` those
    of them that do have a twin.
    """

    n_seen: int
    n_heldout: int
    shared_names: int
    shared_contents: int
    trivial: int = 0
    shared_trivial: int = 0
    examples: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Audit:
        """From what `splits.leak_audit` returns."""
        counts = {key: int(found[key]) for key in ("shared_names", "shared_contents", "trivial", "shared_trivial")}
        return cls(int(found["seen"]), int(found["heldout"]), **counts, examples=tuple(found["examples"]))

    @property
    def clean(self) -> bool:
        return self.shared_names == 0 and self.shared_contents == 0


@dataclass(frozen=True)
class Operator:
    """The operator of one condition, K(z) = A z + b, with its response profile."""

    condition: Condition
    A: np.ndarray  # (n_latent, n_latent)
    b: np.ndarray  # (n_latent,)
    alpha: np.ndarray  # (n_bases,)
    beta: np.ndarray  # (n_bases,)
    held_out: bool = False


@dataclass(frozen=True)
class Report:
    """Everything the report shows. Every part but the title and the configuration may be empty."""

    title: str
    config: Config
    metrics: tuple[MetricRow, ...] = ()
    cells: tuple[HeldOutCells, ...] = ()
    data: DataSummary | None = None
    audit: Audit | None = None
    history: tuple[Record, ...] = ()
    operators: tuple[Operator, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # under the title: backend, device, output mode, ...
    explained: tuple[float, float] | None = None  # share of variance of the two principal components
    notes: tuple[str, ...] = ()  # sentences under the verdict
    origin: str = "control"  # what predictions start from
    sections: tuple[Section, ...] = ()  # further sections, before the data


def write_report(path: str | Path, payload: Report) -> None:
    """Write the report as one HTML file, whole or not at all."""
    # A file name that is not UTF-8 must not cost the report: such characters become references.
    write_atomic(Path(path), render(payload).encode(errors="xmlcharrefreplace"))


def render(payload: Report) -> str:
    """The HTML of a report."""
    return template("report.html.jinja", number=number, count=count, cell=cell).render(
        report=payload,
        judged=_judgement(payload),
        clouds=_clouds(payload),
        data=_data(payload),
        stages=_stages(payload),
        operators=_operators(payload),
        toml=payload.config.to_toml(),
        rows_open=ROWS_OPEN,
    )


# --- what each section shows --------------------------------------------------------------------------------------
def _judgement(payload: Report) -> dict[str, Any]:
    verdict, groups, metrics = judge(payload.metrics), by_condition(payload.metrics), columns(payload.metrics)
    methods: dict[str, str] = {row.method: row.kind for row in payload.metrics}
    shown = largest(groups)
    found = [
        (
            condition.name,
            {row.method: row.values.get(verdict.metric, math.nan) for row in groups[condition] if not row.declined},
        )
        for condition in shown
    ]
    ours = [method for method, kind in methods.items() if kind == "model"]
    others = [method for method, kind in methods.items() if kind != "model"]
    return {
        "verdict": verdict,
        "metrics": metrics,
        "groups": [
            (condition, rows, {metric.key: best(rows, metric) for metric in metrics})
            for condition, rows in groups.items()
        ],
        "figure": plots.energies(found, ours, others) if groups else "",
        "shown": len(shown),
        "total": len(groups),
    }


def _clouds(payload: Report) -> dict[str, Any]:
    kept = set(largest([one.condition for one in payload.cells]))
    shown = [one for one in payload.cells if one.condition in kept]
    limits = plots.shared_limits(
        [points for one in shown for points in (one.control, one.real, one.predicted) if points is not None]
    )
    share = payload.explained
    labels = (f"PC 1 ({share[0]:.0%} of variance)", f"PC 2 ({share[1]:.0%})") if share else ("PC 1", "PC 2")
    figures = [
        (one, plots.cloud(one.condition.name, one.control, one.real, one.predicted, limits, labels, payload.origin))
        for one in shown
    ]
    return {"figures": figures, "total": len(payload.cells)}


def _data(payload: Report) -> dict[str, Any] | None:
    data = payload.data
    if data is None:
        return None
    conditions = {group.condition for group in data.groups}
    contexts = {(group.condition.tissue, group.condition.cell_type) for group in data.groups}
    tiles = {
        "cells": data.n_cells,
        "genes": data.n_genes,
        "conditions": len(conditions),
        "contexts": len(contexts),
        "control cells": data.n_control,
        "training cells": data.n_train,
        "validation cells": data.n_validation,
        "held-out cells": data.n_heldout,
    }
    groups = sorted(data.groups, key=lambda group: not group.held_out)
    return {"tiles": tiles, "groups": groups, "batches": any(group.batch for group in groups)}


def _series(records: Sequence[Record], read: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record.step, value) for record in records if (value := read(record)) is not None]
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


def _stages(payload: Report) -> list[dict[str, Any]]:
    refused = bad_steps(payload.history)
    stages = []
    for stage, records in by_stage(payload.history).items():
        if not records:
            continue
        base, member = stage_of(stage)  # further members of an ensemble: whether they went well, not in every detail
        events = [(record.step, record.event) for record in payload.history if record.stage == stage and record.event]
        marks: dict[str, Any] = {
            "events": [step for step, _ in events],
            "bad": [step for step, _ in refused.get(stage, [])],
        }
        parts = list(dict.fromkeys(name for record in records for name in record.parts))
        extra = [name for record in records for name in record.validation]
        figures = [
            plots.curve(
                "loss",
                _series(records, lambda record: record.loss),
                _series(records, lambda record: record.validation.get("loss")),
                **marks,
            )
        ]
        for name in () if member else dict.fromkeys(parts + extra):
            if name != "loss":
                train = _series(records, lambda record, name=name: record.parts.get(name))
                validation = _series(records, lambda record, name=name: record.validation.get(name))
                bound = {"level": payload.config.operator.rho_max, "level_name": "ρ max"} if name == "sigma_max" else {}
                figures.append(plots.curve(PARTS.get(name, name), train, validation, **bound))
        if not member:
            figures.append(plots.curve("learning rate", _series(records, lambda record: record.lr), log=False))
        limit = getattr(getattr(payload.config, f"stage_{base}", None), "max_norm", None)
        clip = {} if limit is None else {"level": limit, "level_name": "clipped above"}
        norms = plots.curve(
            "gradient norm, all parameters", _series(records, lambda record: record.grad_norm), **marks, **clip
        )
        stages.append(
            {
                "title": STAGES.get(base, base) + (f", member {member + 1}" if member else ""),
                "steps": records[-1].step,
                "figures": figures,
                "events": events,
                "refused": sum(count for _, count in refused.get(stage, [])),
                "gradients": [norms, *(() if member else _gradient_map(records))],
                "health": _health(records),
            }
        )
    return stages


def _gradient_map(records: Sequence[Record]) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record.grad_norms))
    if not names:
        return []
    # NaN means no value recorded; a value that is not finite is marked as such.
    table = {name: np.full(len(records), np.nan) for name in names}
    for j, record in enumerate(records):
        for name, value in record.grad_norms.items():
            table[name][j] = value if math.isfinite(value) else math.inf
    return [plots.gradient_map(np.array([record.step for record in records]), table)]


def _health(records: Sequence[Record]) -> list[dict[str, Any]]:
    judged = [record for record in records if record.health]
    rows = []
    for name in dict.fromkeys(name for record in judged for name in record.health):
        verdicts = [(record.step, record.health[name]) for record in judged if name in record.health]
        counts = Counter(verdict for _, verdict in verdicts if verdict != "ok")
        first = {verdict: next(step for step, other in verdicts if other == verdict) for verdict in counts}
        history = ", ".join(f"{verdict} {count}× (first at step {first[verdict]})" for verdict, count in counts.items())
        norms = [record.grad_norms[name] for record in records if name in record.grad_norms]
        rows.append(
            {
                "name": name,
                "last": verdicts[-1][1],
                "norm": norms[-1] if norms else math.nan,
                "n": len(verdicts),
                "history": history,
            }
        )
    return rows


def _operators(payload: Report) -> dict[str, Any] | None:
    operators = payload.operators
    if not operators:
        return None
    rho_max = payload.config.operator.rho_max
    rows = [_measures(operator) for operator in operators]
    names = [f"{operator.condition.name}{' (held out)' if operator.held_out else ''}" for operator in operators]

    strength = [float(np.nan_to_num(np.hypot(np.linalg.norm(o.alpha), np.linalg.norm(o.beta)))) for o in operators]
    kept = sorted(sorted(range(len(operators)), key=lambda i: (-strength[i], i))[:PROFILE_ROWS])
    alpha, beta = (np.array([getattr(operators[i], name) for i in kept], float) for name in ("alpha", "beta"))
    profile = plots.profiles([names[i] for i in kept], alpha, beta) if alpha.shape[1] else ""

    # Held-out operators first, then the largest radius: those are the ones a reader asks about.
    radius = [float(np.nan_to_num(row["radius"])) for row in rows]
    spectra = sorted(range(len(rows)), key=lambda i: (not operators[i].held_out, -radius[i], i))[:SHOWN]
    every = np.concatenate([row["eigenvalues"] for row in rows])
    finite = every[np.isfinite(every)]
    limits = _window(finite) if len(finite) else None
    figures = [("all conditions", plots.eigenvalues("all conditions", every, rho_max))]
    figures += [(names[i], plots.eigenvalues(names[i], rows[i]["eigenvalues"], rho_max, limits)) for i in spectra]
    return {
        "profile": profile,
        "profile_rows": len(kept),
        "rows": rows,
        "spectra": figures,
        "spectra_shown": len(spectra),
        "total": len(rows),
    }


def _measures(operator: Operator) -> dict[str, Any]:
    A = np.asarray(operator.A, float)
    usable = bool(np.isfinite(A).all())
    values = np.linalg.eigvals(A) if usable else np.empty(0, complex)
    return {
        "operator": operator,
        "eigenvalues": values,
        "norm": float(np.linalg.norm(A, 2)) if usable else math.nan,
        "radius": float(np.abs(values).max()) if usable else math.nan,
        "expanding": int((np.abs(values) > 1).sum()) if usable else None,
        "distance": float(np.linalg.norm(A - np.eye(len(A)))),
        "shift": float(np.linalg.norm(operator.b)),
    }


def _window(values: np.ndarray) -> tuple[float, float, float, float]:
    """A square view of the complex plane that holds all eigenvalues and the point 1."""
    real, imaginary = np.append(np.real(values), 1.0), np.append(np.imag(values), 0.0)
    half = 0.56 * max(float(np.ptp(real)), float(np.ptp(imaginary)), 0.1)
    x, y = (real.min() + real.max()) / 2, (imaginary.min() + imaginary.max()) / 2
    return float(x - half), float(x + half), float(y - half), float(y + half)
