"""Functions of a node's parents. To add one, write it here and name it in MECHANISMS.

A mechanism sees its parents through J = 4 random linear combinations of them, the indices, so that
it costs the same whatever their number. Its result is standardised over the rows afterwards, so
only its form matters, and depth does not make values explode.

Args of all:
    s: (..., J, R) indices, each of about unit variance over the rows.
    a: (..., J, 1) random coefficients of random sign.
    b: (..., J, 1) random shifts, standard deviation 1.

Returns of all: (..., R).
"""

import jax
import jax.numpy as jnp

INDICES = 4


def linear(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The first index."""
    return s[..., 0, :]


def square(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A parabola, its vertex within the data."""
    return jnp.square(s[..., 0, :] - b[..., 0, :])


def relu(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A hinge."""
    return jnp.maximum(s[..., 0, :] - b[..., 0, :], 0.0)


def tanh(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A soft step."""
    return jnp.tanh(2.0 * (s[..., 0, :] - b[..., 0, :]))


def sine(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A wave, between half a period and some periods over the data."""
    return jnp.sin(3.0 * a[..., 0, :] * s[..., 0, :] + b[..., 0, :])


def product(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of two indices: an interaction."""
    return (s[..., 0, :] + b[..., 0, :]) * (s[..., 1, :] + b[..., 1, :])


def mlp(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A network with a hidden unit per index."""
    return (a * jnp.tanh(1.5 * (s - b))).sum(axis=-2)


def tree(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Piecewise constant: a split, split again on one side, and a split of the whole beside it."""
    side = (s > b).astype(s.dtype)
    first, second, third, fourth = (side[..., j, :] for j in range(INDICES))
    a0, a1, a2, a3 = (a[..., j, :] for j in range(INDICES))
    return a0 * first + a1 * first * second + a2 * (1.0 - first) * third + a3 * fourth


MECHANISMS = {
    "linear": linear,
    "square": square,
    "relu": relu,
    "tanh": tanh,
    "sine": sine,
    "product": product,
    "mlp": mlp,
    "tree": tree,
}
