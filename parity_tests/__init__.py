"""The proof that the JAX and the PyTorch twin are one function with the same gradients, and the proof of that proof.

A case (`cases.py`) is data: a function's name, its inputs, what is differentiated. `compare.py` runs it on two sides
(`sides.py`) and on an oracle that is neither (`oracles.py`, extended precision with a running error bound), and returns
a verdict per leaf. `mutants.py` plants faults in one twin; every one must be noticed. pytest and `pf parity` share all
of it. `check` and `check_modules` do the same for a pair that is not ours.
"""

from parity_tests.pair import check, check_modules, note

__all__ = ["check", "check_modules", "note"]
