"""The learned field of a simulated course held against the true one; writes docs/results_known_flow.md.

    python benchmarks/known_flow.py --runs runs-known-flow --seeds 3

Fresh cells are drawn from the truth at measured and unmeasured times. The model sees their counts only: it encodes
them, and where its field would push them is compared with where the true field does, over genes.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from pf_core import data, simulate_flow
from pf_core.config import NORMALISED_TOTAL, Config
from pf_core.flow_fit import fit_flow
from pf_core.flow_model import FlowModel
from pf_core.genes import align_genes

TIMES = (0.0, 6.0, 12.0, 18.0, 24.0)  # hours; 6 and 18 were not measured
CELLS = 300


def cosines(model: FlowModel, course: anndata.AnnData, condition: str, hour: float) -> np.ndarray:
    """(CELLS,) cosine over genes of the learned and the true change of log1p counts per 10,000 of every cell."""
    truth = course.uns["truth"]
    counts, latents = simulate_flow.draw(truth, condition, hour, 0, CELLS, seed=1)
    obs = pd.DataFrame({"perturbation": [condition] * CELLS, "time": hour, "tissue": "tissue1"})
    obs.index = obs.index.astype(str)
    fresh = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=course.var_names))
    cells, _ = align_genes(data.load(fresh, model.config.data, training=False), model.vocabulary.genes)
    z, tissue = model.encode(cells, np.arange(CELLS)), model.vocabulary.codes("tissues", cells.tissue)
    [s] = model.scaled([hour])
    learned = model.slopes(z, model.velocity(z, model.codes(condition, cells.tissue), s), tissue)
    per_10k = NORMALISED_TOTAL * simulate_flow.profile(truth, latents, 0)
    true = per_10k / (1.0 + per_10k) * simulate_flow.log_profile_velocity(truth, latents, condition, 0)
    true = true[:, course.var_names.get_indexer(pd.Index(model.vocabulary.genes))]
    return (learned * true).sum(1) / (np.linalg.norm(learned, axis=1) * np.linalg.norm(true, axis=1))


def trained(course: anndata.AnnData, out: Path, backend: str, seed: int) -> FlowModel:
    """The run of a seed with default settings, made where it is not there."""
    if out.exists():
        return FlowModel.load(out, backend=backend)
    out.parent.mkdir(parents=True, exist_ok=True)
    edges = out.parent / "network.csv"
    simulate_flow.network(course.uns["truth"]).to_csv(edges, index=False)
    return fit_flow(course, out=out, backend=backend, config=Config(system="flow", seed=seed), network=edges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-known-flow"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=int, nargs="*", default=[150, 500], help="per time point and condition")
    parser.add_argument("--backend", choices=["jax", "torch"], default="jax")
    parser.add_argument("--out", type=Path, default=Path("docs/results_known_flow.md"))
    arguments = parser.parse_args()
    lines = [
        "# The learned field against the true one",
        "",
        f"Written by `python benchmarks/known_flow.py --seeds {arguments.seeds} --cells"
        f" {' '.join(map(str, arguments.cells))} --backend {arguments.backend}` on {platform.machine()}, Python"
        f" {platform.python_version()}. Courses of `pf simulate --flow` (three time points, two conditions, a known"
        " network), default settings, a course and a training a seed. The mean cosine,"
        f" over {CELLS} fresh cells, between where the learned field pushes a cell, encoded from its counts, and where"
        " the true field pushes it, both as changes of log1p counts per 10,000. In brackets the cells'"
        " 5 % quantile. Drug cells at the first time are control cells under the drug's field; times with * were not"
        " measured.",
        "",
        f"| cells a time point | condition | {' | '.join(shown(hour) for hour in TIMES)} | mean ± standard error |",
        "|---|---|" + "---|" * (len(TIMES) + 1),
    ]
    for n_cells in arguments.cells:
        found = {condition: np.empty((len(TIMES), arguments.seeds, CELLS)) for condition in simulate_flow.CONDITIONS}
        for seed in range(arguments.seeds):
            course = simulate_flow.simulate_flow(seed, n_cells=n_cells)
            model = trained(course, arguments.runs / f"{n_cells}-cells" / f"seed-{seed}", arguments.backend, seed)
            for condition, values in found.items():
                for row, hour in enumerate(TIMES):
                    values[row, seed] = cosines(model, course, condition, hour)
        for condition, values in found.items():
            cells = [f"{one.mean():.3f} ({np.quantile(one, 0.05):.2f})" for one in values]
            lines.append(f"| {n_cells} | {condition} | {' | '.join(cells)} | {spread(values.mean((0, 2)))} |")
        whole = np.mean([values.mean((0, 2)) for values in found.values()], axis=0)
        lines.append(f"| {n_cells} | both | {' | '.join('' for _ in TIMES)} | {spread(whole)} |")
    arguments.out.write_text("\n".join(lines) + "\n")


def shown(hour: float) -> str:
    return f"{hour:g} h" + ("" if hour in simulate_flow.HOURS else " *")


def spread(means: np.ndarray) -> str:
    """Mean over seeds and, of several, its standard error."""
    if len(means) == 1:
        return f"{means[0]:.3f}"
    return f"{means.mean():.3f} ± {means.std(ddof=1) / np.sqrt(len(means)):.3f}"


if __name__ == "__main__":
    main()
