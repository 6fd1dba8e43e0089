"""The prior: from a key to a structural causal model and the table that it generates (Do-PFN, Algorithm 1)."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dopfn_jax.config import PriorConfig
from dopfn_jax.scm import SCM, descendants, propagate, sample_noise
from dopfn_jax.scm.case_studies import CASE_STUDIES
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES


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
    """One table: an observational context and queries about it. Leading batch axes are allowed on every field.

    Rows and columns beyond the masks hold zeros. Missing cells are NaN.

    Attributes:
        context_x: (N, F) covariates of the observational rows.
        context_t: (N,) observed treatment, 0 or 1.
        context_y: (N,) observed outcome.
        context_mask: (N,) bool, rows that exist.
        query_x: (M, F) pre-treatment covariates of the query rows.
        query_t: (M,) treatment that is set.
        query_y: (M,) the target.
        query_mask: (M,) bool, rows that exist.
        covariate_mask: (F,) bool, columns that exist.
        valid: () bool, False for degenerate tasks, which must carry no loss.
        y0, y1: (M,) potential outcomes of the query rows under do(0) and do(1), or None where not asked for.
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


def sample_tasks(
    keys: jax.Array,
    prior: PriorConfig,
    rows: int,
    context: tuple[int, int],
    potential_outcomes: bool = False,
) -> Task:
    """A batch of independent tasks, an SCM each: `sample_task` over (B,) keys."""
    return jax.vmap(lambda key: sample_task(key, prior, rows, context, potential_outcomes))(keys)


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
        context: closed interval from which the number of context rows is drawn uniformly; the others are queries.
        potential_outcomes: also return y(0) and y(1) of the query rows.

    Returns:
        A Task with N = context[1] and M = rows - context[0].
    """
    scm_key, table_key = jax.random.split(key)
    scm, roles = sample_scm(scm_key, prior)
    return sample_table(table_key, scm, roles, prior, rows, context, potential_outcomes)


def sample_scm(key: jax.Array, prior: PriorConfig) -> tuple[SCM, Roles]:
    """An SCM over `prior.nodes` array slots and the roles of its nodes; no node is binary yet."""
    graph_key, roles_key, mechanism_key = jax.random.split(key, 3)
    if prior.case_study:
        adjacency, active, roles = _case_study_graph(prior.case_study)
    else:
        adjacency, active, roles = _random_graph(graph_key, roles_key, prior)
    return _attach_mechanisms(mechanism_key, adjacency, active, prior), roles


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

    Interventional rows carry their unit's noise and its covariates from before the treatment.
    """
    noise_key, threshold_key, treatment_key, split_key = jax.random.split(key, 4)
    noise = sample_noise(noise_key, scm.noise_family, scm.noise_scale, rows, prior.noise_families)

    raw_t = propagate(scm, noise)[roles.treatment]
    threshold, separates = _pick_threshold(threshold_key, raw_t)
    is_treatment = jnp.arange(prior.nodes) == roles.treatment
    scm = scm.replace(
        binary=scm.binary | is_treatment, threshold=jnp.where(is_treatment, threshold, scm.threshold)
    )
    observed = propagate(scm, noise)
    t, y = observed[roles.treatment], observed[roles.outcome]
    x = jnp.where(roles.covariate_mask[:, None], observed[roles.covariates], 0.0)

    low, high = context
    query_noise = noise[:, low:]
    if prior.target == "interventional":
        query_t = jax.random.bernoulli(treatment_key, shape=(rows - low,)).astype(jnp.float32)
        query_y = propagate(scm, query_noise, (roles.treatment, query_t))[roles.outcome]
    else:
        query_t, query_y = t[low:], y[low:]
    y0 = y1 = None
    if potential_outcomes:
        y0, y1 = (
            propagate(scm, query_noise, (roles.treatment, jnp.full(rows - low, value)))[roles.outcome]
            for value in (0.0, 1.0)
        )

    context_rows = jax.random.randint(split_key, (), low, high + 1)
    task = Task(
        context_x=x[:, :high].T,
        context_t=t[:high],
        context_y=y[:high],
        context_mask=jnp.arange(high) < context_rows,
        query_x=x[:, low:].T,
        query_t=query_t,
        query_y=query_y,
        query_mask=jnp.arange(low, rows) >= context_rows,
        covariate_mask=roles.covariate_mask,
        valid=separates & jnp.all(jnp.isfinite(observed)),
        y0=y0,
        y1=y1,
    )
    return _mask_degenerate(task)


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
    graph_key: jax.Array, roles_key: jax.Array, prior: PriorConfig
) -> tuple[jax.Array, jax.Array, Roles]:
    size_key, hidden_key, share_key, edge_key = jax.random.split(graph_key, 4)
    k_max = prior.max_nodes
    nodes = jax.random.randint(size_key, (), prior.min_nodes, prior.max_nodes + 1)
    most_hidden = jnp.clip(nodes - 3, 0, prior.max_hidden)
    hidden = jax.random.randint(hidden_key, (), 0, most_hidden + 1)
    shown = nodes - 2 - hidden

    active = jnp.arange(k_max) < nodes
    edge_share = jax.random.uniform(share_key, minval=1.0 / (shown + 1.0))
    edges = jax.random.uniform(edge_key, (k_max, k_max)) < edge_share
    adjacency = jnp.tril(edges, -1) & active[:, None] & active[None, :]
    return adjacency, active, _assign_roles(roles_key, adjacency, active, shown, prior)


