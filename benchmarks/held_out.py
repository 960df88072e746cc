"""Held-out conditions of the three public data sets, in both twins; writes a Markdown file.

    python benchmarks/held_out.py FOLDER_WITH_H5AD_FILES --runs runs --seeds 1

Each training is one `pf train` with default settings. Wall-clock seconds and peak memory are those of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TASKS = {
    "kang2018_pbmc_ifnb.h5ad": ("cell_type=NK cells,perturbation=IFNB", "cell_type=CD14+ Monocytes,perturbation=IFNB"),
    "datlinger2021_jurkat_ko_tcr.h5ad": ("perturbation=JUN+TCR", "perturbation=ZAP70+TCR"),
    "papalexi2021_thp1_ko.h5ad": ("replicate=rep_2,perturbation=STAT1", "replicate=rep_2,perturbation=JAK2"),
}
COLUMNS = {"energy_pca_u": "E (U, 20 PCs)", "pearson_delta": "Pearson", "r2": "R2", "mse": "MSE"}


def train(data: Path, holdouts: tuple[str, ...], out: Path, backend: str, seed: int) -> tuple[float, float]:
    """One training; wall-clock seconds and peak resident GiB of the process."""
    options = [part for holdout in holdouts for part in ("--holdout", holdout)]
    command = [sys.executable, "-m", "pf_core", "train", str(data), "--out", str(out), "--backend", backend]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--seed", str(seed), *options], stdout=subprocess.DEVNULL)
    _, status, usage = _wait(process)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return time.perf_counter() - begin, usage.ru_maxrss / 2**20


def _wait(process: subprocess.Popen) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(process.pid, 0)


def table(name: str, runs: dict[str, list[Path]]) -> list[str]:
    """Mean over seeds of every metric, per condition and method; the least energy distance is bold."""
    lines = [f"\n### {name.removesuffix('.h5ad')}\n"]
    lines += ["| condition | method | " + " | ".join(f"{b}: {c}" for b in runs for c in COLUMNS.values()) + " |"]
    lines += ["|---|---|" + "---|" * (len(runs) * len(COLUMNS))]
    values: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for backend, paths in runs.items():
        for path in paths:
            for row in json.loads((path / "metrics.json").read_text())["metrics"]:
                values.setdefault((row["condition"], row["method"]), {}).setdefault(backend, []).append(row)
    for (condition, method), found in values.items():
        if any(row["declined"] for rows in found.values() for row in rows):
            lines.append(f"| {condition} | {method} | declined: {next(iter(found.values()))[0]['declined']} |")
            continue
        cells = []
        for backend in runs:
            for metric in COLUMNS:
                numbers = [row[metric] for row in found[backend] if row[metric] is not None]
                rivals = [
                    np.mean([row["energy_pca_u"] for row in other[backend]])
                    for (where, _), other in values.items()
                    if where == condition
                    and other[backend][0]["kind"] != "reference"
                    and not other[backend][0]["declined"]
                ]
                text = f"{np.mean(numbers):.3f}" if numbers else "n/a"
                best = metric == "energy_pca_u" and np.mean(numbers) == min(rivals)
                cells.append(f"**{text}**" if best else text)
        lines.append(f"| {condition} | {method} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("held_out.md"))
    arguments = parser.parse_args()
    lines = [
        "# Held-out conditions of public data",
        "",
        f"Written by `python benchmarks/held_out.py DATA --seeds {arguments.seeds}` on {platform.machine()}, Python"
        f" {platform.python_version()}. Default settings; energy distance is the"
        " U-statistic on 20 principal components of all real cells, less is better; bold is the least of a condition,"
        " half-against-half of the real cells left out.",
    ]
    costs = ["\n## Cost\n", "| data | backend | seed | seconds | peak GiB |", "|---|---|---|---|---|"]
    for name, holdouts in TASKS.items():
        runs: dict[str, list[Path]] = {}
        for backend in ("jax", "torch"):
            for seed in range(arguments.seeds):
                out = arguments.runs / f"{name.split('_')[0]}-{backend}-{seed}"
                seconds, peak = train(arguments.data / name, holdouts, out, backend, seed)
                costs.append(f"| {name} | {backend} | {seed} | {seconds:.0f} | {peak:.2f} |")
                print(costs[-1], flush=True)
                runs.setdefault(backend, []).append(out)
        lines += table(name, runs)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    end = [
        f"\nOne process after the other, OMP_NUM_THREADS {threads}; on a shared machine seconds are upper bounds.",
        "What was tried on the way, and what limits the result, is in [experiments.md](experiments.md).",
    ]
    arguments.out.write_text("\n".join([*lines, *costs, *end]) + "\n")


if __name__ == "__main__":
    main()
