"""Arrays and parameters in and out, gradients with their paths, and the Backend that pf_core trains with."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.stages import Traced

from pf_core.config import NORMALISED_TOTAL, RK4_STEPS, Config
from pf_core.health import Health, health_of
from pf_core.initial import select
from pf_core.sparse_counts import Batch, SparseCounts
from pf_jax import steps
from pf_jax.conditions import ConditionEncoder
from pf_jax.coupling import entropic_plan
from pf_jax.cvae import CVAE
from pf_jax.flow import VectorField
from pf_jax.flow_steps import ENCODER, players_loss
from pf_jax.integrate import check_request, integrate
from pf_jax.layers import PRECISION
from pf_jax.operators import OperatorFamily
from pf_jax.probe import recording
from pf_jax.steps import Stage
from pf_jax.vae import NBVAE

__all__ = ["Backend", "gradient_health", "synchronize", "to_backend", "to_numpy", "value_and_grad"]

DTYPES = ("float32", "float64")
Numpy = dict[str, np.ndarray]
# Equations whose outputs feed their inputs again: every output is taken to depend on every input.
_LOOPS = ("scan", "while")
FLOW_MARK = "cvae.encoder.mean.weight"  # a parameter that flow models have and operator models have not
_CELLS = 256  # cells whose endpoint is differentiated together


def to_backend(tree: Any, dtype: str | None = None, device: str | None = None) -> Any:
    """Arrays of any kind as arrays of this framework; those of NumPy are copied.

    Nothing is differentiated.

    Args:
        tree: an array, or a nested container of arrays.
        dtype: "float32" or "float64" for the floating leaves; None keeps theirs. Integers become 32-bit in JAX.
        device: of the framework, for example "cpu"; None for the default, or where the array already is.

    Returns:
        The same structure.

    Raises:
        ValueError: an unknown dtype, or in JAX an integer beyond 32 bits.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; one of {DTYPES} was wanted")
    place = _device(device) if device is not None else None
    return jax.tree.map(lambda leaf: _leaf_to_backend(leaf, dtype, place), tree)


def _leaf_to_backend(leaf: Any, dtype: str | None, place: Any) -> jax.Array:
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    kind: Any = array.dtype
    if np.issubdtype(kind, np.floating):
        kind = np.dtype(dtype or kind)
    elif np.issubdtype(kind, np.integer):
        limits = np.iinfo(np.int32)
        if kind.itemsize > 4 and array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(f"an integer array reaches {array.min()} to {array.max()}; 32-bit integers were wanted")
        kind = np.dtype(np.int32)
    if kind == np.float64:
        # twin: without this flag JAX hands out float32 where float64 was asked for, without a word.
        jax.config.update("jax_enable_x64", True)
    return jax.device_put(jnp.array(array, dtype=kind, copy=True), place)


def to_numpy(tree: Any) -> Any:
    """Arrays of this framework as NumPy arrays.

    Nothing is differentiated. The result shares no memory with the tree.

    Args:
        tree: an array, or a nested container of arrays.

    Returns:
        The same structure.
    """
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def synchronize(tree: Any) -> Any:
    """Wait until the arrays are computed; timings need it.

    Args:
        tree: an array, or a nested container of arrays.

    Returns:
        tree.
    """
    return jax.block_until_ready(tree)


def value_and_grad(
    function: Callable[..., jax.Array], params: Mapping[str, jax.Array], *args: Any
) -> tuple[jax.Array, dict[str, jax.Array | None]]:
    """Value of function(params, *args) and its gradient in every parameter.

    A gradient is None where no path leads from the parameter to the value, as distinct from a gradient that is zero.

    Args:
        function: (params, *args) -> () value.
        params: floating arrays by name.
        args: further arguments, not differentiated.

    Returns:
        value (), and {name: gradient or None}.
    """
    traced = jax.jit(jax.value_and_grad(function)).trace(dict(params), *args)
    value, grads = traced.lower().compile()(dict(params), *args)
    blind = _without_path(traced, dict(params), *args)
    return value, {name: None if name in blind else grads[name] for name in params}


