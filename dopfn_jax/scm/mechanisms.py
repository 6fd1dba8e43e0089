"""The nonlinearities that a node applies to the weighted sum of its parents (Appendix C.1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The position of a name is its id in `SCM.mechanism`. Each maps 0 to 0, so that a root is its
# noise alone.
MECHANISMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "square": jnp.square,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
MECHANISM_NAMES = tuple(MECHANISMS)


def apply_mechanism(mechanism: jax.Array, x: jax.Array) -> jax.Array:
    """g(x) for the scalar id `mechanism`, elementwise on `x` of any shape."""
    return jax.lax.select_n(mechanism, *(function(x) for function in MECHANISMS.values()))
