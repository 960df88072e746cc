"""Perturb-seq counts whose operators are known: the data set of the demo, and a judge that knows the truth.

Cells are points z of a latent space, N(centre of cell type + shift of tissue, spread^2). A perturbation acts on control
cells by a low-rank affine operator, z' = A z + b with

    A = I + sum_k c_k g (p_k q_k^T - q_k p_k^T)        b = sum_k c_k u_k        c = tanh(sum over members of w_member)

where (p_k, q_k) span orthogonal planes and u_k lies in plane k. The turn by c_k in plane k moves cells of different
types in different directions: the effect depends on the context through z. The norm of A is sqrt(1 + g^2 max c^2),
which g keeps at RHO_MAX or below. Pairs add in the coefficients before the tanh, so that a condition encoder whose
embeddings add can represent them, and a baseline that adds effects overshoots where members act alike. Counts are
negative binomial around library * softmax(z W + bias), with one inverse dispersion per gene and log-normal libraries.

Perturbation 2 is the opposite of 1, 4 that of 3, and the last one does nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pf_core.config import RHO_MAX
from pf_core.labels import CONTROL
from pf_core.noise import generator
from pf_core.outputs import BLOCK, Csr, sample

TISSUES = ("tissue1", "tissue2")
CELL_TYPES = ("type1", "type2", "type3")
BATCHES = ("batch1", "batch2")
SPREAD = 0.6  # standard deviation of cells around their centre
LIBRARY_SIGMA = 0.35  # of log library size
DEPTH = (0.8, 1.25)  # library size of a batch, relative to the median
Truth = dict[str, Any]


def simulate(
    seed: int = 0,
    *,
    n_genes: int = 250,
    n_perturbations: int = 8,
    n_pairs: int = 10,
    n_latent: int = 8,
    n_control: int = 150,
    n_single: int = 60,
    n_pair: int = 35,
    library: float = 1000.0,
    loy: float | None = None,
) -> Any:
    """Counts of a simulated screen over two tissues and three cell types.

    Args:
        seed: the same seed gives the same cells.
        n_genes: the first n_perturbations of them carry the perturbations' names.
        n_perturbations: at least 5.
        n_pairs: combinations of two perturbations.
        n_latent: even; half of it is the number of bases.
        n_control, n_single, n_pair: cells per tissue and cell type, of the controls and of each condition.
        library: median counts per cell.
        loy: a share of cells that have lost their Y gives cells of donors instead of a screen, which
            `pf_core.simulate_loy.simulate_loy` describes; of the sizes here, n_genes and n_latent count then.

    Returns:
        AnnData with CSR float32 counts, shuffled; obs: tissue, cell_type, perturbation ("control", "A", "A+B"), nperts,
        batch; uns["truth"]: plain arrays, what `operator` and `draw` take.

    Raises:
        ValueError: sizes that do not allow the design.
    """
    if loy is not None:
        from pf_core.simulate_loy import simulate_loy

        return simulate_loy(seed, share=loy, n_genes=n_genes, n_latent=n_latent)
    import anndata
    import pandas as pd
    from scipy import sparse

    if n_perturbations < 5 or n_genes < n_perturbations or n_latent < 2 or n_latent % 2:
        raise ValueError(
            f"n_perturbations={n_perturbations}, n_genes={n_genes}, n_latent={n_latent}; at least 5 perturbations, "
            "as many genes, and an even number of latent dimensions were wanted"
        )
    if not 0 <= n_pairs <= n_perturbations * (n_perturbations - 1) // 2:
        raise ValueError(f"n_pairs={n_pairs}; {n_perturbations} perturbations have fewer pairs")
    truth = _truth(seed, n_genes, n_perturbations, n_latent, library)
    names = [str(name) for name in truth["perturbations"]]
    sizes = {CONTROL: n_control} | dict.fromkeys(names, n_single) | dict.fromkeys(_pairs(names, n_pairs), n_pair)
    counts, rows = [], []
    for tissue in TISSUES:
        for cell_type in CELL_TYPES:
            for label, n in sizes.items():
                cells, batch = _cells(truth, label, tissue, cell_type, n, seed, "simulate")
                counts.append(cells)
                nperts = 0 if label == CONTROL else label.count("+") + 1
                rows += [(tissue, cell_type, label, nperts, BATCHES[index]) for index in batch]
    order = generator(seed, "simulate.order").permutation(len(rows))
    obs = pd.DataFrame([rows[index] for index in order])
    obs.columns = pd.Index(["tissue", "cell_type", "perturbation", "nperts", "batch"])
    obs.index = pd.Index([f"cell{number}" for number in range(len(rows))])
    genes = names + [f"gene{number}" for number in range(n_perturbations, n_genes)]
    stacked: Csr = sparse.vstack(counts, format="csr")
    return anndata.AnnData(stacked[order], obs=obs, var=pd.DataFrame(index=pd.Index(genes)), uns={"truth": truth})


def demo_holdout(data: Any) -> tuple[str, ...]:
    """What the demo holds out of `simulate`'s cells, as `DataConfig.holdout` wants it.

    Every third pair, in all contexts (its members are seen alone and in other pairs), and one single perturbation in
    one context (it is seen in the others).
    """
    names = [str(name) for name in data.uns["truth"]["perturbations"]]
    pairs = sorted(label for label in set(data.obs["perturbation"]) if "+" in label)
    single = f"perturbation={names[4]},tissue={TISSUES[-1]},cell_type={CELL_TYPES[-1]}"
    return (*(f"perturbation={pair}" for pair in pairs[1::3]), single)


def operator(truth: Truth, label: str) -> tuple[np.ndarray, np.ndarray]:
    """The operator (A, b) of a condition: z' = A z + b. Identity and 0 for control."""
    names = [str(name) for name in truth["perturbations"]]
    members = [] if label == CONTROL else label.split("+")
    for name in members:
        if name not in names:
            raise ValueError(f"{name!r} is none of the simulated perturbations: {', '.join(names)}")
    total = np.sum([truth["weights"][names.index(name)] for name in members], axis=0) if members else 0.0
    c = np.tanh(total) * np.ones(len(truth["u"]))
    return np.eye(truth["B"].shape[1]) + np.tensordot(c, truth["B"], axes=1), c @ truth["u"]


