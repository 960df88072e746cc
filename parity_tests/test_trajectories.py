"""Rule 9: whole trainings. The slow tier runs the full length."""

from __future__ import annotations

import pytest

from parity_tests import trajectories

STAGES = ("vae", "operator", "joint", "cvae", "flow")
SHORT, LONG = 30, 1000


@pytest.fixture(autouse=True)
def _x64_put_back():
    import jax

    before = jax.config.values["jax_enable_x64"]
    yield
    jax.config.update("jax_enable_x64", before)


def check(stage: str, dtype: str, steps: int) -> None:
    result = trajectories.compare(stage, dtype, steps)
    assert result.passed, result


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stage", ["vae", "operator", "cvae", "flow"])
def test_short_trainings_stay_together(stage: str, dtype: str) -> None:
    check(stage, dtype, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stage", STAGES)
def test_long_trainings_stay_together(stage: str, dtype: str) -> None:
    check(stage, dtype, LONG)


@pytest.mark.parametrize("order", [("torch", "jax"), ("jax", "torch")])
@pytest.mark.parametrize("stage", ["operator", "cvae"])
def test_a_swap_in_mid_run_changes_nothing(stage: str, order: tuple[str, str]) -> None:
    assert trajectories.swapped(stage, "float64", SHORT, order) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("order", [("torch", "jax"), ("jax", "torch")])
@pytest.mark.parametrize("stage", STAGES)
def test_500_steps_in_one_twin_and_500_in_the_other(stage: str, order: tuple[str, str]) -> None:
    assert trajectories.swapped(stage, "float64", LONG, order) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_one_step_from_states_on_the_way(stage: str) -> None:
    gaps = trajectories.restarts(stage, "float64", (0, 1, 10, 100))
    assert max(gaps.values()) < 1e-11, gaps
