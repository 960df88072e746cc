"""Batches of each stage: pure functions of (seed, step), so that their order never depends on who reads them.

An epoch is a permutation drawn from (seed, name, epoch); a step takes the next slice, and the remainder that does not
fill a batch is left for another epoch's order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pf_core import noise
from pf_core.backends import Arrays
from pf_core.config import Config
from pf_core.count_table import count_table, tail_sizes
from pf_core.data import Dataset, Group
from pf_core.labels import CONTROL, codes
from pf_core.sparse_counts import Batch, SparseCounts, stack

VALIDATION_CELLS = 256  # at most, per condition and side
MIN_VALIDATION_CELLS = 5  # a condition with fewer says nothing about a distance


@dataclass(frozen=True)
class Vocabulary:
    """Names behind the indices of a trained model, and the units of its numbers.

    Index 0 is "unknown" in all but genes and covariates.
    """

    genes: tuple[str, ...]
    perturbations: tuple[str, ...]
    tissues: tuple[str, ...]
    batches: tuple[str, ...]
    covariates: tuple[str, ...]
    dose_units: tuple[float, ...]  # the largest training dose of every perturbation, 1 where there was none
    covariate_means: tuple[float, ...]  # over the training conditions
    covariate_scales: tuple[float, ...]  # their standard deviations, 1 for a covariate that does not vary

    def codes(self, kind: str, values: Sequence[str] | np.ndarray) -> np.ndarray:
        """Indices of names; 0 for names never seen."""
        return codes(values, getattr(self, kind))

    def relative_doses(self, perturbations: np.ndarray, doses: np.ndarray) -> np.ndarray:
        """Doses in units of the largest one that training had of the perturbation with that index."""
        return doses / np.array(self.dose_units)[perturbations]

    def standardised(self, covariates: np.ndarray) -> np.ndarray:
        """Covariates (n, n_covariates) as the condition encoder reads them; 0 is the mean of training."""
        return (covariates - np.array(self.covariate_means)) / np.array(self.covariate_scales)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, name: str, epoch: int, n: int) -> np.ndarray:
    return noise.permutation(seed, name, epoch, n)


def epoch_slice(n: int, size: int, seed: int, name: str, index: int) -> np.ndarray:
    """Which of n items the index-th batch of a size takes."""
    epoch, place = divmod(index, max(n // size, 1))
    return _epoch_order(seed, name, epoch, n)[place * size : (place + 1) * size]


def attempted(name: str, attempt: int) -> str:
    return f"{name}.{attempt}" if attempt else name


class CellSource:
    """Batches of single cells: stage 1, and the ELBO of stage 3."""

    stage = "vae"

    def __init__(
        self,
        dataset: Dataset,
        train: np.ndarray,
        validation: np.ndarray,
        vocabulary: Vocabulary,
        config: Config,
        batch_size: int,
    ) -> None:
        self.dataset, self.config = dataset, config
        self.train, self.held = train, validation
        self.tissue = vocabulary.codes("tissues", dataset.tissue)
        self.library = dataset.library().astype(config.dtype)
        self.size = min(batch_size, len(train))
        self.n_tail = self._most_in_tail() if config.vae.dispersion == "gene" else None

    def _most_in_tail(self) -> int:
        """More counts than a batch of any cells can have beyond the table."""
        read = np.concatenate([self.train, self.held])
        found = [tail_sizes(counts) for _, counts in self.dataset.blocks(read)]
        return int(np.sort(np.concatenate(found))[-self.size :].sum())

    def cells(self, indices: np.ndarray, size: int) -> Batch:
        """A batch of these cells, padded with weight 0 to a fixed size; with a count table where r is one per gene."""
        pad = size - len(indices)
        dtype = self.config.dtype
        rows, weight = self.dataset.rows(indices), np.ones(len(indices), dtype)
        batch: dict[str, np.ndarray | SparseCounts] = {
            "counts": SparseCounts((size, rows.shape[1]), (rows.astype(dtype, copy=False),)),
            "tissue": np.pad(self.tissue[indices], (0, pad)),
            "library": np.pad(self.library[indices], (0, pad), constant_values=1.0),
            "weight": np.pad(weight, (0, pad)),
        }
        return batch if self.n_tail is None else batch | count_table(rows, weight, self.n_tail, dtype=dtype)

    def eps(self, name: str, index: int) -> Arrays:
        """The posterior's noise for one batch."""
        shape = (self.size, self.config.vae.n_latent)
        return {"eps": noise.normal(self.config.seed, name, index, shape, self.config.dtype)}

    def micro_batch(self, stage: str, index: int, attempt: int) -> tuple[Batch, Arrays]:
        order = attempted(f"{stage}.order", attempt)
        chosen = epoch_slice(len(self.train), self.size, self.config.seed, order, index)
        return self.cells(self.train[chosen], self.size), self.eps(attempted(f"{stage}.eps", attempt), index)

    def batch(self, step: int, attempt: int) -> tuple[Batch, Batch]:
        n = getattr(self.config, f"stage_{self.stage}").accumulate
        pairs = [self.micro_batch(self.stage, step * n + micro, attempt) for micro in range(n)]
        return stack([batch for batch, _ in pairs]), stack([eps for _, eps in pairs])

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        blocks = [self.held[start : start + self.size] for start in range(0, len(self.held), self.size)]
        return [
            (self.cells(block, self.size), self.eps(f"{self.stage}.validation", index), float(len(block)))
            for index, block in enumerate(blocks)
        ]


