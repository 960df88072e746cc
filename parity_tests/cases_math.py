"""Cases of the functions: likelihood, operators, distances, spectral."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from parity_tests import synthetic as syn
from parity_tests.case import QUANTITIES, Case
from pf_core.config import R_MAX, R_MIN
from pf_core.noise import generator

FIRST = ("value", "gradient", "jvp")
VALUE = ("value",)


def normal(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    return mean + scale * generator(3, name).standard_normal(shape)


def uniform(name: str, low: float, high: float, *shape: int) -> np.ndarray:
    return generator(3, name).uniform(low, high, shape)


def log_uniform(name: str, low: float, high: float, *shape: int) -> np.ndarray:
    return np.exp(uniform(name, np.log(low), np.log(high), *shape))


def counts(name: str, *shape: int, mean: float = 4.0) -> np.ndarray:
    draw = generator(3, name)
    return draw.poisson(draw.gamma(0.7, mean / 0.7, shape)).astype(np.float64)


def likelihood() -> Iterator[Case]:
    clip = {"static": {"low": -1.0, "high": 2.0}, "differentiate": ("x",), "taylor": False}
    edge = np.array([-3.0, -1.0, -0.75, 0.0, 0.5, 1.5, 2.0, 2.5, 7.0])
    yield Case("strict_clip/at bounds, inside, outside", "likelihood.strict_clip", {"x": edge}, **clip)
    yield Case(
        "strict_clip/squared, for the second derivative",
        "likelihood.strict_clip",
        {"x": edge},
        differentiate=("x",),
        taylor=False,
        run=lambda f, a: f.likelihood.strict_clip(a["x"], -1.0, 2.0) * f.likelihood.strict_clip(a["x"], -1.0, 2.0),
    )
    yield Case(
        "strict_clip/everything outside",
        "likelihood.strict_clip",
        {"x": np.array([-5.0, -1.0, 2.0, 3.0])},
        zero=("x",),
        zero_outputs=("value",),
        **clip,
    )
    x = np.array([0, 1, 2, 3, 7, 31, 100, 1021, 99991, 1000003.0])[:, None]
    r = np.array([1e-4, 3e-3, 0.11, 0.9, 1.0, 2.0, 7.3, 130.0, 1999.0, 1e4])[None, :]
    grid: dict[str, Any] = {"inputs": {"x": x, "r": r}, "differentiate": ("r",)}
    yield Case("lgamma_difference/extreme counts and dispersions", "likelihood.lgamma_difference", **grid)
    third: dict[str, Any] = {
        "quantities": FIRST,
        "reason": "its second derivative is the third of lgamma, which nothing needs",
    }
    yield Case("digamma_difference/extreme counts and dispersions", "likelihood.digamma_difference", **grid, **third)
    grid_mu = np.array([1e-8, 1e-3, 0.37, 1.0, 5.3, 97.0, 1e5])[:, None, None]
    grid = {
        k: np.array(v).reshape(70, 10)
        for k, v in zip("xmr", np.broadcast_arrays(x[None], grid_mu, r[None]), strict=True)
    }
    grid = {"x": grid["x"], "mu": grid["m"], "r": grid["r"]}
    yield Case(
        "nb_log_prob/extreme grid, elementwise", "likelihood.nb_log_prob_elements", grid, differentiate=("mu", "r")
    )
    shape = (7, 13)
    usual = {
        "x": counts("nb.x", *shape),
        "mu": log_uniform("nb.mu", 0.03, 50, *shape),
        "r": log_uniform("nb.r", 0.05, 300, shape[1]),
    }
    both: dict[str, Any] = {"differentiate": ("mu", "r")}
    yield Case("nb_log_prob/r per gene", "likelihood.nb_log_prob", usual, **both)
    per_cell = usual | {"r": log_uniform("nb.r2", 1e-3, 9e3, *shape)}
    yield Case("nb_log_prob/r per cell and gene", "likelihood.nb_log_prob", per_cell, **both)
    near_poisson = usual | {"r": np.full(shape[1], 1e4), "mu": usual["x"] + uniform("nb.near", 0.01, 0.3, *shape)}
    yield Case("nb_log_prob/nearly Poisson, mean near the count", "likelihood.nb_log_prob", near_poisson, **both)
    zeros = usual | {"x": np.zeros(shape)}
    yield Case("nb_log_prob/all counts zero", "likelihood.nb_log_prob", zeros, **both)
    for method in ("stable", "plain"):
        yield Case(
            f"nb_log_prob/counts carry no gradient, {method}",
            "likelihood.nb_log_prob",
            usual,
            {"method": method},
            differentiate=("x", "mu", "r"),
            none=("x",),
            taylor=False,
            quantities=("value", "gradient"),
            terms=32,
        )
    plain = {"static": {"method": "plain"}, "terms": 32, "quantities": FIRST}
    plain["reason"] = "for comparison only; torch.polygamma(1, x) is 1e-10 off in float64, so no second derivative"
    yield Case("nb_log_prob/plain form", "likelihood.nb_log_prob", usual, **both, **plain)
    yield Case("nb_log_prob/plain form, elementwise", "likelihood.nb_log_prob_elements", usual, **both, **plain)

    weight = uniform("sum.weight", 0.2, 2.0, shape[0])
    weight[2] = 0.0
    sums = "likelihood.nb_log_prob_sum"
    whole = {"x": grid["x"], "mu": grid["mu"], "r": r[0]}
    for label, inputs in {
        "usual": usual,
        "nearly Poisson, mean near the count": near_poisson,
        "all counts zero": zeros,
        "extreme counts, means and dispersions": whole,
    }.items():
        for rows in (4, 32):
            given_weight = weight if len(inputs["x"]) == len(weight) else np.ones(len(inputs["x"]))
            tabled = inputs | syn.tabled(inputs["x"], given_weight, rows=rows)
            yield Case(f"nb_log_prob_sum/{label}, table of {rows}", sums, tabled, {"method": "table"}, **both)
    yield Case("nb_log_prob_sum/unweighted", sums, usual, **both)
    tabled = usual | syn.tabled(usual["x"], np.ones(shape[0]))
    del tabled["weight"]
    yield Case("nb_log_prob_sum/unweighted, table", sums, tabled, {"method": "table"}, **both)
    yield Case("nb_log_prob_sum/weighted", sums, usual | {"weight": weight}, **both)
    yield Case("nb_log_prob_sum/r per cell and gene", sums, per_cell | {"weight": weight}, **both)
    yield Case("nb_log_prob_sum/plain form", sums, usual | {"weight": weight}, **both, **plain)
    tabled = usual | syn.tabled(usual["x"], weight)
    yield Case(
        "nb_log_prob_sum/counts, weights and table carry no gradient",
        sums,
        tabled,
        {"method": "table"},
        differentiate=("x", "mu", "r", "weight", "table"),
        none=("x", "weight", "table"),
        taylor=False,
        quantities=("value", "gradient"),
    )

    log_r = np.concatenate([np.linspace(-9.0, 9.0, 11), [-12.0, -9.5, 9.5, 30.0]])
    yield Case(
        "inverse_dispersion/inside and outside",
        "likelihood.inverse_dispersion",
        {"log_r": log_r},
        differentiate=("log_r",),
    )
    yield Case(
        "inverse_dispersion/exactly at the bounds",
        "likelihood.inverse_dispersion",
        {"log_r": np.log([R_MIN, R_MAX])},
        differentiate=("log_r",),
        zero=("log_r",),
        zero_outputs=("value",),
        dtypes=("float64",),
        taylor=False,
        reason="the bounds are not float32 numbers",
    )
    latent = {"mu": normal("kl.mu", 7, 5), "logvar": normal("kl.lv", 7, 5, scale=2.0)}
    latent["logvar"][0, :3] = (-10.0, 10.0, 0.0)
    latent["logvar"][3, :3] = (-31.0, 13.0, 9.75)
    yield Case(
        "gaussian_kl/at bounds, inside, outside",
        "likelihood.gaussian_kl",
        latent,
        differentiate=("mu", "logvar"),
        taylor=False,
    )
    yield Case(
        "reparameterize/at bounds, inside, outside",
        "likelihood.reparameterize",
        latent | {"eps": normal("eps", 7, 5)},
        differentiate=("mu", "logvar", "eps"),
        taylor=False,
    )
    elbo = usual | {"z_mu": latent["mu"], "z_logvar": latent["logvar"]}
    leaves: dict[str, Any] = {
        "differentiate": ("mu", "r", "z_mu", "z_logvar"),
        "zero_outputs": ("1/nll", "1/kl"),
        "taylor": False,
    }
    yield Case("elbo_loss/beta below one", "likelihood.elbo_loss", elbo, {"beta": 0.375}, **leaves)
    yield Case("elbo_loss/default beta", "likelihood.elbo_loss", elbo, **leaves)
    weight = uniform("elbo.weight", 0.2, 2.0, 7)
    weight[2] = 0.0
    yield Case(
        "elbo_loss/weighted, one cell left out",
        "likelihood.elbo_loss",
        elbo | {"weight": weight},
        {"beta": 2.5},
        **leaves,
    )
    tabled = elbo | syn.tabled(elbo["x"], weight)
    yield Case("elbo_loss/weighted, by the count table", "likelihood.elbo_loss", tabled, {"beta": 2.5}, **leaves)
    tabled = elbo | syn.tabled(elbo["x"], np.ones(7))
    del tabled["weight"]
    yield Case("elbo_loss/unweighted, by the count table", "likelihood.elbo_loss", tabled, **leaves)


def _map(name: str, *lead: int, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return np.eye(d) + normal(name + ".A", *lead, d, d, scale=0.4), normal(name + ".b", *lead, d)


def operators() -> Iterator[Case]:
    A, b = _map("one", 3)
    every: dict[str, Any] = {"differentiate": ("*",)}
    yield Case(
        "apply_operator/grouped", "operators.apply_operator", {"A": A, "b": b, "z": normal("z", 3, 7, 5)}, **every
    )
    yield Case(
        "apply_operator/one map", "operators.apply_operator", {"A": A[0], "b": b[0], "z": normal("z", 7, 5)}, **every
    )
    three = [_map(name) for name in ("first", "second", "third")]
    yield Case("compose/three maps", "operators.compose", {"operators": three}, **every)
    yield Case("compose/batched", "operators.compose", {"operators": [_map("p", 3), _map("q", 3)]}, **every)
    pair = {"first": _map("first"), "second": _map("second")}
    yield Case("commutator_norm/generic", "operators.commutator_norm", pair, **every)
    yield Case(
        "commutator_norm/batched", "operators.commutator_norm", {"first": _map("p", 3), "second": _map("q", 3)}, **every
    )
    scaling = {"first": (2 * np.eye(3), np.zeros(3)), "second": (-4 * np.eye(3), np.zeros(3))}
    flat = {"zero": ("*",), "zero_outputs": ("value",), "quantities": ("value", "gradient")}
    hvp = {"taylor": False, "reason": "the second derivative of a norm at 0 does not exist"}
    yield Case("commutator_norm/exactly commuting", "operators.commutator_norm", scaling, **every, **flat, **hvp)
    yield Case("identity_penalty/unweighted", "operators.identity_penalty", {"A": A}, **every)
    weighted = {"A": A, "weight": np.array([0.5, 0.0, 1.75])}
    yield Case("identity_penalty/weighted", "operators.identity_penalty", weighted, differentiate=("A",))


def distances() -> Iterator[Case]:
    name = "distances.energy_distance"
    x, y = normal("e.x", 7, 3), normal("e.y", 11, 3, mean=0.4, scale=1.3)
    wx, wy = uniform("e.wx", 0.3, 2.0, 7), uniform("e.wy", 0.3, 2.0, 11)
    wx[3], wy[5] = 0.0, 0.0
    both: dict[str, Any] = {"differentiate": ("x", "y")}
    plain = {"x": x, "y": y}
    weighted = plain | {"wx": wx, "wy": wy}
    together = plain | {"x": x.copy(), "y": y.copy()}
    together["x"][2] = together["x"][4]  # two cells of one sample
    together["y"][1] = together["x"][0]  # a cell of each
    near = plain | {"x": np.concatenate([x, x[:3] + 1e-4 * normal("e.near", 3, 3)])}
    far = {"x": x + 1000.0, "y": y + 1000.0}
    regimes: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ("v", plain, {}, {}),
        ("u", plain, {"estimator": "u"}, {}),
        ("v, weighted", weighted, {}, {}),
        ("u, weighted", weighted, {"estimator": "u"}, {}),
        ("power 2", plain, {"power": 2}, {}),
        ("power 2, u, weighted", weighted, {"power": 2, "estimator": "u"}, {}),
        ("smoothed as in the original", plain, {"smoothing": 1e-8}, {"hvp_zero": True}),
        ("far from each other", plain | {"y": y + 300.0}, {}, {"accuracy": 1e-5}),
        ("near pairs", near, {}, {"accuracy": 1e-5}),
        ("smoothed strongly, u", plain, {"smoothing": 0.25, "estimator": "u"}, {}),
        ("coincident cells", together, {}, {"taylor": False}),
        ("coincident cells, smoothed", together, {"smoothing": 0.25}, {}),
        ("far from the origin", far, {}, {"accuracy": 1e-5}),
        ("far from the origin, u", far, {"estimator": "u"}, {"accuracy": 1e-5}),
        ("far from the origin, power 2", far, {"power": 2}, {"accuracy": 1e-5}),
        ("one cell against many", {"x": x[:1], "y": y}, {}, {}),
        ("one dimension", {"x": x[:, :1], "y": y[:, :1]}, {}, {"hvp_zero": True}),
    ]
    for label, inputs, static, extra in regimes:
        quantities = FIRST if extra.pop("hvp_zero", False) else QUANTITIES
        reason = ""
        if label == "one dimension":
            reason = "in one dimension |x - y| has no curvature"
        elif quantities == FIRST:
            reason = (
                "reverse mode adds and takes away 1e4 at i = i'; the strongly smoothed case has the second derivative"
            )
        for method, tile in (("tiled", 5), ("tiled", 512), ("plain", 5)):
            case = f"energy_distance/{label}, {method}" + (f" by {tile}" if method == "tiled" else "")
            options = static | {"method": method, "tile": tile}
            yield Case(case, name, inputs, options, quantities=quantities, reason=reason, **both, **extra)
    yield Case("energy_distance/defaults", name, plain, **both)
    for label, static in {
        "weights are data": {"tile": 5},
        "weights are data, u": {"tile": 5, "estimator": "u"},
        "weights are data, plain": {"method": "plain"},
        "weights are data, power 2": {"power": 2, "estimator": "u"},
    }.items():
        yield Case(
            f"energy_distance/{label}",
            name,
            weighted,
            static,
            differentiate=("x", "y", "wx", "wy"),
            zero=("wx", "wy"),
            taylor=False,
            quantities=("value", "gradient"),
            reason="weights carry no gradient; whether as none or as zero is left to the framework's custom rules",
        )
    # Targets that are data: JAX then leaves out what it would need for their gradient.
    many = {"x": normal("e.many.x", 16, 3), "y": normal("e.many.y", 20, 3, mean=0.4, scale=1.3)}
    few_near = many | {"x": many["x"].copy(), "y": many["y"].copy()}
    few_near["x"][2] = few_near["x"][4] + 1e-4
    few_near["x"][7] = few_near["x"][8]
    few_near["y"][1] = few_near["x"][0]
    few_near["y"][5] = few_near["y"][6] + 1e-4
    many_weighted = {"wx": uniform("e.many.wx", 0.3, 2.0, 16), "wy": uniform("e.many.wy", 0.3, 2.0, 20)}
    many_weighted["wx"][3], many_weighted["wy"][5] = 0.0, 0.0
    fixed: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ("v", many, {}, {}),
        ("u, weighted", many | many_weighted, {"estimator": "u"}, {}),
        ("smoothed, u", many, {"smoothing": 0.25, "estimator": "u"}, {}),
        ("few near pairs", few_near | many_weighted, {}, {"accuracy": 1e-5, "taylor": False}),
        ("few near pairs, smoothed", few_near, {"smoothing": 0.25}, {"accuracy": 1e-5}),
        ("many near pairs", near, {"estimator": "u"}, {"accuracy": 1e-5}),
        ("many coincident cells", together, {}, {"taylor": False}),
        ("far from the origin", far, {}, {"accuracy": 1e-5}),
        ("in tiles", many, {"tile": 7}, {}),
    ]
    for label, inputs, static, extra in fixed:
        yield Case(f"energy_distance/fixed targets, {label}", name, inputs, static, differentiate=("x",), **extra)
    same = {"x": x, "y": x.copy()}
    yield Case(
        "energy_distance/of a sample with itself",
        name,
        same,
        {"tile": 5},
        quantities=("value",),
        reason="0 up to rounding",
    )

    gx, gy = normal("g.x", 5, 7, 3), normal("g.y", 5, 3, 3, mean=0.5)
    gwx = uniform("g.wx", 0.3, 2, 5, 7) * (np.arange(7) < np.array([7, 4, 1, 5, 0])[:, None])
    gwy = (np.arange(3) < np.array([2, 3, 3, 1, 0])[:, None]).astype(float)
    for label, static in (("v", {}), ("power 2", {"power": 2}), ("smoothed", {"smoothing": 0.25})):
        grouped = {"x": gx, "y": gy, "wx": gwx, "wy": gwy}
        yield Case(
            f"energy_distance_grouped/{label}, padded, an empty group",
            "distances.energy_distance_grouped",
            grouped,
            static,
            **both,
        )
        yield Case(
            f"energy_distance_grouped/fixed targets, {label}, padded, an empty group",
            "distances.energy_distance_grouped",
            grouped,
            static,
            differentiate=("x",),
        )
    gwx_u = uniform("g.wx", 0.3, 2, 5, 7) * (np.arange(7) < np.array([7, 4, 2, 5, 0])[:, None])
    gwy_u = (np.arange(3) < np.array([2, 3, 3, 2, 0])[:, None]).astype(float)
    for label, static in (("u", {"estimator": "u"}), ("u, power 2", {"estimator": "u", "power": 2})):
        grouped = {"x": gx, "y": gy, "wx": gwx_u, "wy": gwy_u}
        yield Case(
            f"energy_distance_grouped/{label}, padded, an empty group",
            "distances.energy_distance_grouped",
            grouped,
            static,
            **both,
        )
    alone = {"wx": gwx_u * (np.arange(7) < np.array([7, 1, 2, 5, 0])[:, None]), "wy": gwy_u}
    yield Case(
        "energy_distance_grouped/u, a group of one cell",
        "distances.energy_distance_grouped",
        {"x": gx, "y": gy, **alone},
        {"estimator": "u"},
        **both,
    )
    grouped = {"x": gx + 1000.0, "y": gy + 1000.0, "wx": gwx, "wy": gwy}
    yield Case(
        "energy_distance_grouped/far from the origin",
        "distances.energy_distance_grouped",
        grouped,
        accuracy=1e-5,
        **both,
    )
    gx_same = gx.copy()
    gx_same[0, 2] = gx_same[0, 1]
    gx_same[1, 0] = gy[1, 1]
    grouped = {"x": gx_same, "y": gy, "wx": gwx, "wy": gwy}
    yield Case(
        "energy_distance_grouped/coincident cells", "distances.energy_distance_grouped", grouped, taylor=False, **both
    )

    directions = normal("s.w", 5, 3)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    axes = np.eye(3)
    sliced = "distances.sliced_energy_distance"
    flat = {"quantities": FIRST, "reason": "piecewise linear: no curvature", "terms": 32}
    for estimator in ("v", "u"):
        inputs = plain | {"directions": directions}
        yield Case(f"sliced_energy_distance/{estimator}", sliced, inputs, {"estimator": estimator}, **both, **flat)
    tied = {"x": np.round(x), "y": np.round(y), "directions": axes}
    yield Case(
        "sliced_energy_distance/ties",
        sliced,
        tied,
        quantities=VALUE,
        reason="the gradient at ties is a subgradient; see ties test",
    )
    yield Case("sliced_energy_distance/far from the origin", sliced, far | {"directions": axes}, **both, **flat)


def spectral() -> Iterator[Case]:
    A = normal("s.A", 2, 3, 5, 5, scale=0.5)
    v0 = normal("s.v", 2, 3, 5)
    small_gap = np.array([[1.5, 0.1, 0.0], [0.0, 1.45, -0.2], [0.05, 0.0, -1.4]])
    cut = {"taylor": False, "differentiate": ("A",)}
    for n_iter in (1, 2, 5):
        yield Case(
            f"power_iteration/{n_iter} steps",
            "spectral.power_iteration",
            {"A": A, "v0": v0},
            {"n_iter": n_iter},
            quantities=VALUE,
        )
        yield Case(
            f"spectral_norm/{n_iter} steps", "spectral.spectral_norm", {"A": A, "v0": v0}, {"n_iter": n_iter}, **cut
        )
    yield Case("power_iteration/default steps", "spectral.power_iteration", {"A": A, "v0": v0}, quantities=VALUE)
    yield Case(
        "power_iteration/carries no gradient",
        "spectral.power_iteration",
        {"A": A, "v0": v0},
        {"n_iter": 1},
        differentiate=("A", "v0"),
        none=("A", "v0"),
        quantities=("value", "gradient"),
        taylor=False,
    )
    yield Case(
        "spectral_norm/the start carries no gradient",
        "spectral.spectral_norm",
        {"A": A, "v0": v0},
        {"n_iter": 1},
        differentiate=("A", "v0"),
        none=("v0",),
        taylor=False,
        quantities=("value", "gradient"),
    )
    one = {"A": small_gap, "v0": np.array([1.0, -0.5, 0.25])}
    yield Case("spectral_norm/small gap, one step", "spectral.spectral_norm", one, {"n_iter": 1}, **cut)
    yield Case("spectral_norm/one matrix, default steps", "spectral.spectral_norm", one, **cut)
    zero = {"A": np.zeros((3, 3)), "v0": np.array([1.0, 2.0, -1.0])}
    yield Case(
        "spectral_norm/the zero matrix",
        "spectral.spectral_norm",
        zero,
        zero=("A",),
        quantities=("value", "gradient"),
        **cut,
    )

    penalty, flat = "spectral.spectral_penalty", {"A": A.reshape(6, 5, 5), "v0": v0.reshape(6, 5)}
    silent: dict[str, Any] = {"zero_outputs": ("1",)}
    yield Case("spectral_penalty/some above, some below", penalty, flat, {"rho_max": 1.0, "n_iter": 2}, **cut, **silent)
    yield Case("spectral_penalty/defaults", penalty, flat, **cut, **silent)
    yield Case("spectral_penalty/all above", penalty, flat, {"rho_max": 0.1, "n_iter": 1}, **cut, **silent)
    yield Case(
        "spectral_penalty/none above", penalty, flat, {"rho_max": 50.0}, zero=("A",), zero_outputs=("0", "1"), **cut
    )
    weight = np.array([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])
    yield Case(
        "spectral_penalty/weighted", penalty, flat | {"weight": weight}, {"rho_max": 0.3, "n_iter": 2}, **cut, **silent
    )

    generator_ = "spectral.generator_penalty"
    yield Case("generator_penalty/mixed signs", generator_, {"A": np.eye(5) + A}, differentiate=("A",), terms=64)
    yield Case(
        "generator_penalty/other time step",
        generator_,
        {"A": np.eye(5) + A[0]},
        {"dt": 0.25},
        differentiate=("A",),
        terms=64,
    )
    decaying = {"A": np.eye(3) - np.diag([0.5, 0.25, 1.5])}
    yield Case(
        "generator_penalty/decaying",
        generator_,
        decaying,
        differentiate=("A",),
        zero=("A",),
        quantities=("value", "gradient"),
        terms=64,
    )
    for kind in ("spectral", "frobenius"):
        yield Case(
            f"operator_norm/{kind}",
            "spectral.operator_norm",
            {"A": A},
            {"kind": kind},
            quantities=("value", "gradient"),
            differentiate=("A",),
            none=("A",),
            taylor=False,
            terms=64,
        )
    yield Case("operator_norm/default", "spectral.operator_norm", {"A": A}, quantities=VALUE, terms=64)
    yield Case("spectral_radius/generic", "spectral.spectral_radius", {"A": A}, quantities=VALUE, terms=64)
    yield Case(
        "spectral_radius/carries no gradient",
        "spectral.spectral_radius",
        {"A": A[0, 0]},
        differentiate=("A",),
        none=("A",),
        quantities=("value", "gradient"),
        taylor=False,
        terms=64,
    )


def all_cases() -> list[Case]:
    return [*likelihood(), *operators(), *distances(), *spectral()]
