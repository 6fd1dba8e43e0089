"""Nodes of the random graph: layers before the treatment, and what hangs on them.

Axes: K pre-treatment nodes, P post-treatment nodes, J indices of a mechanism, R rows.
"""

import math

import jax
import jax.numpy as jnp

from dopfn_jax.config import WidePriorConfig
from dopfn_jax.wide.columns import COLUMN_KINDS
from dopfn_jax.wide.draws import Draws, at_least_one, log_uniform, signed, standardise
from dopfn_jax.wide.graphs import GRAPHS
from dopfn_jax.wide.mechanisms import MECHANISMS
from dopfn_jax.wide.registry import apply, pick

LAYERS = 4
# Terms of the outcome's baseline; a task uses one or more of them.
TERMS = 6

# Draws of which every node has its own: of pre- and post-treatment nodes, and of mechanisms.
NODE_DRAWS = ("edges", "kind", "kind_u", "kind_v", "noise_share")
MECHANISM_DRAWS = ("mechanism", "weights", "sparsity", "coefficients", "shifts")


def pre_treatment(
    draws: Draws, prior: WidePriorConfig, noise: jax.Array, active: jax.Array
) -> jax.Array:
    """Values (K, R) of the nodes before the treatment, standardised."""
    k = active.shape[0]
    width = k // LAYERS
    density = log_uniform(draws["density"], prior.density)
    family = pick(draws["graph"], prior.graphs)
    number = jnp.arange(k)

    def by_layer(values: jax.Array) -> jax.Array:
        return values[:k].reshape(LAYERS, width, *values.shape[1:])

    def add_layer(
        z: jax.Array, inputs: tuple[jax.Array, Draws, jax.Array]
    ) -> tuple[jax.Array, None]:
        layer, draws, noise = inputs
        back = layer - number // width  # how many layers a node lies before this one
        propensity = (active & (back > 0))[None] * apply(
            GRAPHS, prior.graphs, family, hub, jnp.arange(width), number % width, back
        )
        total = jnp.maximum(propensity.sum(axis=1, keepdims=True), 1e-6)
        edges = draws["edges"] < density * propensity / total
        value = mechanisms(draws, prior, edges, z)
        share = jnp.where(edges.any(axis=1, keepdims=True), draws["noise_share"], 1.0)
        value = jnp.sqrt(1.0 - share) * value + jnp.sqrt(share) * noise
        value = render(draws, prior, value)
        return jax.lax.dynamic_update_slice_in_dim(z, value, layer * width, axis=0), None

    hub = draws["hub"]
    per_node = {name: by_layer(draws[name]) for name in (*MECHANISM_DRAWS, *NODE_DRAWS)}
    inputs = (jnp.arange(LAYERS), per_node, by_layer(noise))
    # What stands in later layers before their turn has weight 0.
    return jax.lax.scan(add_layer, noise, inputs)[0]


def special_mechanisms(
    draws: Draws, prior: WidePriorConfig, z: jax.Array, active: jax.Array
) -> jax.Array:
    """What outcome, treatment, effect, noise and post-treatment nodes make of the others.

    Returns (TERMS + 4 + P, R): terms of the baseline, the treatment's score, two modifiers of the
    effect, one of the noise, and post-treatment nodes; each standardised.
    """
    k = active.shape[0]
    number = active.sum(dtype=jnp.float32)
    # From one relevant node to all of them.
    relevant = number ** draws["relevant"] / number
    outcome = at_least_one(draws["outcome_parents"], relevant, active)
    # None, some or all of them confound.
    overlap = jnp.clip(2.0 * draws["overlap"] - 0.5, 0.0, 1.0)
    share = jnp.where(outcome, overlap, relevant * draws["instruments"])
    treatment = at_least_one(draws["treatment_parents"], share, active)
    modifiers = at_least_one(draws["modifiers"], jnp.where(outcome, 0.5, 0.05), active)
    post = at_least_one(draws["edges"][k:], relevant, active)
    parents = jnp.concatenate(
        [
            jnp.broadcast_to(outcome, (TERMS, k)),
            treatment[None],
            jnp.broadcast_to(modifiers, (3, k)),
            post,
        ]
    )
    special = {name: draws[name][k:] for name in MECHANISM_DRAWS}
    return mechanisms(special, prior, parents, z)


def mechanisms(
    draws: Draws, prior: WidePriorConfig, edges: jax.Array, parents: jax.Array
) -> jax.Array:
    """N nodes as standardised functions of (K, R) parents by (N, K) edges, without noise.

    `draws` holds MECHANISM_DRAWS of these nodes.
    """
    weights = signed(draws["weights"])
    # High powers leave little but the largest: indices along one parent, for trees and sums.
    power = jnp.where(draws["sparsity"] < 0.5, 1.0, 8.0)
    weights = jnp.sign(weights) * jnp.abs(weights) ** power * edges[:, None, :]
    norm = jnp.sqrt(jnp.square(weights).sum(axis=-1, keepdims=True))
    indices = jnp.einsum("njp,pr->njr", weights / jnp.maximum(norm, 1e-12), parents)
    result = apply(
        MECHANISMS,
        prior.mechanisms,
        pick(draws["mechanism"], prior.mechanisms),
        indices,
        2.0 * signed(draws["coefficients"]),
        math.sqrt(3.0) * signed(draws["shifts"]),
    )
    return standardise(result)


def render(draws: Draws, prior: WidePriorConfig, values: jax.Array) -> jax.Array:
    """Nodes as they look in a table, standardised; `draws` holds NODE_DRAWS of these nodes."""
    return standardise(
        apply(
            COLUMN_KINDS,
            prior.column_kinds,
            pick(draws["kind"], prior.column_kinds),
            values,
            draws["kind_u"],
            draws["kind_v"],
        )
    )
