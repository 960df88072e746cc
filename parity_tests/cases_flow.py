"""Cases of the flow system: conditional NB-VAE, discriminator, vector field, trajectories, their losses and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from parity_tests import synthetic as syn
from parity_tests.case import QUANTITIES, Case
from parity_tests.cases_math import FIRST, VALUE, normal, uniform
from parity_tests.cases_models import PARAMS, step_case
from pf_core.config import Config
from pf_core.initial import select

D = 5  # latents
KEPT = ("value", "gradient")


def _moved(params: Mapping[str, np.ndarray], **changes: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
    """A copy with parameters changed in place; "__" stands for the dot."""
    out = {name: value.copy() for name, value in params.items()}
    for name, change in changes.items():
        change(out[name.replace("__", ".")])
    return out


def _zeros(*columns: int) -> Callable[[np.ndarray], Any]:
    return lambda array: array.__setitem__((..., list(columns)), 0.0)


def _times(factor: float) -> Callable[[np.ndarray], Any]:
    return lambda array: array.__imul__(factor)


# --- the conditional NB-VAE ------------------------------------------------------------------------------------
def norms() -> Iterator[Case]:
    name, n, h = "cvae.batch_norm", 11, 7
    usual = {
        "x": normal("bn.x", n, h, scale=1.7, mean=0.4),
        "scale": normal("bn.scale", h, mean=1.0, scale=0.4),
        "shift": normal("bn.shift", h),
        "mean": normal("bn.mean", h),
        "var": uniform("bn.var", 0.3, 3.0, h),
    }
    weight = uniform("bn.weight", 0.2, 2.0, n)
    weight[[3, n - 1]] = 0.0
    masked = (weight > 0).astype(float)
    moving: dict[str, Any] = {"differentiate": ("x", "scale", "shift")}
    train: dict[str, Any] = moving | {"static": {"train": True}, "zero_outputs": ("1", "2"), "terms": 16}
    yield Case("batch_norm/training", name, usual, **train)
    yield Case("batch_norm/training, weighted, cells left out", name, usual | {"weight": weight}, **train)
    yield Case("batch_norm/training, a mask as weight", name, usual | {"weight": masked}, **train)
    flat = usual["x"].copy()
    flat[:, 2], flat[:, 4] = 0.0, 2.5
    yield Case("batch_norm/training, features that do not vary", name, usual | {"x": flat}, **train)
    two = usual | {"x": usual["x"][:2]}
    yield Case("batch_norm/training, two cells", name, two, **train)
    padded = usual | {"x": usual["x"][:5], "weight": np.array([0.0, 1.0, 0.0, 1.0, 0.0])}
    yield Case("batch_norm/training, two cells and padding", name, padded, **train)
    far = usual | {"x": usual["x"] + 1024.0}
    yield Case("batch_norm/training, far from the origin", name, far, **train)
    tiny = usual | {"x": usual["x"] * 2.0**-9}
    yield Case("batch_norm/training, variance below eps", name, tiny, **train)
    yield Case(
        "batch_norm/evaluation",
        name,
        usual,
        {"train": False},
        **moving,
        run=lambda f, a: f.cvae.batch_norm(**a, train=False)[0],
    )
    unchanged: dict[str, Any] = {"quantities": VALUE, "reason": "that y has derivatives is another case"}
    yield Case("batch_norm/evaluation returns the statistics", name, usual, {"train": False}, **unchanged)
    yield Case(
        "batch_norm/running statistics carry no gradient",
        name,
        usual | {"weight": weight},
        differentiate=("x", "mean", "var"),
        none=("mean", "var"),
        quantities=KEPT,
        taylor=False,
        run=lambda f, a: f.cvae.batch_norm(**a, train=False)[0],
    )
    edge = np.array([-1e4, -3.0, -0.0, 0.0, 1e-30, 0.5, 7.0, 1e4])
    leaky: dict[str, Any] = {"differentiate": ("x",), "taylor": False}
    yield Case("leaky_relu/at 0 and on both sides", "layers.leaky_relu", {"x": edge}, **leaky)
    yield Case(
        "leaky_relu/squared, for the second derivative",
        "layers.leaky_relu",
        {"x": edge / 100.0},
        run=lambda f, a: f.layers.leaky_relu(a["x"]) * f.layers.leaky_relu(a["x"]),
        **leaky,
    )


def cvae() -> Iterator[Case]:
    config, batch = syn.configuration(), syn.cvae_batch()
    params = select(syn.parameters_of("cvae", config), "cvae")
    statistics = select(syn.carry_of("cvae", config), "cvae.encoder")
    cells = {"x": batch["counts"], "tissue": batch["tissue"], "statistics": statistics}
    latent = {"z": normal("z", syn.N_CELLS, D), "tissue": batch["tissue"], "library": batch["library"]}
    train: dict[str, Any] = {"zero_outputs": ("2/*",), "terms": 16, "static": {"train": True}}

    encoder = select(params, "encoder")
    name = "cvae.ConditionalEncoder"
    inputs = {"params": encoder, **cells}
    weighted = inputs | {"weight": batch["weight"]}
    yield Case("ConditionalEncoder/training, weighted", name, weighted, differentiate=PARAMS, **train)
    yield Case("ConditionalEncoder/training", name, inputs, differentiate=PARAMS, **train)
    yield Case("ConditionalEncoder/evaluation", name, inputs, differentiate=PARAMS)
    alike = weighted | {"tissue": np.full_like(batch["tissue"], 2)}
    yield Case("ConditionalEncoder/training, one tissue", name, alike, differentiate=PARAMS, **train)
    unknown = inputs | {"tissue": np.zeros_like(batch["tissue"])}
    yield Case("ConditionalEncoder/training, unknown tissue", name, unknown, differentiate=PARAMS, **train)
    few = {"params": encoder, "statistics": statistics, "x": batch["counts"][2:5], "tissue": batch["tissue"][2:5]}
    yield Case("ConditionalEncoder/training, three cells", name, few, differentiate=PARAMS, **train)
    silent = batch["counts"].copy()
    silent[:, [1, 5]] = 0.0
    dead = _moved(encoder, block1__weight=_zeros(0, 1, 2), norm1__shift=_zeros(0, 3), norm1__scale=_zeros(3))
    kinks = weighted | {"params": dead, "x": silent}
    train_kinks = train | {"taylor": False, "differentiate": PARAMS}
    yield Case("ConditionalEncoder/training, units at the kink, genes without counts", name, kinks, **train_kinks)

    decoder = select(params, "decoder")
    name = "cvae.ConditionalDecoder"
    inputs = {"params": decoder, **latent}
    moving = (*PARAMS, "z", "library")
    none = ("params/log_r",)
    yield Case("ConditionalDecoder/alone", name, inputs, differentiate=moving, none=none)
    kink = _moved(decoder, block1__weight=_zeros(*range(9)), block1__bias=_zeros(*range(9)))
    at_kink = inputs | {"params": kink}
    label = "ConditionalDecoder/units exactly at the kink"
    yield Case(label, name, at_kink, differentiate=moving, none=none, taylor=False)
    steep = inputs | {"params": _moved(decoder, mean__weight=_times(30.0), mean__bias=_times(30.0))}
    yield Case("ConditionalDecoder/large logits", name, steep, differentiate=moving, none=none)
    alike = inputs | {"tissue": np.zeros_like(batch["tissue"])}
    yield Case("ConditionalDecoder/unknown tissue", name, alike, differentiate=moving, none=none)

    everything = {"params": params, **cells, "library": batch["library"], "eps": normal("eps", syn.N_CELLS, D)}
    moving = (*PARAMS, "eps", "library")
    statics: dict[str, Any] = train | {"zero_outputs": ("5/*",)}
    weighted = everything | {"weight": batch["weight"]}
    yield Case("CVAE/whole, training", "cvae.CVAE", weighted, differentiate=moving, **statics)
    yield Case("CVAE/whole, evaluation", "cvae.CVAE", everything, differentiate=moving)
    none = ("params/decoder.*",)
    yield Case("CVAE/encode", "cvae.CVAE.encode", {"params": params, **cells}, differentiate=PARAMS, none=none)
    none = ("params/encoder.*", "params/decoder.log_r")
    whole = {"params": params, **latent}
    yield Case("CVAE/decode", "cvae.CVAE.decode", whole, differentiate=(*PARAMS, "z", "library"), none=none)
    none = ("params/encoder.*", "params/decoder.block*", "params/decoder.mean.*")
    beyond = {"params": _moved(params, decoder__log_r=_times(40.0)), "tissue": batch["tissue"]}
    yield Case("CVAE/dispersion", "cvae.CVAE.dispersion", beyond, differentiate=PARAMS, none=none)


# --- the discriminator -----------------------------------------------------------------------------------------
def discriminator() -> Iterator[Case]:
    config = syn.configuration()
    params = select(syn.parameters_of("cvae", config), "discriminator")
    name, z, noise = "discriminator.Discriminator", normal("dz", syn.N_CELLS, D), syn.noise_of("cvae", config)
    keep = {"keep1": noise["keep1"], "keep2": noise["keep2"]}
    inputs = {"params": params, "z": z}
    moving: dict[str, Any] = {"differentiate": (*PARAMS, "z")}
    yield Case("Discriminator/no dropout", name, inputs, **moving)
    yield Case("Discriminator/dropout", name, inputs | keep, {"dropout": 0.3}, **moving)
    ones = {key: np.ones_like(mask) for key, mask in keep.items()}
    yield Case("Discriminator/everything is kept, and scaled", name, inputs | ones, {"dropout": 0.3}, **moving)
    yield Case("Discriminator/masks with a dropout of 0", name, inputs | keep, **moving)
    nothing = {key: mask * (np.arange(syn.N_CELLS) != 2)[:, None] for key, mask in keep.items()}
    yield Case("Discriminator/a cell that loses every unit", name, inputs | nothing, {"dropout": 0.5}, **moving)
    first = {"keep1": keep["keep1"]}
    yield Case("Discriminator/a mask for the first layer alone", name, inputs | first, {"dropout": 0.25}, **moving)
    kink = _moved(params, hidden1__weight=_zeros(0, 1, 2), hidden1__bias=_zeros(0, 1, 2))
    yield Case("Discriminator/units exactly at the kink", name, inputs | {"params": kink}, taylor=False, **moving)

    tissue, weight = syn.cvae_batch()["tissue"], syn.cvae_batch()["weight"]
    logits = normal("logits", syn.N_CELLS, 3, scale=2.0)
    at = {"logits": logits, "tissue": tissue, "weight": weight}
    regimes: dict[str, dict[str, Any]] = {
        "some cells unknown": at,
        "every cell known": at | {"tissue": np.arange(syn.N_CELLS, dtype=np.int32) % 3 + 1},
        "one tissue": at | {"tissue": np.full_like(tissue, 3)},
        "large logits": at | {"logits": logits * 16.0},
        "equal logits": at | {"logits": np.full_like(logits, 0.75)},
    }
    losses = {
        "cross_entropy": ("discriminator.cross_entropy", {}),
        "adversary_loss, entropy": ("discriminator.adversary_loss", {"kind": "entropy"}),
        "adversary_loss, minimax": ("discriminator.adversary_loss", {"kind": "minimax"}),
    }
    for label, (name, static) in losses.items():
        group = label.replace("_loss, ", "_loss/").replace("cross_entropy", "cross_entropy/")
        group = group if group.endswith("/") else group + ", "
        for regime, inputs in regimes.items():
            most_uncertain = regime == "equal logits" and static.get("kind") == "entropy"
            kept: dict[str, Any] = {"differentiate": ("logits",)}
            if most_uncertain:
                kept = {"quantities": VALUE, "reason": "the entropy is at its maximum: the gradient is rounding alone"}
            yield Case(f"{group}{regime}", name, inputs, static, terms=16, **kept)
        zero: dict[str, Any] = {"differentiate": ("logits",), "zero": ("logits",), "zero_outputs": ("value",)}
        nobody = at | {"tissue": np.zeros_like(tissue)}
        yield Case(f"{group}no cell known", name, nobody, static, quantities=KEPT, **zero)
        only_padding = at | {"weight": weight * (tissue == 0)}
        yield Case(f"{group}known cells without weight", name, only_padding, static, quantities=KEPT, **zero)
        single = {"logits": logits[:, :1], "tissue": np.minimum(tissue, 1), "weight": weight}
        yield Case(f"{group}a single class", name, single, static, quantities=KEPT, **zero)


# --- the vector field ------------------------------------------------------------------------------------------
def attention() -> Iterator[Case]:
    network = syn.network()
    itself = np.arange(syn.N_GENES, dtype=np.int32)
    n, shape = len(itself), (2, 3)
    ends = {"source": np.append(network["source"], itself), "target": np.append(network["target"], itself)}
    signs = np.append(network["sign"], np.zeros(n))[:, None, None]
    inputs = {
        "left": normal("att.left", n, *shape),
        "right": normal("att.right", n, *shape),
        "attention": normal("att.a", *shape),
        **{name: index.astype(np.int32) for name, index in ends.items()},
        "edge": signs * normal("att.edge", *shape),
    }
    moving: dict[str, Any] = {"differentiate": ("left", "right", "attention", "edge"), "terms": 16}
    yield Case("gatv2/network with self loops", "flow.gatv2", inputs, **moving)
    shuffled = np.random.default_rng(3).permutation(len(inputs["source"]))
    mixed = inputs | {name: inputs[name][shuffled] for name in ("source", "target", "edge")}
    yield Case("gatv2/edges in another order", "flow.gatv2", mixed, **moving)
    open_ends = inputs | {name: inputs[name][: len(network["sign"])] for name in ("source", "target", "edge")}
    yield Case("gatv2/genes that no edge enters", "flow.gatv2", open_ends, **moving)
    steep = inputs | {"attention": 32.0 * inputs["attention"]}
    yield Case("gatv2/large scores", "flow.gatv2", steep, **moving)
    kink = inputs | {name: inputs[name].copy() for name in ("left", "right", "edge")}
    kink["right"][...] = -kink["left"]  # of a gene with itself: exactly 0
    kink["left"][2, 0] = kink["right"][1, 0] = kink["edge"][ends["target"] == 1, 0] = 0.0
    yield Case("gatv2/exactly at the kink", "flow.gatv2", kink, taylor=False, **moving)

    config = syn.configuration()
    params = select(syn.parameters_of("flow", config), "flow")
    layer = {"params": select(params, "graph"), "x": params["genes"], **network}
    moving = {"differentiate": (*PARAMS, "x"), "terms": 16}
    name = "flow.GraphAttention"
    yield Case("GraphAttention/network", name, layer, **moving)
    flipped = layer | {"sign": -network["sign"]}
    yield Case("GraphAttention/other signs", name, flipped, **moving)
    reversed_ = layer | {"source": network["target"], "target": network["source"]}
    yield Case("GraphAttention/edges reversed", name, reversed_, **moving)
    again = {key: np.append(value, value[[4, 4]]) for key, value in network.items()}
    again["source"] = np.append(again["source"], np.int32(7))  # an edge of a gene to itself, besides the self loop
    again["target"], again["sign"] = np.append(again["target"], np.int32(7)), np.append(again["sign"], -1.0)
    yield Case("GraphAttention/an edge three times, and a gene that regulates itself", name, layer | again, **moving)
    nothing = layer | {key: value[:0] for key, value in network.items()}
    # One edge has all the attention: the gradient in what scores it would be rounding alone.
    flowing: dict[str, Any] = {"differentiate": ("params/source.weight", "params/bias", "x"), "terms": 16}
    yield Case("GraphAttention/self loops alone", name, nothing, **flowing)


def fields() -> Iterator[Case]:
    n = syn.N_CELLS
    cells = {"times": uniform("times", 0.0, 1.0, n), "z": normal("fz", n, D), "condition": syn.condition_codes(n)}
    moving = (*PARAMS, "times", "z", "condition")
    name = "flow.VectorField"

    def run(f: Any, a: Any) -> Any:
        field = f.flow.VectorField(a["params"])
        return field(a["times"], a["z"], a["condition"], field.nodes(a["graph"]))

    for label, graph in (("network", syn.network()), ("no network", {})):
        params = select(syn.parameters_of("flow", syn.configuration(), graph=bool(graph)), "flow")
        trained = {key: value for key, value in params.items() if key not in ("center", "scale")}
        inputs = {"params": trained, **cells, "graph": graph}
        kept: dict[str, Any] = {"differentiate": moving, "run": run, "terms": 16}
        yield Case(f"VectorField/{label}", name, inputs, **kept)
        yield Case(f"VectorField/{label}, one time", name, inputs | {"times": np.array(0.375)}, **kept)
        steep = _moved(trained, query__weight=_times(16.0), query__bias=_times(16.0))
        yield Case(f"VectorField/{label}, large scores", name, inputs | {"params": steep}, **kept)
        alone = {key: value[:1] for key, value in cells.items()}
        yield Case(f"VectorField/{label}, one cell", name, inputs | alone, **kept)
        frozen = inputs | {"params": params}
        same = kept | {"differentiate": (), "quantities": VALUE, "reason": "the same field as without them"}
        yield Case(f"VectorField/{label}, center and scale beside it", name, frozen, **same)
        elsewhere = ("query.*", "time.*", "condition.*", "head.*")
        yield Case(
            f"VectorField/{label}, nodes",
            "flow.VectorField.nodes",
            {"params": trained, "graph": graph},
            differentiate=PARAMS,
            none=tuple(f"params/{part}" for part in elsewhere),
            terms=16,
        )


# --- flow matching and trajectories ----------------------------------------------------------------------------
def _swirl(f: Any, a: Any) -> Callable[[Any, Any], Any]:
    """(s, z) -> a velocity that is not linear in z, of one time or of one per cell."""

    def velocity(s: Any, z: Any) -> Any:
        moved = f.operators.apply_operator(a["A"], a["b"], z)
        clock = s.reshape(-1, 1)
        return moved * clock + f.layers.leaky_relu(z) * (clock * clock)

    return velocity


def matching() -> Iterator[Case]:
    n = syn.N_CELLS
    name = "flow.flow_matching_loss"
    plane = {"A": normal("fm.A", D, D, scale=0.6), "b": normal("fm.b", D)}
    pairs = {"z0": normal("fm.z0", n, D), "z1": normal("fm.z1", n, D, mean=0.7), "tau": uniform("fm.tau", 0, 1, n)}
    weight = uniform("fm.weight", 0.3, 2.0, n)
    weight[4] = 0.0

    def run(f: Any, a: Any) -> Any:
        rest = {key: value for key, value in a.items() if key not in plane}
        return f.flow.flow_matching_loss(_swirl(f, a), **rest)

    moving: dict[str, Any] = {"differentiate": ("A", "b", "z0", "z1", "tau"), "run": run, "terms": 32}
    inputs = plane | pairs
    times = {"start": uniform("fm.start", 0.0, 0.4, n), "stop": uniform("fm.stop", 0.6, 1.0, n)}
    yield Case("flow_matching_loss/one unit of time", name, inputs, **moving)
    yield Case("flow_matching_loss/weighted, a cell left out", name, inputs | {"weight": weight}, **moving)
    scalar = {"start": np.array(0.25), "stop": np.array(0.875)}
    yield Case("flow_matching_loss/one interval", name, inputs | scalar, **moving)
    yield Case("flow_matching_loss/an interval per cell", name, inputs | times | {"weight": weight}, **moving)
    back = {"start": times["stop"], "stop": times["start"]}
    yield Case("flow_matching_loss/backwards", name, inputs | back, **moving)
    ends = {"tau": np.where(np.arange(n) % 2 == 0, 0.0, 1.0 - 2.0**-20)}
    yield Case("flow_matching_loss/at both ends", name, inputs | times | ends, **moving)


def trajectories() -> Iterator[Case]:
    name = "integrate.integrate"
    inputs = {"A": normal("in.A", D, D, scale=0.6), "b": normal("in.b", D), "z": normal("in.z", 3, D)}

    def run(f: Any, a: Any, **options: Any) -> Any:
        return f.integrate.integrate(_swirl(f, a), a["z"], a["times"], **options)

    moving: dict[str, Any] = {"differentiate": ("A", "b", "z"), "terms": 64}
    first: dict[str, Any] = {"quantities": FIRST, "reason": "other trajectories have the second derivative"}
    routes = {
        "forth": np.array([0.0, 1.0]),
        "back": np.array([1.0, 0.0]),
        "unequal times": np.array([0.125, 0.25, 0.75, 1.0]),
        "unequal times, back": np.array([1.0, 0.5, 0.375]),
    }
    for label, times in routes.items():
        for n_steps in (1, 3):
            steps = "1 step" if n_steps == 1 else f"{n_steps} steps"
            yield Case(
                f"integrate/{label}, {steps}",
                name,
                inputs | {"times": times},
                run=lambda f, a, n=n_steps: run(f, a, n_steps=n),
                **moving,
                **({} if steps == "3 steps" and label in ("forth", "unequal times, back") else first),
            )
    yield Case("integrate/default steps", name, inputs | {"times": routes["forth"]}, run=run, **moving, **first)

    n = 3
    start = {"z": normal("in.fz", n, D), "condition": syn.condition_codes(n)}
    for label, graph in (("network", syn.network()), ("no network", {})):
        params = select(syn.parameters_of("flow", syn.configuration(), graph=bool(graph)), "flow")
        trained = {key: value for key, value in params.items() if key not in ("center", "scale")}

        def along(f: Any, a: Any, n_steps: int) -> Any:
            field = f.flow.VectorField(a["params"])
            nodes = field.nodes(a["graph"])
            velocity = lambda s, z: field(s, z, a["condition"], nodes)
            return f.integrate.integrate(velocity, a["z"], a["times"], n_steps=n_steps)[1:]

        for way, times in (("forth", np.array([0.0, 0.375, 1.0])), ("back", np.array([1.0, 0.25]))):
            yield Case(
                f"integrate/{label}, {way}",
                name,
                {"params": trained, "graph": graph, **start, "times": times},
                differentiate=(*PARAMS, "z", "condition"),
                terms=64,
                run=lambda f, a: along(f, a, 2),
                **({} if graph and way == "back" else first),
            )


# --- losses and steps ------------------------------------------------------------------------------------------
def _loss_case(loss: str, label: str, config: Config, *, graph: bool = True, **changes: Any) -> Case:
    """A case of cvae_loss, discriminator_loss or flow_loss."""
    stage = "flow" if loss == "flow" else "cvae"
    params = syn.parameters_of(stage, config, **({"graph": graph} if stage == "flow" else {}))
    batch = syn.flow_batch(config, graph=graph) if stage == "flow" else syn.cvae_batch()
    inputs = {
        "params": params,
        "batch": batch | changes.pop("batch", {}),
        "noise": syn.noise_of(stage, config) | changes.pop("noise", {}),
    }
    if stage == "cvae":
        inputs["carry"] = syn.carry_of("cvae", config)
    return Case(
        f"{loss}_loss/{label}",
        f"flow_steps.{loss}_loss",
        inputs,
        {"config": config} | changes.pop("static", {}),
        tuple(f"params/{name}" for name in syn.trainable(stage, params)),
        zero_outputs=("1/*",),
        taylor=loss == "flow",
        terms=64,
        **changes,
    )


def losses() -> Iterator[Case]:
    config = syn.configuration()
    frozen = ("params/discriminator.*",)
    encoder = ("params/cvae.*",)
    for kind in ("entropy", "minimax"):
        beta = {"beta": 0.375}
        chosen = syn.configuration(adversary__kind=kind)
        quantities = QUANTITIES if kind == "entropy" else FIRST
        yield _loss_case("cvae", f"{kind}, training", chosen, static=beta, none=frozen, quantities=quantities)
        running = beta | {"train": False}
        yield _loss_case("cvae", f"{kind}, evaluation", chosen, static=running, none=frozen, quantities=FIRST)
    silent = syn.configuration(adversary__weight=0.0)
    yield _loss_case("cvae", "no adversary", silent, static={"beta": 0.0}, none=frozen, quantities=FIRST)
    unknown = {"tissue": np.zeros(syn.N_CELLS, np.int32)}
    yield _loss_case(
        "cvae", "no tissue known", config, static={"beta": 1.0}, batch=unknown, none=frozen, quantities=FIRST
    )
    alike = {"tissue": np.full(syn.N_CELLS, 3, np.int32)}
    yield _loss_case("cvae", "one tissue", config, static={"beta": 1.0}, batch=alike, none=frozen, quantities=FIRST)

    yield _loss_case("discriminator", "dropout", config, none=encoder)
    dry = syn.configuration(adversary__dropout=0.0)
    kept = {name: np.ones((syn.N_CELLS, 7)) for name in ("keep1", "keep2")}
    yield _loss_case("discriminator", "no dropout", dry, noise=kept, none=encoder, quantities=FIRST)
    yield _loss_case("discriminator", "one tissue", config, batch=alike, none=encoder, quantities=FIRST)

    yield _loss_case("flow", "network", config)
    yield _loss_case("flow", "no network", config, graph=False)
    even = {"weight": np.ones(syn.N_CELLS), "start": np.zeros(syn.N_CELLS), "stop": np.ones(syn.N_CELLS)}
    yield _loss_case("flow", "one interval", config, batch=even, quantities=FIRST)
    flipped = {"sign": -syn.network()["sign"]}
    yield _loss_case("flow", "other signs", config, batch=flipped, quantities=FIRST)


def steps() -> Iterator[Case]:
    tight = {f"stage_{stage}__max_norm": 0.25 for stage in ("cvae", "flow")}
    clipped = syn.configuration(**tight)
    for stage in ("cvae", "flow"):
        yield step_case(stage, "shared state, clipped, decayed", clipped)
        loose = syn.configuration(**{f"stage_{stage}__max_norm": 1e6, f"stage_{stage}__weight_decay": 0.0})
        yield step_case(stage, "two micro-batches, not clipped", loose, n_micro=2, count=40)
        yield step_case(stage, "first step", syn.configuration(), count=0)
    yield step_case("cvae", "minimax, clipped for one player", syn.configuration(adversary__kind="minimax"))
    everything = syn.trainable("cvae", syn.parameters_of("cvae", clipped))
    second = tuple(name for name in everything if not name.startswith("discriminator."))
    yield step_case("cvae", "a frozen discriminator", clipped, trained=second)


def all_cases() -> list[Case]:
    return [
        *norms(),
        *cvae(),
        *discriminator(),
        *attention(),
        *fields(),
        *matching(),
        *trajectories(),
        *losses(),
        *steps(),
    ]
