"""The suite is tested: faults are noticed, and what is healthy is not called ill."""

from __future__ import annotations

import pytest

from parity_tests.cases import all_cases
from parity_tests.mutants import EQUIVALENT, Mutant, all_mutants, indispensable, judge, notices, relevant, score

# A fault of each kind on each side, seconds each; `pf parity --mutants` runs them all.
FAST = (
    "torch, likelihood: torch's clamp, with gradient at the bounds",
    "torch, likelihood: digamma from the graph of r alone: trigamma lost",
    "torch, likelihood: the table's gradient in mu for that in r",
    "torch, vae: torch's softplus",
    "torch, layers: weight transposed when square",
    "torch, distances: the last tile dropped",
    "torch, distances: gradient of the lower cell of a pair forgotten",
    "torch, distances: Hessian of a constant pull",
    "torch, spectral: the iteration is not detached",
    "torch, steps: b2 of 0.99",
    "torch, steps: norms by insertion order",
    "torch, bridge: zero in the place of no gradient",
    "torch, cvae: variance detached",
    "torch, discriminator: unknown tissue is the first class",
    "torch, flow: normalised over the edges out of a gene",
    "torch, integrate: k3 from k1",
    "torch, flow_steps: the encoder plays against the old discriminator",
    "jax, cvae: biased running variance, as Flax has it",
    "jax, layers: leaky relu as a maximum",
    "jax, flow: velocity not multiplied by the interval",
    "jax, likelihood: the clip passes gradient at its bounds",
    "jax, spectral: gradient leaks through the power iteration",
    "jax, conditions: combination averaged",
    "jax, operators: A applied untransposed to rows",
    "jax, steps: eps inside the root",
)


def by_name(name: str) -> Mutant:
    return next(mutant for mutant in all_mutants() if mutant.name == name)


@pytest.mark.parametrize("name", FAST)
def test_a_planted_fault_is_noticed(name: str) -> None:
    assert judge(by_name(name)).killed


@pytest.mark.slow
@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: mutant.name)
def test_every_planted_fault_is_noticed_or_declared_equivalent(mutant: Mutant) -> None:
    assert judge(mutant).killed != (mutant.name in EQUIVALENT)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_copy_without_a_fault_is_not_noticed(framework: str) -> None:
    """Otherwise everything would be killed by a check that always fails."""
    healthy = Mutant("healthy", framework, "likelihood", "strict_clip", "strict_clip")
    from parity_tests.mutants import planted

    groups = ("strict_clip", "gaussian_kl", "compose", "power_iteration", "adam_update", "ConditionEncoder")
    with planted(healthy) as package:
        ill = [c.name for c in all_cases() if c.group in groups and notices(c, healthy, package, ("hvp",))]
    assert ill == []


def test_there_are_at_least_100_mutants_on_both_sides() -> None:
    mutants = all_mutants()
    assert len(mutants) - len(EQUIVALENT) >= 100
    assert min(sum(m.framework == side for m in mutants) for side in ("jax", "torch")) >= 50


def test_every_equivalent_mutant_is_a_mutant_with_a_reason() -> None:
    names = {mutant.name for mutant in all_mutants()}
    assert all(name in names and reason for name, reason in EQUIVALENT.items())


def test_every_mutant_is_a_program() -> None:
    """A fault that does not compile would be noticed by anything."""
    from parity_tests.mutants import _source

    for mutant in all_mutants():
        text = _source(mutant.package, mutant.module).replace(mutant.old, mutant.new)
        compile(text, mutant.name, "exec")


def test_a_mutant_whose_text_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from parity_tests import mutants

    monkeypatch.setattr(mutants, "JAX", [("likelihood", "stale", "this text is nowhere", "")])
    with pytest.raises(ValueError, match="stale"):
        mutants.all_mutants()


def test_a_run_goes_on_from_the_verdicts_of_the_same_programs(monkeypatch, tmp_path, capsys) -> None:
    from parity_tests import mutants

    one, other = "torch, spectral: the iteration is not detached", "torch, bridge: integers are sent before"
    (first,), (second,) = (mutants.run(only=name, out=tmp_path) for name in (one, other))
    assert first.killed
    assert second.killed
    judged = []
    monkeypatch.setattr(mutants, "judge", lambda mutant, **_: judged.append(mutant.name) or first)
    assert mutants.run(only=one, out=tmp_path) == [first]
    assert "2 verdicts of an earlier run" in capsys.readouterr().out
    assert judged == []
    mutants.run(only=one, out=tmp_path, all_checks=True)
    assert judged == [one], "another question"
    monkeypatch.setattr(mutants, "version", lambda name: f"another {name}")
    mutants.run(only=one, out=tmp_path)
    assert judged == [one, one], "other programs"


def test_removing_the_only_check_that_notices_a_mutant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill matrix calls it indispensable; without it the mutant survives and the score falls."""
    from parity_tests import mutants

    mutant = by_name("torch, spectral: the radius carries gradient")
    near = [case for case in relevant(mutant) if case.module == mutant.module]  # the whole matrix takes too long here
    monkeypatch.setattr(mutants, "relevant", lambda _: near)
    monkeypatch.setattr(mutants, "CHECKS", {})
    verdict = judge(mutant, all_checks=True)
    assert list(indispensable([verdict])) == ["spectral_radius/carries no gradient"]
    kept = [case for case in near if case.name not in verdict.killed_by]
    monkeypatch.setattr(mutants, "relevant", lambda _: kept)
    killed, total = score([judge(mutant, all_checks=True)])
    assert (killed, total) == (0, 1)
