"""What treatment adds to the signal of the outcome. To add a form, name it in EFFECTS.

Args of all:
    mean: () average effect, in standard deviations of the untreated signal.
    modifiers: (R,) what the covariates say about it, standardised.
    spread: () how much of the effect varies, as a multiple of `mean`.

Returns of all: (R,).
"""

import jax
import jax.numpy as jnp


def zero(mean: jax.Array, modifiers: jax.Array, spread: jax.Array) -> jax.Array:
    """No direct one; mediators, which `post_treatment_share = 0` rules out, still carry theirs."""
    return jnp.zeros_like(modifiers)


def constant(mean: jax.Array, modifiers: jax.Array, spread: jax.Array) -> jax.Array:
    """The same for everybody before the link; afterwards only with "identity" and "continuous"."""
    return mean * jnp.ones_like(modifiers)


def varying(mean: jax.Array, modifiers: jax.Array, spread: jax.Array) -> jax.Array:
    """Larger for some; of either sign where `spread` is above one."""
    return mean * (1.0 + spread * modifiers)


EFFECTS = {"zero": zero, "constant": constant, "varying": varying}

# Monotone or not, applied to signal plus effect: "identity" leaves the two additive, all others
# make them interact.
LINKS = {
    "identity": lambda s: s,
    "tanh": lambda s: jnp.tanh(s),
    "exponential": lambda s: jnp.exp(jnp.minimum(0.7 * s, 4.0)),
    "square": lambda s: jnp.square(s + 1.0),
    "relu": lambda s: jnp.maximum(s, 0.0),
}
