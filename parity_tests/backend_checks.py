"""What a Backend and its training loop must do beyond single functions. Each check returns "" or what is wrong.

They take the modules of a twin, so that tests and mutants share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from parity_tests import oracle_steps, oracles
from parity_tests import synthetic as syn
from parity_tests.trees import flatten
from pf_core.initial import select
from pf_core.sparse_counts import SparseCounts

STAGES = ("vae", "operator", "joint")
TIGHT = 1e-11  # float64, relative to the largest entry: thousands of roundings, and no fault is so small
Twin = Any  # a namespace of modules


def _backend(twin: Twin) -> Any:
    return twin.bridge.Backend(dtype="float64")


def _differs(found: Any, wanted: Any, tolerance: float = TIGHT) -> str:
    """The first leaf that differs; names, shapes and masks first."""
    one, two = flatten(found), flatten(wanted)
    if set(one) != set(two):
        return f"leaves {sorted(set(one) ^ set(two))} are on one side only"
    for name, value in two.items():
        a = np.asarray(one[name], np.float64)
        b = np.asarray(value.value if hasattr(value, "v") else value, np.float64)
        if a.shape != b.shape:
            return f"{name} has shape {a.shape}, not {b.shape}"
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return f"{name} is NaN elsewhere"
        worst = np.nanmax(np.abs(a - b), initial=0.0)
        if worst > tolerance * max(np.nanmax(np.abs(b), initial=0.0), 1e-12):
            return f"{name} differs by {worst:.3g}"
    return ""


def _start(stage: str, config: Any, count: int = 2) -> dict[str, Any]:
    params = syn.parameters_of(stage, config)
    moving = syn.trainable(stage, params)
    m, v = syn.moments(moving)
    return {"params": params, "m": m, "v": v, "count": count, "carry": syn.carry_of(stage, config)}


def _init(backend: Any, stage: str, at: dict[str, Any]) -> Any:
    return backend.init(
        stage, at["params"], trainable=tuple(at["m"]), m=at["m"], v=at["v"], count=at["count"], carry=at["carry"]
    )


def _inputs(stage: str, config: Any, steps: int, n_micro: int) -> tuple[Any, Any, Any]:
    pick = lambda make: syn.stacked(
        [syn.stacked([make(stage, config, s * n_micro + a) for a in range(n_micro)]) for s in range(steps)]
    )
    hypers = {"lr": 2.0 ** -np.arange(7.0, 7 + steps), "beta": np.linspace(0.25, 1.0, steps)}
    return pick(syn.batch_of), pick(syn.noise_of), hypers


def _trained(export: dict[str, Any]) -> dict[str, Any]:
    """The part of an export that a step changes."""
    return {
        **{k: export[k] for k in ("m", "v", "carry", "count")},
        "params": {n: export["params"][n] for n in export["m"]},
    }


@cache
def _steps_of_the_oracle(stage: str, steps: int) -> tuple[tuple[dict[str, Any], dict[str, Any]], ...]:
    """(metrics, state) after each step of `run`; no mutant changes the oracle."""
    config = _config_of_steps(stage)
    at, (batches, noises, hypers) = _start(stage, config), _inputs(stage, config, steps, 2)
    frozen = {k: p for k, p in at["params"].items() if k not in at["m"]}
    state = {**at, "params": {k: at["params"][k] for k in at["m"]}, "frozen": frozen}
    out = []
    for s in range(steps):
        pick = lambda tree, s=s: {k: np.asarray(v[s]) for k, v in tree.items()}
        reached = oracle_steps.step(stage, state, pick(batches), pick(noises), pick(hypers), config=config)
        plain = {k: {n: _plain(x) for n, x in reached[k].items()} for k in ("params", "m", "v", "carry")}
        state = {**plain, "count": int(reached["count"]), "frozen": frozen}
        out.append((reached["metrics"], state))
    return tuple(out)


def _config_of_steps(stage: str) -> Any:
    return syn.configuration(**{f"stage_{stage}__max_norm": 3.0})


def three_steps(twin: Twin, stages: tuple[str, ...] = STAGES) -> str:
    """run() of 3 steps with 2 micro-batches against the oracle's steps, states and metrics."""
    for stage in stages:
        config, backend = _config_of_steps(stage), _backend(twin)
        steps = 3 if stage != "joint" else 1
        inputs = _inputs(stage, config, steps, 2)
        state, metrics = backend.run(stage, _init(backend, stage, _start(stage, config)), *inputs, config)
        expected = _steps_of_the_oracle(stage, steps)
        for s in range(steps):
            got = {k: v for k, v in metrics.items() if k != "ok"}
            got = {k: {n: x[s] for n, x in v.items()} if isinstance(v, dict) else v[s] for k, v in got.items()}
            wrong = _differs(got, expected[s][0])
            if wrong:
                return f"{stage}, metrics of step {s}: {wrong}"
        if not np.all(np.asarray(metrics["ok"])) or np.shape(metrics["ok"]) != (steps,):
            return f"{stage}: ok is {metrics['ok']}"
        wanted = {k: expected[-1][1][k] for k in ("params", "m", "v", "carry", "count")}
        wrong = _differs(_trained(backend.export(state)), wanted)
        if wrong:
            return f"{stage}, state: {wrong}"
    return ""


