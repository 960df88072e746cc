"""The whole of pf in a minute, without a file: simulate, train, predict held-out pairs, compare with the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pf_core.config import Config, DataConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.errors import ConfigError
from pf_core.evaluation import MODEL
from pf_core.fit import fit
from pf_core.model import Model
from pf_core.outputs import Csr
from pf_core.simulate import demo_holdout, draw, simulate

if TYPE_CHECKING:
    from rich.console import Console

TRUTH = "the truth, drawn anew"


def demo_config(holdout: tuple[str, ...], seed: int) -> Config:
    """Settings for the simulated screen: small networks, every gene."""
    return Config(
        seed=seed,
        data=DataConfig(genes=0, holdout=holdout),
        vae=VAEConfig(n_hidden=128, n_latent=12, kl_warmup=200),
        operator=OperatorConfig(cells_per_condition=64, conditions_per_step=24),
        stage_vae=StageConfig(max_steps=1200, learning_rate=2e-3),
        stage_operator=StageConfig(max_steps=800, learning_rate=2e-3),
        stage_joint=StageConfig(max_steps=0),
    )


def demo(out: Path, *, backend: str, seed: int, console: Console) -> Model:
    """Simulate cells beside `out` (OUT.h5ad), train on them, judge the held-out pairs, and say how close they come.

    Raises:
        ConfigError: OUT.h5ad exists; RunError: `out` holds something.
    """
    data = out.with_name(out.name + ".h5ad")
    if data.exists() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"{out} or {data} exists; nothing was written. Choose another --out, or delete them")
    adata = simulate(seed)
    data.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(data)
    held = demo_holdout(adata)
    console.print(
        f"{data}: {adata.n_obs} simulated cells, {adata.n_vars} genes; held out: {'; '.join(held)}", highlight=False
    )
    truth = adata.uns["truth"]

    def drawn_anew(label: str, tissue: str, cell_type: str, n: int) -> Csr:
        return draw(truth, label, tissue, cell_type, n, seed + 1)

    model = fit(
        data,
        out=out,
        backend=backend,
        config=demo_config(held, seed),
        references={TRUTH: drawn_anew},
        console=console,
    )
    ours, ceiling = _mean_distance(model, MODEL), _mean_distance(model, TRUTH)
    console.print(
        f"Mean energy distance to the held-out cells: {ours:.3f} predicted, {ceiling:.3f} for fresh draws from the"
        " truth (the noise ceiling).",
        highlight=False,
    )
    console.print(f"Open {out / 'report.html'}", highlight=False)
    return model


def _mean_distance(model: Model, method: str) -> float:
    rows = model.run.read_json("metrics.json")["metrics"]
    return float(np.mean([row["energy_pca_u"] for row in rows if row["method"] == method]))
