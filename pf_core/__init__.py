"""The framework-free core: data, the training loop, runs, metrics. Imports neither jax nor torch."""

__version__ = "0.1.0"
