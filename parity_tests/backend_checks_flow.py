"""What a Backend must do with models of the flow system. Each check returns "" or what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from parity_tests import jets, oracle_flow, oracle_steps
from parity_tests import synthetic as syn
from parity_tests.backend_checks import (
    Twin,
    _backend,
    _differs,
    _init,
    _inputs,
    _start,
    _trained,
    evaluation,
    first_accepted,
    guard_of,
    three_steps,
)
from parity_tests.jets import Jet, jet
from pf_core.config import NORMALISED_TOTAL
from pf_core.initial import select

STAGES = ("cvae", "flow")
# With a network the cells go forth, without one back: times, and steps between them.
ROUTES = {True: (np.array([0.0, 0.375, 1.0]), 2), False: (np.array([1.0, 0.25]), 1)}
N = 3  # cells that are moved


@cache
def _model(graph: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All parameters with the running statistics among them, and the network."""
    config = syn.configuration()
    params = syn.parameters_of_flow(config, graph=graph) | syn.carry_of("cvae", config)
    return params, syn.network() if graph else {}


def _cells() -> dict[str, np.ndarray]:
    draw = syn.generator(11, "flow.cells")
    batch = syn.cvae_batch()
    return {
        "z": draw.normal(0.4, 1.5, (N, 5)),
        "condition": syn.condition_codes(N),
        "times": draw.uniform(0.0, 1.0, N),
        "counts": batch["counts"][1 : N + 1],
        "tissue": batch["tissue"][1 : N + 1],
        "weights": draw.normal(0.0, 1.0, syn.N_GENES),
    }


def _raw_velocity(params: Any, condition: Any, nodes: Any) -> Callable[[Any, Any], Jet]:
    """dz/ds of latents in their own units."""
    field = oracle_flow.VectorField(select(params, "flow"))
    center, scale = jet(params["flow.center"]), jet(params["flow.scale"])
    return lambda s, z: scale * field(s, (z - center) / scale, condition, nodes)


@cache
def _of_the_oracle(graph: bool) -> dict[str, Any]:
    params, network = _model(graph)
    cells = _cells()
    nodes = oracle_flow.VectorField(select(params, "flow")).nodes(network)
    velocity = _raw_velocity(params, cells["condition"], nodes)
    found: dict[str, Any] = {"velocity": velocity(cells["times"], cells["z"])}
    cvae = oracle_flow.CVAE(select(params, "cvae"))
    times, n_steps = ROUTES[graph]
    go = lambda z: oracle_flow.integrate(velocity, z, times, n_steps=n_steps)
    found["trajectory"] = go(cells["z"])
    end = go(jets.seed({"z": cells["z"]}, None)["z"])[-1]
    assert end.a is not None
    # (first cell, its latent, last cell, its latent): the diagonal of the cells.
    full = np.asarray(end.a.value, float).reshape(N, 5, N, 5)
    found["endpoint_jacobian"] = np.einsum("cjci->cij", full)
    log_counts = jets.seed({"x": np.log1p(cells["counts"])}, None)["x"]
    mean, *_ = cvae.encoder.of_log_counts(log_counts, cells["tissue"], select(params, "cvae.encoder"))
    mu = cvae.decode(go(mean)[-1], cells["tissue"], np.ones(N))
    score = (jets.log1p(mu * NORMALISED_TOTAL) * cells["weights"]).sum()
    assert score.a is not None
    found["endpoint_gradient"] = np.asarray(score.a.value, float).reshape(cells["counts"].shape)
    return found


def flow_movement(twin: Twin) -> str:
    """velocity, trajectory, endpoint_jacobian and endpoint_gradient, with a network and without."""
    backend, config, cells = _backend(twin), syn.configuration(), _cells()
    for graph in (True, False):
        params, network = _model(graph)
        rest = (cells["condition"], network)
        times, n_steps = ROUTES[graph]
        way: Any = {"n_steps": n_steps}
        where, score = (cells["counts"], cells["tissue"]), cells["weights"]
        found = {
            "velocity": backend.velocity(params, cells["times"], cells["z"], *rest, config),
            "trajectory": backend.trajectory(params, cells["z"], times, *rest, config, **way),
            "endpoint_jacobian": backend.endpoint_jacobian(params, cells["z"], times, *rest, config, **way),
            "endpoint_gradient": backend.endpoint_gradient(params, *where, times, *rest, score, config, **way),
        }
        if not np.array_equal(found["trajectory"][0], cells["z"]):
            return "a trajectory does not begin where it was told to"
        for name, wanted in _of_the_oracle(graph).items():
            wrong = _differs(found[name], wanted)
            if wrong:
                return f"{name}, {'a' if graph else 'no'} network: {wrong}"
    return ""


