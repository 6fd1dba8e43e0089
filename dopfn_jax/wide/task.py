"""A task of the wide prior: a table like those of ordinary observational studies.

Pre-treatment nodes come in layers of a random graph. Some of them decide the treatment, some the
outcome, some both (confounders), some the size of the effect, some neither. Nodes after the
treatment (mediators, and descendants of the outcome) may be shown as well; query rows show them as
they were observed. Nodes that are not shown are hidden.

Axes: K pre-treatment nodes, P post-treatment nodes, J indices of a mechanism, R rows, F columns.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from dopfn_jax.config import WidePriorConfig
from dopfn_jax.prior import LARGEST_VALUE, Task, mask_degenerate, uniform_draws
from dopfn_jax.scm import sample_noise
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.wide.assignments import ASSIGNMENTS
from dopfn_jax.wide.columns import OUTCOME_KINDS
from dopfn_jax.wide.draws import Draws, ids, log_uniform, ranks, sign, signed, standardise
from dopfn_jax.wide.effects import EFFECTS, LINKS
from dopfn_jax.wide.mechanisms import INDICES
from dopfn_jax.wide.nodes import (
    LAYERS,
    NODE_DRAWS,
    TERMS,
    pre_treatment,
    render,
    special_mechanisms,
)
from dopfn_jax.wide.registry import apply, pick


def sample_wide_tasks(
    keys: jax.Array,
    prior: WidePriorConfig,
    rows: int,
    context: tuple[int, int],
    covariates: tuple[int, int],
    potential_outcomes: bool = False,
    outcome_draws: int = 1,
) -> Task:
    """A batch of independent tasks: `sample_wide_task` over (B,) keys."""
    sample = partial(
        sample_wide_task,
        prior=prior,
        rows=rows,
        context=context,
        covariates=covariates,
        potential_outcomes=potential_outcomes,
        outcome_draws=outcome_draws,
    )
    return jax.vmap(sample)(keys)


def sample_wide_task(
    key: jax.Array,
    prior: WidePriorConfig,
    rows: int,
    context: tuple[int, int],
    covariates: tuple[int, int],
    potential_outcomes: bool = False,
    outcome_draws: int = 1,
) -> Task:
    """One task of the wide prior.

    Args:
        key: a PRNG key.
        prior: the distribution to draw from.
        rows: rows in all.
        context: closed interval from which the number of context rows is drawn uniformly; the
            others are queries.
        covariates: closed interval from which the number of shown columns is drawn log-uniformly.
        potential_outcomes: also return y(0) and y(1) of the query rows, and `other_draws`.
        outcome_draws: outcomes per query row; all but `query_y` itself are in `query_draws`.

    Returns:
        A Task with N = context[1], M = rows - context[0] and F = covariates[1]; its covariates have
        missing cells (NaN).
    """
    most, hidden, post = covariates[1], prior.max_hidden, prior.max_post_treatment
    width = -(-(most + hidden) // LAYERS)
    k = LAYERS * width
    noise_key, draw_key, anew_key = jax.random.split(key, 3)
    draws = _uniform_draws(draw_key, k, post, rows, most)
    noise_family = ids(draws["noise_family"], prior.noise_families, NOISE_FAMILIES)
    noise = sample_noise(
        noise_key, noise_family, jnp.ones(noise_family.shape), rows, prior.noise_families
    )

    shown, nodes_before, post_nodes = _numbers(draws, prior, covariates)
    active = ranks(draws["active"]) < nodes_before
    post_active = jnp.arange(post)[:, None] < post_nodes

    z = pre_treatment(draws, prior, noise[:k], active)
    parts = special_mechanisms(draws, prior, z, active)
    terms, (own_score, modifier, other_modifier, scale), post_base = jnp.split(
        parts, [TERMS, TERMS + 4]
    )
    used = jnp.arange(TERMS)[:, None] <= jnp.floor(draws["term_count"] * TERMS)
    baseline = standardise((signed(draws["terms"]) * used * terms).sum(axis=0))
    t = _assign(draws, prior, own_score, baseline)

    is_mediator = draws["post_role"] < 0.6
    post_share = draws["noise_share"][k:]
    post_untreated = jnp.sqrt(1.0 - post_share) * post_base + jnp.sqrt(post_share) * noise[k:-1]
    post_effect = 2.0 * signed(draws["post_effect"])
    post_weight = signed(draws["post_weight"]) * (is_mediator & post_active)
    effect = apply(
        EFFECTS,
        prior.effects,
        pick(draws["effect"], prior.effects),
        sign(draws["effect_sign"]) * log_uniform(draws["effect_size"], prior.effect_size),
        standardise(modifier + draws["modifier_mix"] * other_modifier),
        log_uniform(draws["effect_spread"], (0.1, 3.0)),
    )

    def signal(t: jax.Array) -> jax.Array:
        through_mediators = (post_weight * (post_untreated + post_effect * t[None])).sum(axis=0)
        inner = baseline + effect * t + through_mediators
        return apply(LINKS, prior.links, pick(draws["link"], prior.links), inner)

    observed_signal = signal(t)
    hetero = draws["hetero"] < prior.heteroscedastic_share
    spread = jnp.exp(jnp.where(hetero, draws["hetero_size"], 0.0) * jnp.clip(scale, -3.0, 3.0))
    noise_scale = log_uniform(draws["noise_ratio"], prior.noise_ratio) * observed_signal.std()
    noise_scale = noise_scale * spread
    disturbance = noise_scale * noise[-1]
    location = (observed_signal + disturbance).mean()
    deviation = jnp.maximum((observed_signal + disturbance).std(), 1e-12)

    def standardised(y: jax.Array) -> jax.Array:
        return (y - location) / deviation

    # Most mechanisms lean to one side (squares, exponentials, counts), mirrored ones to the other.
    side = jnp.where(draws["outcome_mirror"] < prior.mirrored_share, -1.0, 1.0)

    def outcome(undisturbed: jax.Array, disturbance: jax.Array) -> jax.Array:
        return side * apply(
            OUTCOME_KINDS,
            prior.outcome_kinds,
            pick(draws["outcome_kind"], prior.outcome_kinds),
            standardised(undisturbed + disturbance),
            draws["outcome_u"],
            draws["outcome_v"],
        )

    # A post-treatment node that is no mediator hears the outcome.
    hears = jnp.where(is_mediator, 0.0, 2.0 * signed(draws["post_weight"]))
    heard = hears * standardised(observed_signal + disturbance)[None]
    post_observed = post_untreated + post_effect * t[None] + heard
    post_draws = {name: draws[name][k:] for name in NODE_DRAWS}
    post_shown = render(post_draws, prior, standardise(post_observed))
    pool = jnp.concatenate([z, post_shown])
    candidates = jnp.concatenate([active, post_active[:, 0]])
    x = _columns(draws, prior, pool, candidates, shown, most)

    y = outcome(observed_signal, disturbance)
    low, high = context
    query_t = (draws["query_t"] < 0.5).astype(jnp.float32)[low:]
    signals = [signal(jnp.zeros_like(t))[low:], signal(jnp.ones_like(t))[low:]]
    arms = [outcome(of_arm, disturbance[low:]) for of_arm in signals]
    query_y = jnp.where(query_t > 0.5, arms[1], arms[0])
    sane = (jnp.abs(pool) < LARGEST_VALUE).all()
    for values in (y, *arms):
        sane &= (jnp.abs(values) < LARGEST_VALUE).all()

    query_draws = other_draws = None
    if outcome_draws > 1:
        anew = noise_scale[None, low:] * sample_noise(
            anew_key,
            jnp.repeat(noise_family[-1:], outcome_draws - 1),
            jnp.ones(outcome_draws - 1),
            rows - low,
            prior.noise_families,
        )
        # What hears the outcome tells of its noise.
        told = (~is_mediator & post_active).any()
        disturbances = jnp.where(told, disturbance[None, low:], anew)
        of_arms = [outcome(of_arm[None], disturbances) for of_arm in signals]
        query_draws = jnp.where(query_t > 0.5, of_arms[1], of_arms[0])
        sane &= (jnp.abs(query_draws) < LARGEST_VALUE).all()
        if potential_outcomes:
            other_draws = jnp.where(query_t > 0.5, of_arms[0], of_arms[1])
            sane &= (jnp.abs(other_draws) < LARGEST_VALUE).all()

    context_rows = low + jnp.floor(draws["context_rows"] * (high - low + 1)).astype(jnp.int32)
    return mask_degenerate(
        Task(
            context_x=x[:, :high].T,
            context_t=t[:high],
            context_y=y[:high],
            context_mask=jnp.arange(high) < context_rows,
            query_x=x[:, low:].T,
            query_t=query_t,
            query_y=query_y,
            query_mask=jnp.arange(low, rows) >= context_rows,
            covariate_mask=jnp.arange(most) < shown,
            valid=sane,
            y0=arms[0] if potential_outcomes else None,
            y1=arms[1] if potential_outcomes else None,
            query_draws=query_draws,
            other_draws=other_draws,
        )
    )


_TASK_DRAWS = (
    "shown",
    "has_hidden",
    "hidden",
    "has_post",
    "post",
    "graph",
    "density",
    "relevant",
    "overlap",
    "instruments",
    "term_count",
    "prognostic",
    "prognostic_size",
    "prognostic_sign",
    "assignment",
    "rate",
    "steepness",
    "effect",
    "effect_size",
    "effect_sign",
    "effect_spread",
    "modifier_mix",
    "link",
    "noise_ratio",
    "hetero",
    "hetero_size",
    "outcome_kind",
    "outcome_u",
    "outcome_v",
    "outcome_mirror",
    "context_rows",
    "has_duplicates",
    "has_missing",
)


def _uniform_draws(key: jax.Array, k: int, post: int, rows: int, most: int) -> Draws:
    """All that is drawn but noise, for K + P nodes and at most F columns."""
    special = TERMS + 4 + post
    return uniform_draws(
        key,
        **dict.fromkeys(_TASK_DRAWS, ()),
        hub=(k,),
        active=(k,),
        edges=(k + post, k),
        kind=(k + post, 1),
        kind_u=(k + post, 1),
        kind_v=(k + post, 1),
        noise_family=(k + post + 1,),
        noise_share=(k + post, 1),
        mechanism=(k + special, 1),
        weights=(k + special, INDICES, k),
        sparsity=(k + special, 1, 1),
        coefficients=(k + special, INDICES, 1),
        shifts=(k + special, INDICES, 1),
        outcome_parents=(k,),
        treatment_parents=(k,),
        modifiers=(k,),
        terms=(TERMS, 1),
        post_effect=(post, 1),
        post_weight=(post, 1),
        post_role=(post, 1),
        assignment_u=(rows,),
        query_t=(rows,),
        columns=(k + post,),
        duplicate=(most,),
        duplicate_of=(most,),
        column_missing=(most, 1),
        missing_rate=(most, 1),
        missing=(most, rows),
    )


def _numbers(
    draws: Draws, prior: WidePriorConfig, covariates: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many columns are shown, nodes come before the treatment, and nodes come after it.

    Columns show nodes of either kind; those before the treatment that no column shows are hidden.
    """
    low, high = covariates
    shown = jnp.floor(log_uniform(draws["shown"], (low, high + 1))).astype(jnp.int32)
    shown = jnp.minimum(shown, high)

    def number(has: jax.Array, share: float, draw: jax.Array, most: int) -> jax.Array:
        return jnp.where(has < share, 1 + jnp.floor(draw * most), 0).astype(jnp.int32)

    hidden = number(draws["has_hidden"], prior.hidden_share, draws["hidden"], prior.max_hidden)
    post = number(
        draws["has_post"], prior.post_treatment_share, draws["post"], prior.max_post_treatment
    )
    post = jnp.minimum(post, shown)
    before = jnp.maximum(shown - post + hidden, 1)
    return shown, before, post


