"""Every choice of a run, as frozen dataclasses with TOML in and out, and every numerical constant, once.

A constant that both twins need is typed here and imported by both, so that it cannot differ between them.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pf_core.errors import ConfigError

# --- numerical constants (docs/math.md gives the formula each belongs to) ---------------------------------------
MU_FLOOR = 1e-8  # added to a softplus mean, and the smallest mean of the likelihood
R_MIN, R_MAX = 1e-4, 1e4  # bounds of the inverse dispersion r = exp(clip(log_r, ln R_MIN, ln R_MAX))
LOGVAR_MIN, LOGVAR_MAX = -10.0, 10.0  # bounds of the posterior's log variance
EPS_NORMALISE = 1e-8  # v / (|v| + eps) in the power iteration
EPS_SIGMA = 1e-8  # sigma = sqrt(max(|A v|^2, 0) + eps)
RHO_MAX = 1.05  # largest operator norm that is not penalised
POWER_ITERATIONS = 5
ADAM_B1, ADAM_B2, ADAM_EPS = 0.9, 0.999, 1e-8
CLIP_EPS = 1e-6  # global-norm clip: min(1, max_norm / (norm + eps))
# Most rows of a tile of the energy distance: what each twin is fastest with. Not 1024: rows that lie 4 KiB apart fall
# into one place of a processor's cache, and a product of matrices that reads down the columns is then slow.
TILE = {"jax": 960, "torch": 512}
TABLE_ROWS = 32  # counts up to here are in the likelihood's table, larger ones in its tail
LEAKY_SLOPE = 0.2  # of leaky relu below and at 0
BATCH_NORM_EPS = 1e-5  # added to the variance
BATCH_NORM_MOMENTUM = 0.1  # weight of a batch in the running statistics
ATTENTION_EPS = 1e-16  # added to the softmax's denominator over the edges into a gene
STANDARD_FLOOR = 1e-8  # smallest standard deviation of a latent that is divided by
RK4_STEPS = 20  # of Runge-Kutta per interval between two requested times

Output = Literal["transport", "sample", "mean"]  # how decoded means become predicted cells (outputs.py)

# --- guards -------------------------------------------------------------------------------------------------------
BAD_STEPS_IN_A_ROW = 3  # non-finite steps before training returns to the last good checkpoint
MAX_RETURNS = 2  # returns to a checkpoint; when it happens once more, training stops with a crash bundle
RETURN_LR_FACTOR = 0.1  # learning rate after a return

# --- data ---------------------------------------------------------------------------------------------------------
MIN_MATCHED = 20  # cells a batch needs on both sides before controls are matched within it
NORMALISED_TOTAL = 1e4  # counts per cell after normalisation, where a metric or a plot normalises


def _bounds(where: str, config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"{where}.{name} is {value!r}; a finite number of at least {low} was wanted")


def _shares(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{where}.{name} is {value!r}; a share from 0 up to, not including, 1 was wanted")


def _parts(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}.{name} is {value!r}; a number from 0 to 1 was wanted")


@dataclass(frozen=True)
class DataConfig:
    """Which columns hold what, which cells are held out, which genes are used."""

    perturbation: str = "perturbation"
    control: tuple[str, ...] = ("control", "ctrl", "non-targeting")
    separator: str = "+"
    dose: str = ""  # column of doses; "" for dose 1 everywhere. "1+0.5" gives one dose per member
    tissue: str = "tissue"
    cell_type: str = "cell_type"
    batch: str = "batch"
    covariates: tuple[str, ...] = ()
    layer: str = ""  # "" takes layers["counts"] where it exists, else X
    genes: int = 2000  # highly variable genes kept; 0 keeps every gene
    min_counts: int = 0  # cells with fewer counts are left out (and counted in the report)
    time: str = "time"  # column of times, in any unit; the flow system alone reads it
    timepoint: str = ""  # column of time points, such as bins of inferred times; "" takes the times themselves
    holdout: tuple[str, ...] = ()  # "column=value,column=value", any number of them
    holdout_share: float = 0.0  # share of non-control conditions held out at random
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        _bounds("data", self, 0, "genes", "min_counts")
        _shares("data", self, "holdout_share", "validation_share")


@dataclass(frozen=True)
class VAEConfig:
    """The negative-binomial VAE (docs/math.md 2)."""

    n_hidden: int = 256
    n_latent: int = 32
    input: Literal["log1p", "counts"] = "log1p"
    scale: Literal["library", "softplus"] = "library"
    dispersion: Literal["gene", "gene-tissue"] = "gene"
    beta: float = 1.0
    kl_warmup: int = 400  # steps over which beta rises linearly from 0

    def __post_init__(self) -> None:
        _bounds("vae", self, 1, "n_hidden", "n_latent")
        _bounds("vae", self, 0, "beta", "kl_warmup")


@dataclass(frozen=True)
class OperatorConfig:
    """The condition encoder and the operators (docs/math.md 3, 4, 6)."""

    n_embedding: int = 16
    n_tissue_embedding: int = 4
    n_theta: int = 32
    n_bases: int = 8
    n_hidden: int = 32
    ensemble: int = 5  # trainings on the same latents from different seeds; the operators are their mean
    start: Literal["identity", "shift", "least_squares"] = "shift"
    calibrate: bool = True  # add what the decoder does not show of known changes (calibration.py)
    shrinkage: float = 0.1  # lambda_A of lambda_A mean |A - I|_F^2
    spectral_weight: float = 1.0
    spectral_target: Literal["operators", "bases"] = "operators"
    rho_max: float = RHO_MAX
    power_iterations: int = POWER_ITERATIONS
    warm_start: bool = True  # carry the power iteration's vector from step to step
    estimator: Literal["v", "u"] = "v"
    gene_weight: float = 1.0  # stage 3: weight of the energy distance of decoded profiles
    elbo_weight: float = 0.01  # stage 3: weight of the VAE's own loss
    conditions_per_step: int = 16
    cells_per_condition: int = 128

    def __post_init__(self) -> None:
        _bounds("operator", self, 1, "n_embedding", "n_tissue_embedding", "n_theta", "n_bases", "n_hidden")
        _bounds("operator", self, 1, "ensemble", "power_iterations", "conditions_per_step", "cells_per_condition")
        _bounds("operator", self, 0, "shrinkage", "spectral_weight", "rho_max", "gene_weight", "elbo_weight")


@dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator that clears the flow system's latents of the tissue (docs/math.md 7)."""

    kind: Literal["entropy", "minimax"] = "entropy"
    weight: float = 1.0  # of the adversary beside the ELBO; 0 trains the discriminator and leaves the encoder alone
    n_hidden: int = 128
    dropout: float = 0.2

    def __post_init__(self) -> None:
        _bounds("adversary", self, 1, "n_hidden")
        _bounds("adversary", self, 0, "weight")
        _shares("adversary", self, "dropout")