def _without_path(traced: Traced, params: dict[str, jax.Array], *args: Any) -> set[str]:
    """Parameters from which no path leads to the value, of a traced function (params, *args) -> (value, gradients).

    Their gradients are constant zeros: their part of the program reads no input, and is zero.
    """
    program = traced.jaxpr.jaxpr
    reads = _reads_input(program, [True] * len(program.invars))[1:]
    constant = {name: k for k, (name, read) in enumerate(zip(sorted(params), reads, strict=True)) if not read}
    if not constant:
        return set()
    part = program.replace(outvars=[program.outvars[1 + k] for k in constant.values()])
    inputs = jax.tree.leaves((params, *args))
    values = jax.jit(jaxpr_as_fun(ClosedJaxpr(part, traced.jaxpr.consts)))(*inputs)
    return {name for name, value in zip(constant, values, strict=True) if not (value != 0).any()}


def _reads_input(program: Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which outputs of a program depend on the marked inputs, or on constants (data that a function closes over)."""
    reading = {var for var, marked in zip(program.invars, inputs, strict=True) if marked} | set(program.constvars)

    def marks(variables: Sequence[Any]) -> list[bool]:
        return [not isinstance(var, Literal) and var in reading for var in variables]

    for equation in program.eqns:
        marked = marks(equation.invars)
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        shape = (len(equation.invars), len(equation.outvars))
        if (
            isinstance(inner, Jaxpr)
            and (len(inner.invars), len(inner.outvars)) == shape
            and equation.primitive.name not in _LOOPS
        ):
            outputs = _reads_input(inner, marked)
        else:
            outputs = [any(marked)] * len(equation.outvars)
        reading.update(var for var, mark in zip(equation.outvars, outputs, strict=True) if mark)
    return marks(program.outvars)


def gradient_health(grads: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Health]:
    """A verdict on every gradient, by `pf_core.health.judge`.

    Args:
        grads: {name: gradient or None}, as `value_and_grad` returns them.
        params: parameters by name.

    Returns:
        {name: Health}, verdict "none", "zero", "tiny", "huge", "non-finite" or "ok".
    """
    return {
        name: health_of(None if grad is None else np.asarray(grad), np.asarray(params[name]))
        for name, grad in grads.items()
    }


# --- compiled functions of whole parameter dictionaries ------------------------------------------------------------


def _model(params, config: Config) -> NBVAE | _FlowVAE:
    return _FlowVAE(params) if FLOW_MARK in params else NBVAE(config.vae, select(params, "vae"))


@partial(jax.jit, static_argnames=("config",))
def _encode(params, counts, tissue, config: Config):
    return _model(params, config).encode(counts, tissue)


@partial(jax.jit, static_argnames=("config",))
def _decode(params, z, tissue, library, config: Config):
    return _model(params, config).decode(z, tissue, library)


@partial(jax.jit, static_argnames=("config",))
def _decode_jvp(params, z, direction, tissue, library, config: Config):
    model = _model(params, config)
    return jax.jvp(lambda z: model.decode(z, tissue, library), (z,), (direction,))[1]


@partial(jax.jit, static_argnames=("config",))
def _dispersion(params, tissue, config: Config):
    return _model(params, config).dispersion(tissue)


@partial(jax.jit, static_argnames=("method", "n_steps", "rtol", "atol"))
def _trajectory(params, z, times, condition, graph, method, n_steps, rtol, atol):
    settings = {"method": method, "n_steps": n_steps, "rtol": rtol, "atol": atol}
    return _Flow(params, graph).path(z, times, condition, **settings)


@jax.jit
def _velocity(params, times, z, condition, graph):
    return _Flow(params, graph).velocity(times, z, condition)


@partial(jax.jit, static_argnames=("n_steps",))
def _endpoint_jacobian(params, z, times, condition, graph, n_steps):
    flow = _Flow(params, graph)

    def one(cell):
        end = lambda z: flow.path(z[None], times, cell[1][None], n_steps=n_steps)[-1, 0]
        return jax.jacfwd(end)(cell[0])

    return jax.lax.map(one, (z, condition), batch_size=_CELLS)


@partial(jax.jit, static_argnames=("n_steps",))
def _endpoint_gradient(params, counts, tissue, times, condition, graph, weights, n_steps):
    model, flow = _FlowVAE(params), _Flow(params, graph)

    def one(cell):
        x, tissue, condition = cell

        def score(x):
            z, _ = model.encode(x[None], tissue[None])
            end = flow.path(z, times, condition[None], n_steps=n_steps)[-1]
            mu = model.decode(end, tissue[None], jnp.ones(1, end.dtype))[0]
            return (weights * jnp.log1p(NORMALISED_TOTAL * mu)).sum()

        # d log1p(x) = dx / (1 + x).
        return jax.grad(score)(x) * (1.0 + x)

    return jax.lax.map(one, (counts, tissue, condition), batch_size=_CELLS)


class _FlowVAE:
    """The conditional VAE in use, with its running statistics."""

    def __init__(self, params):
        self.cvae, self.statistics = CVAE(select(params, "cvae")), select(params, ENCODER)
        self.decode, self.dispersion = self.cvae.decode, self.cvae.dispersion

    def encode(self, counts, tissue):
        if "norm1.mean" not in self.statistics:
            raise ValueError("params have no running statistics; add what stage 'cvae' left in its carry")
        return self.cvae.encode(counts, tissue, self.statistics)[:2]


class _Flow:
    """The vector field in use, on raw latents."""

    def __init__(self, params, graph):
        missing = [name for name in ("flow.center", "flow.scale") if name not in params]
        if missing:
            raise ValueError(f"params lack {', '.join(missing)}; pass the parameters of a trained flow")
        self.center, self.scale = params["flow.center"], params["flow.scale"]
        self.field = VectorField(select(params, "flow"))
        self.nodes = self.field.nodes(graph)

    def velocity(self, times, z, condition):
        return self.scale * self.field(times, (z - self.center) / self.scale, condition, self.nodes)

    def path(self, z, times, condition, **settings):
        standard = lambda s, z: self.field(s, z, condition, self.nodes)
        path = self.center + self.scale * integrate(standard, (z - self.center) / self.scale, times, **settings)
        return path.at[0].set(z)  # not rounded by the way there and back


@partial(jax.jit, static_argnames="shape")
def _scatter(places, values, *, shape):
    flat = jnp.zeros(math.prod(shape), values.dtype)
    return flat.at[places].set(values, mode="drop", unique_indices=True).reshape(shape)


@jax.jit
def _operators(params, conditions):
    theta = ConditionEncoder(select(params, "conditions"))(**conditions)
    family = OperatorFamily(select(params, "operators"))
    alpha, beta = family.coefficients(theta)
    A, b = family.operator(theta, conditions["tissue"])
    return {"theta": theta, "alpha": alpha, "beta": beta, "A": A, "b": b}


class Backend:
    """What pf_core uses: NumPy in and out, a training state that only this class looks into.

    Args:
        dtype: "float32" or "float64".
        device: "cpu", "gpu" ("cuda" is the same), or "tpu", which only JAX knows.
        compile: run the losses through torch.compile; JAX always compiles.

    Raises:
        ValueError: an unknown dtype, or a device that is not there.
    """

    name = "jax"

    def __init__(self, dtype: str = "float32", device: str = "cpu", compile: bool = False):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; one of {DTYPES} was wanted")
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.dtype, self.device = dtype, device
        self._place = _device(device)
        self.scatters = self._place.platform != "cpu"  # whether counts become dense on the device
        self._cached: tuple[tuple[int, ...], Any, dict[str, jax.Array]] | None = None
        self._unreached: dict[Any, set[str]] = {}

    def describe(self) -> dict[str, str]:
        """Versions, device, dtype and matmul precision.

        Returns:
            {name: text}.
        """
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
        device = f"{self._place.platform}: {self._place.device_kind}"
        return versions | {"device": device, "dtype": self.dtype, "precision": str(PRECISION).lower()}

    # --- training ---

    def init(
        self,
        stage: Stage,
        params: Mapping[str, np.ndarray],
        *,
        trainable: Any,
        m: Mapping[str, np.ndarray] | None = None,
        v: Mapping[str, np.ndarray] | None = None,
        count: int = 0,
        carry: Mapping[str, np.ndarray] | None = None,
    ) -> steps.TrainState:
        """The state of a run, on the device.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            params: all canonical parameters.
            trainable: names of those that are trained.
            m: first moments by name; None for zeros.
            v: second moments by name; None for zeros.
            count: updates done so far.
            carry: vectors of the power iteration, or running statistics; None for none.

        Returns:
            An opaque state for `run`, `evaluate` and `export`.

        Raises:
            ValueError: an unknown stage or trainable name, or moments of other names or shapes.
        """
        steps.check_stage(stage)
        state = steps.init_state(params, trainable=trainable, m=m, v=v, count=count, carry=carry, dtype=self.dtype)
        # Committed to the device, as the state that comes out of a step is: otherwise the second call compiles again.
        return jax.device_put(state, self._place)

    def send(self, batch: Batch) -> dict[str, Any]:
        """Batches or noise on their way to the device: what `run` and `evaluate` take instead of NumPy arrays.

        Nothing is differentiated. Floating arrays are put on the device, or read where they lie, so that they must not
        change afterwards. CSR counts become dense, and travel to an accelerator without their zeros. Integers stay as
        they are, for `run` to check.

        Args:
            batch: NumPy arrays and `pf_core.sparse_counts.SparseCounts` by name, of any shape.

        Returns:
            The same names.
        """
        return {name: self._sent(leaf) for name, leaf in batch.items()}

    def _sent(self, leaf: Any) -> Any:
        if isinstance(leaf, SparseCounts):
            if self.scatters and leaf.travels_lighter:
                return self._scattered(leaf)
            leaf = leaf.dense()
        if isinstance(leaf, jax.Array) or not np.issubdtype(np.asarray(leaf).dtype, np.floating):
            return leaf
        return jax.device_put(np.asarray(leaf, self.dtype), self._place)

    def _scattered(self, counts: SparseCounts) -> jax.Array:
        places, values = counts.places(), counts.values().astype(self.dtype, copy=False)
        # A program belongs to a number of values: few numbers, at most a sixteenth apart. What is added is dropped.
        more = -len(places) % 2 ** max(len(places).bit_length() - 5, 0)
        beyond = math.prod(counts.shape) + np.arange(more, dtype=np.int32)
        padded = np.concatenate([places, beyond]), np.pad(values, (0, more))
        return _scatter(*jax.device_put(padded, self._place), shape=counts.shape)

    def _batch(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        sent = self.send(batch)
        return {name: leaf if isinstance(leaf, jax.Array) else self._arrays(leaf) for name, leaf in sent.items()}

    def run(
        self,
        stage: Stage,
        state: Any,
        batches: Mapping[str, Any],
        noises: Mapping[str, Any],
        hypers: Numpy,
        config: Config,
    ) -> tuple[Any, dict[str, Any]]:
        """Many steps in one call. The state that is passed in is used up.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            state: from `init` or `run`.
            batches: leaves (n_steps, n_micro, ...), of NumPy or from `send`.
            noises: the same.
            hypers: {"lr": (n_steps,), "beta": (n_steps,)}.
            config: the run's configuration.

        Returns:
            state, and the metrics of every step as NumPy.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        steps.check_stage(stage)
        self._check_indices(state.params | state.frozen, state.carry, batches)
        state, metrics = steps.run_steps(
            stage, state, self._batch(batches), self._batch(noises), self._arrays(hypers), config=config
        )
        return state, to_numpy(metrics)

    def evaluate(
        self, stage: Stage, state: Any, batch: Batch, noise: Batch, config: Config, beta: float
    ) -> dict[str, float]:
        """Loss of a stage and its parts, without an update.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            state: from `init` or `run`.
            batch: without an axis of micro-batches, of NumPy or from `send`.
            noise: the same.
            config: the run's configuration.
            beta: weight of the KL divergence.

        Returns:
            {name: number}.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        steps.check_stage(stage)
        self._check_indices(state.params | state.frozen, state.carry, batch)
        parts = steps.evaluate(stage, state, self._batch(batch), self._batch(noise), config=config, beta=beta)
        return {name: float(value) for name, value in parts.items()}

    def export(self, state: Any) -> dict[str, Any]:
        """The state in canonical form; `init` takes it back bit by bit.

        Args:
            state: from `init` or `run`.

        Returns:
            {"params", "m", "v", "carry"} of NumPy arrays by name, the trained parameters only, and "count".
        """
        return {
            "params": to_numpy(state.params),
            "m": to_numpy(state.m),
            "v": to_numpy(state.v),
            "count": int(state.count),
            "carry": to_numpy(state.carry),
        }

    # --- using a model ---

    def encode(
        self,
        params: Mapping[str, np.ndarray],
        counts: np.ndarray | SparseCounts,
        tissue: np.ndarray,
        config: Config,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and unclipped log variance, in evaluation mode.

        Args:
            params: canonical parameters; with those below "cvae." the running statistics too.
            counts: (n_cells, n_genes), of NumPy or `SparseCounts`.
            tissue: (n_cells,).
            config: the run's configuration.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent).

        Raises:
            ValueError: another number of genes than the model has, an index beyond its table, or no running statistics.
        """
        self._check_indices(params, {}, {"tissue": tissue})
        inputs = self._batch({"counts": counts, "tissue": tissue})
        return to_numpy(_encode(self._parameters(params), **inputs, config=config))

    def decode(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        tissue: np.ndarray,
        library: np.ndarray,
        config: Config,
    ) -> np.ndarray:
        """Mean counts.

        Args:
            params: canonical parameters.
            z: (n_cells, n_latent).
            tissue: (n_cells,).
            library: (n_cells,) total counts.
            config: the run's configuration.

        Returns:
            (n_cells, n_genes).

        Raises:
            ValueError: an index beyond its table.
        """
        self._check_indices(params, {}, {"tissue": tissue})
        inputs = self._arrays((z, tissue, library))
        return to_numpy(_decode(self._parameters(params), *inputs, config=config))

    def decode_jacobian_vector(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        direction: np.ndarray,
        tissue: np.ndarray,
        library: np.ndarray,
        config: Config,
    ) -> np.ndarray:
        """Derivative of the mean counts at z in a latent direction.

        Args:
            params: canonical parameters.
            z: (n_cells, n_latent).
            direction: (n_cells, n_latent).
            tissue: (n_cells,).
            library: (n_cells,) total counts.
            config: the run's configuration.

        Returns:
            (n_cells, n_genes).

        Raises:
            ValueError: an index beyond its table.
        """
        self._check_indices(params, {}, {"tissue": tissue})
        inputs = self._arrays((z, direction, tissue, library))
        return to_numpy(_decode_jvp(self._parameters(params), *inputs, config=config))

    def dispersion(self, params: Mapping[str, np.ndarray], tissue: np.ndarray, config: Config) -> np.ndarray:
        """Inverse dispersion of every gene.

        Args:
            params: canonical parameters.
            tissue: (n_cells,).
            config: the run's configuration.

        Returns:
            (n_genes,), or (n_cells, n_genes) for "gene-tissue".

        Raises:
            ValueError: an index beyond its table.
        """
        self._check_indices(params, {}, {"tissue": tissue})
        return to_numpy(_dispersion(self._parameters(params), self._arrays(tissue), config=config))

    def operators(self, params: Mapping[str, np.ndarray], conditions: Numpy, config: Config) -> Numpy:
        """The operators of conditions, and what they are made of.

        Args:
            params: canonical parameters.
            conditions: perturbations, doses, tissue, batch, covariates, as for `ConditionEncoder`.
            config: the run's configuration.

        Returns:
            theta, alpha, beta, A and b, each with a leading axis of conditions.

        Raises:
            ValueError: widths that do not fit, or an index beyond its table.
        """
        self._check_indices(params, {}, conditions)
        return to_numpy(_operators(self._parameters(params), self._arrays(dict(conditions))))

    def entropic_plan(self, x: np.ndarray, y: np.ndarray, *, epsilon: float, unbalanced: float) -> np.ndarray:
        """Entropic optimal-transport plan between two sets of latents, of uniform marginals.

        Args:
            x: (n, n_latent) cells on one side.
            y: (m, n_latent) cells on the other.
            epsilon: strength of the entropy, in units of the mean cost.
            unbalanced: strength of the marginals, in units of the mean cost; 0 holds them exactly.

        Returns:
            (n, m) plan.

        Raises:
            ValueError: as for `entropic_plan`.
            RuntimeError: the iteration did not converge.
            ImportError: without the extra that brings the solver.
        """
        return np.asarray(entropic_plan(x, y, epsilon=epsilon, unbalanced=unbalanced))

    def trajectory(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Numpy,
        config: Config,
        *,
        method: str = "rk4",
        n_steps: int = RK4_STEPS,
        rtol: float = 1e-5,
        atol: float = 1e-6,
    ) -> np.ndarray:
        """Latents on the way of the vector field.

        Args:
            params: canonical parameters below "flow.", with the frozen "flow.center" and "flow.scale".
            z: (n_cells, n_latent) at the first time.
            times: (n_times,) strictly rising or falling, 0 at the first and 1 at the last time point of training.
            condition: (n_cells, n_conditions).
            graph: source, target and sign (n_edges,), or {} for no network.
            config: the run's configuration.
            method: "rk4" or "dopri5".
            n_steps: of "rk4" between neighbouring times.
            rtol: of "dopri5".
            atol: of "dopri5".

        Returns:
            (n_times, n_cells, n_latent), the first z itself.

        Raises:
            ValueError: as for `integrate`, an index beyond its table, or widths that do not fit.
            ImportError: "dopri5" without the extra that brings its solver.
        """
        check_request(times, method, n_steps)
        self._check_indices(params, {}, graph)
        inputs = self._arrays((z, np.asarray(times, np.float64), condition, dict(graph)))
        path = _trajectory(
            self._parameters(params), *inputs, method=method, n_steps=n_steps, rtol=float(rtol), atol=float(atol)
        )
        return to_numpy(path)

    def velocity(
        self,
        params: Mapping[str, np.ndarray],
        times: np.ndarray,
        z: np.ndarray,
        condition: np.ndarray,
        graph: Numpy,
        config: Config,
    ) -> np.ndarray:
        """Derivative of the latents in time.

        Args:
            params: canonical parameters below "flow.", with the frozen "flow.center" and "flow.scale".
            times: (n_cells,) or ().
            z: (n_cells, n_latent).
            condition: (n_cells, n_conditions).
            graph: source, target and sign (n_edges,), or {} for no network.
            config: the run's configuration.

        Returns:
            (n_cells, n_latent).

        Raises:
            ValueError: an index beyond its table, or widths that do not fit.
        """
        self._check_indices(params, {}, graph)
        inputs = self._arrays((np.asarray(times, np.float64), z, condition, dict(graph)))
        return to_numpy(_velocity(self._parameters(params), *inputs))

    def endpoint_jacobian(
        self,
        params: Mapping[str, np.ndarray],
        z: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Numpy,
        config: Config,
        *,
        n_steps: int = RK4_STEPS,
    ) -> np.ndarray:
        """Derivative of each cell's latent at the last time in its latent at the first.

        Args:
            params: canonical parameters below "flow.", with the frozen "flow.center" and "flow.scale".
            z: (n_cells, n_latent) at the first time.
            times: (n_times,) strictly rising or falling.
            condition: (n_cells, n_conditions).
            graph: source, target and sign (n_edges,), or {} for no network.
            config: the run's configuration.
            n_steps: of "rk4" between neighbouring times.

        Returns:
            (n_cells, n_latent, n_latent), [c, i, j] the derivative of latent i at the end in latent j at the start.

        Raises:
            ValueError: as for `integrate`, an index beyond its table, or widths that do not fit.
        """
        check_request(times, "rk4", n_steps)
        self._check_indices(params, {}, graph)
        inputs = self._arrays((z, np.asarray(times, np.float64), condition, dict(graph)))
        return to_numpy(_endpoint_jacobian(self._parameters(params), *inputs, n_steps=n_steps))

    def endpoint_gradient(
        self,
        params: Mapping[str, np.ndarray],
        counts: np.ndarray,
        tissue: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Numpy,
        weights: np.ndarray,
        config: Config,
        *,
        n_steps: int = RK4_STEPS,
    ) -> np.ndarray:
        """Derivative in log1p(counts) of what a cell expresses at the end of its trajectory.

        A cell is encoded (posterior mean, evaluation mode), moved from the first time to the last and decoded at
        library 1; differentiated is sum_g weights_g log1p(NORMALISED_TOTAL mu_g).

        Args:
            params: canonical parameters below "cvae." and "flow.", with running statistics, "flow.center" and
                "flow.scale".
            counts: (n_cells, n_genes) at the first time.
            tissue: (n_cells,).
            times: (n_times,) strictly rising or falling.
            condition: (n_cells, n_conditions).
            graph: source, target and sign (n_edges,), or {} for no network.
            weights: (n_genes,) of the genes looked at.
            config: the run's configuration.
            n_steps: of "rk4" between neighbouring times.

        Returns:
            (n_cells, n_genes).

        Raises:
            ValueError: as for `integrate`, another number of genes than the model has, an index beyond its table, or
                no running statistics.
        """
        check_request(times, "rk4", n_steps)
        self._check_indices(params, {}, {"tissue": tissue, **graph})
        counts, times, weights = (np.asarray(array, np.float64) for array in (counts, times, weights))
        inputs = self._arrays((counts, tissue, times, condition, dict(graph), weights))
        return to_numpy(_endpoint_gradient(self._parameters(params), *inputs, n_steps=n_steps))

    # --- diagnosis ---

    def gradients(
        self,
        stage: Stage,
        params: Mapping[str, np.ndarray],
        trainable: Any,
        batch: Numpy,
        noise: Numpy,
        hyper: Mapping[str, float],
        carry: Numpy | None,
        config: Config,
    ) -> tuple[float, dict[str, np.ndarray | None]]:
        """Loss of one micro-batch and the gradient of every trained parameter.

        In stage "cvae" the loss is player 2's, and a gradient is that of the player who trains the parameter.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            params: all canonical parameters.
            trainable: names of those that are trained.
            batch: without an axis of micro-batches.
            noise: the same.
            hyper: {"beta": number, ...}.
            carry: vectors of the power iteration, or running statistics; {} for none.
            config: the run's configuration.

        Returns:
            loss, and {name: gradient, or None where no path leads from it to the loss}.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        state, loss = self._loss(stage, params, trainable, batch, noise, hyper, carry, config)
        value, grads = value_and_grad(loss, state.params)
        return float(value), {name: None if grad is None else to_numpy(grad) for name, grad in grads.items()}

    def unreached(
        self,
        stage: Stage,
        params: Mapping[str, np.ndarray],
        trainable: Any,
        batch: Numpy,
        noise: Numpy,
        carry: Numpy | None,
        config: Config,
    ) -> set[str]:
        """Trained parameters from which no path leads to the loss, a matter of structure.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            params: all canonical parameters.
            trainable: names of those that are trained.
            batch: without an axis of micro-batches.
            noise: the same.
            carry: vectors of the power iteration, or running statistics; {} for none.
            config: the run's configuration.

        Returns:
            Their names: those whose gradient `gradients` gives as None.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        hyper = {"beta": config.vae.beta}
        state, loss = self._loss(stage, params, trainable, batch, noise, hyper, carry, config)
        shapes = jax.tree.map(jnp.shape, (state, batch, noise))
        key = stage, config, jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes))
        if key not in self._unreached:  # tracing takes a second, and members of an ensemble ask for the same
            self._unreached[key] = _without_path(jax.jit(jax.value_and_grad(loss)).trace(state.params), state.params)
        return self._unreached[key]

    def diagnose(
        self,
        stage: Stage,
        params: Mapping[str, np.ndarray],
        trainable: Any,
        batch: Numpy,
        noise: Numpy,
        hyper: Mapping[str, float],
        carry: Numpy | None,
        config: Config,
    ) -> str:
        """The first thing on the way to the loss, or else the first gradient, that is not finite.

        Intermediates come in the order in which they arise, then the loss as "loss", then gradients by sorted name.

        Args:
            stage: a name of `pf_core.backends.STAGES`.
            params: all canonical parameters.
            trainable: names of those that are trained.
            batch: without an axis of micro-batches.
            noise: the same.
            hyper: {"beta": number, ...}.
            carry: vectors of the power iteration, or running statistics; {} for none.
            config: the run's configuration.

        Returns:
            name of an intermediate (see `record`) or "loss", or text that ends in the name of a parameter with such a
            gradient; "" if all is finite.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        state, loss = self._loss(stage, params, trainable, batch, noise, hyper, carry, config)
        with recording() as found:
            found["loss"] = loss(state.params)
        found["loss"] = found.pop("loss")  # the loss comes last, whatever was recorded on the way
        for name, value in found.items():
            if not bool(jnp.isfinite(jnp.asarray(value)).all()):
                return name
        grads = jax.jit(jax.grad(loss))(state.params)
        bad = (name for name in sorted(grads) if not bool(jnp.isfinite(grads[name]).all()))
        return next((f"gradient of {name}" for name in bad), "")

    # --- helpers ---

    def _loss(self, stage, params, trainable, batch, noise, hyper, carry, config):
        steps.check_stage(stage)
        self._check_indices(params, carry or {}, batch)
        state = self.init(stage, params, trainable=trainable, carry=carry)
        batch, noise = self._arrays(batch), self._arrays(noise)
        beta = self._arrays(np.asarray(hyper["beta"], np.float64))

        def loss(trained):
            params = state.frozen | trained
            if stage == "cvae":
                return players_loss(params, batch, noise, state.carry, config=config, beta=beta)[0]
            return steps.stage_loss(stage, params, batch, noise, state.carry, beta, config)[0]

        return state, loss

    def _arrays(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _leaf_to_backend(leaf, self.dtype, self._place), tree)

    def _parameters(self, params: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The device copy of parameters, kept for as long as the same arrays come again."""
        key = tuple(id(value) for value in params.values())
        if self._cached is None or self._cached[0] != key:
            # The arrays are kept too, so that their ids stay theirs.
            self._cached = key, list(params.values()), self._arrays(dict(params))
        return self._cached[2]

    def _check_indices(self, params: Mapping[str, Any], carry: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        # twin: JAX clamps an index out of range without a word, so it is looked for out here.
        tissues = _rows(params, "conditions.tissue.table", "operators.A0")
        if tissues is None and "vae.decoder.hidden.weight" in params and "vae.encoder.mean.weight" in params:
            tissues = np.shape(params["vae.encoder.mean.weight"])[0] - np.shape(params["vae.encoder.hidden.weight"])[1]
        if FLOW_MARK in params:
            n_genes = np.shape(params["cvae.decoder.mean.weight"])[1]
            tissues = np.shape(params["cvae.encoder.block1.weight"])[0] - n_genes
        genes = _rows(params, "flow.genes")
        limits = {
            "perturbations": _rows(params, "conditions.features", "conditions.perturbation.table"),
            "tissue": tissues,
            "cells_tissue": tissues,
            "slot": _rows(carry, "v"),
            "source": genes,
            "target": genes,
        }
        for name, limit in limits.items():
            if limit is None or name not in batch or not np.size(batch[name]):
                continue
            low, high = np.min(batch[name]), np.max(batch[name])
            if low < 0 or high >= limit:
                raise ValueError(f"{name} has indices from {low} to {high} but the model knows 0 to {limit - 1}")


def _rows(arrays: Mapping[str, Any], *names: str) -> int | None:
    return next((np.shape(arrays[name])[0] for name in names if name in arrays), None)


def _device(name: str) -> Any:
    platform = {"cuda": "gpu"}.get(name, name)
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        present = sorted({device.platform for device in jax.devices()})
        raise ValueError(f"device is {name!r} but JAX sees {present}; install its support or ask for another") from None
