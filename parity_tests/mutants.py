"""Plant each fault of `mutant_list.py` in a copy of one twin, and see which checks notice.

A mutant is a copy of the package under another name with one text replaced; only the mutated side is run again, the
other side and the oracle are kept.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from parity_tests import backend_checks, backend_checks_flow, mutant_list, mutant_list_flow
from parity_tests.cases import Case, all_cases
from parity_tests.compare import compare, oracle_of
from parity_tests.sides import Evaluation, Namespace, Side
from pf_core.checkpoint import write_atomic

TIER = "float64"
JAX, TORCH = mutant_list.JAX + mutant_list_flow.JAX, mutant_list.TORCH + mutant_list_flow.TORCH
EQUIVALENT = mutant_list.EQUIVALENT | mutant_list_flow.EQUIVALENT
CHECKS = backend_checks.CHECKS | backend_checks_flow.CHECKS
FLOW_MODULES = ("cvae", "discriminator", "flow", "integrate", "flow_steps")
# Groups of cases that take long, and in which order they are asked.
PRICE = {"joint_loss": 9, "joint_step": 10, "vae_loss": 5, "operator_loss": 6, "vae_step": 7, "operator_step": 8}
PRICE |= {"flow_loss": 5, "cvae_loss": 6, "flow_step": 7, "cvae_step": 8}
# Second derivatives take most of the time; they are compared where a first derivative noticed nothing.
FIRST, SECOND = ("hvp",), ("value", "gradient", "jvp")


@dataclass(frozen=True)
class Mutant:
    """One fault in one module of one twin."""

    name: str
    framework: str
    module: str
    old: str
    new: str

    @property
    def package(self) -> str:
        return f"pf_{self.framework}"


@dataclass
class Verdict:
    """Which checks noticed a mutant."""

    mutant: str
    framework: str
    module: str
    killed_by: list[str] = field(default_factory=list)
    tried: int = 0
    seconds: float = 0.0
    equivalent: str = ""
    programs: str = ""  # a digest of all that it depends on

    @property
    def killed(self) -> bool:
        return bool(self.killed_by)


def all_mutants() -> list[Mutant]:
    """Every mutant; one whose text is gone, or is there twice, is an error."""
    mutants = []
    for framework, faults in (("jax", JAX), ("torch", TORCH)):
        for module, name, old, new in faults:
            found = _source(f"pf_{framework}", module).count(old)
            if found != 1:
                raise ValueError(f"mutant {name!r}: its text is {found} times in pf_{framework}/{module}.py: {old!r}")
            mutants.append(Mutant(f"{framework}, {module}: {name}", framework, module, old, new))
    names = [mutant.name for mutant in mutants]
    if len(set(names)) != len(names):
        raise ValueError(f"two mutants are called {sorted({n for n in names if names.count(n) > 1})}")
    return mutants


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; mutants need its source")
    return Path(spec.submodule_search_locations[0])


@cache
def _source(package: str, module: str) -> str:
    return (_folder(package) / f"{module}.py").read_text()


@cache
def dependents(package: str, module: str) -> frozenset[str]:
    """Modules of a package that import a module, directly or not, and the module itself."""
    names = [path.stem for path in _folder(package).glob("*.py") if path.stem != "__init__"]
    found = {module}
    while True:
        more = {n for n in names if any(f"from {package}.{m} import" in _source(package, n) for m in found)} | found
        if "steps" in found:
            more |= {n for n in names if f"from {package} import steps" in _source(package, n)}
        if more == found:
            return frozenset(found)
        found = more


@contextmanager
def planted(mutant: Mutant) -> Iterator[str]:
    """The name of a package with the fault in it, for as long as the block runs."""
    folder = Path(tempfile.mkdtemp(prefix="pf-mutant-"))
    name = f"{mutant.package}_{folder.name.removeprefix('pf-mutant-').replace('-', '_')}"
    try:
        (folder / name).mkdir()
        for path in _folder(mutant.package).glob("*.py"):
            text = path.read_text()
            if path.stem == mutant.module:
                text = text.replace(mutant.old, mutant.new)
            (folder / name / path.name).write_text(text.replace(mutant.package, name))
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        yield name
    finally:
        sys.path.remove(str(folder))
        for module in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
            del sys.modules[module]
        shutil.rmtree(folder)
        if mutant.framework == "jax":
            _forget()


_CLEARED = {"jax": time.perf_counter()}


def _forget(after: float = 100.0) -> None:
    """Compiled programs of mutants are never asked for again; gigabytes, and a system's memory maps, would pile up."""
    import jax

    if time.perf_counter() - _CLEARED["jax"] > after:
        jax.clear_caches()
        _CLEARED["jax"] = time.perf_counter()


