"""What the models of both systems share: names, parameters, and the way from counts to latents and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pf_core import data
from pf_core.backends import Backend
from pf_core.batches import Vocabulary
from pf_core.checkpoint import Run
from pf_core.config import NORMALISED_TOTAL, Config
from pf_core.counts import Csr
from pf_core.outputs import BLOCK
from pf_core.sparse_counts import SparseCounts

__all__ = ["ENCODE_BLOCK", "LatentModel"]

ENCODE_BLOCK = BLOCK  # cells encoded or decoded at once; the last block is padded so that one shape is compiled


class LatentModel:
    """Encoder and decoder of a trained model, and the run it lives in."""

    def __init__(
        self, config: Config, vocabulary: Vocabulary, params: Mapping[str, np.ndarray], backend: Backend, run: Run
    ) -> None:
        self.config, self.vocabulary, self.params = config, vocabulary, dict(params)
        self.backend, self.run = backend, run

    def encode(self, dataset: data.Dataset, cells: np.ndarray | None = None) -> np.ndarray:
        """Latent means (n, n_latent) of some or all cells of a data set that has the model's genes."""
        cells = np.arange(dataset.n_cells) if cells is None else cells
        tissue = self.vocabulary.codes("tissues", dataset.tissue)
        out = np.empty((len(cells), self.config.vae.n_latent), self.config.dtype)
        for start in range(0, len(cells), ENCODE_BLOCK):
            block = cells[start : start + ENCODE_BLOCK]
            out[start : start + len(block)] = self.encode_counts(dataset.rows(block), tissue[block])
        return out

    def encode_counts(self, counts: Csr, tissue: np.ndarray) -> np.ndarray:
        """Latent means of at most ENCODE_BLOCK rows."""
        n, n_genes = counts.shape
        padded = SparseCounts((ENCODE_BLOCK, n_genes), (counts.astype(self.config.dtype, copy=False),))
        mean, _ = self.backend.encode(self.params, padded, np.pad(tissue, (0, ENCODE_BLOCK - n)), self.config)
        return mean[:n]

    def decode(self, z: np.ndarray, tissue: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Mean counts (n, n_genes) of at most ENCODE_BLOCK latents."""
        n = len(z)
        pad = ENCODE_BLOCK - n
        padded = (np.pad(z, ((0, pad), (0, 0))), np.pad(tissue, (0, pad)), np.pad(library, (0, pad), mode="edge"))
        return self.backend.decode(self.params, *padded, self.config)[:n]

    def dispersion(self) -> np.ndarray:
        """Inverse dispersion per gene (the mean over tissues where each has its own)."""
        tissues = np.arange(len(self.vocabulary.tissues), dtype=np.int32)
        r = self.backend.dispersion(self.params, tissues, self.config)
        return r if r.ndim == 1 else np.exp(np.log(r).mean(0))

    def log_profiles(self, z: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """log1p of decoded counts per 10,000, (n, n_genes) float64.

        Args:
            z: (n, n_latent).
            tissue: (n,) indices.
        """
        out = np.empty((len(z), len(self.vocabulary.genes)))
        for start in range(0, len(z), ENCODE_BLOCK):
            rows = slice(start, start + ENCODE_BLOCK)
            depth = np.full(len(z[rows]), NORMALISED_TOTAL, self.config.dtype)
            mean = self.decode(z[rows].astype(self.config.dtype), tissue[rows], depth)
            out[rows] = np.log1p(mean.astype(np.float64))
        return out

    def slopes(self, z: np.ndarray, direction: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """Derivative of `log_profiles` along a direction of each cell, (n, n_genes) float64.

        Args:
            z, direction: (n, n_latent).
            tissue: (n,) indices.
        """
        dtype, out = self.config.dtype, []
        for start in range(0, len(z), ENCODE_BLOCK):
            rows = slice(start, start + ENCODE_BLOCK)
            n = len(z[rows])
            pad = ENCODE_BLOCK - n
            at, along = (np.pad(part[rows].astype(dtype), ((0, pad), (0, 0))) for part in (z, direction))
            place, depth = np.pad(tissue[rows], (0, pad)), np.full(ENCODE_BLOCK, NORMALISED_TOTAL, dtype)
            moved = self.backend.decode_jacobian_vector(self.params, at, along, place, depth, self.config)[:n]
            out.append(moved.astype(np.float64) / (1.0 + self.decode(at[:n], place[:n], depth[:n]).astype(np.float64)))
        return np.concatenate(out)
