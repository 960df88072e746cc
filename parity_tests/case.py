"""What a case is: a function's name, its inputs and what is compared, as data."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity_tests.trees import flatten, map_leaves

QUANTITIES = ("value", "gradient", "jvp", "hvp")


@dataclass(frozen=True)
class Case:
    """One function in one regime.

    The floats of `inputs` are rounded to the smallest dtype of the case, so that all dtypes see the same numbers and
    share one oracle.
    """

    name: str  # "group/what is special"
    function: str  # "distances.energy_distance", "vae.NBVAE.encode": the public name it covers
    inputs: Mapping[str, Any]  # arguments by name: arrays, or nestings of arrays
    static: Mapping[str, Any] = field(default_factory=dict)  # arguments that are not arrays
    differentiate: tuple[str, ...] = ()  # leaf paths, with wildcards
    zero: tuple[str, ...] = ()  # differentiated leaves whose gradient is zero by declaration, with a path
    none: tuple[str, ...] = ()  # differentiated leaves without a gradient path, by declaration
    quantities: tuple[str, ...] = QUANTITIES
    reason: str = ""  # why a quantity or a dtype is left out
    dtypes: tuple[str, ...] = ("float64", "float32")
    c: float = 100.0  # float64 threshold: c 2^-53 S
    terms: int = 4  # n of the floor gamma_n S
    accuracy: float | None = None  # float32: required error relative to the largest entry of a leaf
    taylor: bool = True  # False where a stop-gradient makes the derivative differ from the function's
    run: Callable[[Any, Mapping[str, Any]], Any] | None = None  # (namespace, arguments) -> outputs
    oracle: Callable[[Mapping[str, Any]], Any] | None = None  # where the oracle is called differently
    zero_outputs: tuple[str, ...] = ()  # outputs whose derivative is zero by declaration

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def module(self) -> str:
        return self.function.split(".")[0]

    def leaves(self) -> dict[str, np.ndarray]:
        """Every array of the inputs by path; floats as float64 numbers of the case's precision."""
        single = "float32" in self.dtypes

        def rounded(array: Any) -> np.ndarray:
            array = np.asarray(array)
            if array.dtype.kind != "f":
                return array
            return array.astype(np.float32).astype(np.float64) if single else array.astype(np.float64)

        return {name: rounded(value) for name, value in flatten(dict(self.inputs)).items()}

    def active(self) -> tuple[str, ...]:
        """Paths of the differentiated leaves, in order."""
        names = [name for name, value in self.leaves().items() if value.dtype.kind == "f"]
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, rule) for rule in self.differentiate)]
        missing = [rule for rule in self.differentiate if not fnmatch.filter(names, rule)]
        if missing:
            raise ValueError(f"{self.name}: no float input matches {missing}; inputs are {names}")
        return tuple(chosen)

    def declared(self, leaf: str) -> str:
        """ "zero", "none" or "flows"."""
        for word, rules in (("zero", self.zero), ("none", self.none)):
            if any(fnmatch.fnmatchcase(leaf, rule) for rule in rules):
                return word
        return "flows"

    def arguments(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The nesting of `inputs` with other leaves in it."""
        return map_leaves(lambda path, _: leaves[path], dict(self.inputs))

    def call(self, namespace: Any, leaves: Mapping[str, Any]) -> Any:
        """Run the function that the case names on a twin or on the oracle."""
        arguments = self.arguments(leaves)
        if self.run is not None:
            return self.run(namespace, arguments)
        module, *path = self.function.split(".")
        target = getattr(getattr(namespace, module), path[0])
        static = dict(self.static)
        if isinstance(target, type):
            config = [static.pop("config")] if "config" in static else []
            target = target(*config, arguments.pop("params"))
        for name in path[1:]:
            target = getattr(target, name)
        return target(**arguments, **static)

    def draw(self, what: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Fixed weights of the scalar <w, outputs> and fixed directions, exact in float32."""
        digest = hashlib.sha256(f"{self.name}:{what}:{name}".encode()).digest()
        values = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little"))).standard_normal(shape)
        return values.astype(np.float32).astype(np.float64)

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(()) if shape == () else self.draw("weight", name, shape)

    def directions(self) -> dict[str, np.ndarray]:
        """One direction per differentiated leaf, scaled to it entry by entry (and to the leaf where an entry is 0)."""
        leaves = self.leaves()
        out = {}
        for name in self.active():
            size = np.abs(leaves[name])
            size = np.where(size > 0, size, size.max(initial=0) or 1.0)
            # Powers of two, so that the direction is exact in float32.
            out[name] = self.draw("direction", name, size.shape) * 2.0 ** np.round(np.log2(size))
        return out