def flow_model(twin: Twin) -> str:
    """encode, decode, dispersion and the decoder's Jacobian-vector product; running statistics come with the model."""
    backend, config, batch = _backend(twin), syn.configuration(), syn.cvae_batch()
    params, _ = _model(True)
    model = oracle_flow.CVAE(select(params, "cvae"))
    z, direction = (syn.generator(11, name).standard_normal((syn.N_CELLS, 5)) for name in ("z", "direction"))
    where = (batch["tissue"], batch["library"])
    tangent = model.decode(Jet(jet(z).v, None, jet(direction).v), *where).b
    assert tangent is not None
    statistics = select(params, "cvae.encoder")
    pairs = {
        "encode": (
            backend.encode(params, batch["counts"], batch["tissue"], config),
            model.encode(batch["counts"], batch["tissue"], statistics)[:2],
        ),
        "decode": (backend.decode(params, z, *where, config), model.decode(z, *where)),
        "dispersion": (backend.dispersion(params, batch["tissue"], config), model.dispersion(batch["tissue"])),
        "decode_jacobian_vector": (backend.decode_jacobian_vector(params, z, direction, *where, config), tangent.value),
    }
    for name, (found, wanted) in pairs.items():
        wrong = _differs(found, wanted)
        if wrong:
            return f"{name}: {wrong}"
    one = backend.encode(params, batch["counts"][:1], batch["tissue"][:1], config)
    return _differs(one, tuple(np.asarray(value.value[:1], float) for value in pairs["encode"][1]))


def flow_evaluation(twin: Twin) -> str:
    """evaluate() of both stages: with running statistics and without dropout in stage "cvae"."""
    return evaluation(twin, STAGES)


def flow_gradients(twin: Twin) -> str:
    """gradients() against the oracle: each player's in its own parameters; None where nothing leads."""
    config, backend = syn.configuration(), _backend(twin)
    for stage in STAGES:
        at = _start(stage, config)
        batch, noise = syn.batch_of(stage, config), syn.noise_of(stage, config)
        names = tuple(name for name in sorted(at["params"]) if stage == "cvae" or name.startswith("flow."))
        loss, found = backend.gradients(
            stage, at["params"], names, batch, noise, {"lr": 0.0, "beta": 0.375}, at["carry"], config
        )
        trained = {name: at["params"][name] for name in at["m"]}
        players = {stage: list(trained)}
        if stage == "cvae":
            players = {
                "discriminator": [name for name in trained if name.startswith("discriminator.")],
                "cvae": [name for name in trained if not name.startswith("discriminator.")],
            }
        wanted, expected = {}, None
        for player, own in players.items():
            leaves = {name: trained[name] for name in own}
            seeded = {**at["params"], **jets.seed(leaves, None)}
            expected, _ = oracle_steps.loss_of(player, seeded, batch, noise, at["carry"], config, 0.375)
            wanted |= oracle_steps._gradient(expected, leaves)
        absent = {name for name, grad in found.items() if grad is None}
        if absent != set(names) - set(trained):
            return f"{stage}: no path to {sorted(absent)}"
        if backend.unreached(stage, at["params"], names, batch, noise, at["carry"], config) != absent:
            return f"{stage}: unreached parameters are not those without a gradient"
        got = {name: grad for name, grad in found.items() if grad is not None}
        wrong = _differs(loss, expected) or _differs(got, wanted)
        if wrong:
            return f"{stage}: {wrong}"
    return ""