@dataclass(frozen=True)
class FlowConfig:
    """The vector field and the pairs it learns from (docs/math.md 7)."""

    n_embedding: int = 16  # per gene and head
    n_heads: int = 2
    n_time: int = 16
    n_condition: int = 16
    n_hidden: int = 128
    coupling: Literal["exact", "entropic"] = "exact"  # entropic: by the twin's own library, extra "flow"
    scope: Literal["minibatch", "global"] = "minibatch"  # a new plan per step, or one over all cells
    pairing: Literal["sample", "argmax"] = "sample"
    epsilon: float = 0.05  # entropic regularisation, in units of the mean cost
    unbalanced: float = 0.0  # strength of the marginals in units of the mean cost; 0 holds them exactly
    bins: int = 0  # groups of about equally many cells that times are put into; 0 takes every distinct time
    pace: float = 0.5  # of the time between measured points: 0 even, 1 as cells change; see docs/experiments.md
    reach: float = 0.25  # share of the way that cells are moved between measured times
    bend: float = 1.0  # of means between measured times: 0 on the line between neighbours, 1 on the course's curve

    def __post_init__(self) -> None:
        _bounds("flow", self, 1, "n_embedding", "n_heads", "n_time", "n_condition", "n_hidden")
        _bounds("flow", self, 0, "epsilon", "unbalanced", "bins")
        _parts("flow", self, "pace", "reach", "bend")
        if self.coupling == "exact" and self.unbalanced:
            raise ConfigError(
                f"flow.unbalanced is {self.unbalanced:g}, and an exact plan holds its marginals; set flow.coupling to"
                " 'entropic'"
            )
        if self.coupling == "entropic" and not self.epsilon:
            raise ConfigError("flow.epsilon is 0, and an entropic plan needs more; set flow.coupling to 'exact'")


