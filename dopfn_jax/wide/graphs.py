"""Families of graphs over layers of nodes. To add one, write it here and name it in GRAPHS.

Nodes come in layers; a node's parents lie in earlier ones, so that a layer is computed in one go.

Args of all:
    hub: (P,) uniform draws, one per possible parent.
    child: (C,) number of the child within its layer.
    parent: (P,) number of the possible parent within its layer.
    layer: (P,) layer of the possible parent, counted back from the child: 1 is the one before.

Returns of all: (C, P) non-negative propensities to be a parent; only their proportions in a row
matter.
"""

import jax
import jax.numpy as jnp

COMMUNITIES = 3


def erdos_renyi(hub: jax.Array, child: jax.Array, parent: jax.Array, layer: jax.Array) -> jax.Array:
    """All alike."""
    return jnp.ones((child.shape[0], parent.shape[0]), jnp.float32)


def scale_free(hub: jax.Array, child: jax.Array, parent: jax.Array, layer: jax.Array) -> jax.Array:
    """A few hubs have most of the children (a power law of popularity)."""
    return jnp.broadcast_to((hub + 0.01) ** -1.0, (child.shape[0], parent.shape[0]))


def layered(hub: jax.Array, child: jax.Array, parent: jax.Array, layer: jax.Array) -> jax.Array:
    """Only from the layer before."""
    return jnp.broadcast_to((layer == 1).astype(hub.dtype), (child.shape[0], parent.shape[0]))


def block(hub: jax.Array, child: jax.Array, parent: jax.Array, layer: jax.Array) -> jax.Array:
    """Communities that hardly speak to each other."""
    same = child[:, None] % COMMUNITIES == parent[None, :] % COMMUNITIES
    return jnp.where(same, 1.0, 0.02)


def factors(hub: jax.Array, child: jax.Array, parent: jax.Array, layer: jax.Array) -> jax.Array:
    """Only from the first layer, whose nodes are common factors."""
    return jnp.broadcast_to((layer == layer.max()).astype(hub.dtype), (len(child), len(parent)))


GRAPHS = {
    "erdos_renyi": erdos_renyi,
    "scale_free": scale_free,
    "layered": layered,
    "block": block,
    "factors": factors,
}
