"""NumPy in, NumPy out: arrays and parameters, gradients with their paths, and the Backend that pf_core uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pf_core.config import NORMALISED_TOTAL, RK4_STEPS, Config
from pf_core.health import Health, judge
from pf_core.initial import select
from pf_core.sparse_counts import Batch, SparseCounts
from pf_torch.conditions import ConditionEncoder
from pf_torch.coupling import entropic_plan
from pf_torch.cvae import CVAE
from pf_torch.flow import VectorField
from pf_torch.flow_steps import discriminator_loss
from pf_torch.integrate import integrate
from pf_torch.operators import OperatorFamily
from pf_torch.probe import recording
from pf_torch.steps import TrainState, check_stage, check_trainable, evaluate, init_state, run_steps, stage_loss
from pf_torch.vae import NBVAE

__all__ = ["Backend", "gradient_health", "synchronize", "to_backend", "to_numpy", "value_and_grad"]

Arrays = Mapping[str, np.ndarray]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_STATISTICS = ("norm1.mean", "norm1.var", "norm2.mean", "norm2.var")  # of the encoder of the flow system


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply to every leaf of dicts, lists and tuples."""
    if isinstance(tree, Mapping):
        return {name: _map(function, value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(function, value) for value in tree)
    return function(tree)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; one of {', '.join(map(repr, _DTYPES))} was wanted")
    return None if name is None else _DTYPES[name]


def to_backend(tree: Any, dtype: str | None = None, device: str | torch.device | None = None) -> Any:
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
    kind = _dtype(dtype)

    def convert(leaf: Any) -> Tensor:
        tensor = leaf if isinstance(leaf, Tensor) else torch.tensor(np.asarray(leaf))
        floating = tensor.is_floating_point() and kind is not None
        return tensor.to(device=device, dtype=kind if floating else tensor.dtype)

    return _map(convert, tree)


def to_numpy(tree: Any) -> Any:
    """Arrays of this framework as NumPy arrays.

    Nothing is differentiated. The result shares no memory with the tree.

    Args:
        tree: an array, or a nested container of arrays.

    Returns:
        The same structure.
    """

    def own_copy(leaf: Any) -> Any:
        if leaf is None:
            return None
        return np.array(leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf, copy=True)

    return _map(own_copy, tree)


def synchronize(tree: Any) -> Any:
    """Wait until the arrays are computed; timings need it.

    Args:
        tree: an array, or a nested container of arrays.

    Returns:
        tree.
    """
    for device in {leaf.device for leaf in _leaves(tree) if leaf.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return tree


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, tree)
    return found


def value_and_grad(
    function: Callable[..., Any], params: Mapping[str, Tensor], *args: Any
) -> tuple[Any, dict[str, Tensor | None]]:
    """Value of function(params, *args) and its gradient in every parameter.

    A gradient is None where no path leads from the parameter to the value, as distinct from a gradient that is zero.

    Args:
        function: (params, *args) -> () value.
        params: floating arrays by name.
        args: further arguments, not differentiated.

    Returns:
        value (), and {name: gradient or None}.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    output = function(leaves, *args)
    value = output[0] if isinstance(output, tuple) else output
    if value.requires_grad:
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    else:
        grads = [None] * len(leaves)
    output = _map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    return output, dict(zip(leaves, grads, strict=True))


def gradient_health(grads: Mapping[str, Tensor | None], params: Mapping[str, Tensor]) -> dict[str, Health]:
    """A verdict on every gradient, by `pf_core.health.judge`.

    Args:
        grads: {name: gradient or None}, as `value_and_grad` returns them.
        params: parameters by name.

    Returns:
        {name: Health}, verdict "none", "zero", "tiny", "huge", "non-finite" or "ok".
    """
    out = {}
    for name, grad in grads.items():
        if grad is None:
            out[name] = judge(0.0, 0.0, 0, 0.0, False)
            continue
        finite = torch.isfinite(grad)
        values = grad[finite].double()
        norm = float(torch.linalg.vector_norm(values))
        max_abs = float(values.abs().max()) if values.numel() else 0.0
        param_norm = float(torch.linalg.vector_norm(params[name].detach().double()))
        out[name] = judge(norm, max_abs, int((~finite).sum()), param_norm, True)
    return out


def _check_index(name: str, index: np.ndarray, n: int) -> None:
    index = np.asarray(index)
    if index.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {index.dtype}; integers were wanted")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(
            f"{name} holds indices from {index.min()} to {index.max()}, but the model has {n} (0 is unknown); "
            "use the vocabulary of training"
        )


def _check_indices(
    params: Mapping[str, Any], arrays: Mapping[str, Any], carry: Mapping[str, Any] | None = None
) -> None:
    """Indices within the model's tables: nothing inside a step looks at them."""
    sizes = {}
    if "vae.encoder.mean.weight" in params:
        n_tissues = params["vae.encoder.mean.weight"].shape[0] - params["vae.encoder.hidden.weight"].shape[1]
        sizes["tissue"] = sizes["cells_tissue"] = n_tissues
    if "operators.A0" in params:
        table = "conditions.perturbation.table"
        n = params[table if table in params else "conditions.features"].shape[0]
        sizes |= {"tissue": params["operators.A0"].shape[0], "perturbations": n}
    if "cvae.encoder.block1.weight" in params:
        n_genes = params["cvae.decoder.mean.weight"].shape[1]
        sizes["tissue"] = params["cvae.encoder.block1.weight"].shape[0] - n_genes
    if "flow.genes" in params:
        sizes["source"] = sizes["target"] = params["flow.genes"].shape[0]
    if carry and "v" in carry:
        sizes["slot"] = carry["v"].shape[0]
    for name, n in sizes.items():
        if name in arrays:
            _check_index(name, arrays[name], n)


class Backend:
    """What pf_core uses: NumPy in and out, a training state that only this class looks into.

    Args:
        dtype: "float32" or "float64".
        device: "cpu", "gpu" ("cuda" is the same), or "tpu", which only JAX knows.
        compile: run the losses through torch.compile; JAX always compiles.

    Raises:
        ValueError: an unknown dtype, or a device that is not there.
    """

    name = "torch"

    def __init__(self, dtype: str = "float32", device: str = "cpu", compile: bool = False):
        _dtype(dtype)
        try:
            self.device = torch.device("cuda" if device == "gpu" else device)
            torch.zeros((), device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {device!r} is not usable ({reason}); use 'cpu', or install its driver") from None
        self.dtype, self.compile = dtype, compile
        self.scatters = self.device.type != "cpu"  # whether counts become dense on the device
        torch.set_float32_matmul_precision("highest")

    def describe(self) -> dict[str, str]:
        """Versions, device, dtype and matmul precision.

        Returns:
            {name: text}.
        """
        cuda = self.device.type == "cuda"
        return {
            "backend": self.name,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "dtype": self.dtype,
            "precision": torch.get_float32_matmul_precision(),
            "threads": str(torch.get_num_threads()),
            "compile": str(self.compile),
        }

    # --- training -------------------------------------------------------------------------------------------------

    def init(
        self,
        stage: str,
        params: Arrays,
        *,
        trainable: Collection[str],
        m: Arrays | None = None,
        v: Arrays | None = None,
        count: int = 0,
        carry: Arrays | None = None,
    ) -> TrainState:
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
        check_stage(stage)
        return init_state(
            params, trainable=trainable, m=m, v=v, count=count, carry=carry, dtype=self.dtype, device=self.device
        )

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
        if isinstance(leaf, Tensor) or not np.issubdtype(np.asarray(leaf).dtype, np.floating):
            return leaf
        return self._to(torch.from_numpy(np.require(leaf, requirements=["C", "W"])))

    def _scattered(self, counts: SparseCounts) -> Tensor:
        places, values = self._to(counts.places()).long(), self._to(counts.values())
        flat = torch.zeros(math.prod(counts.shape), dtype=values.dtype, device=self.device)
        return flat.scatter_(0, places, values).reshape(counts.shape)

    def run(
        self,
        stage: str,
        state: TrainState,
        batches: Mapping[str, Any],
        noises: Mapping[str, Any],
        hypers: Arrays,
        config: Config,
    ) -> tuple[TrainState, dict[str, Any]]:
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
        _check_indices({**state.params, **state.frozen}, batches, state.carry)
        data = [self._to(tree) for tree in (self.send(batches), self.send(noises), hypers)]
        state, metrics = run_steps(stage, state, *data, config=config, compile=self.compile)
        return state, to_numpy(metrics)

    def evaluate(
        self, stage: str, state: TrainState, batch: Batch, noise: Batch, config: Config, beta: float
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
        _check_indices({**state.params, **state.frozen}, batch, state.carry)
        data = self._to(self.send(batch)), self._to(self.send(noise))
        parts = evaluate(stage, state, *data, config=config, beta=beta)
        return {name: float(value) for name, value in parts.items()}

    def export(self, state: TrainState) -> dict[str, Any]:
        """The state in canonical form; `init` takes it back bit by bit.

        Args:
            state: from `init` or `run`.

        Returns:
            {"params", "m", "v", "carry"} of NumPy arrays by name, the trained parameters only, and "count".
        """
        trees = {"params": state.params, "m": state.m, "v": state.v, "carry": state.carry}
        copied = {key: {name: np.array(x) for name, x in to_numpy(tree).items()} for key, tree in trees.items()}
        return {**copied, "count": state.count}

    # --- the model ------------------------------------------------------------------------------------------------

    def encode(
        self, params: Arrays, counts: np.ndarray | SparseCounts, tissue: np.ndarray, config: Config
    ) -> tuple[Any, Any]:
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
        _check_indices(params, {"tissue": tissue})
        with torch.no_grad():
            inputs = self._to(self.send({"counts": counts, "tissue": tissue}))
            return to_numpy(self._encode(params, **inputs, config=config))

    def decode(
        self, params: Arrays, z: np.ndarray, tissue: np.ndarray, library: np.ndarray, config: Config
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
        _check_indices(params, {"tissue": tissue})
        with torch.no_grad():
            return to_numpy(self._model(params, config).decode(self._to(z), self._to(tissue), self._to(library)))

    def dispersion(self, params: Arrays, tissue: np.ndarray, config: Config) -> np.ndarray:
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
        _check_indices(params, {"tissue": tissue})
        with torch.no_grad():
            return to_numpy(self._model(params, config).dispersion(self._to(tissue)))

    def operators(self, params: Arrays, conditions: Arrays, config: Config) -> dict[str, np.ndarray]:
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
        _check_indices(params, conditions)
        weights, given = self._to(dict(params)), self._to(dict(conditions))
        with torch.no_grad():
            encoder = ConditionEncoder(select(weights, "conditions"))
            family = OperatorFamily(select(weights, "operators"))
            keys = ("perturbations", "doses", "tissue", "batch", "covariates")
            theta = encoder(*(given[key] for key in keys))
            alpha, beta = family.coefficients(theta)
            A, b = family.operator(theta, given["tissue"])
        return to_numpy({"theta": theta, "alpha": alpha, "beta": beta, "A": A, "b": b})

    def decode_jacobian_vector(
        self,
        params: Arrays,
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
        _check_indices(params, {"tissue": tissue})
        model, tissue_, library_ = self._model(params, config), self._to(tissue), self._to(library)
        with torch.no_grad():
            decode = lambda latent: model.decode(latent, tissue_, library_)
            return to_numpy(torch.func.jvp(decode, (self._to(z),), (self._to(direction),))[1])

    # --- trajectories ---------------------------------------------------------------------------------------------

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
        return entropic_plan(x, y, epsilon=epsilon, unbalanced=unbalanced).cpu().numpy()

    def trajectory(
        self,
        params: Arrays,
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
        _check_indices(params, graph)
        start = self._to(z)
        with torch.no_grad():
            standard = self._flow(params, condition, graph)
            path = standard.path(start, self._to(times), method=method, n_steps=n_steps, rtol=rtol, atol=atol)
        return to_numpy(path)

    def velocity(
        self,
        params: Arrays,
        times: np.ndarray,
        z: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
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
        _check_indices(params, graph)
        with torch.no_grad():
            return to_numpy(self._flow(params, condition, graph).velocity(self._to(times), self._to(z)))

    def endpoint_jacobian(
        self,
        params: Arrays,
        z: np.ndarray,
        times: np.ndarray,
        condition: np.ndarray,
        graph: Arrays,
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
        _check_indices(params, graph)
        start, times_ = self._to(z), self._to(times)
        with torch.no_grad():
            flow = self._flow(params, condition, graph)
            end = lambda latent: flow.path(latent, times_, n_steps=n_steps)[-1]
            # Cells do not meet, so one direction serves all of them; forward mode keeps no steps in memory.
            columns = [
                torch.func.jvp(end, (start,), (unit.expand_as(start),))[1]
                for unit in torch.eye(start.shape[1], dtype=start.dtype, device=start.device)
            ]
        return to_numpy(torch.stack(columns, dim=-1))

    def endpoint_gradient(
        self,
        params: Arrays,
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
        _check_indices(params, {**graph, "tissue": tissue})
        x, tissue_, weights_ = self._to(counts).requires_grad_(), self._to(tissue), self._to(weights)
        z, _ = self._encode(params, x, tissue_, config)
        end = self._flow(params, condition, graph).path(z, self._to(times), n_steps=n_steps)[-1]
        mu = self._model(params, config).decode(end, tissue_, torch.ones_like(x[:, 0]))
        score = (torch.log1p(NORMALISED_TOTAL * mu) * weights_).sum()
        (by_counts,) = torch.autograd.grad(score, x)
        return to_numpy(by_counts * (1.0 + x))  # d counts / d log1p(counts)

    # --- looking into a step --------------------------------------------------------------------------------------

    def gradients(
        self,
        stage: str,
        params: Arrays,
        trainable: Collection[str],
        batch: Arrays,
        noise: Arrays,
        hyper: Mapping[str, float],
        carry: Arrays,
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
        check_stage(stage)
        check_trainable(trainable, params)
        _check_indices(params, batch, carry)
        weights = self._to(dict(params))
        trained = {name: weights[name] for name in sorted(trainable)}
        frozen = {name: value for name, value in weights.items() if name not in trained}
        given, noise_, carry_ = (self._to(dict(tree)) for tree in (batch, noise, carry))

        def losses(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            """What is differentiated, and the loss. The players share no parameter, so the sum has both gradients."""
            everything = {**frozen, **leaves}
            first = 0.0
            if stage == "cvae":
                first, _ = discriminator_loss(everything, given, noise_, carry_, config=config)
            loss, _ = stage_loss(stage, everything, given, noise_, carry_, hyper["beta"], config)
            return loss + first, loss

        (_, loss), grads = value_and_grad(losses, trained)
        return float(loss), to_numpy(grads)

    def unreached(
        self,
        stage: str,
        params: Arrays,
        trainable: Collection[str],
        batch: Arrays,
        noise: Arrays,
        carry: Arrays,
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
        _, grads = self.gradients(stage, params, trainable, batch, noise, hyper, carry, config)
        return {name for name, grad in grads.items() if grad is None}

    def diagnose(
        self,
        stage: str,
        params: Arrays,
        trainable: Collection[str],
        batch: Arrays,
        noise: Arrays,
        hyper: Mapping[str, float],
        carry: Arrays,
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
        with recording() as values:
            loss, grads = self.gradients(stage, params, trainable, batch, noise, hyper, carry, config)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                return name
        if not math.isfinite(loss):
            return "loss"
        for name, grad in grads.items():
            if grad is not None and not np.isfinite(grad).all():
                return f"gradient of {name}"
        return ""

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _to(self, tree: Any) -> Any:
        return to_backend(tree, self.dtype, self.device)

    def _model(self, params: Arrays, config: Config) -> NBVAE | CVAE:
        weights = self._to(dict(params))
        if "cvae.encoder.mean.weight" in params:
            return CVAE(select(weights, "cvae"))
        return NBVAE(config.vae, select(weights, "vae"))

    def _encode(self, params: Arrays, counts: Tensor, tissue: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        model = self._model(params, config)
        if isinstance(model, NBVAE):
            return model.encode(counts, tissue)
        names = {name: f"cvae.encoder.{name}" for name in _STATISTICS}
        missing = [name for name in names.values() if name not in params]
        if missing:
            raise ValueError(f"params lack the running statistics {', '.join(missing)}; add the carry of stage 'cvae'")
        statistics = {name: self._to(params[canonical]) for name, canonical in names.items()}
        return model.encode(counts, tissue, statistics)[:2]

    def _flow(self, params: Arrays, condition: np.ndarray, graph: Arrays) -> _Flow:
        missing = [name for name in ("flow.center", "flow.scale") if name not in params]
        if missing:
            raise ValueError(f"params lack {', '.join(missing)}; pass the parameters of a trained flow")
        weights = select(self._to(dict(params)), "flow")
        return _Flow(weights, self._to(condition), self._to(dict(graph)))


class _Flow:
    """A vector field on latents as they are; the field itself knows standardised ones, (z - center) / scale."""

    def __init__(self, weights: dict[str, Tensor], condition: Tensor, graph: dict[str, Tensor]):
        self.field, self.condition = VectorField(weights), condition
        self.nodes = self.field.nodes(graph)
        self.center, self.scale = weights["center"], weights["scale"]

    def velocity(self, times: Tensor, z: Tensor) -> Tensor:
        return self.scale * self.field(times, (z - self.center) / self.scale, self.condition, self.nodes)

    def path(self, z: Tensor, times: Tensor, **options: Any) -> Tensor:
        standard = lambda s, z: self.field(s, z, self.condition, self.nodes)
        path = integrate(standard, (z - self.center) / self.scale, times, **options)
        return torch.cat([z[None], self.center + self.scale * path[1:]])
