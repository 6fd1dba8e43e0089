"""From uniform draws to what a task needs of them, for all parts of the wide prior."""

import jax
import jax.numpy as jnp

from dopfn_jax.wide.registry import pick

# Uniform on [0, 1), by name.
Draws = dict[str, jax.Array]


def at_least_one(draws: jax.Array, share: jax.Array, active: jax.Array) -> jax.Array:
    """Each active node with probability `share`, and in any case the one with the lowest draw."""
    active = jnp.broadcast_to(active, draws.shape)
    draws = jnp.where(active, draws, 2.0)
    return active & ((draws < share) | (draws == draws.min(axis=-1, keepdims=True)))


def ids(draws: jax.Array, names: tuple[str, ...], known: tuple[str, ...]) -> jax.Array:
    """A name each, as its place among the known ones."""
    return jnp.array([known.index(name) for name in names], jnp.int32)[pick(draws, names)]


def ranks(draws: jax.Array) -> jax.Array:
    """The place of each draw in their order, from 0."""
    return jnp.argsort(jnp.argsort(draws))


def sign(draw: jax.Array) -> jax.Array:
    """-1 or 1."""
    return jnp.where(draw < 0.5, -1.0, 1.0)


def signed(draws: jax.Array) -> jax.Array:
    """Uniform on [-1, 1)."""
    return 2.0 * draws - 1.0


def log_uniform(draw: jax.Array, interval: tuple[float, float]) -> jax.Array:
    """Log-uniform on the interval."""
    low, high = interval
    return low * (high / low) ** draw


def standardise(values: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the last axis; a constant becomes 0."""
    centred = values - values.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True))
    return jnp.where(deviation > 1e-5, centred / jnp.maximum(deviation, 1e-5), 0.0)
