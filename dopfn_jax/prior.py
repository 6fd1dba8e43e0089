"""The prior: from a key to a structural causal model and its table (Do-PFN, Algorithm 1)."""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dopfn_jax.config import PriorConfig
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES, sample_noise
from dopfn_jax.scm.propagate import propagate
from dopfn_jax.scm.structure import SCM, descendants

# A valid task holds no larger value, so that sums of squares over its rows stay finite in float32.
LARGEST_VALUE = 1e15


@flax.struct.dataclass
class Roles:
    """What the nodes of an SCM stand for.

    Attributes:
        treatment: () int32 node index.
        outcome: () int32 node index.
        covariates: (F,) int32 node indices in column order.
        covariate_mask: (F,) bool, True for columns that exist.
    """

    treatment: jax.Array
    outcome: jax.Array
    covariates: jax.Array
    covariate_mask: jax.Array


@flax.struct.dataclass
class Task:
    """One table: an observational context and queries about it.

    Leading batch axes are allowed on every field. Rows and columns beyond the masks hold zeros.

    Attributes:
        context_x: (N, F) covariates of the observational rows.
        context_t: (N,) observed treatment, 0 or 1.
        context_y: (N,) observed outcome.
        context_mask: (N,) bool, rows that exist.
        query_x: (M, F) covariates of the query rows, as they were before the intervention.
        query_t: (M,) treatment that is set.
        query_y: (M,) the target.
        query_mask: (M,) bool, rows that exist.
        covariate_mask: (F,) bool, columns that exist.
        valid: () bool, False for degenerate tasks, which hold zeros and must carry no loss.
        y0, y1: (M,) potential outcomes of the query rows under do(0) and do(1), or None.
        query_draws: (D, M) what else `query_y` might have been: the outcome's own noise drawn
            anew, unless a column tells of it; or None.
        other_draws: (D, M) the same draws under the other treatment, or None.
    """

    context_x: jax.Array
    context_t: jax.Array
    context_y: jax.Array
    context_mask: jax.Array
    query_x: jax.Array
    query_t: jax.Array
    query_y: jax.Array
    query_mask: jax.Array
    covariate_mask: jax.Array
    valid: jax.Array
    y0: jax.Array | None = None
    y1: jax.Array | None = None
    query_draws: jax.Array | None = None
    other_draws: jax.Array | None = None


def sample_tasks(
    keys: jax.Array,
    prior: PriorConfig,
    rows: int,
    context: tuple[int, int],
    potential_outcomes: bool = False,
    at_once: int | None = None,
) -> Task:
    """A batch of independent tasks, an SCM each: `sample_task` over (B,) keys.

    With `at_once` so many are drawn together, one group after another: values of a group that fit
    a processor's cache are faster than more.
    """

    def sample(key: jax.Array) -> Task:
        return sample_task(key, prior, rows, context, potential_outcomes)

    if at_once is None or at_once >= len(keys):
        return jax.vmap(sample)(keys)
    return jax.lax.map(sample, keys, batch_size=at_once)


def sample_task(
    key: jax.Array,
    prior: PriorConfig,
    rows: int,
    context: tuple[int, int],
    potential_outcomes: bool = False,
) -> Task:
    """One task of the prior: an SCM, its roles and its table.

    Args:
        key: a PRNG key.
        prior: the distribution to draw from.
        rows: rows in all, M_max.
        context: closed interval from which the number of context rows is drawn uniformly; the
            others are queries.
        potential_outcomes: also return y(0) and y(1) of the query rows.

    Returns:
        A Task with N = context[1] and M = rows - context[0].
    """
    scm_key, table_key = jax.random.split(key)
    scm, roles = sample_scm(scm_key, prior)
    return sample_table(table_key, scm, roles, prior, rows, context, potential_outcomes)


def sample_scm(key: jax.Array, prior: PriorConfig) -> tuple[SCM, Roles]:
    """An SCM over `prior.nodes` array slots and the roles of its nodes; no node is binary yet."""
    k = prior.nodes
    draws = uniform_draws(
        key,
        nodes=(),
        hidden=(),
        edge_share=(),
        edges=(k, k),
        zero_effect=(),
        treatment=(k,),
        outcome=(k,),
        columns=(k,),
        weights=(k, k),
        mechanism=(k,),
        noise_family=(k,),
        root_scale=(),
        noise_scale=(),
    )
    if prior.case_study:
        adjacency, active, roles = _case_study_graph(prior.case_study)
    else:
        adjacency, active, shown = _random_graph(draws, prior)
        roles = _assign_roles(draws, adjacency, active, shown, prior)
    return _attach_mechanisms(draws, adjacency, active, prior), roles


