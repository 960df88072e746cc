"""A whole `pf train` in either twin, from the file to the report, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pf_bench.case import Absent, Case, Context, Side, Skipped, Target

__all__ = ["cases"]

METRICS = ("pearson_delta", "r2")
ENERGY = "energy_pca_u"
MODEL, UNCHANGED = "operator model", "no change"
# Rounding grows over a whole training, so that two runs end near each other and not at the same place.
TOLERANCE = 0.1
NO_STEPS = ("stage_vae.max_steps=0", "stage_operator.max_steps=0")
FEW_STEPS = ("stage_vae.max_steps=25", "stage_operator.max_steps=25")  # one call: every program there is
CACHE = "JAX_COMPILATION_CACHE"
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
QUICK = ("vae.n_hidden=9", "vae.n_latent=4", "stage_vae.max_steps=8", "stage_operator.max_steps=8", "data.genes=0")


def cases(context: Context) -> list[Case]:
    """The suite.

    Raises:
        Skipped: no data were given.
    """
    if not context.data:
        raise Skipped("no data were given: --data FILE.h5ad")
    return [whole(context)]


def train(data: str, options: list[str], programs: str | None = None, module: str = "pf_core") -> dict[str, np.ndarray]:
    """Train, and return the model's mean metrics over the held-out conditions.

    The energy distance is given as the share of that of no change which the prediction takes away: of a few cells the
    distance itself moves by a fifth between two trainings of one twin that round differently.

    Args:
        data: the h5ad file.
        options: of `pf train`.
        programs: folder where JAX keeps compiled programs; None compiles all of them anew.
        module: what runs, "pf_core" or another module with the command's options.

    Raises:
        RuntimeError: the training ended with an error; the message holds its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            module,
            "train",
            data,
            "--out",
            str(out),
            "--holdout-share",
            "0.2",
            *options,
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(CACHE)}
        if programs is not None:
            environment |= {f"{CACHE}_DIR": programs, **KEEP_ALL}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(
                f"pf train ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            )
        rows = json.loads((out / "metrics.json").read_text())["metrics"]

    def mean(name: str, method: str = MODEL) -> np.ndarray:
        return np.array([row[name] for row in rows if row["method"] == method], np.float64).mean(keepdims=True)

    return {"energy taken away": 1.0 - mean(ENERGY) / mean(ENERGY, UNCHANGED)} | {name: mean(name) for name in METRICS}


def whole(context: Context) -> Case:
    """Reading, three stages, judging and the report."""
    programs = tempfile.TemporaryDirectory(prefix="pf-bench-programs-")

    def options(*more: str) -> list[str]:
        settings = [*(QUICK if context.quick else ()), *more]
        return ["--device", context.device, *(part for setting in settings for part in ("--set", setting))]

    def side(*own: str, folder: str | None = None, module: str = "pf_core", note: str = "") -> Side:
        arguments = [*own, *options()]
        last: list[dict[str, np.ndarray]] = []

        def call() -> None:
            last[:] = [train(context.data, arguments, folder, module)]

        def output() -> dict[str, np.ndarray]:
            if not last:
                call()
            return last[0]

        return Side(call, output, note=note or "one process, from its start to its end, compilation included")

    def build() -> dict[str, Side | Absent]:
        train(context.data, options(*FEW_STEPS), programs.name)
        return {
            "jax": side("--backend", "jax"),
            "torch": side("--backend", "torch"),
            "plain torch": side(
                "--backend",
                "torch",
                module="pf_bench.plain_fit",
                note="the PyTorch twin by its plain forms: a loop over conditions, whole matrices, no count table",
            ),
            "jax, compiled before": side(
                "--backend", "jax", folder=programs.name, note="programs of an earlier training are found on disk"
            ),
            "no steps": Side(
                lambda: train(context.data, options(*NO_STEPS)),
                None,
                note="pf train without a single step: reading, choosing genes, judging, the report",
            ),
        }

    targets = () if context.quick or context.device != "cpu" else (Target("faster", 2.5, "plain torch"),)
    return Case(f"pf train, {Path(context.data).stem}", {}, build, TOLERANCE, targets, heavy=True)
