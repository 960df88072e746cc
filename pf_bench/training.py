"""A whole `pf train` in either twin, from the file to the report, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pf_bench.case import Absent, Case, Context, Side, Skipped, Target

__all__ = ["cases"]

METRICS = ("energy_pca_u", "pearson_delta", "r2")
MODEL = "operator model"
# Rounding grows over a whole training, so that two runs end near each other and not at the same place.
TOLERANCE = 0.1
QUICK = ("vae.n_hidden=9", "vae.n_latent=4", "stage_vae.max_steps=8", "stage_operator.max_steps=8", "data.genes=0")


def cases(context: Context) -> list[Case]:
    """The suite.

    Raises:
        Skipped: no data were given.
    """
    if not context.data:
        raise Skipped("no data were given: --data FILE.h5ad")
    return [whole(context)]


def train(data: str, options: list[str]) -> dict[str, np.ndarray]:
    """Train, and return the model's mean metrics over the held-out conditions.

    Raises:
        RuntimeError: the training ended with an error; the message holds its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "pf_core",
            "train",
            data,
            "--out",
            str(out),
            "--holdout-share",
            "0.2",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"pf train ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            )
        rows = [row for row in json.loads((out / "metrics.json").read_text())["metrics"] if row["method"] == MODEL]
    return {name: np.array([row[name] for row in rows], np.float64).mean(keepdims=True) for name in METRICS}


def whole(context: Context) -> Case:
    """Reading, three stages, judging and the report."""
    settings = [part for setting in (QUICK if context.quick else ()) for part in ("--set", setting)]

    def side(*options: str) -> Side:
        arguments = [*options, "--device", context.device, *settings]
        last: list[dict[str, np.ndarray]] = []

        def call() -> None:
            last[:] = [train(context.data, arguments)]

        def output() -> dict[str, np.ndarray]:
            if not last:
                call()
            return last[0]

        return Side(call, output, note="one process, from its start to its end, compilation included")

    def build() -> dict[str, Side | Absent]:
        return {"jax": side("--backend", "jax"), "torch": side("--backend", "torch")}

    targets = () if context.quick or context.device != "cpu" else (Target("faster", 2.5, "torch"),)
    return Case(f"pf train, {Path(context.data).stem}", {}, build, TOLERANCE, targets, heavy=True)
