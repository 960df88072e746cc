"""Batches of the flow system: cells with dropout masks, and pairs of latents between neighbouring time points.

As in batches.py, every batch is a pure function of (seed, step, attempt).

A step of stage "flow" has pairs of several intervals side by side, equally many of each, so that a flow learns all of
its course at once. Cells of an interval are coupled in rounds: a round draws cells of both sides, makes their plan, and
lasts for as many steps as its pairs fill. A plan is therefore as large as a batch, and a step costs about one plan
however many intervals share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core import noise
from pf_core.backends import Arrays
from pf_core.batches import CellSource, Vocabulary, attempted, epoch_slice
from pf_core.config import MIN_MATCHED, Config
from pf_core.coupling import Coupler, pairs
from pf_core.dataset import Dataset
from pf_core.errors import PredictionError, nearest
from pf_core.labels import Members, parse_condition, vocabulary
from pf_core.networks import Network
from pf_core.sparse_counts import Batch, stack
from pf_core.times import Axis, Interval

__all__ = ["CvaeSource", "PairSource", "condition_code", "course_vocabulary"]

MIN_PAIRS = 16  # of an interval in a step; where there are too many intervals for that, they take turns
VALIDATION_PAIRS = 128  # of an interval


class CvaeSource(CellSource):
    """Stage "cvae": batches of single cells, the posterior's noise, and the units that dropout keeps."""

    stage = "cvae"

    def eps(self, name: str, index: int) -> Arrays:
        """eps (n, n_latent), and keep1, keep2 (n, n_hidden of the discriminator), 1 for units that are kept."""
        adversary, seed = self.config.adversary, self.config.seed
        noises = super().eps(name, index)
        for layer in ("keep1", "keep2"):
            drawn = noise.generator(seed, f"{name}.{layer}", index).random((self.size, adversary.n_hidden))
            noises[layer] = (drawn >= adversary.dropout).astype(self.config.dtype)
        return noises


def course_vocabulary(dataset: Dataset, cells: np.ndarray) -> Vocabulary:
    """Names that these training cells give a meaning to. The flow system reads neither batches nor covariates."""
    members, doses = dataset.members[cells], dataset.doses[cells]
    largest = np.zeros(len(dataset.perturbations))
    np.maximum.at(largest, members.ravel(), doses.ravel())
    known = vocabulary([name for name, dose in zip(dataset.perturbations, largest, strict=True) if dose])
    units = dict(zip(dataset.perturbations, largest.tolist(), strict=True))
    return Vocabulary(
        genes=tuple(map(str, dataset.genes)),
        perturbations=known,
        tissues=vocabulary(dataset.tissue[cells]),
        batches=(),
        covariates=(),
        dose_units=tuple(units.get(name) or 1.0 for name in known),
        covariate_means=(),
        covariate_scales=(),
    )


def condition_code(members: Members, tissue: str, names: Vocabulary) -> np.ndarray:
    """(n_perturbations + n_tissues,) float64: relative doses by perturbation, then the one-hot tissue.

    Args:
        members: (name, dose) pairs; () is control, all zeros.
        tissue: its name; one that training did not see is the unknown one, index 0.
        names: the model's vocabulary.

    Raises:
        PredictionError: a perturbation that was not in training.
    """
    known = names.perturbations
    code = np.zeros(len(known) + len(names.tissues))
    for name, _ in members:
        if name not in known[1:]:
            raise PredictionError(f"condition {name!r} was not in training; {nearest(name, ('control', *known[1:]))}")
    index = names.codes("perturbations", [name for name, _ in members])
    code[index] = names.relative_doses(index, np.array([dose for _, dose in members]))
    code[len(known) + names.codes("tissues", [tissue])[0]] = 1.0
    return code