def _plain(value: Any) -> np.ndarray:
    return np.asarray(value.value if hasattr(value, "v") else value, np.float64)


# What one cell's NaN is put into. Of the players of stage "cvae" only the second sees the library: a bad value of one
# refuses the update of both.
ILL = {"vae": "counts", "operator": "x", "joint": "cells_library", "cvae": "library", "flow": "z0"}


def the_guard(twin: Twin) -> str:
    """A NaN in one cell: ok is False, no trace is left in the state, count or carry, and the next step is taken."""
    return guard_of(twin, STAGES) or _guarded_parameters(twin)


def guard_of(twin: Twin, stages: tuple[str, ...]) -> str:
    """The guard of some stages."""
    for stage in stages:
        config, backend = syn.configuration(), _backend(twin)
        at = _start(stage, config)
        inputs = _inputs(stage, config, 2, 1)
        ends = {}
        # Always two steps of one program, so that nothing but the order differs: bit by bit.
        for name, order in {"good, bad": (0, 1), "bad, good": (1, 0), "bad, bad": (1, 1)}.items():
            batches, noises, hypers = ({k: v[list(order)].copy() for k, v in tree.items()} for tree in inputs)
            for step, which in enumerate(order):
                if which == 1:
                    batches[ILL[stage]][step, 0, 0] = np.nan
            state, metrics = backend.run(stage, _init(backend, stage, at), batches, noises, hypers, config)
            if np.asarray(metrics["ok"]).tolist() != [which == 0 for which in order]:
                return f"{stage}, {name}: ok is {np.asarray(metrics['ok']).tolist()}"
            ends[name] = _trained(backend.export(state))
        wrong = _differs(ends["bad, bad"], _trained({**at, "params": at["params"]}), 0.0)
        if wrong:
            return f"{stage}: refused steps left a trace: {wrong}"
        wrong = _differs(ends["bad, good"], ends["good, bad"], 0.0)
        if wrong:
            return f"{stage}: a step after a refused one is not the step it would have been: {wrong}"
        if not _differs(ends["good, bad"], ends["bad, bad"], 0.0):
            return f"{stage}: the good step was not taken"
    return ""