def flow_diagnosis(twin: Twin) -> str:
    """The first intermediate that is not finite is named, and a healthy batch gets no name."""
    config, backend = syn.configuration(), _backend(twin)
    ill_leaves = {
        "cvae": {
            "cvae.encoder.block1.weight": "cvae.encoder.norm1",
            "cvae.encoder.norm2.shift": "cvae.encoder.norm2",
            "cvae.encoder.logvar.bias": "cvae.encoder.logvar",
            "cvae.decoder.mean.bias": "cvae.decoder.mean",
            "discriminator.out.bias": "discriminator.logits",
        },
        "flow": {
            "flow.graph.attention": "flow.nodes",
            "flow.query.bias": "flow.context",
            "flow.head.out.bias": "flow.velocity",
        },
    }
    for stage, leaves in ill_leaves.items():
        at = _start(stage, config)
        inputs = (syn.batch_of(stage, config), syn.noise_of(stage, config), {"lr": 0.1, "beta": 1.0})
        rest = (tuple(at["m"]), *inputs, at["carry"], config)
        if backend.diagnose(stage, at["params"], *rest) != "":
            return f"{stage}: a healthy batch is diagnosed"
        for leaf, wanted in leaves.items():
            ill = {**at["params"], leaf: np.full_like(at["params"][leaf], np.nan)}
            found = backend.diagnose(stage, ill, *rest)
            if found != wanted:
                return f"NaN in {leaf} is diagnosed as {found!r}, not {wanted!r}"
    return ""


def flow_bad_input(twin: Twin) -> str:
    """Every misuse raises ValueError, in either twin."""
    config, backend = syn.configuration(), _backend(twin)
    params, network = _model(True)
    batch, cells = syn.cvae_batch(), _cells()
    array = lambda value: twin.bridge.to_backend(value, dtype="float64")
    ones = lambda *shape: array(np.ones(shape))
    whole = array(dict(params))
    x, tissue, library = (array(batch[name]) for name in ("counts", "tissue", "library"))
    statistics = select(whole, "cvae.encoder")
    cvae = lambda: twin.cvae.CVAE(select(whole, "cvae"))
    judge = lambda: twin.discriminator.Discriminator(select(whole, "discriminator"))
    field = lambda: twin.flow.VectorField(select(whole, "flow"))
    away = lambda n, side="target": {**network, side: np.full_like(network[side], n)}
    go = lambda times, **options: twin.integrate.integrate(
        lambda s, z: z, ones(3, 5), array(np.array(times)), **options
    )
    moved = lambda graph: backend.velocity(params, cells["times"], cells["z"], cells["condition"], graph, config)
    trained = lambda stage: backend.init(stage, params, trainable=(), carry=syn.carry_of(stage, config))
    far = {"tissue": np.full_like(batch["tissue"], syn.N_CODES)}
    route = (cells["condition"], network)
    misuses: dict[str, Callable[[], Any]] = {
        "batch norm of one cell": lambda: twin.cvae.batch_norm(ones(1, 3), *(ones(3) for _ in range(4)), train=True),
        "an encoder trained on one cell": lambda: cvae().encode(x[:1], tissue[:1], statistics, train=True),
        "genes that the model lacks": lambda: cvae().encode(x[:, :-1], tissue, statistics),
        "latents that the model lacks": lambda: cvae().decode(ones(syn.N_CELLS, 4), tissue, library),
        "latents that the discriminator lacks": lambda: judge()(ones(3, 4)),
        "a mask of another shape": lambda: judge()(ones(3, 5), ones(3, 5), dropout=0.5),
        "a dropout of 1": lambda: judge()(ones(3, 5), ones(3, 7), dropout=1.0),
        "unknown adversary": lambda: twin.discriminator.adversary_loss(ones(11, 3), tissue, ones(11), kind="wgan"),
        "a field without its network": lambda: field().nodes({}),
        "a mask for other cells": lambda: judge()(ones(3, 5), ones(1, 7), dropout=0.5),
        "pairs that would be repeated": lambda: twin.flow.flow_matching_loss(
            lambda s, z: z, ones(3, 5), ones(1, 5), ones(3)
        ),
        "edges of different lengths": lambda: field().nodes(array({**network, "sign": network["sign"][:-1]})),
        "conditions of another width": lambda: field()(ones(3), ones(3, 5), ones(3, 2), ones(13, 6)),
        "times of other cells": lambda: field()(ones(2), ones(3, 5), ones(3, 9), ones(13, 6)),
        "pairs of different lengths": lambda: twin.flow.flow_matching_loss(
            lambda s, z: z, ones(3, 5), ones(2, 5), ones(3)
        ),
        "times that stand still": lambda: go([0.0, 0.5, 0.5]),
        "times that turn back": lambda: go([0.0, 0.5, 0.25]),
        "no steps": lambda: go([0.0, 1.0], n_steps=0),
        "unknown method": lambda: go([0.0, 1.0], method="euler"),
        "a model without its running statistics": lambda: backend.encode(
            syn.parameters_of_flow(config), batch["counts"], batch["tissue"], config
        ),
        "a field without the units of its latents": lambda: backend.velocity(
            {k: v for k, v in params.items() if k != "flow.scale"}, cells["times"], cells["z"], *route, config
        ),
        "an edge to a gene that is not there": lambda: moved(away(syn.N_GENES)),
        "an edge to a negative gene": lambda: moved(away(-1)),
        "an edge from a gene that is not there": lambda: moved(away(syn.N_GENES, "source")),
        "an edge from a negative gene": lambda: moved(away(-1, "source")),
        "a trajectory that turns back": lambda: backend.trajectory(
            params, cells["z"], np.array([0.0, 1.0, 0.5]), *route, config
        ),
        "a trajectory by an unknown method": lambda: backend.trajectory(
            params, cells["z"], np.array([0.0, 1.0]), *route, config, method="euler"
        ),
        "a tissue out of range": lambda: backend.encode(params, batch["counts"], far["tissue"], config),
        "a tissue out of range, decoded": lambda: backend.decode(
            params, np.zeros((syn.N_CELLS, 5)), far["tissue"], batch["library"], config
        ),
        "a training tissue out of range": lambda: backend.evaluate(
            "cvae", trained("cvae"), {**batch, **far}, syn.noise_of("cvae", config), config, 1.0
        ),
        "a training edge out of range": lambda: backend.evaluate(
            "flow",
            trained("flow"),
            {**syn.flow_batch(config), **away(syn.N_GENES)},
            syn.noise_of("flow", config),
            config,
            1.0,
        ),
        "an endpoint of a tissue out of range": lambda: backend.endpoint_gradient(
            params, cells["counts"], far["tissue"][:N], np.array([0.0, 1.0]), *route, cells["weights"], config
        ),
    }
    return first_accepted(misuses)


