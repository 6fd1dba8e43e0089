"""Do-PFN in JAX: in-context learning for causal effect estimation.

The public names are imported on first use, so that `import dopfn_jax` is quick and initialises no
JAX backend: devices can still be chosen after it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.estimators import DoPFNRegressor
    from dopfn_jax.model.bar_distribution import BarDistribution
    from dopfn_jax.scm import SCM

    __version__: str

__all__ = ["SCM", "BarDistribution", "DoPFNRegressor", "__version__", "from_pretrained"]

_HOME = {
    "BarDistribution": "dopfn_jax.model.bar_distribution",
    "DoPFNRegressor": "dopfn_jax.estimators",
    "SCM": "dopfn_jax.scm",
    "from_pretrained": "dopfn_jax.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dopfn-jax")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
