"""Held-out time points of four public time courses; writes docs/results_time_courses.md.

    python benchmarks/time_courses.py FOLDER_WITH_H5AD_FILES --runs runs-time --seeds 3

Every middle time point is left out in turn: a training a time point and seed. What is complete is not run again.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.interpolate import CubicSpline, PchipInterpolator

from pf_core import data, metrics, times
from pf_core.config import Config, DataConfig, from_dict, to_dict
from pf_core.flow_judgement import ALONG, HALVES, INTERPOLATION, MAX_CELLS, MIXTURE, MODEL, NEXT, PREVIOUS
from pf_core.leave_one_time_out import CANDIDATES, candidate_scores, leave_one_time_out
from pf_core.task_report import Result
from pf_core.time_baselines import clock, closeness, mixed, path_lengths, reading
from pf_core.verdict import DECIDING_METRIC

DRAWS = 5
GP_LENGTH, GP_NOISE = 0.5, 0.05

SIDES = ("flow from the previous point alone", "flow from the next point alone")
COLUMNS = (PREVIOUS, NEXT, INTERPOLATION, MIXTURE, *SIDES, ALONG, MODEL, HALVES)


@dataclass(frozen=True)
class CourseFile:
    """A time course: its file and what its columns need."""

    name: str
    file: str
    data: DataConfig


COURSES = (
    CourseFile("schiebinger", "schiebinger2019_reprogramming_d10_d11.h5ad", DataConfig()),
    CourseFile("semrau", "semrau2017_mesc_ra_timecourse.h5ad", DataConfig(min_counts=1)),
    CourseFile("kameneva", "kameneva2021_sympathoadrenal_timecourse.h5ad", DataConfig()),
    CourseFile("packer", "packer2019_celegans_neurons_timecourse.h5ad", DataConfig(timepoint="timepoint")),
)


def by_point(result: Result, method: str) -> np.ndarray:
    """(n_points, n_seeds) energy distance, mean over the conditions of a time point; NaN where the method declined."""
    found = np.full((len(result.folds), len(result.seeds)), np.nan)
    for row, fold in enumerate(result.folds):
        for column, seed in enumerate(result.seeds):
            values = [
                score.values.get(DECIDING_METRIC, np.nan)
                for score in result.scores
                if (score.fold, score.seed, score.method) == (fold["fold"], seed, method) and not score.declined
            ]
            found[row, column] = np.mean(values) if values else np.nan
    return found


def error(values: np.ndarray) -> float:
    """Standard error of a mean over seeds."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def shown(mean: float, spread: float, sign: str = "") -> str:
    """A mean with its standard error, where there is one."""
    text = f"{mean:{sign}.3f}"
    return text if np.isnan(spread) else f"{text} ± {spread:.3f}"


