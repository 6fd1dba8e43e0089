"""The SCM pytree: a graph, its mechanisms and its noise, as arrays for `vmap` and `jit`."""

import math

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class SCM:
    """An additive-noise structural causal model over K nodes in topological order.

    Node k is z_k = g_k(sum_l weights[k, l] z_l) + e_k; where `binary[k]`, it then becomes 1 if
    z_k >= threshold[k], else 0. Leading batch axes are allowed on every field (`vmap`).

    Attributes:
        adjacency: (K, K) bool, [child, parent], strictly lower triangular.
        weights: (K, K) float32, zero where there is no edge.
        mechanism: (K,) int32, ids into `mechanisms.MECHANISM_NAMES`.
        noise_family: (K,) int32, ids into `noise.NOISE_FAMILIES`.
        noise_scale: (K,) float32, standard deviation of e_k.
        binary: (K,) bool, whether the node is thresholded.
        threshold: (K,) float32, used where `binary`.
        active: (K,) bool, False for nodes that only fill up the array.
    """

    adjacency: jax.Array
    weights: jax.Array
    mechanism: jax.Array
    noise_family: jax.Array
    noise_scale: jax.Array
    binary: jax.Array
    threshold: jax.Array
    active: jax.Array


def descendants(adjacency: jax.Array) -> jax.Array:
    """Transitive closure of (K, K) bool: entry [k, l] says whether a path leads from l to k."""
    reach = adjacency.astype(jnp.float32)
    for _ in range(math.ceil(math.log2(max(adjacency.shape[-1], 2)))):
        reach = jnp.minimum(reach + reach @ reach, 1.0)
    return reach > 0
