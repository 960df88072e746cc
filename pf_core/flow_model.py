"""A trained flow system: cells moved through time, to points that were not measured, and under other conditions.

Times are in the units of the data wherever a user meets them; the vector field knows s, 0 at the first training time
and 1 at the last. Latents are raw, as the encoder gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pf_core import backends
from pf_core.backends import Arrays, Backend
from pf_core.baselines import Declined
from pf_core.batches import Vocabulary
from pf_core.checkpoint import Run
from pf_core.config import RK4_STEPS, Config, Output
from pf_core.data import Dataset
from pf_core.errors import PredictionError, RunError, nearest
from pf_core.flow_batches import condition_code
from pf_core.labels import Members, parse_condition
from pf_core.latent import ENCODE_BLOCK, LatentModel
from pf_core.model import read_config, read_vocabulary
from pf_core.outputs import Csr, Means, predicted_counts, scaled
from pf_core.time_baselines import Gap, clock, closeness, curve_over_line, mixed, path_lengths, reading, some
from pf_core.times import Axis

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["FlowModel", "Moved"]

Sides = Literal["both", "previous", "next"]
Method = Literal["rk4", "dopri5"]
DRAW = "flow"  # names the draws: cells at two times, and under two conditions, get the same
FEWEST_STEPS = 2  # of Runge-Kutta between two requested times
MAX_CELLS = 2000  # of a mixture


@dataclass(frozen=True)
class Moved:
    """Cells that were moved to one time."""

    cells: np.ndarray  # (n,) indices of the data set
    start: np.ndarray  # (n,) times they come from, real units
    z0: np.ndarray  # (n, n_latent) where they start
    z1: np.ndarray  # (n, n_latent) where they end
    counts: Csr  # (n, n_genes) predicted


class FlowModel(LatentModel):
    """Encoder, decoder, vector field and time axis of a trained flow run."""

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        params: Mapping[str, np.ndarray],
        backend: Backend,
        run: Run,
        axis: Axis,
        graph: Arrays,
    ) -> None:
        super().__init__(config, vocabulary, params, backend, run)
        self.axis, self.graph = axis, graph

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "jax", device: str = "cpu") -> FlowModel:
        """A trained flow model from its run directory, in either twin whichever wrote it.

        Raises:
            RunError: not a run directory, damaged, its training has not ended, or a run of the operator system.
        """
        run = Run.open(path)
        config = read_config(run)
        if config.system != "flow":
            raise RunError(f"{path} is a run of the {config.system} system, which has no flow in time; use pf predict")
        twin = backends.load(backend, dtype=config.dtype, device=device)
        params = run.read_arrays("model.safetensors")
        facts = run.read_json("data.json")["time"]
        graph = run.read_arrays("network.safetensors") if run.has("network.safetensors") else {}
        return cls(config, read_vocabulary(run), params, twin, run, Axis(**facts), graph)

    # --- conditions and times -------------------------------------------------------------------------------------
    def members(self, label: str) -> Members:
        """The perturbations of a label and their doses.

        Raises:
            PredictionError: a perturbation that was not in training.
        """
        members = parse_condition(label, self.config.data)
        condition_code(members, "", self.vocabulary)
        return members

    def code(self, condition: str, tissue: str) -> np.ndarray:
        """(n_conditions,) what the vector field reads of a condition in a tissue.

        Raises:
            PredictionError: a perturbation or a tissue that was not in training.
        """
        known = self.vocabulary.tissues[1:] or self.vocabulary.tissues
        if tissue not in known:
            raise PredictionError(f"tissue {tissue!r} was not in training; {nearest(tissue, known)}")
        members = parse_condition(condition, self.config.data)
        return condition_code(members, tissue, self.vocabulary).astype(self.config.dtype)

    def codes(self, condition: str, tissues: np.ndarray) -> np.ndarray:
        """(n, n_conditions) codes of one condition in the tissue of each cell."""
        names, place = np.unique(tissues.astype(str), return_inverse=True)
        return np.stack([self.code(condition, str(name)) for name in names])[place]

    def scaled(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Real times as the vector field knows them.

        Raises:
            PredictionError: a time outside of what training has seen.
        """
        times = np.asarray(times, np.float64)
        first, last = self.axis.first, self.axis.last
        rounding = 1e-9 * (last - first)
        outside = times[~((times >= first - rounding) & (times <= last + rounding))]
        if len(outside):
            raise PredictionError(
                f"time {outside[0]:g} is outside of what training has seen, {self.time(first)} to {self.time(last)};"
                " the flow is not known there: choose times between"
            )
        return np.clip(self.axis.scaled(times), 0.0, 1.0)

    def time(self, value: float) -> str:
        """A time with its unit."""
        return f"{value:g} {self.axis.unit}".strip()

    # --- moving latents ---------------------------------------------------------------------------------------------
    def flow(
        self, z: np.ndarray, codes: np.ndarray, start: float, times: np.ndarray, *, method: Method = "rk4"
    ) -> np.ndarray:
        """Latents (n_times, n, n_latent) at times s on either side of the start, in any order.

        Args:
            z: (n, n_latent) latents at the start.
            codes: (n, n_conditions).
            start: s of z.
            times: (n_times,) s.
            method: "rk4", or "dopri5" with the extra "flow".
        """
        begin, times = z.dtype.type(start), np.asarray(times).astype(z.dtype)
        out = np.empty((len(times), *z.shape), z.dtype)
        out[times == begin] = z
        later, earlier = np.unique(times[times > begin]), np.unique(times[times < begin])[::-1]
        for side in (later, earlier):  # each way by itself: an integrator takes times of one direction
            if len(side):
                found = self._integrate(z, codes, np.concatenate([[begin], side]), method)
                for time, latents in zip(side, found[1:], strict=True):
                    out[times == time] = latents
        return out

    def _integrate(self, z: np.ndarray, codes: np.ndarray, times: np.ndarray, method: Method) -> np.ndarray:
        n_steps = max(FEWEST_STEPS, math.ceil(RK4_STEPS * float(np.abs(np.diff(times)).max())))
        out = np.empty((len(times), *z.shape), z.dtype)
        for rows, pad in _blocks(len(z)):
            padded = np.pad(z[rows], pad), times, np.pad(codes[rows], pad)
            found = self.backend.trajectory(
                self.params, *padded, self.graph, self.config, method=method, n_steps=n_steps
            )
            out[:, rows] = found[:, : len(z[rows])]
        return out

    def velocity(self, z: np.ndarray, codes: np.ndarray, time: float) -> np.ndarray:
        """dz/ds (n, n_latent) of raw latents at one s."""
        out, at = np.empty_like(z), np.full(ENCODE_BLOCK, time, z.dtype)
        for rows, pad in _blocks(len(z)):
            padded = np.pad(z[rows], pad), np.pad(codes[rows], pad)
            out[rows] = self.backend.velocity(self.params, at, *padded, self.graph, self.config)[: len(z[rows])]
        return out

    def move(
        self,
        dataset: Dataset,
        cells: np.ndarray,
        from_time: float,
        times: Sequence[float] | np.ndarray,
        condition: str,
        *,
        method: Method = "rk4",
    ) -> np.ndarray:
        """Latents (n_times, n, n_latent) of cells at real times, on their way from one real time under a condition.

        Raises:
            PredictionError: a time outside the trained range, a condition or a tissue that was not in training.
        """
        start, *way = self.scaled([from_time, *times])
        codes = self.codes(condition, dataset.tissue[cells])
        return self.flow(self.encode(dataset, cells), codes, start, np.array(way), method=method)

    # --- moving cells -----------------------------------------------------------------------------------------------
    def predicted(
        self,
        dataset: Dataset,
        cells: np.ndarray,
        z0: np.ndarray,
        z1: np.ndarray,
        *,
        output: Output,
        seed: int,
        name: str,
    ) -> Csr:
        """Predicted counts (n, n_genes) of cells that go from z0 to z1, at their own library sizes."""
        tissue = self.vocabulary.codes("tissues", dataset.tissue[cells])
        library = dataset.library()[cells].astype(self.config.dtype)

        def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            rest = (tissue[rows], library[rows])
            return self.decode(z0[rows], *rest), self.decode(z1[rows], *rest)

        still = output == "transport" and np.array_equal(z0, z1)
        chosen: Means | None = None if still else means
        draw = f"{DRAW}.{name}" if name else DRAW
        return predicted_counts(dataset.rows(cells), chosen, seed=seed, name=draw, output=output, r=self.dispersion())

    def clock(self, dataset: Dataset, gap: Gap, pace: float | None = None) -> tuple[np.ndarray, float]:
        """What the clock of a gap's series shows at each of its points, and in the gap (`time_baselines.clock`).

        Args:
            dataset: with the model's genes.
            gap: the time point and the points of its series.
            pace: 0 for even in time, 1 for as fast as latents change from point to point; by default config.flow.pace.
        """
        times = [point.time for point in gap.points]
        latents = [
            self.encode(dataset, some(point.cells, MAX_CELLS, 0, f"pace.{point.name}")) / self.params["flow.scale"]
            for point in gap.points
        ]
        readings = clock(times, path_lengths(latents), self.config.flow.pace if pace is None else pace)
        return readings, reading(times, readings, gap.time)

    def interpolate(
        self,
        dataset: Dataset,
        gap: Gap,
        *,
        sides: Sides = "both",
        output: Output = "transport",
        seed: int = 0,
        name: str = "",
        pace: float | None = None,
        reach: float | None = None,
        bend: float | None = None,
        method: Method = "rk4",
    ) -> Moved | Declined:
        """Cells at a time point that was not measured, from the measured ones next to it.

        Cells of the earlier point are moved forward, cells of the later one backward, each by `reach` of the way, and
        put together in proportion to closeness, on the clock of flow.pace. Then every gene's mean goes from the line
        between the neighbours to the course's curve, by `bend` of the way. With pace, reach and bend 0 this is the
        plain mixture of the neighbours' cells. The latents are those before the bend.

        Args:
            dataset: with the model's genes.
            gap: the time point and its sides; their cells are those that may be used.
            sides: "both", or all cells of one side.
            output: how decoded means become cells.
            seed, name: of the draws; a mixture of the same name and seed (`time_baselines.mixed`) has the same cells.
            pace, reach, bend: those of config.flow by default.
            method: of integration.

        Returns:
            The cells, or why there are none.
        """
        found = gap.sides
        if isinstance(found, Declined):
            return found
        reach = self.config.flow.reach if reach is None else reach
        readings, now = self.clock(dataset, gap, pace)
        after = int(np.searchsorted(readings, now))
        place = closeness(readings[after - 1], now, readings[after])
        share = place if sides == "both" else float(sides == "next")
        chosen = mixed(found[0].cells, found[1].cells, share, seed=seed, name=name, most=MAX_CELLS)
        ends = self.scaled([side.time for side in found])
        target = ends[0] + place * (ends[1] - ends[0])
        code, parts = self.code(gap.label, gap.tissue), []
        for side, cells in zip(found, chosen, strict=True):
            if len(cells):
                [start] = self.scaled([side.time])
                z0 = self.encode(dataset, cells)
                end = np.array([start + reach * (target - start)])
                [z1] = self.flow(z0, np.tile(code, (len(cells), 1)), start, end, method=method)
                parts.append((cells, np.full(len(cells), side.time), z0, z1))
        cells, start, z0, z1 = (np.concatenate(part) for part in zip(*parts, strict=True))
        counts = self.predicted(dataset, cells, z0, z1, output=output, seed=seed, name=name)
        profiles = np.stack([_profile(dataset, point.cells) for point in gap.points])
        bend = self.config.flow.bend if bend is None else bend
        factor = 1.0 + bend * (curve_over_line(readings, profiles, now) - 1.0)
        counts = scaled(counts, factor, seed=seed, name=f"{DRAW}.bend.{name}", output=output)
        return Moved(cells, start, z0, z1, counts)

    # --- files ------------------------------------------------------------------------------------------------------
    def trajectory(
        self,
        source: Any | None,
        condition: str,
        times: Sequence[float],
        *,
        start: str | float | None = None,
        **options: Any,
    ) -> AnnData:
        """Cells at several times, `pf_core.trajectory.trajectory`: the same cells on their way from the time point
        `start`, or without one the cells of the measured points around each time.

        Args:
            source: AnnData or a path; None for the data of the run, without a start those it has not held out.
            condition, times, start, options: as there.

        Returns:
            AnnData with predicted counts in X, the real time in obs, latents in obsm["X_latent"] and, where cells
            began, in obsm["X_start_latent"].
        """
        from pf_core import trajectory

        found = trajectory.cells(self, source, heldout=start is not None)
        way = trajectory.trajectory(self, found, condition, times, start=start, **options)
        return trajectory.to_anndata(self, found, way)

    def counterfactual(
        self, source: Any, first: str, second: str, times: Sequence[float], *, start: str | float, **options: Any
    ) -> tuple[AnnData, AnnData]:
        """The same cells with the same draws under two conditions: those of the first at the time point `start`."""
        from pf_core import trajectory

        found = trajectory.cells(self, source)
        pair = trajectory.counterfactual(self, found, first, second, times, start=start, **options)
        return trajectory.to_anndata(self, found, pair[0]), trajectory.to_anndata(self, found, pair[1])


def _profile(dataset: Dataset, cells: np.ndarray) -> np.ndarray:
    """(n_genes,) mean over cells of counts / library."""
    return np.asarray(dataset.rows(cells).T @ (1.0 / dataset.library()[cells])).ravel() / len(cells)


def _blocks(n: int) -> list[tuple[slice, tuple[tuple[int, int], tuple[int, int]]]]:
    """Rows at once, and how they are padded so that one shape is compiled."""
    starts = range(0, n, ENCODE_BLOCK)
    return [(slice(at, min(at + ENCODE_BLOCK, n)), ((0, max(at + ENCODE_BLOCK - n, 0)), (0, 0))) for at in starts]
