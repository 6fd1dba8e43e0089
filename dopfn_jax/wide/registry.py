"""Choosing a named part of the prior per node or per task, without branching."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

Parts = Mapping[str, Callable[..., jax.Array]]


def pick(draws: jax.Array, names: Sequence[str]) -> jax.Array:
    """Draws from [0, 1) as uniform ids of the names."""
    return jnp.floor(draws * len(names)).astype(jnp.int32)


def apply(parts: Parts, names: Sequence[str], ids: jax.Array, *arguments: jax.Array) -> jax.Array:
    """`parts[names[id]](*arguments)` for every entry of `ids`, which broadcasts with the results.

    Every named part is computed and selected from: under `vmap` a branch would be too.
    """
    result = parts[names[0]](*arguments)
    for i, name in enumerate(names[1:], start=1):
        result = jnp.where(ids == i, parts[name](*arguments), result)
    return result