def conditions(groups: Sequence[Group], names: Sequence[str], vocabulary: Vocabulary, dtype: str) -> Arrays:
    """What the condition encoder reads, one row per group, whose members are indices into names."""
    onehot = np.zeros((len(groups), len(vocabulary.batches)), dtype)
    batch = vocabulary.codes("batches", [group.batch for group in groups])
    rows = np.flatnonzero(batch)  # pooled groups and batches never seen have no batch: a zero row
    onehot[rows, batch[rows]] = 1.0
    members = vocabulary.codes("perturbations", names)[np.stack([group.members for group in groups])]
    doses = vocabulary.relative_doses(members, np.stack([group.doses for group in groups]))
    covariates = vocabulary.standardised(np.stack([group.covariates for group in groups]))
    return {
        "perturbations": members,
        "doses": doses.astype(dtype),
        "tissue": vocabulary.codes("tissues", [group.tissue for group in groups]),
        "batch": onehot,
        "covariates": covariates.astype(dtype),
    }


def draw(cells: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """size of the cells without replacement, and their weights; where there are fewer, padding of weight 0."""
    chosen = rng.permutation(cells)[:size]
    pad = size - len(chosen)
    return np.pad(chosen, (0, pad), mode="edge"), np.pad(np.ones(len(chosen)), (0, pad))


def _slots(groups: Sequence[Group]) -> np.ndarray:
    """One slot of the carried vectors per distinct operator, from 1 on: contexts that share an operator share it."""
    keys = [(g.label, g.tissue, g.batch, tuple(g.covariates)) for g in groups]
    order = {key: 1 + place for place, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], np.int32)


