"""What a task says: means with standard errors, paired tests, folds won; as a table, Markdown, JSON and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core.checkpoint import write_atomic
from pf_core.verdict import DECIDING_METRIC, METRICS, Metric, count, number

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Result", "Score", "Summary", "Test", "compare", "markdown", "plot", "summarise", "write"]

SHOWN = ("energy_pca_u", "pearson_delta", "r2", "mse")
INTERVALS = {"coverage_90": "all genes", "coverage_90_top": "the 200 with the largest predicted change"}
EFFECT = "effect_p"  # of the real cells against the controls, in the row of the prediction that is the controls
LEVEL = 0.05


@dataclass(frozen=True)
class Score:
    """One method on one held-out condition of one fold and seed; `kind` as in verdict.MetricRow."""

    fold: int
    seed: int
    condition: str
    cells: int
    method: str
    kind: str
    declined: str | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """A task that was run: what it was, the facts of every fold (held out, leak audit, choice), and every score."""

    name: str
    task: Mapping[str, Any]
    backend: str
    seeds: list[int]
    folds: list[dict[str, Any]]
    scores: list[Score]


@dataclass(frozen=True)
class Summary:
    """One method and metric over a task.

    mean: over seeds of the mean over conditions. se_seeds: standard error of that mean over seeds, NaN for one seed.
    se_conditions: standard error over conditions of their means over seeds, NaN for one condition.
    n_conditions: with a finite value; methods that decline some conditions have fewer, and another mean.
    """

    method: str
    kind: str
    metric: str
    mean: float
    se_seeds: float
    se_conditions: float
    n_conditions: int
    n_seeds: int


@dataclass(frozen=True)
class Test:
    """The model against one baseline, over conditions and seeds where both have a finite value.

    difference: mean of model - baseline. p: two-sided Wilcoxon signed-rank test over the n pairs of condition and
    seed; p_conditions: over the n_conditions means over seeds, which unlike the seeds are separate biological cases.
    Neither is corrected for the number of baselines; NaN where all differences are 0. A tie wins nothing.
    """

    __test__ = False  # no pytest class

    baseline: str
    metric: str
    difference: float
    n: int
    p: float
    n_conditions: int
    p_conditions: float
    wins: int  # conditions won on the mean over seeds
    folds_won: int
    n_folds: int


def _values(scores: Iterable[Score], method: str, metric: str) -> dict[tuple[int, str, int], float]:
    """Finite values by (fold, condition, seed)."""
    found = {
        (score.fold, score.condition, score.seed): score.values.get(metric, math.nan)
        for score in scores
        if score.method == method and not score.declined
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _error(values: Iterable[float]) -> float:
    values = np.array(list(values))
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _groups(values: Mapping[tuple[int, str, int], float], key: Any) -> dict[Any, float]:
    """Mean of the values of each key, in sorted order."""
    found: dict[Any, list[float]] = {}
    for place, value in values.items():
        found.setdefault(key(place), []).append(value)
    return {name: float(np.mean(found[name])) for name in sorted(found)}


def _condition(place: tuple[int, str, int]) -> tuple[int, str]:
    return place[:2]


def methods(scores: Iterable[Score]) -> dict[str, str]:
    """Kinds by method: the model, baselines in their order, references."""
    kinds = {score.method: score.kind for score in scores}
    order = ("model", "baseline", "reference")
    return dict(sorted(kinds.items(), key=lambda item: order.index(item[1])))


def metrics_of(scores: Iterable[Score]) -> list[Metric]:
    present = {key for score in scores for key in score.values}
    return [metric for metric in METRICS if metric.key in present]


def summarise(scores: list[Score]) -> list[Summary]:
    """Every method that answers at all, in every known metric."""
    found = []
    for method, kind in methods(scores).items():
        for metric in metrics_of(scores):
            values = _values(scores, method, metric.key)
            if values:
                seeds, conditions = _groups(values, lambda place: place[2]), _groups(values, _condition)
                errors = _error(seeds.values()), _error(conditions.values())
                mean = float(np.mean(list(seeds.values())))
                found.append(Summary(method, kind, metric.key, mean, *errors, len(conditions), len(seeds)))
    return found


def compare(scores: list[Score], metric: Metric) -> list[Test]:
    """The model against every baseline in one metric."""
    kinds = methods(scores)
    ours = next((method for method, kind in kinds.items() if kind == "model"), "")
    model, sign, found = _values(scores, ours, metric.key), 1.0 if metric.best == "low" else -1.0, []
    for method in (method for method, kind in kinds.items() if kind == "baseline"):
        theirs = _values(scores, method, metric.key)
        pairs = {place: model[place] - theirs[place] for place in sorted(model.keys() & theirs.keys())}
        if not pairs:
            continue
        by_condition, by_fold = _groups(pairs, _condition), _groups(pairs, lambda place: place[0])
        found.append(
            Test(
                baseline=method,
                metric=metric.key,
                difference=float(np.mean(list(pairs.values()))),
                n=len(pairs),
                p=_wilcoxon(pairs.values()),
                n_conditions=len(by_condition),
                p_conditions=_wilcoxon(by_condition.values()),
                wins=sum(sign * value < 0 for value in by_condition.values()),
                folds_won=sum(sign * value < 0 for value in by_fold.values()),
                n_folds=len(by_fold),
            )
        )
    return found


def _wilcoxon(differences: Iterable[float]) -> float:
    from scipy.stats import wilcoxon

    values = np.array([value for value in differences if value])
    result: Any = wilcoxon(values) if len(values) else None
    return float(result.pvalue) if result is not None else math.nan


# --- output -------------------------------------------------------------------------------------------------------
def _with_error(summary: Summary | None) -> str:
    """mean ± standard error over seeds (over conditions)."""
    if summary is None:
        return "n/a"
    return f"{number(summary.mean)} ± {number(summary.se_seeds)} ({number(summary.se_conditions)})"


def _declined(scores: Iterable[Score]) -> dict[str, dict[str, int]]:
    """Reasons by method, with the number of conditions and seeds."""
    found: dict[str, dict[str, int]] = {}
    for score in scores:
        if score.declined:
            reasons = found.setdefault(score.method, {})
            reasons[score.declined] = reasons.get(score.declined, 0) + 1
    return found


def _tables(result: Result) -> tuple[list[str], list[list[str]], list[str], list[list[str]]]:
    """Headings and rows of the two tables: means, and the model against every baseline."""
    shown = [metric for metric in metrics_of(result.scores) if metric.key in SHOWN]
    by = {(summary.method, summary.metric): summary for summary in summarise(result.scores)}
    heads = ["method", "conditions", *(metric.heading for metric in shown)]
    rows = []
    for method in methods(result.scores):
        some = by.get((method, DECIDING_METRIC))
        rows.append(
            [method, str(some.n_conditions if some else 0), *(_with_error(by.get((method, m.key))) for m in shown)]
        )
    deciding = next(metric for metric in METRICS if metric.key == DECIDING_METRIC)
    test_heads = ["against", "difference", "conditions won", "folds won", "p, conditions", "p, conditions × seeds"]
    tests = [
        [
            test.baseline,
            number(test.difference),
            f"{test.wins} of {test.n_conditions}",
            f"{test.folds_won} of {test.n_folds}",
            f"{number(test.p_conditions)} (n = {test.n_conditions})",
            f"{number(test.p)} (n = {test.n})",
        ]
        for test in compare(result.scores, deciding)
    ]
    return heads, rows, test_heads, tests


def coverage_line(scores: list[Score]) -> str:
    """What the predicted 90 % intervals of mean changes cover; nothing where no method gives any."""
    found = []
    for key, genes in INTERVALS.items():
        for method in methods(scores):
            values = _groups(_values(scores, method, key), _condition)
            if values:
                shares = 100.0 * np.array(list(values.values()))
                found.append(f"{shares.mean():.1f} % of {genes} ({shares.min():.1f} to {shares.max():.1f})")
    if not found:
        return ""
    return f"90 % intervals of mean changes cover {', and '.join(found)}: mean over conditions (least to most)."


def by_effect(scores: list[Score]) -> tuple[list[str], list[list[str]]]:
    """Mean energy distance where the real cells differ from the controls and where they do not; both must occur."""
    tests = [_values(scores, method, EFFECT) for method in methods(scores)]
    p = _groups({place: value for found in tests for place, value in found.items()}, _condition)
    parts = [[place for place in p if (p[place] <= LEVEL) == effect] for effect in (True, False)]
    if not all(parts):
        return [], []
    heads = [
        "method",
        f"{count(len(parts[0]), 'condition')} with effect",
        f"{count(len(parts[1]), 'condition')} without",
    ]
    rows = []
    for method in methods(scores):
        values = _groups(_values(scores, method, DECIDING_METRIC), _condition)
        if set(p) <= set(values):
            rows.append([method, *(number(float(np.mean([values[place] for place in part]))) for part in parts)])
    return heads, rows


NOTE = (
    "Mean over conditions and folds ± standard error over seeds (over conditions in brackets); n/a for a single one. "
    "Real cells, half against half, is the ceiling. Methods with fewer conditions have another mean: compare below."
)
EFFECT_NOTE = (
    "Mean energy distance (PCA, U) of the methods that answer in all of these. With effect: the real cells differ from "
    f"the controls, p at most {LEVEL} by relabelling up to 500 cells a side, mean over seeds. Without, controls are "
    "the answer, and what a method has above *no change* is a false effect."
)
TEST_NOTE = (
    "Energy distance (PCA, U), model less baseline, in the conditions that both answer: negative is better. Wilcoxon "
    "signed-rank test, two-sided, not corrected for the number of baselines; seeds repeat a condition and are not "
    "independent of each other."
)


def markdown(result: Result) -> str:
    """The result as Markdown."""

    def table(heads: list[str], rows: list[list[str]]) -> list[str]:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
        return [f"| {' | '.join(cells[0])} |", "|" + "---|" * len(heads), *(f"| {' | '.join(r)} |" for r in cells[1:])]

    heads, rows, test_heads, tests = _tables(result)
    size = f"{count(len(result.folds), 'fold')}, {count(len(result.seeds), 'seed')}, {result.backend}."
    lines = [f"# {result.name}", "", size]
    lines += ["", *table(heads, rows), "", NOTE, "", *table(test_heads, tests), "", TEST_NOTE]
    intervals, (effect_heads, effects) = coverage_line(result.scores), by_effect(result.scores)
    lines += ["", intervals] if intervals else []
    lines += ["", *table(effect_heads, effects), "", EFFECT_NOTE] if effects else []
    declined = _declined(result.scores)
    if declined:
        lines += ["", "Declined:", ""]
        lines += [
            f"- {method}: {reason} ({n} of conditions × seeds)"
            for method, rs in declined.items()
            for reason, n in rs.items()
        ]
    lines += ["", "## Conditions", "", *table(*_by_condition(result, DECIDING_METRIC))]
    lines += ["", *table(*_by_condition(result, "pearson_delta")), "", "## Folds", ""]
    audit_heads = [
        "fold",
        "name",
        "seen cells",
        "held-out cells",
        "shared names",
        "shared contents",
        "chosen on inner folds",
    ]
    audits = []
    for fold in result.folds:
        worst = {key: max(one[key] for one in fold["audit"]) for key in ("shared_names", "shared_contents")}
        first, choice = fold["audit"][0], fold["choice"]
        chosen = ", ".join(f"{key} = {value}" for key, value in choice["chosen"].items()) if choice else "nothing"
        audits.append(
            [
                str(fold["fold"]),
                fold["name"],
                str(first["seen"]),
                str(first["heldout"]),
                *map(str, worst.values()),
                chosen,
            ]
        )
    return "\n".join([*lines, *table(audit_heads, audits)]) + "\n"


def _by_condition(result: Result, key: str) -> tuple[list[str], list[list[str]]]:
    """One metric of every condition and method, mean over seeds."""
    heading = next(metric.heading for metric in METRICS if metric.key == key)
    order = list(methods(result.scores))
    values = {method: _groups(_values(result.scores, method, key), _condition) for method in order}
    places = sorted({(score.fold, score.condition) for score in result.scores})
    rows = [[str(p[0]), p[1], *(number(values[m].get(p)) for m in order)] for p in places]
    return ["fold", heading, *order], rows


def as_json(result: Result) -> dict[str, Any]:
    """What task.json holds; undefined numbers are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(
        {
            "name": result.name,
            "task": result.task,
            "backend": result.backend,
            "seeds": result.seeds,
            "folds": result.folds,
            "summary": [vars(summary) for summary in summarise(result.scores)],
            "tests": [vars(test) for metric in metrics_of(result.scores) for test in compare(result.scores, metric)],
            "scores": [vars(score) for score in result.scores],
        }
    )


