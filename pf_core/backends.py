"""The face a twin shows to the core: NumPy in, NumPy out, training state opaque. Imported only when used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pf_core.config import RK4_STEPS, Config
from pf_core.errors import ConfigError
from pf_core.sparse_counts import Batch, SparseCounts

Arrays = dict[str, np.ndarray]
STAGES = {"operator": ("vae", "operator", "joint"), "flow": ("cvae", "flow")}  # of each system, in order
INSTALL = {"jax": "pip install perturb-forecast", "torch": 'pip install "perturb-forecast[torch]"'}


def stage_label(stage: str, member: int) -> str:
    """The name under which a run keeps a stage: "operator", and "operator.2" for the second member of an ensemble."""
    return f"{stage}.{member + 1}" if member else stage


def stage_of(label: str) -> tuple[str, int]:
    """Stage and member of a label."""
    stage, _, number = label.partition(".")
    return stage, int(number or 1) - 1


class Backend(Protocol):
    """What pf_core asks of a twin. Parameters are canonical: dotted names, dense weights (in, out)."""

    name: str

    def describe(self) -> dict[str, str]:
        """Versions, device, dtype and matmul precision."""
        ...

    def init(
        self,
        stage: str,
        params: Mapping[str, np.ndarray],
        *,
        trainable: tuple[str, ...],
        m: Mapping[str, np.ndarray] | None = None,
        v: Mapping[str, np.ndarray] | None = None,
        count: int = 0,
        carry: Mapping[str, np.ndarray] | None = None,
    ) -> Any:
        """A training state: trainable and frozen parameters, Adam's moments and count, carried vectors."""
        ...

    def send(self, batch: Batch) -> dict[str, Any]:
        """Batches or noise on their way to the device, for run and evaluate; counts become dense there."""
        ...

    def run(
        self,
        stage: str,
        state: Any,
        batches: Mapping[str, Any],
        noises: Mapping[str, Any],
        hypers: Arrays,
        config: Config,
    ) -> tuple[Any, dict[str, Any]]:
        """Many steps; every leaf has a leading axis of steps, then one of micro-batches."""
        ...

    def evaluate(
        self, stage: str, state: Any, batch: Batch, noise: Batch, config: Config, beta: float
    ) -> dict[str, float]:
        """Loss and its parts on one batch; nothing is updated."""
        ...

    def export(self, state: Any) -> dict[str, Any]:
        """{"params", "m", "v", "count", "carry"} in NumPy; init(export(state)) is bit-exact."""
        ...

    def encode(
        self,
        params: Mapping[str, np.ndarray],
        counts: np.ndarray | SparseCounts,
        tissue: np.ndarray,
        config: Config,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and log variance, (n_cells, n_latent) each."""
        ...

    def decode(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        tissue: np.ndarray,
        library: np.ndarray,
        config: Config,
    ) -> np.ndarray:
        """Mean counts, (n_cells, n_genes)."""
        ...

    def dispersion(self, params: Mapping[str, np.ndarray], tissue: np.ndarray, config: Config) -> np.ndarray:
        """Inverse dispersion, (n_genes,) or (n_cells, n_genes)."""
        ...

    def operators(self, params: Mapping[str, np.ndarray], conditions: Arrays, config: Config) -> Arrays:
        """theta, alpha, beta, A, b of each condition."""
        ...

    def decode_jacobian_vector(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        direction: np.ndarray,
        tissue: np.ndarray,
        library: np.ndarray,
        config: Config,
    ) -> np.ndarray:
        """Derivative of the decoded mean along a latent direction, (n_cells, n_genes)."""
        ...

    def gradients(
        self,
        stage: str,
        params: Mapping[str, np.ndarray],
        trainable: tuple[str, ...],
        batch: Arrays,
        noise: Arrays,
        hyper: Mapping[str, float],
        carry: Arrays,
        config: Config,
    ) -> tuple[float, dict[str, np.ndarray | None]]:
        """Loss and the gradient per parameter; None where no path leads to the parameter."""
        ...

    def unreached(
        self,
        stage: str,
        params: Mapping[str, np.ndarray],
        trainable: tuple[str, ...],
        batch: Arrays,
        noise: Arrays,
        carry: Arrays,
        config: Config,
    ) -> set[str]:
        """Trained parameters from which no path leads to the loss, a matter of structure."""
        ...

    def diagnose(
        self,
        stage: str,
        params: Mapping[str, np.ndarray],
        trainable: tuple[str, ...],
        batch: Arrays,
        noise: Arrays,
        hyper: Mapping[str, float],
        carry: Arrays,
        config: Config,
    ) -> str:
        """The first intermediate value or gradient that is not finite, by name; "" where all are finite."""
        ...

    def entropic_plan(self, x: np.ndarray, y: np.ndarray, *, epsilon: float, unbalanced: float) -> np.ndarray:
        """Entropic optimal-transport plan (n, m) between latents; both strengths in units of the mean cost."""
        ...

    def trajectory(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
        config: Config,
        *,
        method: str = "rk4",
        n_steps: int = RK4_STEPS,
        rtol: float = 1e-5,
        atol: float = 1e-6,
    ) -> np.ndarray:
        """Latents (n_times, n_cells, n_latent) on the way of the vector field; the first are z itself."""
        ...

    def velocity(
        self,
        params: Mapping[str, np.ndarray],
        times: np.ndarray,
        z: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
        config: Config,
    ) -> np.ndarray:
        """dz/ds at one time per cell, (n_cells, n_latent)."""
        ...

    def endpoint_jacobian(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
        config: Config,
        *,
        n_steps: int = RK4_STEPS,
    ) -> np.ndarray:
        """Derivative of each cell's last latent in its first, (n_cells, n_latent, n_latent)."""
        ...

    def endpoint_gradient(
        self,
        params: Mapping[str, np.ndarray],
        counts: np.ndarray,
        tissue: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
        weights: np.ndarray,
        config: Config,
        *,
        n_steps: int = RK4_STEPS,
    ) -> np.ndarray:
        """Derivative in log1p(counts) of a weighted sum of genes' log1p of decoded counts per 10,000 at the end."""
        ...


def load(
    name: str, *, dtype: str = "float32", device: str = "cpu", compile: bool = False, precision: str = "float32"
) -> Backend:
    """The twin of that name, "jax" or "torch".

    Args:
        name, dtype, device, compile: see Backend.
        precision: of the dense layers of the training that is to come, `Config.precision`.

    Raises:
        ConfigError: no such twin, no such device, a precision that the device does not have, or a framework that is not
            installed (the message says how to).
    """
    have = {"cpu": ("float32",), "tpu": ("float32", "bf16")}.get(device, ("float32", "tf32", "bf16"))
    if precision not in have:
        raise ConfigError(
            f"precision is {precision!r} on device {device!r}, which computes {' or '.join(have)}; "
            "set precision to one of these, or take another device"
        )
    if name not in INSTALL:
        raise ConfigError(f"backend is {name!r}; one of {', '.join(map(repr, INSTALL))} was wanted")
    try:
        bridge = importlib.import_module(f"pf_{name}.bridge")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("pf_"):
            raise
        raise ConfigError(f"backend {name!r} needs {error.name}, which is not installed: {INSTALL[name]}") from None
    try:
        return bridge.Backend(dtype=dtype, device=device, compile=compile)
    except ValueError as error:
        raise ConfigError(str(error)) from None
