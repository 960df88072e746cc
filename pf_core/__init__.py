"""The framework-free core: data, the training loop, runs, metrics. Imports neither jax nor torch.

model = pf_core.Model.train(adata, backend="jax", holdout=["cell_type=NK cells,perturbation=IFNB"])
predicted = model.predict(controls, perturbation="IFNB")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pf_core.config import Config
    from pf_core.model import Model
    from pf_core.operator import Operator

__version__ = "0.1.0"
__all__ = ["Config", "Model", "Operator", "__version__"]


def __getattr__(name: str) -> Any:
    # Names are resolved when asked for, so that `import pf_core` and `pf --help` load nothing heavy.
    if name == "Config":
        from pf_core.config import Config

        return Config
    if name == "Model":
        from pf_core.model import Model

        return Model
    if name == "Operator":
        from pf_core.operator import Operator

        return Operator
    raise AttributeError(f"module 'pf_core' has no attribute {name!r}")
