"""What a node looks like in a table, and to its children. To add a kind, name it in COLUMN_KINDS.

Args of all:
    z: (..., R) values, about standardised.
    u: (..., 1) a uniform draw per node, for thresholds and the like.
    v: (..., 1) another one.

Returns of all: (..., R).
"""

import jax
import jax.numpy as jnp


def continuous(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """As it is."""
    return z


def binary(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """1 above a threshold; the rarer value has 5 % or more of normal rows."""
    return (z > 3.3 * (u - 0.5)).astype(z.dtype)


def ordinal(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Rounded to between about 3 and 12 levels."""
    return jnp.round((0.6 + 2.0 * u) * z + v)


def categorical(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Codes of 5 or 7 categories in an order that means nothing."""
    categories = jnp.where(u < 0.5, 5.0, 7.0)
    level = jnp.clip(jnp.floor(jax.scipy.stats.norm.cdf(z) * categories), 0.0, categories - 1.0)
    factor = 1.0 + jnp.floor(v * (categories - 1.0))  # a prime modulus makes it a permutation
    return jnp.mod(level * factor, categories)


def skewed(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Log-normal."""
    return jnp.exp((0.3 + u) * jnp.minimum(z, 6.0))


def heavy_tailed(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Tails of both signs."""
    return jnp.sinh((0.5 + u) * jnp.clip(z, -6.0, 6.0))


def zero_inflated(z: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Nothing below a threshold, the excess above."""
    return jnp.maximum(z - 2.0 * (u - 0.5), 0.0)


COLUMN_KINDS = {
    "continuous": continuous,
    "binary": binary,
    "ordinal": ordinal,
    "categorical": categorical,
    "skewed": skewed,
    "heavy_tailed": heavy_tailed,
    "zero_inflated": zero_inflated,
}

# Of the outcome, in all its arms alike. `z` is standardised by the observed arm.
OUTCOME_KINDS = {
    "continuous": continuous,
    "binary": lambda z, u, v: (z > 4.4 * (u - 0.5)).astype(z.dtype),  # rarer from 1.4 %
    "skewed": skewed,
    "count": lambda z, u, v: jnp.floor(jnp.exp((0.3 + 0.7 * u) * jnp.clip(z, -6.0, 6.0) + 2.0 * v)),
    # Amounts: nothing below a threshold, log-normal tails above.
    "zero_inflated": lambda z, u, v: jnp.expm1((0.3 + v) * jnp.clip(z - 2.0 * (u - 0.5), 0.0, 6.0)),
}
