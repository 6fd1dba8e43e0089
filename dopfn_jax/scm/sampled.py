"""Between the named SCM and the arrays that the prior samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dopfn_jax.scm import structure
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.distributions import Noise
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Argument, Binary, Linear, Node
from dopfn_jax.scm.noise import NOISE_FAMILIES, sample_noise
from dopfn_jax.scm.propagate import propagate

if TYPE_CHECKING:
    from dopfn_jax.config import PriorConfig


def from_prior(key: jax.Array, prior: "PriorConfig | None" = None) -> SCM:
    """An SCM drawn from the prior, with a binary treatment.

    The treatment is "t", the outcome "y", shown covariates are "x1", "x2", ... in column order and
    hidden nodes "u1", ...; a case study keeps its own names. The treatment's threshold is the raw
    value of one more unit.

    Args:
        key: a PRNG key.
        prior: the distribution to draw from, by default that of the paper.

    Raises:
        SCMError: called under jit or vmap for a prior over random graphs, whose structure is not
            known while tracing; a prior with a `case_study` has one structure.
    """
    # Both are built on this package, so they can only be imported once it is there.
    from dopfn_jax.config import PriorConfig
    from dopfn_jax.prior import sample_scm

    prior = PriorConfig() if prior is None else prior
    if isinstance(key, jax.core.Tracer) and not prior.case_study:
        raise SCMError(
            "from_prior draws a random graph, which jit and vmap cannot trace: call it outside of "
            "them, or set PriorConfig(case_study=...), whose SCMs share one structure."
        )
    scm_key, threshold_key = jax.random.split(key)
    arrays, roles = jax.jit(sample_scm, static_argnums=1)(scm_key, prior)
    noise = sample_noise(threshold_key, arrays.noise_family, arrays.noise_scale, 1)
    threshold = propagate(arrays, noise)[roles.treatment, 0]
    is_treatment = jnp.arange(prior.nodes) == roles.treatment
    arrays = arrays.replace(
        binary=arrays.binary | is_treatment,
        threshold=jnp.where(is_treatment, threshold, arrays.threshold),
    )
    if prior.case_study:
        study = CASE_STUDIES[prior.case_study]
        return from_arrays(arrays, study.nodes, study.edges, binary=("t",))
    return from_arrays(arrays, _role_names(arrays, roles))


def _role_names(arrays: structure.SCM, roles: Any) -> list[str]:
    names: dict[int, str] = {int(roles.treatment): "t", int(roles.outcome): "y"}
    shown = np.asarray(roles.covariates)[np.asarray(roles.covariate_mask)]
    names |= {int(k): f"x{column}" for column, k in enumerate(shown, start=1)}
    hidden = [k for k in np.flatnonzero(arrays.active) if int(k) not in names]
    names |= {int(k): f"u{number}" for number, k in enumerate(hidden, start=1)}
    return [names.get(k, "") for k in range(len(arrays.active))]


def from_arrays(
    arrays: structure.SCM,
    names: Sequence[str],
    edges: Sequence[tuple[str, str]] | None = None,
    binary: Sequence[str] | None = None,
) -> SCM:
    """Names the nodes of an array SCM.

    Args:
        arrays: over K nodes, without batch axes.
        names: K names; those of inactive nodes are not used.
        edges: (parent, child) pairs, and
        binary: the thresholded nodes. Both are read from `arrays` by default, and are needed where
            these are traced, since the structure of a named SCM is static. Without `edges`, nodes
            that are not active are left out.
    """
    count = len(names)
    if edges is None:
        used = [k for k in range(count) if bool(arrays.active[k])]
        adjacency = np.asarray(arrays.adjacency)
    else:
        used = list(range(count))
        adjacency = np.zeros((count, count), bool)
        for parent, child in edges:
            adjacency[names.index(child), names.index(parent)] = True
    if binary is None:
        binary = [names[k] for k in used if bool(arrays.binary[k])]

    def named_node(k: int) -> Node:
        parents = np.flatnonzero(adjacency[k])
        mechanism: Any = Linear(
            weights=tuple(arrays.weights[k, parent] for parent in parents),
            bias=np.float32(0),
            nonlinearity=arrays.mechanism[k],
            parents=tuple(names[int(parent)] for parent in parents),
        )
        is_binary = names[k] in binary
        if is_binary:
            mechanism = Binary(mechanism, arrays.threshold[k], mechanism.parents)
        noise = Noise(arrays.noise_family[k], np.float32(0), arrays.noise_scale[k], NOISE_FAMILIES)
        return Node(
            parents=mechanism.parents, mechanism=mechanism, noise=noise, takes_noise=is_binary
        )

    return SCM({names[k]: named_node(k) for k in used})


def to_arrays(scm: SCM) -> structure.SCM:
    """The SCM as the arrays that the prior and `propagate` work on, nodes in the order of `names`.

    With it a known SCM can generate tables: `dopfn_jax.prior.sample_table(key, scm.to_arrays(),
    roles, ...)`, of a prior whose `noise_families` hold the SCM's; else the table is not valid.

    Raises:
        SCMError: a node that the array form cannot hold. It holds weighted sums without a bias
            through one of the prior's nonlinearities, plus centred noise of one of its families,
            possibly thresholded; no parameters, interventions or observations.
    """
    if scm.observations:
        raise SCMError(f"to_arrays: {next(iter(scm.observations))!r} is observed.")
    names = scm.names
    weights = jnp.zeros((len(names), len(names)))
    adjacency = np.zeros((len(names), len(names)), bool)
    nonlinearities, families, scales, thresholds = [], [], [], []
    for k, (name, node) in enumerate(scm.nodes.items()):
        linear, noise, threshold = _array_parts(name, node)
        for weight, parent in zip(linear.weights, linear.parents, strict=True):
            adjacency[k, names.index(parent)] = True
            weights = weights.at[k, names.index(parent)].set(weight)
        nonlinearities.append(linear.nonlinearity)
        families.append(noise.family)
        scales.append(noise.scale)
        thresholds.append(threshold)
    return structure.SCM(
        adjacency=jnp.array(adjacency),
        weights=weights,
        mechanism=jnp.stack([jnp.asarray(i, jnp.int32) for i in nonlinearities]),
        noise_family=jnp.stack([jnp.asarray(i, jnp.int32) for i in families]),
        noise_scale=jnp.stack([jnp.asarray(scale) for scale in scales]),
        binary=jnp.array([isinstance(node.mechanism, Binary) for node in scm.nodes.values()]),
        threshold=jnp.stack([jnp.asarray(threshold) for threshold in thresholds]),
        active=jnp.ones(len(names), bool),
    )


def _array_parts(name: str, node: Node) -> tuple[Linear, Noise, Any]:
    mechanism, threshold = node.mechanism, np.float32(0)
    if isinstance(mechanism, Binary):
        mechanism, threshold = mechanism.mechanism, mechanism.threshold
    if mechanism is None:
        mechanism = Linear((), np.float32(0), np.int32(0), ())
    reason = ""
    if node.intervened:
        reason = "is set by do; give the intervention to `propagate` instead"
    elif not isinstance(mechanism, Linear):
        reason = "has a mechanism other than linear(...)"
    elif not node.per_row or any(isinstance(w, Argument) for w in mechanism.weights):
        reason = "is a parameter, or has a coefficient that is another node"
    elif not _is_zero(mechanism.bias):
        reason = "has a bias"
    elif not isinstance(node.noise, Noise) or node.scale_parent or not _is_zero(node.noise.loc):
        reason = "needs centred noise of one of the prior's families, with a number as scale"
    if reason:
        raise SCMError(f"to_arrays: node {name!r} {reason}.")
    return mechanism, node.noise, threshold


def _is_zero(value: Any) -> bool:
    # A traced bias cannot be read; those that the prior's own SCMs carry are zero.
    return isinstance(value, jax.core.Tracer) or bool(np.all(np.asarray(value) == 0))
