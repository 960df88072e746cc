"""The operator system from end to end, on simulated cells whose operators are known.

    python examples/operator_system.py OUT [jax | torch]

Simulate a screen, train with three pairs and one single condition held out, predict a pair, compare with the truth.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pf_core import Config, Model
from pf_core.metrics import normalise
from pf_core.simulate import demo_holdout, draw, simulate

PAIR = "TF5+TF6"  # one of demo_holdout's


def main(out: Path, backend: str) -> float:
    """Train and compare; returns the correlation of the predicted with the true change of a held-out pair."""
    cells = simulate(0)
    config = Config.from_toml(Path(__file__).with_name("small.toml"))
    model = Model.train(cells, out=out / "run", backend=backend, config=config, holdout=demo_holdout(cells))

    verdict = model.run.read_json("metrics.json")["verdict"]
    print(verdict["sentence"])
    for one in verdict["against"]:
        print(f"  mean energy distance {one['model_mean']:.3f}, {one['baseline']} {one['baseline_mean']:.3f}")

    # Every control cell of one context under the pair, beside fresh cells drawn from the true operator.
    here = (cells.obs["tissue"] == "tissue1") & (cells.obs["cell_type"] == "type1")
    controls = cells[here & (cells.obs["perturbation"] == "control")]
    predicted = model.predict(controls, PAIR)
    predicted.write_h5ad(out / "predicted.h5ad")
    truth = draw(cells.uns["truth"], PAIR, "tissue1", "type1", 2000, seed=1)
    before = mean(controls.X)
    correlation = float(np.corrcoef(mean(predicted.X) - before, mean(truth) - before)[0, 1])
    print(f"{PAIR} in tissue1, type1: the predicted change correlates with the true one at {correlation:.2f}")

    first, second = (model.operator(name, tissue="tissue1") for name in PAIR.split("+"))
    print(f"norm of K({first.label}): {first.norm():.3f}; order matters by {first.commutator_norm(second):.4f}")
    return correlation


def mean(counts) -> np.ndarray:
    """(n_genes,) mean of log1p counts at 1e4 per cell."""
    return np.asarray(normalise(counts).mean(axis=0)).ravel()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, sys.argv[2] if len(sys.argv) == 3 else "jax")