def flow_guard(twin: Twin) -> str:
    """Refused steps leave no trace, not in the other player and not in the running statistics."""
    return guard_of(twin, STAGES) or _guarded_statistics(twin)


def _guarded_statistics(twin: Twin) -> str:
    """Weights that leave one cell: the loss is finite, its unbiased variance is not."""
    config, backend = syn.configuration(), _backend(twin)
    at = _start("cvae", config)
    batches, noises, hypers = _inputs("cvae", config, 1, 1)
    batches["weight"][..., 1:] = 0.0
    state, metrics = backend.run("cvae", _init(backend, "cvae", at), batches, noises, hypers, config)
    if np.asarray(metrics["ok"]).tolist() != [False]:
        return "running statistics that are not finite are not refused"
    return _differs(_trained(backend.export(state)), _trained(at), 0.0)


def flow_steps(twin: Twin) -> str:
    """run() of 3 steps with 2 micro-batches against the oracle's steps, states and metrics."""
    return three_steps(twin, STAGES)


def flow_round_trip(twin: Twin) -> str:
    """init(export(state)) is bit-exact, running statistics among it."""
    backend = twin.bridge.Backend(dtype="float32")
    at = _start("cvae", syn.configuration(), count=41)
    at = {k: {n: x.astype("float32") for n, x in v.items()} if isinstance(v, dict) else v for k, v in at.items()}
    return _differs(_trained(backend.export(_init(backend, "cvae", at))), _trained(at), 0.0)


# The cheap ones first: a mutant is dropped at the first check that notices it.
CHECKS: dict[str, Callable[[Twin], str]] = {
    check.__name__: check
    for check in (
        flow_round_trip,
        flow_bad_input,
        flow_model,
        flow_movement,
        flow_evaluation,
        flow_gradients,
        flow_diagnosis,
        flow_guard,
        flow_steps,
    )
}