@dataclass(frozen=True)
class StageConfig:
    """How long and with which optimiser one stage is trained."""

    max_steps: int = 1500
    batch_size: int = 256  # cells per step: stage 1, and the ELBO of stage 3; stage 2 has conditions_per_step
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 50  # steps over which the learning rate rises linearly
    weight_decay: float = 0.0
    max_norm: float = 10.0  # global gradient norm
    accumulate: int = 1  # micro-batches whose gradients are averaged
    evaluate_every: int = 100
    patience: int = 8  # evaluations without improvement before the stage ends; 0 never ends early
    steps_per_call: int = 25  # a divisor of evaluate_every: calls of another length compile anew
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        _bounds("stage", self, 1, "batch_size", "accumulate", "evaluate_every", "steps_per_call", "checkpoint_every")
        _bounds("stage", self, 0, "max_steps", "learning_rate", "warmup", "weight_decay", "max_norm", "patience")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # dense layers in training; below float32 on accelerators
    system: Literal["operator", "flow"] = "operator"
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    operator: OperatorConfig = field(default_factory=OperatorConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    stage_vae: StageConfig = field(default_factory=StageConfig)
    stage_operator: StageConfig = field(
        default_factory=lambda: StageConfig(max_steps=1000, learning_rate=1e-3, evaluate_every=50)
    )
    stage_joint: StageConfig = field(
        default_factory=lambda: StageConfig(max_steps=0, learning_rate=1e-4, evaluate_every=50)
    )
    stage_cvae: StageConfig = field(default_factory=StageConfig)
    stage_flow: StageConfig = field(default_factory=lambda: StageConfig(max_steps=2000, evaluate_every=50))

    def __post_init__(self) -> None:
        _bounds("config", self, 0, "seed")
        if self.dtype != "float32" and self.precision != "float32":
            raise ConfigError(
                f"precision is {self.precision!r} with dtype {self.dtype!r}; it is a setting of float32 runs"
            )
        settings = (self.vae.input, self.vae.scale, self.vae.dispersion)
        if self.system == "flow" and settings != ("log1p", "library", "gene"):
            raise ConfigError(
                f"vae.input, scale and dispersion are {settings}; the flow system has 'log1p', 'library', 'gene'"
            )

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Read a TOML file. Keys that no field has, and values of a wrong type, raise ConfigError by name."""
        try:
            table = tomllib.loads(Path(path).read_text())
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        return from_dict(cls, table)

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(to_dict(self))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain tables and lists."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def from_dict(cls: type, table: dict[str, Any], where: str = "") -> Any:
    """Build a config dataclass from nested tables, naming what is unknown or of a wrong type."""
    import difflib

    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise ConfigError(f"unknown setting {name}{hint}")
        values[key] = _checked(name, value, hints[key])
    try:
        return cls(**values)
    except ConfigError as error:
        # A dataclass knows its kind but not where it stands: "stage.max_steps" is stage_vae.max_steps here.
        raise ConfigError(
            f"{where.rpartition('.')[2]}.{str(error).partition('.')[2]}" if where else str(error)
        ) from None


def _checked(name: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is {value!r}; a table was wanted")
        return from_dict(kind, value, name)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} is {value!r}; one of {', '.join(map(repr, get_args(kind)))} was wanted")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} is {value!r}; a list of strings was wanted")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r}; a value of type {kind.__name__} was wanted")
    return value