def _assign(
    draws: Draws, prior: WidePriorConfig, own_score: jax.Array, baseline: jax.Array
) -> jax.Array:
    """The observed treatment (R,), 0 or 1."""
    # In some tasks it follows the expected outcome itself: the strongest confounding there is.
    follows = jnp.where(draws["prognostic"] < prior.prognostic_share, draws["prognostic_size"], 0.0)
    direction = sign(draws["prognostic_sign"])
    score = standardise((1.0 - follows) * own_score + follows * direction * baseline)
    low, high = prior.treated_rate
    rate = jnp.clip(jax.nn.sigmoid(1.3 * ndtri(draws["rate"])), low, high)
    treated = apply(
        ASSIGNMENTS,
        prior.assignments,
        pick(draws["assignment"], prior.assignments),
        score,
        draws["assignment_u"],
        rate,
        log_uniform(draws["steepness"], prior.steepness),
    )
    return treated.astype(jnp.float32)


def _columns(
    draws: Draws,
    prior: WidePriorConfig,
    pool: jax.Array,
    candidates: jax.Array,
    shown: jax.Array,
    most: int,
) -> jax.Array:
    """Columns (F, R) shown of the (K + P, R) nodes, some twice, some cells missing (NaN)."""
    columns = jnp.argsort(jnp.where(candidates, draws["columns"], 2.0))[:most]
    doubles = (draws["has_duplicates"] < prior.duplicate_share) & (draws["duplicate"] < 0.15)
    # A duplicate takes the place of another column, whose node is then hidden.
    source = jnp.floor(draws["duplicate_of"] * shown).astype(jnp.int32)
    columns = jnp.where(doubles, columns[source], columns)
    x = jnp.where(jnp.arange(most)[:, None] < shown, pool[columns], 0.0)
    # Half of the columns with gaps have them at random, half only where the value is high.
    of_values = draws["column_missing"] < 0.25
    rate = jnp.where(of_values, (x > 0.0) * draws["missing_rate"], 0.5 * draws["missing_rate"])
    gaps = (draws["has_missing"] < prior.missing_share) & (draws["column_missing"] < 0.5)
    return jnp.where(gaps & (draws["missing"] < rate), jnp.nan, x)
