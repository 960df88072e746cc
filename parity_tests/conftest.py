"""One thread, so that sums have one order and the machine is left to others."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: there is no pair to compare")
    pytest.importorskip("jax", reason="JAX is not installed: there is no pair to compare")
    torch.set_num_threads(1)
