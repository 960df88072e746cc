"""`pf doctor`: what the installed frameworks do where they are known to differ, which devices there are, hazards."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

from parity_tests.conventions import Measured, measure

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "scipy")
FLAGS = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "OMP_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
)


@dataclass
class Diagnosis:
    """What was found on this machine."""

    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, list[str]] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    conventions: list[Measured] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)


def versions() -> dict[str, str]:
    """Installed versions, "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, list[str]]:
    """Devices by framework."""
    found: dict[str, list[str]] = {}
    try:
        import jax

        found["jax"] = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    except ImportError:
        found["jax"] = []
    try:
        import torch

        gpus = [f"gpu: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        found["torch"] = [f"cpu: {torch.get_num_threads()} threads", *gpus]
    except ImportError:
        found["torch"] = []
    return found


def examine() -> Diagnosis:
    """Measure everything; takes seconds."""
    result = Diagnosis(versions(), devices(), flags={name: os.environ[name] for name in FLAGS if name in os.environ})
    missing = [name for name in ("jax", "torch") if result.versions[name] == "not installed"]
    if missing:
        result.hazards.append(f"{' and '.join(missing)} not installed: conventions of a pair cannot be measured")
        return result
    import jax
    import torch

    result.precision = {
        "jax matmul": str(jax.config.values["jax_default_matmul_precision"] or "the device's default"),
        "jax x64": str(jax.config.values["jax_enable_x64"]),
        "torch matmul": torch.get_float32_matmul_precision(),
        "torch cuDNN TF32": str(torch.backends.cudnn.allow_tf32),
    }
    result.conventions = measure()
    jax_gpu = any(not device.startswith("cpu") for device in result.devices["jax"])
    torch_gpu = any(not device.startswith("cpu") for device in result.devices["torch"])
    if jax_gpu != torch_gpu:
        result.hazards.append("only one framework sees the accelerator: cross-device pairs cannot be compared")
    if jax_gpu and result.precision["jax matmul"] == "the device's default":
        result.hazards.append(
            "JAX multiplies float32 matrices in TF32 on recent GPUs by default; the twins ask for more themselves"
        )
    if torch_gpu and result.precision["torch cuDNN TF32"] == "True":
        result.hazards.append("cuDNN may use TF32 in convolutions")
    if "NVIDIA_TF32_OVERRIDE" in result.flags:
        result.hazards.append("NVIDIA_TF32_OVERRIDE is set: it overrules both frameworks")
    if "fast_math" in result.flags.get("XLA_FLAGS", ""):
        result.hazards.append("XLA_FLAGS asks for fast math: NaN checks and rounding are not what the suite assumes")
    return result


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    lines = ["versions   " + ", ".join(f"{k} {v}" for k, v in diagnosis.versions.items())]
    lines += [f"{name:10} {'; '.join(found) or 'not installed'}" for name, found in diagnosis.devices.items()]
    lines += ["precision  " + ", ".join(f"{k}: {v}" for k, v in diagnosis.precision.items())]
    lines += ["flags      " + (", ".join(f"{k}={v}" for k, v in diagnosis.flags.items()) or "none set"), ""]
    width = max((len(row.name) for row in diagnosis.conventions), default=0)
    lines += [f"{'convention':{width}}  {'PyTorch':22} JAX"]
    for row in diagnosis.conventions:
        cells = []
        for found, expected, differs in zip(row.found, row.expected, row.differs, strict=True):
            cells.append(f"{found} (table: {expected})" if differs else found)
        lines.append(f"{row.name:{width}}  {cells[0]:22} {cells[1]}")
    changed = sum(any(row.differs) for row in diagnosis.conventions)
    lines += ["", f"{changed} of {len(diagnosis.conventions)} rows differ from the table"]
    lines += [f"hazard: {text}" for text in diagnosis.hazards] or ["no known hazard"]
    return "\n".join(lines)


def run() -> int:
    """Print the diagnosis. The exit code is 0: a difference from the table is news, not a fault of this machine."""
    print(render(examine()))
    return 0