class ConditionSource:
    """Stage 2: batches of conditions, each a sample of control and of perturbed cells, as latents."""

    stage = "operator"

    def __init__(
        self,
        latents: np.ndarray,
        groups: Sequence[Group],
        validation: Sequence[Group],
        names: Sequence[str],
        vocabulary: Vocabulary,
        config: Config,
    ) -> None:
        self.latents, self.config = latents.astype(config.dtype), config
        self.groups, self.held = list(groups), [g for g in validation if len(g.cells) >= MIN_VALIDATION_CELLS]
        self.conditions = conditions(self.groups, names, vocabulary, config.dtype)
        self.held_conditions = conditions(self.held, names, vocabulary, config.dtype) if self.held else {}
        self.slots = _slots(self.groups)
        operator = config.operator
        self.n_conditions = min(operator.conditions_per_step, len(self.groups))
        most = max(max(len(g.cells), len(g.controls)) for g in self.groups)
        self.n_cells = min(operator.cells_per_condition, most)

    def carry(self, n_tissues: int, n_bases: int) -> Arrays:
        """Start of the vectors that the power iteration carries from step to step."""
        config, n_latent = self.config.operator, self.latents.shape[1]
        if config.spectral_target == "bases":
            name, rows = "v_bases", n_tissues + n_bases
        else:
            name, rows = "v", 1 + int(self.slots.max())
        start = noise.normal(self.config.seed, "operator.v", 0, (rows, n_latent), self.config.dtype)
        return {name: start / np.linalg.norm(start, axis=1, keepdims=True)}

    def micro_batch(self, index: int, attempt: int) -> tuple[Batch, Arrays]:
        seed, dtype, stage = self.config.seed, self.config.dtype, self.stage
        name = attempted(f"{stage}.conditions", attempt)
        rows = epoch_slice(len(self.groups), self.n_conditions, seed, name, index)
        rng = noise.generator(seed, attempted(f"{stage}.cells", attempt), index)
        batch: dict[str, np.ndarray | SparseCounts] = {key: value[rows] for key, value in self.conditions.items()}
        batch |= self.sides([self.groups[row] for row in rows], self.n_cells, rng)
        slots = self.slots[rows]
        _, firsts = np.unique(slots, return_index=True)
        distinct = np.zeros(len(rows), dtype)
        distinct[firsts] = 1.0
        batch["slot"] = np.where(distinct > 0, slots, 0).astype(np.int32)
        batch["distinct"] = distinct
        batch["weight"] = np.ones(len(rows), dtype)
        return batch, self.noises(index, attempt)

    def noises(self, index: int, attempt: int) -> Arrays:
        name = attempted(f"{self.stage}.v0", attempt)
        shape = (self.n_conditions, self.latents.shape[1])
        return {"v0": noise.normal(self.config.seed, name, index, shape, self.config.dtype)}

    def sides(self, groups: Sequence[Group], size: int, rng: np.random.Generator) -> Batch:
        """Controls and perturbed cells of each group; the two sides of a control group are disjoint halves."""
        drawn: dict[str, list[np.ndarray]] = {"x": [], "wx": [], "y": [], "wy": []}
        for group in groups:
            controls, cells = group.controls, group.cells
            if group.label == CONTROL:
                halves = rng.permutation(cells)
                controls, cells = halves[: len(halves) // 2], halves[len(halves) // 2 :]
            for side, members in (("x", controls), ("y", cells)):
                chosen, weight = draw(members, size, rng)
                drawn[side].append(chosen)
                drawn["w" + side].append(weight)
        arrays = {key: np.stack(value) for key, value in drawn.items()}
        weights = {key: arrays[key].astype(self.config.dtype) for key in ("wx", "wy")}
        return {**self.values(arrays["x"], arrays["y"]), **weights}

    def values(self, x: np.ndarray, y: np.ndarray) -> Batch:
        """What a step reads of the chosen cells, (n_conditions, n_cells) indices each side."""
        return {"x": self.latents[x], "y": self.latents[y]}

    def batch(self, step: int, attempt: int) -> tuple[Batch, Batch]:
        n = getattr(self.config, f"stage_{self.stage}").accumulate
        pairs = [self.micro_batch(step * n + micro, attempt) for micro in range(n)]
        return stack([batch for batch, _ in pairs]), stack([v0 for _, v0 in pairs])

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        out = []
        for index, start in enumerate(range(0, len(self.held), self.n_conditions)):
            groups = self.held[start : start + self.n_conditions]
            pad = self.n_conditions - len(groups)
            rows = np.pad(np.arange(start, start + len(groups)), (0, pad), mode="edge")
            rng = noise.generator(self.config.seed, f"{self.stage}.validation", index)
            batch: dict[str, np.ndarray | SparseCounts] = {
                key: value[rows] for key, value in self.held_conditions.items()
            }
            batch |= self.sides([self.held[row] for row in rows], VALIDATION_CELLS, rng)
            weight = np.pad(np.ones(len(groups), self.config.dtype), (0, pad))
            batch |= {"slot": np.zeros(len(rows), np.int32), "distinct": weight, "weight": weight}
            out.append((batch, self.noises(index, -1), float(len(groups))))
        return out


class JointSource(ConditionSource):
    """Stage 3: conditions as counts, beside a batch of single cells for the ELBO."""

    stage = "joint"

    def __init__(
        self,
        cells: CellSource,
        latents: np.ndarray,
        groups: Sequence[Group],
        validation: Sequence[Group],
        vocabulary: Vocabulary,
        config: Config,
    ) -> None:
        super().__init__(latents, groups, validation, cells.dataset.perturbations, vocabulary, config)
        self.cells = cells

    def values(self, x: np.ndarray, y: np.ndarray) -> Batch:
        out: dict[str, np.ndarray | SparseCounts] = {}
        for side, indices in (("x", x), ("y", y)):
            rows = self.cells.dataset.rows(indices.ravel())
            rows = rows.astype(self.config.dtype, copy=False)
            out[f"{side}_counts"] = SparseCounts((*indices.shape, rows.shape[1]), (rows,))
            out[f"{side}_library"] = self.cells.library[indices]
        return out

    def micro_batch(self, index: int, attempt: int) -> tuple[Batch, Arrays]:
        batch, noises = super().micro_batch(index, attempt)
        cells, eps = self.cells.micro_batch("joint", index, attempt)
        return {**batch, **{f"cells_{key}": value for key, value in cells.items()}}, noises | eps

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        out = []
        for index, (batch, noises, weight) in enumerate(super().validation()):
            start = index * self.cells.size % max(len(self.cells.held), 1)
            cells = self.cells.cells(self.cells.held[start : start + self.cells.size], self.cells.size)
            batch = {**batch, **{f"cells_{key}": value for key, value in cells.items()}}
            out.append((batch, {**noises, **self.cells.eps("joint.validation", index)}, weight))
        return out