class PairSource:
    """Stage "flow": pairs of standardised latents between neighbouring time points."""

    def __init__(
        self,
        latents: np.ndarray,
        intervals: Sequence[Interval],
        validation: Sequence[Interval],
        names: Vocabulary,
        axis: Axis,
        config: Config,
        *,
        couple: Coupler,
        network: Network | None = None,
    ) -> None:
        """Args:
        latents: (n_cells, n_latent) of all cells, standardised.
        intervals: with training cells.
        validation: with validation cells; may be empty.
        names, axis: what turns conditions and times into numbers.
        couple: (x, y) -> plan.
        network: the graph that every batch carries along.
        """
        self.latents, self.config, self.couple = latents.astype(config.dtype), config, couple
        self.intervals, self.held = list(intervals), list(validation)
        self.names, self.axis = names, axis
        self.graph = network.arrays(config.dtype) if network is not None else {}
        self.per_step = min(len(self.intervals), max(1, config.stage_flow.batch_size // MIN_PAIRS))
        self.n_pairs = max(1, config.stage_flow.batch_size // self.per_step)  # of each of them
        self.size = self.per_step * self.n_pairs
        self._rounds: dict[int, tuple[Any, tuple[np.ndarray, np.ndarray]]] = {}  # the last round of each interval
        self._plans: dict[int, Any] = {}

    # --- pairs -----------------------------------------------------------------------------------------------------
    def drawn(self, row: int, visit: int, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """The cells of both sides of an interval's pairs at its visit-th turn, (n_pairs,) indices each."""
        interval, size = self.intervals[row], self.config.stage_flow.batch_size
        side = min(size, max(len(interval.start.cells), len(interval.stop.cells)))
        visits = max(1, side // self.n_pairs)  # that a round lasts
        index, place = divmod(visit, visits)
        key = (index, attempt)
        if row not in self._rounds or self._rounds[row][0] != key:
            rng = noise.generator(self.config.seed, attempted(f"flow.pairs.{_name(interval)}", attempt), index)
            if self.config.flow.scope == "global":
                found = self._from_whole(row, visits * self.n_pairs, rng)
            else:
                found = self._from_sample(interval, side, visits * self.n_pairs, rng)
            self._rounds[row] = (key, found)
        before, after = self._rounds[row][1]
        here = slice(place * self.n_pairs, (place + 1) * self.n_pairs)
        return before[here], after[here]

    def _from_sample(
        self, interval: Interval, side: int, n: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """n pairs from the plan of a sample of both sides; the smaller side repeats its cells evenly."""
        before, after = (_even(point.cells, side, rng) for point in (interval.start, interval.stop))
        rows, columns = self._pairs(self.couple(self.latents[before], self.latents[after]), n, rng)
        return before[rows], after[columns]

    def _from_whole(self, row: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """n pairs from the one plan of all cells of an interval."""
        before, after = self.intervals[row].start.cells, self.intervals[row].stop.cells
        if row not in self._plans:
            self._plans[row] = self.couple(self.latents[before], self.latents[after])
        rows, columns = self._pairs(self._plans[row], n, rng)
        return before[rows], after[columns]

    def _pairs(self, plan: Any, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return pairs(plan, n, rng, self.config.flow.pairing)

    # --- batches ---------------------------------------------------------------------------------------------------
    def rows(self, interval: Interval, before: np.ndarray, after: np.ndarray) -> Arrays:
        """What a step reads of an interval's pairs, which weigh n/(n + MIN_MATCHED), n its matched cells."""
        sizes = len(interval.start.cells), len(interval.stop.cells)
        matched = sizes[0] * sizes[1] / sum(sizes)
        members = parse_condition(interval.label, self.config.data)
        code = condition_code(members, interval.tissue, self.names)
        start, stop = self.axis.scaled([interval.start.time, interval.stop.time])
        n, dtype = len(before), self.config.dtype
        return {
            "z0": self.latents[before],
            "z1": self.latents[after],
            "condition": np.tile(code, (n, 1)).astype(dtype),
            "start": np.full(n, start, dtype),
            "stop": np.full(n, stop, dtype),
            "weight": np.full(n, matched / (matched + MIN_MATCHED), dtype),
        }

    def tau(self, name: str, index: int) -> Arrays:
        """Where on the way each pair is looked at, uniform in [0, 1)."""
        drawn = noise.generator(self.config.seed, name, index).random(self.size)
        # A float64 close to 1 is 1 in float32.
        return {"tau": np.minimum(drawn.astype(self.config.dtype), np.nextafter(1.0, 0.0, dtype=self.config.dtype))}

    def micro_batch(self, index: int, attempt: int) -> tuple[Arrays, Arrays]:
        order = attempted("flow.intervals", attempt)
        chosen = epoch_slice(len(self.intervals), self.per_step, self.config.seed, order, index)
        visit = index // max(len(self.intervals) // self.per_step, 1)
        parts = [self.rows(self.intervals[row], *self.drawn(int(row), visit, attempt)) for row in sorted(chosen)]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return batch | self.graph, self.tau(attempted("flow.tau", attempt), index)

    def batch(self, step: int, attempt: int) -> tuple[Batch, Batch]:
        n = self.config.stage_flow.accumulate
        found = [self.micro_batch(step * n + micro, attempt) for micro in range(n)]
        return stack([batch for batch, _ in found]), stack([tau for _, tau in found])

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        """Pairs of validation cells, VALIDATION_PAIRS of every interval, coupled among themselves."""
        parts = []
        for interval in self.held:
            rng = noise.generator(self.config.seed, f"flow.validation.{_name(interval)}")
            most = max(len(interval.start.cells), len(interval.stop.cells))
            side = min(self.config.stage_flow.batch_size, most)
            parts.append(self.rows(interval, *self._from_sample(interval, side, VALIDATION_PAIRS, rng)))
        if not parts:
            return []
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        out, n = [], len(whole["weight"])
        for index, start in enumerate(range(0, n, self.size)):
            place = np.arange(start, start + self.size)
            block = {name: value[np.minimum(place, n - 1)] for name, value in whole.items()}
            block["weight"] = np.where(place < n, block["weight"], 0).astype(self.config.dtype)  # the rest is padding
            noises = self.tau("flow.validation.tau", index)
            out.append((block | self.graph, noises, float(block["weight"].sum())))
        return out


def _name(interval: Interval) -> str:
    """The draws of an interval are its own, whatever other intervals there are."""
    return f"{interval.label}.{interval.tissue}.{interval.start.name}.{interval.stop.name}"


def _even(cells: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """size of the cells in random order: none twice where there are enough, else each as often as any or once more."""
    return np.resize(rng.permutation(cells), size)
