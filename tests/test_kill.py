"""kill -9 at random moments of a training, resumed each time, ends with the files of an undisturbed run."""

import subprocess
import sys
import time

import numpy as np
import pytest
from test_training import files_of

from pf_core.simulate import simulate

KILLS = 20
SETTINGS = [
    "data.genes=0",
    "vae.n_hidden=16",
    "vae.n_latent=5",
    "operator.ensemble=2",
    "operator.conditions_per_step=6",
    "operator.cells_per_condition=13",
    "stage_vae.max_steps=4000",
    "stage_vae.patience=0",
    "stage_vae.evaluate_every=40",
    "stage_vae.checkpoint_every=20",
    "stage_operator.max_steps=2000",
    "stage_operator.patience=0",
    "stage_operator.evaluate_every=40",
    "stage_operator.checkpoint_every=20",
]


def pf(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pf_core", *map(str, arguments)]


def kill_in_training(command: list[str], history, rng: np.random.Generator) -> bool:
    """Start a process, SIGKILL it some moment after it began to write history; False where it ended first."""
    before = history.stat().st_size if history.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and (not history.exists() or history.stat().st_size == before):
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.7))
    if process.poll() is not None:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
        return False
    process.kill()
    process.communicate()
    return True


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run_killed_at_twenty_random_moments_ends_with_the_files_of_an_undisturbed_one(tmp_path, backend):
    cells = tmp_path / "cells.h5ad"
    simulate(3, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(cells)
    begin = [*(part for setting in SETTINGS for part in ("--set", setting)), "--backend", backend]
    holdout = ["--holdout", "perturbation=TF1+TF2"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(pf("train", cells, "--out", tmp_path / "whole/run", *begin, *holdout), check=True)
    run, rng, kills = tmp_path / "killed/run", np.random.default_rng(5), 0
    command = pf("train", cells, "--out", run, *begin, *holdout)
    while kills < KILLS and kill_in_training(command, run / "history.jsonl", rng):
        kills += 1
        command = pf("train", "--resume", run, "--backend", backend)
    print(f"{backend}: killed {kills} times")
    assert kills == KILLS, "the training was over before twenty kills; give it more steps"
    subprocess.run(command, check=True)
    assert files_of(run) == files_of(tmp_path / "whole/run")