def sample_table(
    key: jax.Array,
    scm: SCM,
    roles: Roles,
    prior: PriorConfig,
    rows: int,
    context: tuple[int, int],
    potential_outcomes: bool = False,
) -> Task:
    """The observational and interventional rows of one SCM; arguments as for `sample_task`.

    Interventional rows carry their unit's noise and its covariates from before the treatment. The
    treatment keeps its threshold if it is binary already, else its threshold is drawn.
    """
    low, high = context
    noise_key, draw_key = jax.random.split(key)
    noise = sample_noise(noise_key, scm.noise_family, scm.noise_scale, rows, prior.noise_families)
    draws = uniform_draws(draw_key, threshold=(rows,), query_t=(rows - low,), context_rows=())

    raw_t = propagate(scm, noise)[roles.treatment]
    threshold, separates = _pick_threshold(draws["threshold"], raw_t)
    separates |= scm.binary[roles.treatment]
    to_threshold = (jnp.arange(noise.shape[0]) == roles.treatment) & ~scm.binary
    scm = dataclasses.replace(
        scm,
        binary=scm.binary | to_threshold,
        threshold=jnp.where(to_threshold, threshold, scm.threshold),
    )
    observed = propagate(scm, noise)
    t, y = observed[roles.treatment], observed[roles.outcome]
    x = jnp.where(roles.covariate_mask[:, None], observed[roles.covariates], 0.0)

    if prior.target == "interventional":
        query_t = (draws["query_t"] < 0.5).astype(jnp.float32)
    else:
        query_t = t[low:]
    settings = [query_t]
    if potential_outcomes:
        settings += [jnp.zeros_like(query_t), jnp.ones_like(query_t)]

    def outcome_under(t_in: jax.Array) -> jax.Array:
        return propagate(scm, noise[:, low:], (roles.treatment, t_in))[roles.outcome]

    outcomes = jnp.stack([outcome_under(t_in) for t_in in settings])
    observed_is_sane = (jnp.abs(observed) < LARGEST_VALUE).all()
    outcomes_are_sane = (jnp.abs(outcomes) < LARGEST_VALUE).all()

    context_rows = _integer(draws["context_rows"], low, high)
    task = Task(
        context_x=x[:, :high].T,
        context_t=t[:high],
        context_y=y[:high],
        context_mask=jnp.arange(high) < context_rows,
        query_x=x[:, low:].T,
        query_t=query_t,
        query_y=outcomes[0],
        query_mask=jnp.arange(low, rows) >= context_rows,
        covariate_mask=roles.covariate_mask,
        valid=separates & observed_is_sane & outcomes_are_sane,
        y0=outcomes[1] if potential_outcomes else None,
        y1=outcomes[2] if potential_outcomes else None,
    )
    return mask_degenerate(task)