def _guarded_parameters(twin: Twin) -> str:
    """A finite loss and gradient whose update overflows."""
    config, backend = syn.configuration(), _backend(twin)
    at = _start("vae", config)
    batches, noises, hypers = _inputs("vae", config, 1, 1)
    hypers["lr"] = np.array([1.7e308])
    config = syn.configuration(stage_vae__max_norm=1e300, stage_vae__weight_decay=50.0)
    state, metrics = backend.run("vae", _init(backend, "vae", at), batches, noises, hypers, config)
    if np.asarray(metrics["ok"]).tolist() != [False]:
        return "parameters that overflow are not refused"
    return _differs(_trained(backend.export(state)), _trained({**at, "params": at["params"]}), 0.0)


def the_round_trip(twin: Twin) -> str:
    """init(export(state)) is bit-exact, and export does not share memory with the state."""
    for dtype in ("float32", "float64"):
        backend = twin.bridge.Backend(dtype=dtype)
        at = _start("operator", syn.configuration(), count=41)
        at = {k: {n: x.astype(dtype) for n, x in v.items()} if isinstance(v, dict) else v for k, v in at.items()}
        export = backend.export(_init(backend, "operator", at))
        wrong = _differs(_trained(export), _trained(at), 0.0)
        if wrong:
            return f"{dtype}: {wrong}"
        kinds = {str(x.dtype) for k in ("m", "v", "carry", "params") for x in export[k].values()}
        if kinds != {dtype}:
            return f"exported dtypes are {sorted(kinds)}, not {dtype}"
    return ""


def evaluation(twin: Twin, stages: tuple[str, ...] = STAGES) -> str:
    """evaluate() is the loss and its parts, and changes nothing."""
    for stage in stages:
        config, backend = syn.configuration(), _backend(twin)
        at = _start(stage, config)
        batch, noise = syn.batch_of(stage, config), syn.noise_of(stage, config)
        state = _init(backend, stage, at)
        found = backend.evaluate(stage, state, batch, noise, config, 0.375)
        wanted = oracle_steps.evaluation(stage, at["params"], batch, noise, at["carry"], config, 0.375)
        wrong = _differs(found, wanted) or _differs(_trained(backend.export(state)), _trained(at), 0.0)
        if wrong:
            return f"{stage}: {wrong}"
    return ""


def the_model(twin: Twin) -> str:
    """encode, decode, dispersion, operators and the decoder's Jacobian-vector product."""
    config, backend = syn.configuration(vae__dispersion="gene-tissue"), _backend(twin)
    params, batch = syn.parameters(config), syn.vae_batch()
    model = oracles.NBVAE(config.vae, select(params, "vae"))
    z, direction = (syn.generator(11, name).standard_normal((syn.N_CELLS, 5)) for name in ("z", "direction"))
    where = (batch["tissue"], batch["library"])
    conditions = syn.condition_batch()
    theta = oracles.ConditionEncoder(select(params, "conditions"))(*conditions.values())
    family = oracles.OperatorFamily(select(params, "operators"))
    (alpha, beta), (A, b) = family.coefficients(theta), family.operator(theta, conditions["tissue"])
    seeded = oracles.Jet(oracles.jet(z).v, None, oracles.jet(direction).v)
    tangent = model.decode(seeded, *where).b
    assert tangent is not None
    pairs = {
        "encode": (
            backend.encode(params, batch["counts"], batch["tissue"], config),
            model.encode(batch["counts"], batch["tissue"]),
        ),
        "decode": (backend.decode(params, z, *where, config), model.decode(z, *where)),
        "dispersion": (backend.dispersion(params, batch["tissue"], config), model.dispersion(batch["tissue"])),
        "operators": (
            backend.operators(params, conditions, config),
            {"theta": theta, "alpha": alpha, "beta": beta, "A": A, "b": b},
        ),
        "decode_jacobian_vector": (backend.decode_jacobian_vector(params, z, direction, *where, config), tangent.value),
    }
    for name, (found, wanted) in pairs.items():
        wrong = _differs(found, wanted)
        if wrong:
            return f"{name}: {wrong}"
    other = syn.parameters(config, seed=2)
    wanted = oracles.NBVAE(config.vae, select(other, "vae")).encode(batch["counts"], batch["tissue"])
    wrong = _differs(backend.encode(other, batch["counts"], batch["tissue"], config), wanted)
    return f"encode, other parameters: {wrong}" if wrong else ""


