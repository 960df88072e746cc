"""Settings of the test processes, made before anything is imported.

One thread each: arrays are small, and threads that wait for each other cost more than they give. Compilation is most of
what tests cost: JAX keeps what it has compiled below .pytest_cache, where other workers and the next run find it, and
XLA leaves out what makes code fast and compilation slow. `pf parity` compiles as users do.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
