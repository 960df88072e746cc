"""Cells of male donors of which some have lost the Y chromosome, with known truth: the judge of pf_core.loy.

The latent space, the decoder and the operators are those of pf_core.simulate; LOY is a perturbation of that kind, whose
strength is an argument (0: no effect on other genes). Beside the decoded genes there are Y genes, whose counts are
NB(L share) in XY cells and Poisson(ambient L share) in cells without Y, XIST in the cells of a female donor, and a
share of Y counts that depends on the cell type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pf_core.errors import ConfigError
from pf_core.loy import LOY, XY
from pf_core.noise import generator
from pf_core.outputs import sample
from pf_core.simulate import CELL_TYPES, TISSUES, _cells, _truth
from pf_core.y_genes import XIST

__all__ = ["SIMULATED_Y", "simulate_loy"]

SIMULATED_Y = {  # relative shares, as in kidney and brain: few genes carry most counts, some are never seen
    "RPS4Y1": 0.35,
    "DDX3Y": 0.2,
    "EIF1AY": 0.15,
    "UTY": 0.12,
    "KDM5D": 0.08,
    "USP9Y": 0.06,
    "ZFY": 0.04,
    "NLGN4Y": 0.0,
}
Y_R = 3.0  # inverse dispersion of a Y gene in XY cells
TYPE_FACTOR = (1.0, 0.6, 1.5)  # share of Y counts per cell type, relative
XIST_SHARE = 2e-3
Truth = dict[str, Any]


def simulate_loy(
    seed: int = 0,
    *,
    share: float = 0.2,
    effect: float = 1.0,
    n_genes: int = 150,
    n_donors: int = 4,
    n_female: int = 1,
    n_cells: int = 100,
    n_latent: int = 8,
    library: float = 3000.0,
    y_share: float = 4e-3,
    ambient: float = 0.03,
) -> Any:
    """Counts of male donors with a share of LOY cells, and of female donors.

    Args:
        seed: the same seed gives the same cells.
        share: of the cells of a male donor that have lost their Y; the first male donor is young and has lost none.
        effect: of LOY on the other genes; 0 for none, 1 for that of a simulated perturbation.
        n_genes: other than the Y genes and XIST.
        n_donors, n_female: donors, male and female.
        n_cells: per donor, tissue and cell type.
        n_latent: even.
        library: median counts per cell.
        y_share: Y counts of an XY cell relative to its other counts.
        ambient: Y counts of a cell without Y relative to an XY cell.

    Returns:
        AnnData; obs: tissue, cell_type, donor, sex, age, true_loy ("XY", "LOY", "no Y"). uns["truth"] as in simulate,
        with one perturbation, "LOY". There is no perturbation column: `pf loy` writes it.

    Raises:
        ConfigError: sizes or shares out of range.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    if not (0 <= share < 1 and effect >= 0 and n_donors >= 2 and n_genes >= 5 and 0 < ambient < 1 and n_cells >= 1):
        raise ConfigError(
            f"share={share}, effect={effect}, n_donors={n_donors}, n_genes={n_genes}, ambient={ambient}; a share"
            " below 1, an effect of 0 or more, two male donors and five genes at least were wanted"
        )
    truth = _loy_truth(seed, n_genes, n_latent, library, effect)
    weights = np.array(list(SIMULATED_Y.values()))
    parts, rows = [], []
    for number in range(n_donors + n_female):
        female = number >= n_donors
        name = f"donor{number + 1}"
        for tissue in TISSUES:
            for place, cell_type in enumerate(CELL_TYPES):
                key = f"loy.{name}.{tissue}.{cell_type}"
                rng = generator(seed, key)
                lost = 0 if female or number == 0 else round(share * n_cells)
                states = {LOY: lost, "no Y" if female else XY: n_cells - lost}
                for state, n in states.items():
                    if not n:
                        continue
                    label = LOY if state == LOY else "control"
                    cells, _ = _cells(truth, label, tissue, cell_type, n, seed, key)
                    depth = np.asarray(cells.sum(1), float).ravel()
                    mean = depth[:, None] * (y_share * TYPE_FACTOR[place] * weights)
                    y = sample(mean, np.full(len(weights), Y_R), rng) if state == XY else rng.poisson(ambient * mean)
                    xist = rng.poisson(depth * XIST_SHARE * (1.0 if female else ambient / 10))
                    parts.append(sparse.hstack([cells, sparse.csr_matrix(y), sparse.csr_matrix(xist[:, None])]))
                    age = 30 if number == 0 else 60 + 5 * number
                    rows += [(tissue, cell_type, name, "female" if female else "male", age, state)] * n
    order = generator(seed, "loy.order").permutation(len(rows))
    obs = pd.DataFrame([rows[index] for index in order])
    obs.columns = pd.Index(["tissue", "cell_type", "donor", "sex", "age", "true_loy"])
    obs.index = pd.Index([f"cell{number}" for number in range(len(rows))])
    genes = [f"gene{number}" for number in range(n_genes)] + [*SIMULATED_Y, XIST]
    stacked = sparse.csr_matrix(sparse.vstack(parts, format="csr"), dtype=np.float32)
    return anndata.AnnData(stacked[order], obs=obs, var=pd.DataFrame(index=pd.Index(genes)), uns={"truth": truth})


def _loy_truth(seed: int, n_genes: int, n_latent: int, library: float, effect: float) -> Truth:
    truth = _truth(seed, n_genes, 5, n_latent, library)
    return {**truth, "perturbations": np.array([LOY]), "weights": effect * truth["weights"][:1]}
