"""Does the model beat the simple answers? One set of rows for the screen, metrics.json and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["METRICS", "Condition", "MetricRow", "Verdict", "judge", "metrics_json", "number", "print_metrics"]

DECIDING_METRIC = (
    "energy_pca_u"  # the unbiased estimator: its expectation does not depend on how many cells a group has
)
SHOWN = 12  # conditions on the screen and in small multiples; all of them are in metrics.json


@dataclass(frozen=True)
class Metric:
    """A column of the metric table: its key in `MetricRow.values`, headings, and which end is the good one."""

    key: str
    heading: str
    short: str
    best: Literal["low", "high"]


METRICS = (
    Metric("energy_pca_u", "Energy distance, PCA (U)", "E pca U", "low"),
    Metric("energy_pca_v", "Energy distance, PCA (V)", "E pca V", "low"),
    Metric("energy_latent_u", "Energy distance, latent (U)", "E lat U", "low"),
    Metric("energy_latent_v", "Energy distance, latent (V)", "E lat V", "low"),
    Metric("pearson_delta", "Pearson of mean change", "Pearson", "high"),
    Metric("r2", "R² of means", "R2", "high"),
    Metric("mse", "MSE of means", "MSE", "low"),
)


@dataclass(frozen=True)
class Condition:
    """A perturbation label in a context, at a time in a time course; `n_cells` real cells carry it."""

    label: str
    tissue: str = ""
    cell_type: str = ""
    n_cells: int = field(default=0, compare=False)
    time: str = ""  # of a time course, with its unit

    @property
    def name(self) -> str:
        what = f"{self.label} at {self.time}" if self.time else self.label
        where = ", ".join(part for part in (self.cell_type, self.tissue) if part not in ("", "all"))
        return f"{what} in {where}" if where else what


@dataclass(frozen=True)
class MetricRow:
    """One method judged on one held-out condition.

    `kind` is "model" (at most one row per condition), "baseline" (a simple answer to be beaten) or "reference" (shown
    for scale and never compared, for example a second draw of real cells). `declined` says why there is no answer.
    """

    condition: Condition
    method: str
    values: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["model", "baseline", "reference"] = "baseline"
    declined: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The model against the best simple answer in one condition. A value that does not exist is NaN."""

    condition: Condition
    outcome: Literal["better", "worse", "unknown"]
    model: float
    baseline: str
    baseline_value: float
    lost_to: tuple[str, ...]  # baselines that are as good or better, best first


@dataclass(frozen=True)
class Against:
    """The model against one simple answer, over the conditions in which both have a finite value."""

    baseline: str
    wins: int
    n_conditions: int
    model_mean: float
    baseline_mean: float


@dataclass(frozen=True)
class Verdict:
    """One sentence, and what it rests on."""

    outcome: Literal["yes", "mixed", "no", "unknown"]
    sentence: str
    metric: str
    conditions: tuple[Comparison, ...]
    against: tuple[Against, ...]


def number(value: float | None) -> str:
    """Three significant digits, the same on the screen and in the report."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size and (size >= 1e5 or size < 1e-3):
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if size else "0"


def count(n: int, noun: str) -> str:
    """A number of things, in words that fit one of them as well."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def by_condition(rows: Iterable[MetricRow]) -> dict[Condition, list[MetricRow]]:
    """Rows grouped by condition, both in the order they came."""
    groups: dict[Condition, list[MetricRow]] = {}
    for row in rows:
        group = groups.setdefault(row.condition, [])
        if any(other.method == row.method for other in group):
            raise ValueError(f"{row.condition.name} has two rows of the method {row.method}; give one row per method")
        if row.kind == "model" and any(other.kind == "model" for other in group):
            raise ValueError(f'{row.condition.name} has two rows of kind "model"; make all but one a "reference"')
        group.append(row)
    return groups


def largest(conditions: Iterable[Condition], count: int = SHOWN) -> list[Condition]:
    """The `count` conditions with the most cells, in their order of arrival."""
    order = list(conditions)
    kept = sorted(range(len(order)), key=lambda i: (-order[i].n_cells, i))[:count]
    return [order[i] for i in sorted(kept)]


def columns(rows: Sequence[MetricRow]) -> list[Metric]:
    """The metrics that occur in the rows: the known ones in their order, then any others by name."""
    present = {key for row in rows for key in row.values}
    known = {metric.key for metric in METRICS}
    others = [Metric(key, key, key, "low") for key in sorted(present - known)]
    return [metric for metric in METRICS if metric.key in present] + others


def best(rows: Sequence[MetricRow], metric: Metric) -> set[str]:
    """The methods with the best value, references left out; none where fewer than two methods have a value."""
    values = {
        row.method: row.values[metric.key]
        for row in rows
        if row.kind != "reference" and not row.declined and math.isfinite(row.values.get(metric.key, math.nan))
    }
    if len(values) < 2 or metric not in METRICS:
        return set()
    top = min(values.values()) if metric.best == "low" else max(values.values())
    return {method for method, value in values.items() if value == top}


def _finite(rows: Iterable[MetricRow], kind: str, metric: str) -> list[tuple[float, str]]:
    found = ((row.values.get(metric, math.nan), row.method) for row in rows if row.kind == kind and not row.declined)
    return sorted((value, method) for value, method in found if math.isfinite(value))


