"""NumPy in, NumPy out: arrays and parameters, gradients with their paths, and the Backend that pf_core uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pf_core.config import Config
from pf_core.health import Health, judge
from pf_core.initial import select
from pf_torch.conditions import ConditionEncoder
from pf_torch.operators import OperatorFamily
from pf_torch.probe import recording
from pf_torch.steps import TrainState, check_stage, check_trainable, evaluate, init_state, run_steps, stage_loss
from pf_torch.vae import NBVAE

__all__ = ["Backend", "gradient_health", "synchronize", "to_backend", "to_numpy", "value_and_grad"]

Arrays = Mapping[str, np.ndarray]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


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


def _check_indices(params: Mapping[str, Any], arrays: Arrays, carry: Mapping[str, Any] | None = None) -> None:
    """Indices within the model's tables: nothing inside a step looks at them."""
    sizes = {}
    if "vae.encoder.mean.weight" in params:
        n_tissues = params["vae.encoder.mean.weight"].shape[0] - params["vae.encoder.hidden.weight"].shape[1]
        sizes["tissue"] = sizes["cells_tissue"] = n_tissues
    if "operators.A0" in params:
        table = "conditions.perturbation.table"
        n = params[table if table in params else "conditions.features"].shape[0]
        sizes |= {"tissue": params["operators.A0"].shape[0], "perturbations": n}
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
            stage: "vae", "operator" or "joint".
            params: all canonical parameters.
            trainable: names of those that are trained.
            m: first moments by name; None for zeros.
            v: second moments by name; None for zeros.
            count: updates done so far.
            carry: vectors of the power iteration; None for none.

        Returns:
            An opaque state for `run`, `evaluate` and `export`.

        Raises:
            ValueError: an unknown stage or trainable name, or moments of other names or shapes.
        """
        check_stage(stage)
        return init_state(
            params, trainable=trainable, m=m, v=v, count=count, carry=carry, dtype=self.dtype, device=self.device
        )

    def run(
        self, stage: str, state: TrainState, batches: Arrays, noises: Arrays, hypers: Arrays, config: Config
    ) -> tuple[TrainState, dict[str, Any]]:
        """Many steps in one call. The state that is passed in is used up.

        Args:
            stage: "vae", "operator" or "joint".
            state: from `init` or `run`.
            batches: leaves (n_steps, n_micro, ...).
            noises: the same.
            hypers: {"lr": (n_steps,), "beta": (n_steps,)}.
            config: the run's configuration.

        Returns:
            state, and the metrics of every step as NumPy.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        _check_indices({**state.params, **state.frozen}, batches, state.carry)
        data = [self._to(tree) for tree in (batches, noises, hypers)]
        state, metrics = run_steps(stage, state, *data, config=config, compile=self.compile)
        return state, to_numpy(metrics)

    def evaluate(
        self, stage: str, state: TrainState, batch: Arrays, noise: Arrays, config: Config, beta: float
    ) -> dict[str, float]:
        """Loss of a stage and its parts, without an update.

        Args:
            stage: "vae", "operator" or "joint".
            state: from `init` or `run`.
            batch: without an axis of micro-batches.
            noise: the same.
            config: the run's configuration.
            beta: weight of the KL divergence.

        Returns:
            {name: number}.

        Raises:
            ValueError: an unknown stage, or an index beyond its table.
        """
        _check_indices({**state.params, **state.frozen}, batch, state.carry)
        parts = evaluate(stage, state, self._to(batch), self._to(noise), config=config, beta=beta)
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

    def encode(self, params: Arrays, counts: np.ndarray, tissue: np.ndarray, config: Config) -> tuple[Any, Any]:
        """Posterior mean and unclipped log variance.

        Args:
            params: canonical parameters.
            counts: (n_cells, n_genes).
            tissue: (n_cells,).
            config: the run's configuration.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent).

        Raises:
            ValueError: another number of genes than the model has, or an index beyond its table.
        """
        _check_indices(params, {"tissue": tissue})
        with torch.no_grad():
            return to_numpy(self._vae(params, config).encode(self._to(counts), self._to(tissue)))

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
            return to_numpy(self._vae(params, config).decode(self._to(z), self._to(tissue), self._to(library)))

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
            return to_numpy(self._vae(params, config).dispersion(self._to(tissue)))

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
        model, tissue_, library_ = self._vae(params, config), self._to(tissue), self._to(library)
        with torch.no_grad():
            decode = lambda latent: model.decode(latent, tissue_, library_)
            return to_numpy(torch.func.jvp(decode, (self._to(z),), (self._to(direction),))[1])

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

        Args:
            stage: "vae", "operator" or "joint".
            params: all canonical parameters.
            trainable: names of those that are trained.
            batch: without an axis of micro-batches.
            noise: the same.
            hyper: {"beta": number, ...}.
            carry: vectors of the power iteration; {} for none.
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
        loss = lambda leaves: stage_loss(stage, {**frozen, **leaves}, given, noise_, carry_, hyper["beta"], config)[0]
        output, grads = value_and_grad(loss, trained)
        return float(output), to_numpy(grads)

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
            stage: "vae", "operator" or "joint".
            params: all canonical parameters.
            trainable: names of those that are trained.
            batch: without an axis of micro-batches.
            noise: the same.
            hyper: {"beta": number, ...}.
            carry: vectors of the power iteration; {} for none.
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

    def _vae(self, params: Arrays, config: Config) -> NBVAE:
        return NBVAE(config.vae, select(self._to(dict(params)), "vae"))