def diagnosis(twin: Twin) -> str:
    """The first intermediate that is not finite is named, and a healthy batch gets no name."""
    config, backend = syn.configuration(), _backend(twin)
    params, batch, noise = syn.parameters(config), syn.vae_batch(), syn.noise_of("vae", config)
    rest = ({"lr": 0.1, "beta": 1.0}, {}, config)
    names = tuple(syn.trainable("vae", params))
    if backend.diagnose("vae", params, names, batch, noise, *rest) != "":
        return "a healthy batch is diagnosed"
    for leaf, wanted in (
        ("vae.encoder.logvar.weight", "vae.encoder.logvar"),
        ("vae.encoder.hidden.weight", "vae.encoder.hidden"),
        ("vae.decoder.mean.bias", "vae.decoder.mean"),
    ):
        ill = {**params, leaf: np.full_like(params[leaf], np.nan)}
        found = backend.diagnose("vae", ill, names, batch, noise, *rest)
        if found != wanted:
            return f"NaN in {leaf} is diagnosed as {found!r}, not {wanted!r}"
    return ""


def gradient_paths(twin: Twin) -> str:
    """value_and_grad tells none from zero, and gradient_health passes that on."""
    array = lambda value: twin.bridge.to_backend(np.asarray(value, np.float64), dtype="float64")
    params = {"used": array([1.0, 2.0]), "unused": array([3.0]), "flat": array([0.0]), "linear": array([2.0])}
    value, grads = twin.bridge.value_and_grad(
        lambda p: (p["used"] * p["used"]).sum() + (p["flat"] * p["flat"]).sum() + p["linear"].sum(), params
    )
    if not math.isclose(float(value), 7.0):
        return f"the value is {float(value)}, not 7"
    if grads["unused"] is not None or any(grads[name] is None for name in ("used", "flat", "linear")):
        return "a parameter without a path has a gradient, or the other way round"
    if not np.array_equal(twin.bridge.to_numpy(grads["used"]), [2.0, 4.0]):
        return "the gradient is wrong"
    verdicts = {k: h.verdict for k, h in twin.bridge.gradient_health(grads, params).items()}
    if verdicts != {"used": "ok", "unused": "none", "flat": "zero", "linear": "ok"}:
        return f"verdicts are {verdicts}"
    ill = {"used": array([np.nan, 1.0]), "unused": array([1e-30]), "flat": array([1e30])}
    verdicts = {k: h.verdict for k, h in twin.bridge.gradient_health(ill, params).items()}
    if verdicts != {"used": "non-finite", "unused": "tiny", "flat": "huge"}:
        return f"verdicts are {verdicts}"
    return ""


def loss_gradients(twin: Twin) -> str:
    """gradients() in frozen and trained parameters alike, against the oracle; None where nothing leads."""
    config, backend = syn.configuration(), _backend(twin)
    at = _start("operator", config)
    batch, noise = syn.batch_of("operator", config), syn.noise_of("operator", config)
    names = tuple(sorted(at["params"]))
    loss, grads = backend.gradients(
        "operator", at["params"], names, batch, noise, {"lr": 0.0, "beta": 1.0}, at["carry"], config
    )
    wanted = oracle_steps.operator_loss(at["params"], batch, noise, at["carry"], config=config)[0]
    if _differs(loss, wanted):
        return "the loss is wrong"
    absent = {name for name, grad in grads.items() if grad is None}
    if absent != {name for name in names if name.startswith("vae.")}:
        return f"no path to {sorted(absent)}"
    if backend.unreached("operator", at["params"], names, batch, noise, at["carry"], config) != absent:
        return "unreached parameters are not those without a gradient"
    batch, noise = syn.vae_batch(), syn.noise_of("vae", config)
    loss, _ = backend.gradients("vae", at["params"], names, batch, noise, {"lr": 0.0, "beta": 0.375}, {}, config)
    wanted = oracle_steps.loss_of("vae", at["params"], batch, noise, {}, config, 0.375)[0]
    return "the loss of stage vae is wrong" if _differs(loss, wanted) else ""


