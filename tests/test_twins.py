"""The twins carry the same names, signatures and text, and neither is needed for the other or for the core."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TWINS = ("pf_jax", "pf_torch")
# Modules of one side, each with its reason.
OWN_MODULES = {("pf_torch", "fused"): "a kernel in Triton, which PyTorch for CUDA brings along and JAX does not"}
FILES = {(twin, path.stem) for twin in TWINS for path in (ROOT / twin).glob("*.py")} - OWN_MODULES.keys()
MODULES = sorted({module for _, module in FILES})
FRAMEWORKS = ("jax", "jaxlib", "flax", "torch")
HEAVY = (*FRAMEWORKS, "anndata", "scipy", "sklearn", "matplotlib", "pandas", "h5py")

# twin: what one side has and the other has not, each with its reason.
OWN_NAMES = {
    "layers": "the bottom of each framework: JAX names the precision of every product, PyTorch owns weights as buffers",
}
OWN_ARGUMENTS = {
    ("pf_torch", "steps.init_state", "device"): "a JAX state is moved as a whole, by jax.device_put in Backend.init",
    ("pf_torch", "steps.run_steps", "compile"): "JAX always compiles",
}


def own_arguments(twin: str, qualified: str) -> list[str]:
    return [argument for side, name, argument in OWN_ARGUMENTS if (side, name) == (twin, qualified)]


def signature(node: ast.FunctionDef, leave_out: list[str]) -> list[tuple[str, str, str | None]]:
    """Name, kind and default of every argument, in order; annotations are the framework's own."""
    given = node.args
    positional = [(arg, "positional only") for arg in given.posonlyargs] + [(arg, "positional") for arg in given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    out = [(arg.arg, kind, default) for (arg, kind), default in zip(positional, defaults, strict=True)]
    out += [(given.vararg.arg, "var positional", None)] if given.vararg else []
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    out += [(arg.arg, "keyword only", default) for arg, default in keywords]
    out += [(given.kwarg.arg, "var keyword", None)] if given.kwarg else []
    return [(name, kind, default and ast.unparse(default)) for name, kind, default in out if name not in leave_out]


def text(node: ast.FunctionDef | ast.ClassDef, leave_out: list[str]) -> str | None:
    """The docstring, without the entries of arguments that the other side has not."""
    found = ast.get_docstring(node, clean=False)
    if found is None:
        return None
    found = inspect.cleandoc(found)
    for argument in leave_out:
        found, n = re.subn(rf"^    {argument}: .*\n(?: {{5,}}.*\n)*", "", found, flags=re.MULTILINE)
        assert n == 1, f"{node.name} does not document {argument}"
    return found


def described(source: str, twin: str = "", module: str = "") -> dict[str, dict]:
    """Signature and text of every public function, class and method, by dotted name; `forward` is `__call__`."""
    out: dict[str, dict] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            name = "__call__" if prefix and node.name == "forward" else node.name
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            leave_out = own_arguments(twin, f"{module}.{prefix}{name}")
            entry: dict = {"text": text(node, leave_out)}
            if isinstance(node, ast.FunctionDef):
                entry["signature"] = signature(node, leave_out)
            out[prefix + name] = entry
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{name}.")
                if f"{prefix}{name}.__init__" not in out:  # a record: its fields are its signature
                    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                    entry["fields"] = [(ast.unparse(f.target), f.value and ast.unparse(f.value)) for f in fields]

    visit(ast.parse(source).body, "")
    return out


def exported(source: str) -> list[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("no __all__")


def sources(module: str) -> list[str]:
    return [(ROOT / twin / f"{module}.py").read_text(encoding="utf-8") for twin in TWINS]


def pairs() -> list[tuple[str, dict, dict]]:
    """Everything public that both twins have, and every method of what both export."""
    out = []
    for module in MODULES:
        one, two = (described(source, twin, module) for source, twin in zip(sources(module), TWINS, strict=True))
        both = set(exported(sources(module)[0])) & set(exported(sources(module)[1])) | (one.keys() & two.keys())
        for name in sorted(one.keys() | two.keys()):
            if name.split(".")[0] in both:
                out.append((f"{module}.{name}", one.get(name, {}), two.get(name, {})))
    return out


PAIRS = pairs()
NAMES = [name for name, _, _ in PAIRS]


def test_the_twins_have_the_same_modules():
    assert {(twin, module) for twin in TWINS for module in MODULES} == FILES


@pytest.mark.parametrize("module", [module for module in MODULES if module not in OWN_NAMES])
def test_the_twins_export_the_same_names_in_the_same_order(module):
    one, two = (exported(source) for source in sources(module))
    assert one == two


@pytest.mark.parametrize(("name", "one", "two"), PAIRS, ids=NAMES)
def test_the_twins_have_the_same_signature(name, one, two):
    assert one, f"{name} is in pf_torch only"
    assert two, f"{name} is in pf_jax only"
    assert [one.get(key) for key in ("signature", "fields")] == [two.get(key) for key in ("signature", "fields")]


@pytest.mark.parametrize(("name", "one", "two"), PAIRS, ids=NAMES)
def test_the_twins_have_the_same_docstring(name, one, two):
    assert one.get("text") == two.get("text")


@pytest.mark.parametrize(("name", "one", "two"), PAIRS, ids=NAMES)
def test_a_public_docstring_begins_with_one_line_and_names_every_argument(name, one, two):
    if name.endswith(".__init__") or name == "layers.Linear.__call__":  # the class says it
        return
    found = one["text"]
    assert found, f"{name} has no docstring"
    rest = found.partition("\n")[2]
    assert not rest or rest.startswith("\n"), "the first line is not a line of its own"
    if not rest:  # a helper that says it all in one line
        return
    explained = {"self", *re.findall(r"^    (\w+): ", rest, re.MULTILINE)}
    assert [argument for argument, _, _ in one.get("signature", []) if argument not in explained] == []


def test_the_core_asks_of_a_backend_what_the_twins_offer():
    protocol = described((ROOT / "pf_core" / "backends.py").read_text(encoding="utf-8"))
    asked = {name: entry for name, entry in protocol.items() if name.startswith("Backend.")}
    offered = {name: one for name, one, _ in PAIRS}
    assert asked
    for name, entry in asked.items():
        assert entry["signature"] == offered[f"bridge.{name}"]["signature"], name


def test_the_table_of_differences_has_no_entry_too_many():
    for twin, qualified, argument in OWN_ARGUMENTS:
        module, name = qualified.split(".")
        found = described((ROOT / twin / f"{module}.py").read_text(encoding="utf-8"))
        assert argument in [given for given, _, _ in found[name]["signature"]], qualified
    for module in OWN_NAMES:
        one, two = (exported(source) for source in sources(module))
        assert one != two, module


PLAIN = 'def f(x, y=1, *, z=None):\n    """One line.\n\n    And more.\n    """\n'
RECORD = "class R(NamedTuple):\n    a: int\n    b: int = 0\n"


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        (PLAIN, "y=1", "y=2"),
        (PLAIN, "y=1, *, z=None", "y=1, z=None"),
        (PLAIN, "x, y=1", "y, x=1"),
        (PLAIN, "One line.", "Another line."),
        (RECORD, "    a: int\n    b: int = 0\n", "    b: int = 0\n    a: int\n"),
        (RECORD, "b: int = 0", "b: int = 1"),
    ],
)
def test_the_comparison_notices(source, old, new):
    assert described(source.replace(old, new)) != described(source)