def notices(case: Case, mutant: Mutant, package: str, skip: tuple[str, ...] = ()) -> bool:
    """Whether a case fails when one side is the mutant and the other is right."""
    ill = Side(mutant.framework, tier=TIER, package=package, compiled=False)
    try:
        found = ill.evaluate(case, skip)
    except Exception:
        return True
    other = _exact(case)
    pair = (found, other) if mutant.framework == "jax" else (other, found)
    sides = (Side("jax", tier=TIER), Side("torch", tier=TIER))
    return any(not result.passed for result in compare(case, sides, pair, oracle_of(case), skip))


def _exact(case: Case) -> Evaluation:
    """A healthy side: the oracle, rounded."""
    import numpy as np

    oracle = oracle_of(case)
    rounded = lambda tree: {n: np.asarray(v, v.dtype if v.dtype.kind != "f" else float) for n, v in tree.items()}
    gradient = {n: None if case.declared(n) == "none" else v for n, v in rounded(oracle.gradient).items()}
    return Evaluation(rounded(oracle.value), gradient, rounded(oracle.jvp), rounded(oracle.hvp))


def relevant(mutant: Mutant) -> list[Case]:
    """Cases that can see the mutated module: its own first; cheap groups, one of each loss and step, the others."""
    seen = dependents(mutant.package, mutant.module)
    cases = [case for case in all_cases() if case.module in seen and TIER in case.dtypes]
    rank = {case.name: sum(c.group == case.group for c in cases[:i]) for i, case in enumerate(cases)}

    def order(case: Case) -> tuple[bool, bool, int, int]:
        price = PRICE.get(case.group, 0)
        return case.module != mutant.module, price > 8, rank[case.name] if price else -1, price

    return sorted(cases, key=order)


def judge(mutant: Mutant, *, all_checks: bool = False) -> Verdict:
    """Run the checks on a mutant: up to the first that notices it, or all of them for the kill matrix."""
    begin = time.perf_counter()
    verdict = Verdict(mutant.name, mutant.framework, mutant.module, equivalent=EQUIVALENT.get(mutant.name, ""))

    def tried(name: str, check: Callable[[], bool]) -> bool:
        verdict.tried += 1
        if check():
            verdict.killed_by.append(name)
        return verdict.killed and not all_checks

    if not verdict.equivalent:  # it would go through every check, and none may notice it: the slow tests see to that
        with planted(mutant) as package:
            _run_checks(mutant, package, tried)
    verdict.seconds = time.perf_counter() - begin
    return verdict