def arrays(twin: Twin) -> str:
    """to_backend and to_numpy keep values, dtypes and nesting; synchronize returns its tree."""
    tree = {"a": [np.arange(6.0).reshape(2, 3), np.array([1, 2], np.int32)], "b": {"c": np.array(2.5)}}
    for dtype in ("float32", "float64"):
        there = twin.bridge.synchronize(twin.bridge.to_backend(tree, dtype=dtype))
        back = twin.bridge.to_numpy(there)
        if _differs(back, tree, 0.0):
            return _differs(back, tree, 0.0)
        kinds = [str(x.dtype) for x in flatten(back).values()]
        if kinds != [dtype, "int32", dtype]:
            return f"dtypes are {kinds}"
    return ""


def recordings(twin: Twin) -> str:
    """Nothing is kept outside a recording; inside, values come in order, also names met again."""
    array = twin.bridge.to_backend(np.ones(3), dtype="float64")
    if twin.probe.record("outside", array) is not array:
        return "record changes its value"
    with twin.probe.recording() as values:
        twin.probe.record("one", array)
        twin.probe.record("two", 2 * array)
        twin.probe.record("one", 3 * array)
    twin.probe.record("after", array)
    found = {name: float(value[0]) for name, value in values.items()}
    return "" if found == {"one": 1.0, "two": 2.0, "one.2": 3.0} else f"recorded {found}"


def bad_input(twin: Twin) -> str:
    """Every misuse raises ValueError, in either twin."""
    config, backend = syn.configuration(), _backend(twin)
    at = _start("operator", config)
    ones = lambda *shape: twin.bridge.to_backend(np.ones(shape), dtype="float64")
    batch, noise = syn.vae_batch(), syn.noise_of("vae", config)
    beyond = {**syn.operator_batch(config)}
    beyond["perturbations"] = np.full_like(beyond["perturbations"], syn.N_PERTURBATIONS)
    far = {"tissue": np.full_like(batch["tissue"], syn.N_TISSUES)}
    hyper = {"lr": 0.1, "beta": 1.0}
    trained = (at["params"], tuple(at["m"]), syn.operator_batch(config), syn.noise_of("operator", config))
    misuses: dict[str, Callable[[], Any]] = {
        "unknown method": lambda: twin.likelihood.nb_log_prob(ones(2, 3), ones(2, 3), ones(3), method="fast"),
        "genes that do not fit": lambda: twin.likelihood.nb_log_prob(ones(2, 3), ones(2, 5), ones(3)),
        "unknown estimator": lambda: twin.distances.energy_distance(ones(2, 3), ones(5, 3), estimator="w"),
        "unknown power": lambda: twin.distances.energy_distance(ones(2, 3), ones(5, 3), power=3),
        "dimensions that differ": lambda: twin.distances.energy_distance(ones(2, 3), ones(5, 2)),
        "one cell, u": lambda: twin.distances.energy_distance(ones(1, 3), ones(5, 3), estimator="u"),
        "weights that do not fit": lambda: twin.distances.energy_distance(ones(2, 3), ones(5, 3), wx=ones(3)),
        "directions that do not fit": lambda: twin.distances.sliced_energy_distance(ones(2, 3), ones(5, 3), ones(4, 2)),
        "a matrix that is not square": lambda: twin.spectral.spectral_norm(ones(2, 3), ones(3)),
        "a start that does not fit": lambda: twin.spectral.spectral_norm(ones(3, 3), ones(2)),
        "unknown norm": lambda: twin.spectral.operator_norm(ones(3, 3), kind="nuclear"),
        "nothing to compose": lambda: twin.operators.compose([]),
        "unknown dtype": lambda: twin.bridge.Backend(dtype="float16"),
        "unknown device": lambda: twin.bridge.Backend(device="abacus"),
        "a tile without rows": lambda: twin.distances.energy_distance(ones(2, 3), ones(5, 3), tile=0),
        "conditions without a table": lambda: twin.conditions.ConditionEncoder({"theta.weight": np.ones((2, 3))}),
        "unknown stage": lambda: backend.init("warp", at["params"], trainable=()),
        "unknown trainable": lambda: backend.init("vae", at["params"], trainable=("vae.gone",)),
        "unknown stage, gradients": lambda: backend.gradients("warp", *trained, hyper, at["carry"], config),
        "unknown trainable, gradients": lambda: backend.gradients(
            "operator", at["params"], ("gone",), *trained[2:], hyper, at["carry"], config
        ),
        "moments that do not fit": lambda: backend.init(
            "operator", at["params"], trainable=tuple(at["m"]), m={}, v=at["v"]
        ),
        "genes that the model lacks": lambda: backend.encode(
            at["params"], batch["counts"][:, :-1], batch["tissue"], config
        ),
        "a tissue out of range": lambda: backend.encode(at["params"], batch["counts"], far["tissue"], config),
        "a negative tissue": lambda: backend.encode(at["params"], batch["counts"], far["tissue"] - 9, config),
        "a perturbation out of range": lambda: backend.gradients(
            "operator",
            at["params"],
            tuple(at["m"]),
            beyond,
            syn.noise_of("operator", config),
            hyper,
            at["carry"],
            config,
        ),
        "a training tissue out of range": lambda: backend.evaluate(
            "vae", backend.init("vae", at["params"], trainable=()), {**batch, **far}, noise, config, 1.0
        ),
    }
    return first_accepted(misuses)