@pytest.mark.parametrize(("old", "new"), [("x,", "x: Tensor,"), ("def f", "@jit\ndef f"), ("\n    ", "\n        ")])
def test_the_comparison_leaves_annotations_decorators_and_indentation_alone(old, new):
    assert described(PLAIN.replace(old, new)) == described(PLAIN)


# --- what imports what ------------------------------------------------------------------------------------------------


def run(code: str, *blocked: str) -> list[str]:
    """Run code where the blocked packages cannot be imported; the heavy packages that it loaded."""
    # By a finder, not by None in sys.modules: SciPy asks an imported torch for its Tensor.
    script = f"""import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
{code}"""
    script += f"\nprint([name for name in {HEAVY!r} if sys.modules.get(name) is not None])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def everything_of(*packages: str) -> str:
    names = [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package in packages
        for path in sorted((ROOT / package).glob("*.py"))
    ]
    return f"import {', '.join(names)}"


def test_the_jax_twin_and_the_core_need_no_pytorch():
    loaded = run(everything_of("pf_core", "pf_jax"), "torch")
    assert {"jax", "flax"} <= set(loaded)


def test_the_pytorch_twin_and_the_core_need_neither_jax_nor_flax():
    loaded = run(everything_of("pf_core", "pf_torch"), "jax", "jaxlib", "flax")
    assert "torch" in loaded


def test_the_core_needs_no_framework():
    run(everything_of("pf_core"), *FRAMEWORKS)


def test_importing_the_core_loads_nothing_heavy():
    assert run("import pf_core") == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_and_version_load_nothing_heavy(arguments):
    code = f"from pf_core.cli import main\nsys.argv = ['pf', *{arguments!r}]\n"
    assert run(code + "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code") == []


def test_the_blocking_of_imports_blocks():
    run("try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError", "torch")