def table(result: Result) -> list[str]:
    """One row a time point, means over seeds; last the mean over time points with its standard error over seeds."""
    values = {method: by_point(result, method) for method in COLUMNS}
    lines = [f"| left out | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    rivals = [method for method in COLUMNS if method not in (HALVES, *SIDES)]
    for row, fold in enumerate(result.folds):
        means = {method: float(values[method][row].mean()) for method in COLUMNS}
        least = min(means[method] for method in rivals)
        cells = [f"**{m:.2f}**" if method in rivals and m == least else f"{m:.2f}" for method, m in means.items()]
        lines.append(f"| {fold['name']} | {' | '.join(cells)} |")
    whole = {method: values[method].mean(0) for method in COLUMNS}
    cells = [shown(mean.mean(), error(mean)) for mean in whole.values()]
    return [*lines, f"| mean | {' | '.join(cells)} |"]


def against(result: Result, method: str) -> tuple[float, float]:
    """The model less a method: mean over time points and seeds, and its standard error over seeds."""
    differences = (by_point(result, MODEL) - by_point(result, method)).mean(0)
    return float(differences.mean()), error(differences)


def verdict(results: dict[str, Result]) -> list[str]:
    lines = [f"| | less {INTERPOLATION} | less {MIXTURE} | less {ALONG} |", "|---|---|---|---|"]
    below = 0
    for name, result in results.items():
        found = [against(result, method) for method in (INTERPOLATION, MIXTURE, ALONG)]
        below += all(difference < 0 for difference, _ in found[:2])
        lines.append(f"| {name} | " + " | ".join(shown(d, e, "+") for d, e in found) + " |")
    return [*lines, "", f"Below {INTERPOLATION} and {MIXTURE} in {below} of {len(results)} data sets."]


def leaks(result: Result) -> list[str]:
    """What the leak audit found, where it found something."""
    found = {
        fold["name"]: audit["shared_contents"] for fold in result.folds for audit in fold["audit"] if not audit["clean"]
    }
    each = "; ".join(f"{name}: {number}" for name, number in found.items())
    return [f"\nHeld-out cells with exactly the counts of a training cell, left in: {each}."] if found else []


def chosen(result: Result) -> list[str]:
    """What was chosen on inner time points."""
    picks = [
        f"{fold['name']}: {', '.join(f'{value:g}' for value in fold['choice']['chosen'].values())}"
        for fold in result.folds
        if fold["choice"]
    ]
    return [f"\nPace, bend and reach chosen on inner time points: {'; '.join(picks)}."] if picks else []


def curves(readings: np.ndarray, means: np.ndarray, now: float) -> list[np.ndarray]:
    """Means (d,) on three curves through those of the measured points, over the clock."""

    def covariance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        far = np.sqrt(3.0) * np.abs(one[:, None] - other) / GP_LENGTH
        return (1.0 + far) * np.exp(-far)  # Matern, 3/2

    middle = means.mean(0)
    noisy = covariance(readings, readings) + GP_NOISE * np.eye(len(readings))
    process = middle + (covariance(np.array([now]), readings) @ np.linalg.solve(noisy, means - middle))[0]
    natural = CubicSpline(readings, means, bc_type="natural")
    return [PchipInterpolator(readings, means)(now), natural(now), process]


def limits(course: CourseFile, folder: Path) -> list[str]:
    """What is wrong with the plain mixture: its mean, or what lies around the mean. Means over DRAWS draws."""
    config = Config(system="flow", data=course.data)
    dataset = data.load(folder / course.file, config.data, contrasts=False)
    found = times.read(dataset, config)
    ruler = metrics.real_pca(dataset.rows(np.arange(dataset.n_cells)))
    places = ruler.project(metrics.normalise(dataset.rows(np.arange(dataset.n_cells))))
    lines = []
    for point in range(1, len(found.points) - 1):
        before, here, after = (np.flatnonzero(found.index == point + k) for k in (-1, 0, 1))
        share = closeness(*(float(time) for time in found.points[point - 1 : point + 2]))
        others = [k for k in range(len(found.points)) if k != point]
        measured, known = found.points[others].tolist(), [places[found.index == k] for k in others]
        readings = clock(measured, path_lengths(known), config.flow.pace)
        now = reading(measured, readings, float(found.points[point]))
        means = [*curves(readings, np.stack([cells.mean(0) for cells in known]), now), places[here].mean(0)]
        values = []
        for draw in range(DRAWS):
            chosen = mixed(before, after, share, seed=draw, name="limits", most=MAX_CELLS)
            mixture, real = places[np.concatenate(chosen)], places[here]
            moved = [mixture - mixture.mean(0) + mean for mean in means]
            values.append([metrics.energy_distance(cells, real) for cells in (mixture, *moved)])
        row = " | ".join(f"{value:.2f}" for value in np.mean(values, axis=0))
        lines.append(f"| {course.name} | {found.names[point]} | {row} |")
    return lines


def candidates(results: dict[str, Result], runs: Path, folder: Path, backend: str) -> list[str]:
    """Every pace, bend and reach on the runs of the first seed: the mean over time points."""
    means = []
    for course in COURSES:
        if course.name in results:
            result = results[course.name]
            paths = [runs / course.name / fold["name"] / f"seed-{result.seeds[0]}" for fold in result.folds]
            values = [candidate_scores(path, folder / course.file, backend, "cpu") for path in paths]
            means.append(np.mean(values, axis=0))
    lines = [f"| pace | bend | reach | {' | '.join(results)} |", "|" + "---|" * (3 + len(results))]
    for candidate, row in zip(CANDIDATES, np.transpose(means), strict=True):
        shares = [f"{value:g}" for value in candidate.values()]
        lines.append(f"| {' | '.join([*shares, *(f'{value:.3f}' for value in row)])} |")
    return lines


def settings(course: CourseFile, sets: Sequence[str]) -> Config:
    table = to_dict(Config(system="flow", data=course.data))
    for item in sets:
        key, _, value = item.partition("=")
        *path, last = key.split(".")
        node = table
        for part in path:
            node = node[part]
        node[last] = type(node[last])(value)
    return from_dict(Config, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs-time"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--inner", action="store_true", help="choose pace, bend and reach on inner time points")
    parser.add_argument("--only", nargs="*", default=[], help="names of data sets")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ from the default"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results_time_courses.md"))
    arguments = parser.parse_args()
    results = {}
    for course in COURSES:
        if arguments.only and course.name not in arguments.only:
            continue
        results[course.name] = leave_one_time_out(
            arguments.data / course.file,
            settings(course, arguments.set),
            name=course.name,
            out=arguments.runs / course.name,
            seeds=range(arguments.seeds),
            inner=arguments.inner,
            backend=arguments.backend,
            console=Console(),
        )
    options = [
        f"--seeds {arguments.seeds}",
        f"--backend {arguments.backend}",
        *(["--inner"] if arguments.inner else []),
        *(["--only " + " ".join(arguments.only)] if arguments.only else []),
    ]
    options += [f"--set {' '.join(arguments.set)}"] if arguments.set else []
    lines = [
        "# Held-out time points of public time courses",
        "",
        f"Written by `python benchmarks/time_courses.py DATA {' '.join(options)}` on {platform.machine()}, Python"
        f" {platform.python_version()}. Energy distance, U-statistic, 20 principal components of all real cells, log1p"
        " of counts per 10,000; less is better, bold is the least of a row. The flow and every simple answer start from"
        " the cells of the two neighbouring time points; [flow.md](flow.md) says what each column is. Means over seeds;"
        " the last row is the mean over time points ± standard error over seeds, where there are several."
        " What was tried, and what limits it: [experiments.md](experiments.md).",
    ]
    for name, result in results.items():
        lines += ["", f"## {name}", "", *table(result), *chosen(result), *leaks(result)]
    lines += [
        "",
        "## The flow less its rivals, mean over time points ± standard error over seeds",
        "",
        *verdict(results),
    ]
    lines += [
        "",
        "## What limits the mixture",
        "",
        "Energy distance of the plain mixture of neighbours, and of the same cells shifted to another mean (principal"
        f" components of all genes, also those that training leaves out, mean of {DRAWS} draws)."
        " Three curves go through the means of all other time points, over the"
        f" clock of pace {Config().flow.pace:g}: a monotone cubic, a natural cubic, and the mean of a Gaussian process"
        f" (Matern 3/2, length {GP_LENGTH:g} of the clock, noise {GP_NOISE:g} of the variance). At the true mean, that"
        " of the real cells, what is left is what lies around the mean.",
        "",
        "| | left out | mixture | monotone cubic | natural cubic | Gaussian process | at the true mean |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [line for course in COURSES if course.name in results for line in limits(course, arguments.data)]
    lines += [
        "",
        "## Pace, bend and reach",
        "",
        "Energy distance of the flow, mean over time points, first seed. 0, 0, 0 is the plain mixture.",
        "",
        *candidates(results, arguments.runs, arguments.data, arguments.backend),
    ]
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