def first_accepted(misuses: dict[str, Callable[[], Any]]) -> str:
    """The first misuse that does not raise a ValueError with a message."""
    for name, misuse in misuses.items():
        try:
            misuse()
        except ValueError as error:
            if not str(error).strip():
                return f"{name}: an empty message"
        except Exception as error:
            return f"{name} raises {type(error).__name__}, not ValueError: {error}"
        else:
            return f"{name} is accepted"
    return ""


# The cheap ones first: a mutant is dropped at the first check that notices it.
def sent_batches(twin: Twin) -> str:
    """What a device holds is what was sent, read where it lies or made dense by a scatter; integers come back."""
    rng = np.random.default_rng(17)
    dense = rng.poisson(3.0, (2, 3, 7, 23)) * (rng.random((2, 3, 7, 23)) < 0.3) * 1.0
    dense[0, 0, 0, 0] = 5.0  # what fills a scatter up must not land on it
    rows = [csr_matrix(block[:-1]) for block in dense.reshape(6, 7, 23)]
    dense[..., -1, :] = 0  # of a row that the matrices lack
    tree = {"counts": SparseCounts(dense.shape, tuple(rows)), "eps": rng.normal(size=(2, 3)), "tissue": np.arange(5)}
    backend = _backend(twin)
    for backend.scatters in (False, True):
        sent = backend.send(tree)
        for again in (sent, backend.send(sent)):
            if again["tissue"] is not tree["tissue"]:
                return "integers were sent before they were checked"
            if problem := _differs(twin.bridge.to_numpy(again), {**tree, "counts": dense}, 0.0):
                return f"{'scattered' if backend.scatters else 'read in place'}: {problem}"
    return ""


CHECKS: dict[str, Callable[[Twin], str]] = {
    check.__name__: check
    for check in (
        gradient_paths,
        arrays,
        sent_batches,
        recordings,
        the_round_trip,
        the_model,
        diagnosis,
        loss_gradients,
        bad_input,
        evaluation,
        the_guard,
        three_steps,
    )
}
