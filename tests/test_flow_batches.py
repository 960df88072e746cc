"""Batches of the flow system are pure functions of the step; pairs belong to their interval and follow its plan."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from pf_core import times
from pf_core.config import AdversaryConfig, Config, DataConfig, FlowConfig, StageConfig, VAEConfig
from pf_core.coupling import exact_plan, squared_distances
from pf_core.data import load
from pf_core.errors import PredictionError
from pf_core.flow_batches import VALIDATION_PAIRS, CvaeSource, PairSource, condition_code, course_vocabulary
from pf_core.networks import Network
from pf_core.simulate_flow import simulate_flow

CONFIG = Config(
    system="flow",
    data=DataConfig(genes=0, validation_share=0.2),
    vae=VAEConfig(n_hidden=7, n_latent=3),
    adversary=AdversaryConfig(n_hidden=5, dropout=0.3),
    stage_cvae=StageConfig(batch_size=13, accumulate=2),
    stage_flow=StageConfig(batch_size=64, accumulate=2),
)


@pytest.fixture(scope="module")
def parts():
    dataset = load(simulate_flow(0, n_genes=23, n_cells=53, n_tissues=2), CONFIG.data, contrasts=False)
    course = times.read(dataset, CONFIG)
    split = times.split(dataset, course, CONFIG.data, 0)
    found = times.intervals(times.series(dataset, course, split.train))
    held = times.intervals(times.series(dataset, course, split.validation))
    latents = np.random.default_rng(1).standard_normal((dataset.n_cells, 3))
    latents += course.times[:, None] / 10  # cells move
    return dataset, course, split, found, held, latents.astype("float32"), course_vocabulary(dataset, split.train)


def pair_source(parts, config=CONFIG, intervals=None, network=None, couple=exact_plan):
    _, course, split, found, held, latents, vocabulary = parts
    axis = times.axis_of(course, split.train)
    chosen = found if intervals is None else intervals
    return PairSource(latents, chosen, held, vocabulary, axis, config, couple=couple, network=network)


def setting(**flow) -> Config:
    return dataclasses.replace(CONFIG, flow=FlowConfig(**flow))


def same(one, other) -> bool:
    return all(np.array_equal(one[i][name], other[i][name]) for i in (0, 1) for name in one[i])


# --- cells -------------------------------------------------------------------------------------------------------
def test_a_batch_of_cells_has_noise_and_dropout_masks_of_its_own(parts):
    dataset, _, split, _, _, _, vocabulary = parts
    source = CvaeSource(dataset, split.train, split.validation, vocabulary, CONFIG, 13)
    batch, noise = source.batch(3, 0)
    assert batch["counts"].shape == (2, 13, 23)
    assert set(np.unique(batch["tissue"])) == {1, 2}
    assert {name: array.shape for name, array in noise.items()} == {
        "eps": (2, 13, 3), "keep1": (2, 13, 5), "keep2": (2, 13, 5),
    }  # fmt: skip
    assert set(np.unique(noise["keep1"])) == {0.0, 1.0}
    assert not np.array_equal(noise["keep1"], noise["keep2"])
    assert noise["keep1"].dtype == np.float32
    kept = np.mean([source.batch(step, 0)[1]["keep2"] for step in range(100)])
    assert abs(kept - 0.7) < 0.02
    again = CvaeSource(dataset, split.train, split.validation, vocabulary, CONFIG, 13)
    assert same((batch, noise), again.batch(3, 0))
    assert not same((batch, noise), source.batch(3, 1))


def test_validation_cells_come_once_each(parts):
    dataset, _, split, _, _, _, vocabulary = parts
    source = CvaeSource(dataset, split.train, split.validation, vocabulary, CONFIG, 13)
    found = source.validation()
    counts = np.concatenate([np.asarray(batch["counts"])[batch["weight"] > 0] for batch, _, _ in found])
    np.testing.assert_array_equal(counts, dataset.dense(split.validation))
    assert sum(weight for _, _, weight in found) == len(split.validation)
    assert all(noise["keep1"].shape == (13, 5) for _, noise, _ in found)


# --- conditions --------------------------------------------------------------------------------------------------
def test_the_condition_code_is_doses_by_perturbation_then_the_tissue(parts):
    vocabulary = parts[-1]
    assert (vocabulary.perturbations, vocabulary.tissues) == (
        ("<unknown>", "drug"),
        ("<unknown>", "tissue1", "tissue2"),
    )
    np.testing.assert_array_equal(condition_code((), "tissue1", vocabulary), [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(condition_code((("drug", 1.0),), "tissue2", vocabulary), [0, 1, 0, 0, 1])
    units = dataclasses.replace(vocabulary, dose_units=(1.0, 4.0))
    np.testing.assert_array_equal(condition_code((("drug", 2.0),), "elsewhere", units), [0, 0.5, 1, 0, 0])
    with pytest.raises(PredictionError, match="condition 'drag' was not in training; did you mean 'drug'"):
        condition_code((("drag", 1.0),), "tissue1", vocabulary)


# --- pairs -------------------------------------------------------------------------------------------------------
def cell_of(latents, rows) -> np.ndarray:
    """The cell that each row of latents belongs to."""
    position = {tuple(row): cell for cell, row in enumerate(latents.tolist())}
    return np.array([position[tuple(row)] for row in rows.reshape(-1, 3).tolist()])


def test_every_pair_joins_cells_of_its_interval_under_its_condition_and_times(parts):
    dataset, course, split, found, _, latents, vocabulary = parts
    batch, noise = pair_source(parts).batch(5, 0)
    assert batch["z0"].shape == (2, 64, 3)
    assert noise["tau"].shape == (2, 64)
    before, after = cell_of(latents, batch["z0"]), cell_of(latents, batch["z1"])
    assert set(before) | set(after) <= set(split.train)
    codes = batch["condition"].reshape(-1, 5)
    seen = set()
    for row in range(128):
        drug, tissue = codes[row, 1] == 1, vocabulary.tissues[int(codes[row, 2:].argmax())]
        assert dataset.label[after[row]] == ("drug" if drug else "control")
        assert dataset.label[before[row]] == ("drug" if drug and course.times[before[row]] > 0 else "control")
        assert dataset.tissue[before[row]] == dataset.tissue[after[row]] == tissue
        start, stop = batch["start"].ravel()[row], batch["stop"].ravel()[row]
        assert (course.times[before[row]] / 24, course.times[after[row]] / 24) == (start, stop)
        seen.add((drug, tissue, float(start)))
    assert len(seen) == len(found) == 8
    n = len(found[0].start.cells) * len(found[0].stop.cells) / (len(found[0].start.cells) + len(found[0].stop.cells))
    assert batch["weight"][0, 0] == pytest.approx(n / (n + 20))


def counting(calls):
    def couple(x, y):
        calls.append((len(x), len(y)))
        return exact_plan(x, y)

    return couple


def test_a_round_couples_both_sides_optimally_and_uses_every_pair_once(parts):
    _, _, _, found, _, latents, _ = parts
    config = dataclasses.replace(CONFIG, stage_flow=StageConfig(batch_size=16))
    source = pair_source(parts, config, intervals=found[:1])
    assert (source.per_step, source.n_pairs) == (1, 16)
    before, after = source.drawn(0, 7, 0)
    assert len(set(before)) == len(set(after)) == 16
    cost = squared_distances(latents[before], latents[after])
    assert np.trace(cost) == pytest.approx(cost[linear_sum_assignment(cost)].sum())


def test_a_round_lasts_for_the_steps_that_its_pairs_fill(parts):
    """Two intervals of 16 pairs each: a plan of 32 cells a side lasts for two steps and gives each pair once."""
    _, _, _, found, _, _, _ = parts
    calls: list[tuple[int, int]] = []
    config = dataclasses.replace(CONFIG, stage_flow=StageConfig(batch_size=32))
    source = pair_source(parts, config, intervals=found[:2], couple=counting(calls))
    assert (source.per_step, source.n_pairs, source.size) == (2, 16, 32)
    cells = [source.drawn(row, visit, 0) for visit in range(6) for row in range(2)]
    assert calls == [(32, 32)] * 6
    for first, second in ((0, 2), (1, 3), (4, 6)):
        for side in (0, 1):
            assert len({*cells[first][side], *cells[second][side]}) == 32
    assert len({*cells[2][0], *cells[4][0]}) < 32  # another round


@pytest.mark.parametrize("flow", [{}, {"scope": "global"}, {"pairing": "argmax"}])
def test_pairs_are_a_function_of_the_step_alone(parts, flow):
    one, other = pair_source(parts, setting(**flow)), pair_source(parts, setting(**flow))
    for step in range(5):
        one.batch(step, 0)
    assert same(one.batch(7, 0), other.batch(7, 0))
    assert not same(one.batch(7, 0), one.batch(8, 0))
    assert not same(one.batch(7, 0), other.batch(7, 1))
    assert same(one.batch(2, 0), other.batch(2, 0))  # back again


def test_a_global_plan_is_made_once_over_all_cells_and_its_pairs_are_drawn_from_it(parts):
    _, _, _, found, _, latents, _ = parts
    sizes: list[tuple[int, int]] = []
    uneven = [dataclasses.replace(found[0], stop=dataclasses.replace(found[0].stop, cells=found[0].stop.cells[:17]))]
    source = pair_source(parts, setting(scope="global"), intervals=uneven, couple=counting(sizes))
    interval = uneven[0]
    plan = exact_plan(latents[interval.start.cells], latents[interval.stop.cells]).toarray()
    for step in range(9):
        before, after = source.drawn(0, step, 0)
        rows = np.searchsorted(interval.start.cells, before)
        columns = np.searchsorted(interval.stop.cells, after)
        assert (plan[rows, columns] > 0).all()
    assert sizes == [(42, 17)]


def test_few_cells_are_repeated_evenly_and_a_single_cell_is_enough(parts):
    _, _, _, found, _, _, _ = parts
    few = dataclasses.replace(found[0], start=dataclasses.replace(found[0].start, cells=found[0].start.cells[:1]))
    source = pair_source(parts, intervals=[few])
    before, after = source.drawn(0, 0, 0)
    assert set(before) == {few.start.cells[0]}
    count = np.unique(after, return_counts=True)[1]
    assert len(count) == 42
    assert set(count) == {1, 2}  # 64 pairs over 42 cells
    batch, _ = source.batch(0, 0)
    assert batch["weight"][0, 0] < 0.05


def test_intervals_take_turns_where_there_are_too_many(parts):
    config = dataclasses.replace(CONFIG, stage_flow=StageConfig(batch_size=48))
    source = pair_source(parts, config)
    assert (source.per_step, source.n_pairs, source.size) == (3, 16, 48)
    codes = [source.micro_batch(index, 0)[0] for index in range(2)]  # one epoch: 6 of 8, the others in another order
    keys = {(*one["condition"][row].tolist(), float(one["start"][row])) for one in codes for row in range(0, 48, 16)}
    assert len(keys) == 6
    later = [source.micro_batch(index, 0)[0] for index in range(2, 30)]
    keys |= {(*one["condition"][row].tolist(), float(one["start"][row])) for one in later for row in range(0, 48, 16)}
    assert len(keys) == 8


def test_validation_pairs_are_of_validation_cells_and_padding_weighs_nothing(parts):
    _, _, split, _, held, latents, _ = parts
    source = pair_source(parts)
    found = source.validation()
    assert all(batch["z0"].shape == (64, 3) and noise["tau"].shape == (64,) for batch, noise, _ in found)
    cells = np.concatenate([cell_of(latents, batch[side]) for batch, _, _ in found for side in ("z0", "z1")])
    assert set(cells) <= set(split.validation)
    weights = np.concatenate([batch["weight"] for batch, _, _ in found])
    assert (weights > 0).sum() == len(held) * VALIDATION_PAIRS == 8 * 128
    assert sum(total for _, _, total in found) == pytest.approx(weights.sum(), rel=1e-6)
    assert same(found[0][:2], pair_source(parts).validation()[0][:2])
    odd = dataclasses.replace(CONFIG, stage_flow=StageConfig(batch_size=100))
    last, _, total = pair_source(parts, odd).validation()[-1]
    n = len(last["weight"])
    assert (last["weight"] > 0).sum() == 8 * 128 % n
    assert total == pytest.approx(last["weight"].sum())
    assert np.isfinite(last["z0"]).all()
    none = pair_source(parts)
    none.held = []
    assert none.validation() == []


def test_the_network_travels_with_every_batch(parts):
    network = Network(np.array([0, 1], np.int32), np.array([2, 3], np.int32), np.array([1.0, -1.0]), {})
    source = pair_source(parts, network=network)
    batch, _ = source.batch(0, 0)
    assert (batch["source"].shape, batch["sign"].shape) == ((2, 2), (2, 2))
    assert (batch["target"].dtype, batch["sign"].dtype) == (np.int32, np.float32)
    assert "source" not in pair_source(parts).batch(0, 0)[0]
    assert source.validation()[0][0]["target"].tolist() == [2, 3]


def test_tau_is_below_1_and_even(parts):
    source = pair_source(parts)
    drawn = np.concatenate([source.tau("x", index)["tau"] for index in range(200)])
    assert drawn.dtype == np.float32
    assert 0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 0.02