def uniform_draws(key: jax.Array, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Independent draws from [0, 1) by name and shape.

    They are cut from one long draw, because every draw of its own costs as much to compile.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    # Not by JAX's default, under which a process that has switched to float64 would draw others.
    draws = jax.random.uniform(key, (sum(sizes),), jnp.float32)
    pieces = jnp.split(draws, np.cumsum(sizes)[:-1])
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _integer(draw: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    """A draw from [0, 1) as a uniform integer of the closed interval [low, high]."""
    count = jnp.asarray(high - low + 1, jnp.float32)
    return low + jnp.floor(draw * count).astype(jnp.int32)


def _choose(draws: jax.Array, candidates: jax.Array) -> jax.Array:
    """Index of a uniform choice from the True entries of a (K,) mask, by K draws from [0, 1)."""
    draws = jnp.where(candidates, draws, -1.0)
    # As argmax, which processors take three times as long for.
    place = jnp.arange(len(draws), dtype=jnp.int32)
    return jnp.where(draws == draws.max(), place, len(draws) - 1).min()


def _case_study_graph(name: str) -> tuple[jax.Array, jax.Array, Roles]:
    study = CASE_STUDIES[name]
    adjacency = np.zeros((len(study.nodes), len(study.nodes)), bool)
    for parent, child in study.edges:
        adjacency[study.nodes.index(child), study.nodes.index(parent)] = True
    roles = Roles(
        treatment=jnp.int32(study.nodes.index("t")),
        outcome=jnp.int32(study.nodes.index("y")),
        covariates=jnp.array([study.nodes.index(node) for node in study.shown], jnp.int32),
        covariate_mask=jnp.ones(len(study.shown), bool),
    )
    return jnp.array(adjacency), jnp.ones(len(study.nodes), bool), roles


def _random_graph(
    draws: dict[str, jax.Array], prior: PriorConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adjacency (K, K), active nodes (K,), and the number of shown covariates."""
    nodes = _integer(draws["nodes"], prior.min_nodes, prior.max_nodes)
    hidden = _integer(draws["hidden"], 0, jnp.clip(nodes - 3, 0, prior.max_hidden))
    shown = nodes - 2 - hidden

    active = jnp.arange(prior.nodes) < nodes
    least_share = 1.0 / (shown + 1).astype(jnp.float32)
    edge_share = least_share + (1.0 - least_share) * draws["edge_share"]
    adjacency = jnp.tril(draws["edges"] < edge_share, -1) & active[:, None] & active[None, :]
    return adjacency, active, shown


def _assign_roles(
    draws: dict[str, jax.Array],
    adjacency: jax.Array,
    active: jax.Array,
    shown: jax.Array,
    prior: PriorConfig,
) -> Roles:
    node = jnp.arange(prior.nodes)
    reach = descendants(adjacency)
    has_child = adjacency.any(axis=0)
    # unaffected[k, l]: k is another node that l cannot reach, so the effect of l on k is zero.
    # There always is one: the first node, seen from any other.
    unaffected = active[:, None] & active[None, :] & ~reach & (node[:, None] != node[None, :])
    zero = (draws["zero_effect"] < prior.zero_effect_share) | ~has_child.any()
    treatments = jnp.where(zero, unaffected.any(axis=0), has_child)
    treatment = _choose(draws["treatment"], treatments)
    outcomes = jnp.where(zero, unaffected[:, treatment], reach[:, treatment])
    outcome = _choose(draws["outcome"], outcomes)

    eligible = active & (node != treatment) & (node != outcome)
    order = jnp.argsort(jnp.where(eligible, draws["columns"], 1.0))
    return Roles(
        treatment=treatment,
        outcome=outcome,
        covariates=order[: prior.covariates].astype(jnp.int32),
        covariate_mask=jnp.arange(prior.covariates) < shown,
    )


def _attach_mechanisms(
    draws: dict[str, jax.Array], adjacency: jax.Array, active: jax.Array, prior: PriorConfig
) -> SCM:
    def pick(draws: jax.Array, names: tuple[str, ...], known: tuple[str, ...]) -> jax.Array:
        ids = jnp.array([known.index(name) for name in names], jnp.int32)
        return ids[_integer(draws, 0, len(names) - 1)]

    parents = adjacency.sum(axis=1, dtype=jnp.float32)
    bound = 1.0 / jnp.sqrt(jnp.maximum(parents, 1.0))[:, None]
    weights = (2.0 * draws["weights"] - 1.0) * bound
    low, high = prior.root_scale
    root_scale = low + (high - low) * draws["root_scale"]
    # Beta(1, 5) by its inverse CDF: no rejection loop.
    other_scale = prior.noise_scale * (1.0 - draws["noise_scale"] ** (1 / 5))
    return SCM(
        adjacency=adjacency,
        weights=jnp.where(adjacency, weights, 0.0),
        mechanism=pick(draws["mechanism"], prior.mechanisms, MECHANISM_NAMES),
        noise_family=pick(draws["noise_family"], prior.noise_families, NOISE_FAMILIES),
        noise_scale=jnp.where(active, jnp.where(parents == 0, root_scale, other_scale), 0.0),
        binary=jnp.zeros(prior.nodes, bool),
        threshold=jnp.zeros(prior.nodes, jnp.float32),
        active=active,
    )


def _pick_threshold(draws: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A uniform choice from the (R,) values, but never the minimum or maximum.

    The second answer is False where there is no such value.
    """
    inner = (values > values.min()) & (values < values.max())
    return values[_choose(draws, inner)], inner.any()


def mask_degenerate(task: Task) -> Task:
    """Marks tasks without two arms or a varying outcome as invalid too; zeroes what is masked."""
    mask = task.context_mask
    treated = (mask & (task.context_t > 0.5)).any()
    control = (mask & (task.context_t < 0.5)).any()
    y = jnp.where(mask, task.context_y, 0.0)
    spread = jnp.where(mask, jnp.abs(y - y.sum() / mask.sum(dtype=jnp.float32)), 0.0).max()
    varies = spread > 1e-5 * jnp.abs(y).max()
    valid = task.valid & treated & control & varies

    in_context, in_query = valid & mask, valid & task.query_mask

    def keep(rows: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.where(rows, values, 0.0)

    return dataclasses.replace(
        task,
        context_x=keep(in_context[:, None], task.context_x),
        context_t=keep(in_context, task.context_t),
        context_y=keep(in_context, task.context_y),
        query_x=keep(in_query[:, None], task.query_x),
        query_t=keep(in_query, task.query_t),
        query_y=keep(in_query, task.query_y),
        valid=valid,
        y0=None if task.y0 is None else keep(in_query, task.y0),
        y1=None if task.y1 is None else keep(in_query, task.y1),
        query_draws=None if task.query_draws is None else keep(in_query[None], task.query_draws),
        other_draws=None if task.other_draws is None else keep(in_query[None], task.other_draws),
    )