def draw(truth: Truth, label: str, tissue: str, cell_type: str, n: int, seed: int) -> Csr:
    """Fresh cells of any condition, seen or not: (n, n_genes) CSR counts.

    The distance between two draws, or between a draw and the simulated cells, is the noise ceiling of a prediction.
    """
    return _cells(truth, label, tissue, cell_type, n, seed, "draw")[0]


def _truth(seed: int, n_genes: int, n_perturbations: int, n_latent: int, library: float) -> Truth:
    rng, n_bases = generator(seed, "simulate.truth"), n_latent // 2
    q, _ = np.linalg.qr(rng.standard_normal((n_latent, n_latent)))
    first, second = q[:, 0::2].T, q[:, 1::2].T  # (n_bases, n_latent) each
    turn = first[:, :, None] * second[:, None, :]
    angle = rng.uniform(0.0, 2.0 * np.pi, n_bases)[:, None]
    weights = rng.standard_normal((n_perturbations, n_bases))
    weights *= 1.4 / np.linalg.norm(weights, axis=1, keepdims=True)
    weights[1], weights[3], weights[-1] = -weights[0], -weights[2], 0.0
    return {
        "perturbations": np.array([f"TF{number + 1}" for number in range(n_perturbations)]),
        "weights": weights,
        "B": np.sqrt(RHO_MAX**2 - 1.0) * (turn - turn.transpose(0, 2, 1)),
        "u": 0.8 * (np.cos(angle) * first + np.sin(angle) * second),
        "cell_types": 1.5 * rng.standard_normal((len(CELL_TYPES), n_latent)),
        "tissues": 0.6 * rng.standard_normal((len(TISSUES), n_latent)),
        "decoder_weight": 0.4 * rng.standard_normal((n_latent, n_genes)),
        "decoder_bias": 1.2 * rng.standard_normal(n_genes),
        "r": np.exp(np.log(4.0) + 0.5 * rng.standard_normal(n_genes)),
        "library": float(library),
    }


def _pairs(names: list[str], n_pairs: int) -> list[str]:
    """Neighbours on a ring first, then at distance two, ...: every perturbation is in about equally many pairs."""
    found: dict[str, None] = {}
    for offset in range(1, len(names)):
        for index, name in enumerate(names):
            found["+".join(sorted((name, names[(index + offset) % len(names)])))] = None
    return list(found)[:n_pairs]


def _cells(truth: Truth, label: str, tissue: str, cell_type: str, n: int, seed: int, name: str):
    from scipy import sparse

    for value, known in ((tissue, TISSUES), (cell_type, CELL_TYPES)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    rng = generator(seed, f"{name}.{label}.{tissue}.{cell_type}")
    A, b = operator(truth, label)
    centre = truth["cell_types"][CELL_TYPES.index(cell_type)] + truth["tissues"][TISSUES.index(tissue)]
    z = (centre + SPREAD * rng.standard_normal((n, len(centre)))) @ A.T + b
    batch = rng.integers(len(BATCHES), size=n)
    library = truth["library"] * np.asarray(DEPTH)[batch] * np.exp(LIBRARY_SIGMA * rng.standard_normal(n))
    blocks = []
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        logits = z[rows] @ truth["decoder_weight"] + truth["decoder_bias"]
        profile = np.exp(logits - logits.max(axis=1, keepdims=True))
        profile /= profile.sum(axis=1, keepdims=True)
        blocks.append(sample(library[rows, None] * profile, truth["r"], rng))
    return sparse.csr_matrix(sparse.vstack(blocks)), batch
