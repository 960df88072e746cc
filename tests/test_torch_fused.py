"""The kernel for energy distances: run by Triton's interpreter, compiled for GPUs, and on a GPU where there is one.

The interpreter has to be chosen before Triton is imported, so that this file runs itself in a second process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed: no kernel to test")

import pf_jax  # noqa: E402
from pf_torch import distances  # noqa: E402
from pf_torch.distances import energy_distance  # noqa: E402

N_GROUPS = 2


def sides(n: int, m: int, d: int):
    """Groups with cells at one place, near cells far from the origin, and cells without weight."""
    rng = np.random.default_rng(n + d)
    x, y = rng.standard_normal((N_GROUPS, n, d)), 0.5 + 1.3 * rng.standard_normal((N_GROUPS, m, d))
    wx, wy = rng.uniform(0.1, 1, (N_GROUPS, n)), rng.uniform(0.1, 1, (N_GROUPS, m))
    y[:, :3], x[:, 5] = x[:, :3], x[:, 6]
    y[:, 6:9] = x[:, 7:10] + 1e-4 * rng.standard_normal((N_GROUPS, 3, d))
    wy[:, 4] = 0.0
    y[:, 4] = 1e30  # padding may hold anything finite
    wx[1, 11:] = 0.0
    return x, y, wx, wy


def errors() -> dict[str, float]:
    """Relative errors of value and gradients against the plain form in float64, of every case, by what it is."""
    from pf_torch import fused

    fused.NUMBERS, fused.RUN = 64, 8  # several programs and several runs for few cells
    found = {}
    for dtype in (torch.float32, torch.float64):
        for estimator, smoothing, n, m, d in (("v", 0.0, 19, 13, 3), ("u", 0.0, 12, 21, 5), ("v", 0.01, 17, 9, 8)):
            *cells, wx, wy = (torch.tensor(value) for value in sides(n, m, d))
            x, y = (value.to(dtype) for value in cells)
            a, b = distances._normalise(x, wx), distances._normalise(y, wy)
            got = distances._fused_pass(x, y, a, b, estimator, smoothing)
            x, y = x.double(), torch.where(b[..., None] > 0, y.double(), 0.0)  # the plain form would make inf * 0
            want = distances._plain(x, y, a, b, estimator, smoothing)
            gradients = distances._plain_gradient(x, y, a, b, estimator, smoothing)
            for name, one, other in zip(("value", "in x", "in y"), got, (want, *gradients), strict=True):
                case = f"{dtype}, {estimator}, smoothing {smoothing}, d {d}, {name}"
                found[case] = float((one.double() - other).norm() / other.norm())
    return found


def test_the_interpreted_kernel_is_the_plain_form():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 18
    wrong = {case: error for case, error in found.items() if not error < (3e-13 if "float64" in case else 2e-6)}
    assert not wrong


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "fp64"])
def test_the_kernel_compiles_for_gpus(arch, kind, tmp_path, monkeypatch):
    """To machine code, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pf_torch import fused

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    fixed = {"smoothing": 0.01, "d": 32, "width": 32, "rows": fused.NUMBERS // 32, "run": fused.RUN}
    arrays = dict.fromkeys(("cells", "weight", "total", "pull"), f"*{kind}")
    numbers = dict.fromkeys(("n_cells", "n_rows", "first"), "i32")
    signature = arrays | numbers | dict.fromkeys(fixed, "constexpr")
    compiled = triton.compile(ASTSource(fused._kernel, signature, fixed), target=GPUTarget("cuda", arch, 32))
    assert f".target sm_{arch}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"].startswith(b"\x7fELF")


def test_where_it_is_not_it_is_refused():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="'fused', a kernel for CUDA devices, and x is on cpu"):
        energy_distance(torch.tensor(x), torch.tensor(x), method="fused")
    with pytest.raises(ValueError, match="'fused', a kernel of the PyTorch twin"):
        pf_jax.energy_distance(jax.numpy.asarray(x), jax.numpy.asarray(x), method="fused")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("n", [70, 3000])
def test_the_kernel_on_a_gpu_is_the_tiled_form(n):
    rng = np.random.default_rng(n)
    x, y = (torch.tensor(rng.standard_normal((k, 32)), dtype=torch.float32, device="cuda") for k in (n, n + 33))
    results = []
    for method in ("fused", "tiled"):
        leaves = [value.clone().requires_grad_() for value in (x, y)]
        value = energy_distance(*leaves, estimator="u", method=method)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-4


if __name__ == "__main__":
    print(json.dumps(errors()))
