"""Propagation: from noise to node values, with or without an intervention."""

import jax
import jax.numpy as jnp

from dopfn_jax.scm.mechanisms import apply_mechanism
from dopfn_jax.scm.structure import SCM


def propagate(
    scm: SCM, noise: jax.Array, do: tuple[jax.Array | int, jax.Array] | None = None
) -> jax.Array:
    """Node values of every row, in one pass through the topological order.

    The same noise with and without `do` gives the potential outcomes of the same units.

    Args:
        scm: an SCM over K nodes.
        noise: (K, R) noise of every node and row.
        do: (node, values): the node's mechanism and noise are replaced by `values`, (R,).

    Returns:
        (K, R) float32 node values.
    """

    def set_node(k: int, z: jax.Array) -> jax.Array:
        # Not a matrix product: accelerators would round its factors to fewer bits.
        inputs = (scm.weights[k][:, None] * z).sum(axis=0)
        value = apply_mechanism(scm.mechanism[k], inputs) + noise[k]
        value = jnp.where(scm.binary[k], (value >= scm.threshold[k]).astype(value.dtype), value)
        if do is not None:
            node, values = do
            value = jnp.where(k == node, values, value)
        return z.at[k].set(value)

    return jax.lax.fori_loop(0, noise.shape[0], set_node, jnp.zeros_like(noise))