def _run_checks(mutant: Mutant, package: str, tried: Callable[[str, Callable[[], bool]], bool]) -> None:
    def first(case: Case) -> bool:
        return tried(case.name, lambda: notices(case, mutant, package, FIRST))

    def second(case: Case) -> bool:
        return "hvp" in case.quantities and tried(
            f"{case.name}, second derivative", lambda: notices(case, mutant, package, SECOND)
        )

    def loop(name: str) -> bool:
        return tried(name, lambda: _broken(CHECKS[name], package))

    cases = relevant(mutant)
    near = [case for case in cases if case.module == mutant.module]
    far = [case for case in cases if case.module != mutant.module]
    # What is near the fault and cheap comes first; any() stops where `tried` says so.
    checks = [name for name in CHECKS if mutant.module not in FLOW_MODULES or name in backend_checks_flow.CHECKS]
    if mutant.module == "steps":
        one_each = {case.group: case for case in reversed(cases) if case.group in PRICE}.values()
        quick = [case for case in cases if case.group not in PRICE]
        quick += sorted(one_each, key=lambda case: PRICE[case.group])
        rest = [case for case in cases if case not in quick]
        groups = (map(first, quick), map(loop, checks), map(first, rest), map(second, near))
    elif mutant.module in ("bridge", "probe"):
        groups = (map(loop, checks), map(first, cases))
    elif mutant.module in FLOW_MODULES:  # its misuses are checked in seconds, far cases take minutes
        quick, slow = checks[:2], checks[2:]
        groups = (map(first, near), map(loop, quick), map(second, near), map(first, far), map(loop, slow))
    else:
        groups = (map(first, near), map(second, near), map(first, far), map(second, far), map(loop, checks))
    any(any(group) for group in groups)


def _broken(check: Callable[[Namespace], str], package: str) -> bool:
    import jax

    before = jax.config.values["jax_enable_x64"]
    try:
        return check(Namespace(package)) != ""
    except Exception:
        return True
    finally:
        jax.config.update("jax_enable_x64", before)


def score(verdicts: list[Verdict]) -> tuple[int, int]:
    """(killed, all that are not declared equivalent)."""
    counted = [verdict for verdict in verdicts if not verdict.equivalent]
    return sum(verdict.killed for verdict in counted), len(counted)


def _programs(all_checks: bool) -> str:
    """A digest of the twins, their core, the suite and the frameworks."""
    digest = hashlib.sha256(f"{all_checks} {version('jax')} {version('torch')} {version('numpy')}".encode())
    for package in ("pf_core", "pf_jax", "pf_torch", "parity_tests"):
        for path in sorted(_folder(package).glob("*.py")):
            digest.update(f"{package}/{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _earlier(path: Path | None, programs: str) -> dict[str, Verdict]:
    """Verdicts of a run of the same programs that ended before its time."""
    if path is None or not path.exists():
        return {}
    verdicts = [Verdict(**entry) for entry in json.loads(path.read_text())]
    return {verdict.mutant: verdict for verdict in verdicts if verdict.programs == programs}


def run(*, all_checks: bool = False, out: Path | None = None, only: str = "") -> list[Verdict]:
    """Judge every mutant whose name contains `only`, with a line each; write mutants.json to `out`.

    It takes long and goes on from the mutants.json that it finds there, as far as that is of the same programs.
    """
    path, programs = out and out / "mutants.json", _programs(all_checks)
    earlier, verdicts = _earlier(path, programs), []
    if earlier:
        print(f"{len(earlier)} verdicts of an earlier run of the same programs are taken over", flush=True)
    for mutant in all_mutants():
        if only not in mutant.name:
            continue
        verdict = earlier.get(mutant.name) or judge(mutant, all_checks=all_checks)
        verdict.programs = programs
        verdicts.append(verdict)
        word = (
            verdict.killed_by[0]
            if verdict.killed
            else f"equivalent: {verdict.equivalent}"
            if verdict.equivalent
            else "SURVIVED"
        )
        print(f"{verdict.seconds:5.1f} s  {mutant.name}  <-  {word}", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {verdict.mutant: verdict for verdict in (*earlier.values(), *verdicts)}
            write_atomic(path, json.dumps([asdict(verdict) for verdict in kept.values()], indent=1))
    killed, total = score(verdicts)
    print(f"{killed} of {total} mutants noticed")
    return verdicts


def indispensable(verdicts: list[Verdict]) -> dict[str, list[str]]:
    """Checks that alone noticed some mutant, and which; needs a run with all checks."""
    alone: dict[str, list[str]] = {}
    for verdict in verdicts:
        if len(verdict.killed_by) == 1:
            alone.setdefault(verdict.killed_by[0], []).append(verdict.mutant)
    return alone