def _assign_roles(
    key: jax.Array, adjacency: jax.Array, active: jax.Array, shown: jax.Array, prior: PriorConfig
) -> Roles:
    zero_key, treatment_key, outcome_key, column_key = jax.random.split(key, 4)
    k_max = active.shape[0]
    reach = descendants(adjacency)
    has_child = adjacency.any(axis=0)
    # unaffected[k, l]: k is another node that l cannot reach, so it may be the outcome of an effect of zero.
    unaffected = active[:, None] & active[None, :] & ~reach & ~jnp.eye(k_max, dtype=bool)
    zero = jax.random.bernoulli(zero_key, prior.zero_effect_share) | ~has_child.any()
    zero &= unaffected.any()

    treatment = _choose(treatment_key, jnp.where(zero, unaffected.any(axis=0), has_child))
    outcome = _choose(outcome_key, jnp.where(zero, unaffected[:, treatment], reach[:, treatment]))

    node = jnp.arange(k_max)
    eligible = active & (node != treatment) & (node != outcome)
    order = jnp.argsort(jax.random.uniform(column_key, (k_max,)) + ~eligible)
    return Roles(
        treatment=treatment,
        outcome=outcome,
        covariates=order[: prior.covariates].astype(jnp.int32),
        covariate_mask=jnp.arange(prior.covariates) < shown,
    )


def _choose(key: jax.Array, candidates: jax.Array) -> jax.Array:
    """Index of a uniform draw from the True entries of a (K,) mask."""
    return jnp.argmax(jnp.where(candidates, jax.random.uniform(key, candidates.shape), -1.0)).astype(jnp.int32)


def _attach_mechanisms(key: jax.Array, adjacency: jax.Array, active: jax.Array, prior: PriorConfig) -> SCM:
    weight_key, mechanism_key, family_key, root_key, other_key = jax.random.split(key, 5)
    k_max = active.shape[0]
    parents = adjacency.sum(axis=1)
    bound = 1.0 / jnp.sqrt(jnp.maximum(parents, 1))[:, None]
    weights = jax.random.uniform(weight_key, (k_max, k_max), minval=-1.0) * bound

    mechanism_ids = jnp.array([MECHANISM_NAMES.index(name) for name in prior.mechanisms], jnp.int32)
    family_ids = jnp.array([NOISE_FAMILIES.index(name) for name in prior.noise_families], jnp.int32)
    low, high = prior.root_scale
    root_scale = jax.random.uniform(root_key, minval=low, maxval=high)
    # Beta(1, 5) by its inverse CDF: no rejection loop.
    other_scale = prior.noise_scale * (1.0 - jax.random.uniform(other_key) ** (1 / 5))
    return SCM(
        adjacency=adjacency,
        weights=jnp.where(adjacency, weights, 0.0),
        mechanism=jax.random.choice(mechanism_key, mechanism_ids, (k_max,)),
        noise_family=jax.random.choice(family_key, family_ids, (k_max,)),
        noise_scale=jnp.where(active, jnp.where(parents == 0, root_scale, other_scale), 0.0),
        binary=jnp.zeros(k_max, bool),
        threshold=jnp.zeros(k_max),
        active=active,
    )


def _pick_threshold(key: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A uniform draw from the (R,) values, never their minimum or maximum; False where there is no such value."""
    inner = (values > values.min()) & (values < values.max())
    return values[_choose(key, inner)], inner.any()


def _mask_degenerate(task: Task) -> Task:
    """Marks tasks without two arms, a varying outcome and finite values as invalid, and zeroes their numbers."""
    mask = task.context_mask
    treated = (mask & (task.context_t > 0.5)).any()
    control = (mask & (task.context_t < 0.5)).any()
    y = jnp.where(mask, task.context_y, 0.0)
    mean = y.sum() / mask.sum()
    spread = jnp.where(mask, jnp.abs(task.context_y - mean), 0.0).max()
    varies = spread > 1e-5 * jnp.abs(y).max()
    targets = [target for target in (task.query_y, task.y0, task.y1) if target is not None]
    finite = jnp.all(jnp.isfinite(jnp.stack(targets)))
    # Squares of the outcome must stay finite too, for its standard deviation.
    valid = task.valid & treated & control & varies & finite & (spread < 1e18)

    def sanitise(values: jax.Array) -> jax.Array:
        return jnp.where(valid & jnp.isfinite(values), values, 0.0)

    def sanitise_rows(values: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.where(rows if values.ndim == 1 else rows[:, None], sanitise(values), 0.0)

    return task.replace(
        context_x=sanitise_rows(task.context_x, mask),
        context_t=sanitise_rows(task.context_t, mask),
        context_y=sanitise_rows(task.context_y, mask),
        query_x=sanitise_rows(task.query_x, task.query_mask),
        query_t=sanitise_rows(task.query_t, task.query_mask),
        query_y=sanitise_rows(task.query_y, task.query_mask),
        valid=valid,
        y0=None if task.y0 is None else sanitise_rows(task.y0, task.query_mask),
        y1=None if task.y1 is None else sanitise_rows(task.y1, task.query_mask),
    )