def judge(rows: Sequence[MetricRow], *, metric: str = DECIDING_METRIC) -> Verdict:
    """Compare the model with every simple answer on one metric of which less is better. A tie is not a win."""
    comparisons: list[Comparison] = []
    pairs: dict[str, list[tuple[float, float]]] = {}
    for condition, group in by_condition(rows).items():
        model = _finite(group, "model", metric)
        simple = _finite(group, "baseline", metric)
        value = model[0][0] if model else math.nan
        lowest, name = simple[0] if simple else (math.nan, "")
        lost_to = tuple(method for other, method in simple if other <= value)
        outcome = "unknown" if not model or not simple else "worse" if lost_to else "better"
        comparisons.append(Comparison(condition, outcome, value, name, lowest, lost_to))
        if model:
            for other, method in simple:
                pairs.setdefault(method, []).append((value, other))
    order = {row.method: i for i, row in reversed(list(enumerate(rows)))}
    against = tuple(
        Against(
            baseline=method,
            wins=sum(ours < theirs for ours, theirs in pairs[method]),
            n_conditions=len(pairs[method]),
            model_mean=math.fsum(ours for ours, _ in pairs[method]) / len(pairs[method]),
            baseline_mean=math.fsum(theirs for _, theirs in pairs[method]) / len(pairs[method]),
        )
        for method in sorted(pairs, key=lambda method: order[method])
    )
    outcome, sentence = _sentence(comparisons)
    return Verdict(outcome, sentence, metric, tuple(comparisons), against)


def _sentence(comparisons: Sequence[Comparison]) -> tuple[Literal["yes", "mixed", "no", "unknown"], str]:
    if not comparisons:
        return "unknown", "No condition was held out, so this run does not show how well the model predicts."
    judged = [comparison for comparison in comparisons if comparison.outcome != "unknown"]
    left = len(comparisons) - len(judged)
    tail = f" {left} of {len(comparisons)} conditions could not be judged." if left else ""
    if not judged:
        return (
            "unknown",
            "No held-out condition could be judged: the model or every simple answer lacks a finite value.",
        )
    lost = [comparison for comparison in judged if comparison.outcome == "worse"]
    n = len(judged)
    where = f"in the held-out condition {judged[0].condition.name}" if n == 1 else f"in all {n} held-out conditions"
    if not lost:
        return "yes", f"The model beats every simple answer {where}.{tail}"
    if len(lost) == n:
        where = (
            f"in the held-out condition {judged[0].condition.name}"
            if n == 1
            else f"in any of the {n} held-out conditions"
        )
        return "no", f"The model does not beat the simple answers {where}.{tail}"
    named = [f"{comparison.condition.name} (to {comparison.lost_to[0]})" for comparison in lost]
    listed = "; ".join(named[:3]) + (f"; and {len(named) - 3} more" if len(named) > 3 else "")
    won = f"The model beats every simple answer in {n - len(lost)} of {n} held-out conditions."
    return "mixed", f"{won} It loses in {listed}.{tail}"


def _json(value: Any) -> Any:
    """NaN and infinities become null: strict JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value


def metrics_json(rows: Sequence[MetricRow]) -> dict[str, Any]:
    """What metrics.json holds: {"verdict": ..., "metrics": [one flat object per row]}, strict JSON, full precision."""
    flat = [
        {
            "condition": row.condition.name,
            "label": row.condition.label,
            "tissue": row.condition.tissue,
            "cell_type": row.condition.cell_type,
            **({"time": row.condition.time} if row.condition.time else {}),
            "cells": row.condition.n_cells,
            "method": row.method,
            "kind": row.kind,
            "declined": row.declined,
        }
        | {key: float(value) for key, value in row.values.items()}
        for row in rows
    ]
    verdict = asdict(judge(rows))
    for comparison, found in zip(verdict["conditions"], judge(rows).conditions, strict=True):
        comparison["condition"] = found.condition.name
    return _json({"verdict": verdict, "metrics": flat})


def print_metrics(console: Console, rows: Sequence[MetricRow]) -> None:
    """The verdict and the table of METRICS on a terminal. The best value of a condition is bold and starred."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    verdict, groups = judge(rows), by_condition(rows)
    metrics = [metric for metric in columns(rows) if metric in METRICS]  # as wide as a terminal; the report has all
    if groups:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("held-out condition", overflow="fold")
        for metric in metrics:
            table.add_column(metric.short, justify="right", no_wrap=True)
        shown, declined = largest(groups), {}
        for condition in shown:
            table.add_section()
            table.add_row(Text(condition.name, style="bold"))
            winners = {metric.key: best(groups[condition], metric) for metric in metrics}
            for row in groups[condition]:
                if row.declined:
                    declined[f"{row.method}: declined, {row.declined}"] = None
                    continue
                cells = []
                for metric in metrics:
                    won = row.method in winners[metric.key]
                    text = number(row.values.get(metric.key))
                    cells.append(Text(f"{text}*" if won else f"{text} ", style="bold" if won else ""))
                table.add_row(Text(f"  {row.method}"), *cells)
        console.print(table)
        for reason in declined:
            console.print(Text(reason, style="dim"))
        if len(shown) < len(groups):
            console.print(f"The {len(shown)} largest of {len(groups)} conditions are shown; metrics.json has all.")
        console.print(
            "* best of the condition. Energy distances and MSE: less is better; Pearson and R2: more is better."
        )
    console.print(Text(verdict.sentence, style="bold"))
    for one in verdict.against:
        console.print(
            f"  against {one.baseline}: better in {one.wins} of {one.n_conditions}, "
            f"mean energy distance {number(one.model_mean)} against {number(one.baseline_mean)}",
            markup=False,
            highlight=False,
        )