def plot(result: Result) -> str:
    """Energy distance of every method as a standalone SVG: a dot a condition, the mean with its standard error."""
    from pf_core.plots import MODEL
    from pf_core.svg import INK, MUTED, figure, plain, set_ticks, short, standalone

    kinds = methods(result.scores)
    by = {s.method: s for s in summarise(result.scores) if s.metric == DECIDING_METRIC}
    shown = [method for method in kinds if method in by and kinds[method] != "reference"]
    height = 96 + 24 * len(shown)
    with figure(560, height) as drawing:
        axes = drawing.add_axes((0.25, 46 / height, 0.72, 1 - 84 / height))
        axes.set_title(short(result.name, 60), pad=7)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        for row, method in enumerate(shown):
            points = list(_groups(_values(result.scores, method, DECIDING_METRIC), _condition).values())
            colour = MODEL if kinds[method] == "model" else MUTED
            axes.plot(points, [row] * len(points), "o", color=colour, alpha=0.45, markersize=4, linestyle="none")
            error = by[method].se_seeds if math.isfinite(by[method].se_seeds) else 0.0
            axes.errorbar(by[method].mean, row, xerr=error, fmt="D", color=colour, markersize=7, capsize=3)
        for method, kind in kinds.items():
            if kind == "reference" and method in by:
                axes.axvline(by[method].mean, color=INK, linewidth=0.9, linestyle=(0, (1, 1.6)))
        axes.set_yticks(range(len(shown)), [plain(method) for method in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        set_ticks(axes.xaxis, False)
        axes.set_xlabel("energy distance (less is better): conditions, mean ± error over seeds; dotted: real cells")
        return standalone(drawing, f"Energy distance of {', '.join(shown)}; values in task.md")


def write(out: Path, result: Result, console: Console | None = None) -> None:
    """task.json, task.md and task.svg, and the tables on the screen."""
    write_atomic(out / "task.json", json.dumps(as_json(result), indent=1) + "\n")
    write_atomic(out / "task.md", markdown(result))
    write_atomic(out / "task.svg", plot(result))
    if console is None:
        return
    _print(console, result)
    clean = all(audit["clean"] for fold in result.folds for audit in fold["audit"])
    console.print("leak audit: " + ("clean in every fold" if clean else "NOT CLEAN, see task.md"))
    console.print(f"results: {out / 'task.md'}", highlight=False)


def _print(console: Console, result: Result) -> None:
    """Both tables on a terminal, narrower than in task.md: standard errors over seeds only."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [metric for metric in metrics_of(result.scores) if metric.key in SHOWN]
    by = {(summary.method, summary.metric): summary for summary in summarise(result.scores)}
    heads = ["method", "n", *(metric.short for metric in shown)]
    rows = []
    for method in methods(result.scores):
        found = [by.get((method, metric.key)) for metric in shown]
        n = max((one.n_conditions for one in found if one), default=0)
        rows.append([method, str(n), *(f"{number(s.mean)} ± {number(s.se_seeds)}" if s else "n/a" for s in found)])
    _, _, test_heads, tests = _tables(result)
    n_pairs = len(test_heads) - 1  # the p-value over conditions × seeds is in task.md
    note = "Mean over n conditions of all folds ± standard error over seeds; n/a for a single seed. task.md has more."
    for head, body, text in (
        (heads, rows, note),
        (test_heads[:n_pairs], [row[:n_pairs] for row in tests], TEST_NOTE),
    ):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place else "left", no_wrap=not place)
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print(Text(text, style="dim"))
    if intervals := coverage_line(result.scores):
        console.print(intervals, highlight=False)
    for method, reasons in _declined(result.scores).items():
        first, rest = next(iter(reasons)), len(reasons) - 1
        more = f", and {count(rest, 'other reason')} in task.md" if rest else ""
        console.print(Text(f"{method} declined {count(sum(reasons.values()), 'time')}: {first}{more}", style="dim"))
