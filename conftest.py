"""Settings of the test processes, made before anything is imported.

One thread each: arrays are small, and threads that wait for each other cost more than they give. JAX keeps what it has
compiled below .pytest_cache, where other workers and the next run find it: compilation is most of what tests cost.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
