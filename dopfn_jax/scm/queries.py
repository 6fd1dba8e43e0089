"""The truth about an SCM: E[y | do(t), x] and effects, exact or by Monte Carlo.

Conditioning on covariates means their values from before the intervention, as in the tables that
Do-PFN reads, also where they descend from the treatment: the unit's noise is what is conditioned
on. Hidden noise is integrated out by likelihood weighting: noise of nodes without data is drawn,
that of covariates follows from their values and weighs the draw by its density.

Axes: M rows of the question, S Monte Carlo draws.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.distributions import Empirical, Noise
from dopfn_jax.scm.forward import draw_noise, propagate_named
from dopfn_jax.scm.interventions import Intervention, do, observe
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Argument, Constant, Linear, Node
from dopfn_jax.scm.noise import NOISE_FAMILIES

_GAUSSIAN = NOISE_FAMILIES.index("gaussian")
_IDENTITY = MECHANISM_NAMES.index("identity")
# Rows answered at once: bounds memory at ROWS x S x K numbers.
_ROWS_AT_ONCE = 16


class Estimate(NamedTuple):
    """An answer and how far to trust it.

    Attributes:
        value: (M,) or (); NaN where no draw has the covariates of the row.
        standard_error: of the same shape; 0 where the answer is exact.
        effective_samples: of the same shape; Monte Carlo draws that the weights leave, inf where
            the answer is exact, 0 where it is NaN. Below some hundred, ask for more `samples`.
    """

    value: jax.Array
    standard_error: jax.Array
    effective_samples: jax.Array


def true_cid(
    scm: SCM,
    rows: Mapping[str, ArrayLike],
    do: Mapping[str, Intervention],
    outcome: str,
    key: jax.Array,
    samples: int = 10_000,
) -> Estimate:
    """Expected outcome E[y | do(t), x] of every row.

    Exact where everything that matters is linear and Gaussian, or where the rows determine the
    outcome up to its own noise; by Monte Carlo elsewhere.

    Args:
        scm: the model, its parameters set.
        rows: {covariate: (M,) values from before the intervention}, or a data frame. {} asks for
            E[y | do(t)] and needs a `do` that fixes M, else M = 1.
        do: {node: number, (M,) array, or function of the natural value}.
        outcome: the node whose mean is asked for.
        key: a PRNG key.
        samples: Monte Carlo draws S per row.

    Returns:
        (M,) each.

    Raises:
        SCMError: an unknown node, a question about a covariate that is also set or the outcome, an
            unknown parameter, or a covariate whose noise has no density given its value.
    """
    return _answer(scm, rows, (do,), outcome, key, samples)


def true_cate(
    scm: SCM,
    rows: Mapping[str, ArrayLike],
    treatment: str,
    outcome: str,
    key: jax.Array,
    values: tuple[float, float] = (0.0, 1.0),
    samples: int = 10_000,
) -> Estimate:
    """Effect E[y | do(t = values[1]), x] - E[y | do(t = values[0]), x] of every row.

    Both terms share their draws. Arguments and errors as for `true_cid`.

    Returns:
        (M,) each.
    """
    low, high = values
    return _answer(scm, rows, ({treatment: low}, {treatment: high}), outcome, key, samples)


def true_ate(
    scm: SCM,
    treatment: str,
    outcome: str,
    key: jax.Array,
    values: tuple[float, float] = (0.0, 1.0),
    samples: int = 100_000,
) -> Estimate:
    """Effect E[y | do(t = values[1])] - E[y | do(t = values[0])] over the SCM's population.

    Arguments and errors as for `true_cid`.

    Returns:
        () each.
    """
    low, high = values
    estimate = _answer(scm, {}, ({treatment: low}, {treatment: high}), outcome, key, samples)
    return Estimate(*(field[0] for field in estimate))


def _answer(
    scm: SCM,
    rows: Mapping[str, ArrayLike],
    worlds: tuple[Mapping[str, Intervention], ...],
    outcome: str,
    key: jax.Array,
    samples: int,
) -> Estimate:
    """The mean outcome in the last world, less that in the first if there are two."""
    rows = {name: rows[name] for name in rows.keys()}  # noqa: SIM118 - a data frame iterates otherwise
    _check_question(scm, rows, worlds, outcome)
    x = dict(observe(scm, rows).observations)
    functions = [{n: v for n, v in world.items() if callable(v)} for world in worlds]
    size = _row_count(scm, x, worlds)
    columns = [
        {
            name: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (size,))
            for name, value in world.items()
            if not callable(value)
        }
        for world in worlds
    ]

    if not any(functions) and _is_linear_gaussian(scm, rows, worlds, outcome):
        value = _exact(scm, x, columns, outcome, size)
        return Estimate(value, jnp.zeros_like(value), jnp.full_like(value, jnp.inf))

    def one_row(arguments: tuple[Any, Any, jax.Array]) -> Estimate:
        covariates, settings, row_key = arguments
        sets = [{**s, **f} for s, f in zip(settings, functions, strict=True)]
        return _weighted(scm, covariates, sets, outcome, row_key, samples)

    keys = jax.random.split(key, size)
    return jax.lax.map(one_row, (x, columns, keys), batch_size=min(size, _ROWS_AT_ONCE))


def _check_question(
    scm: SCM,
    rows: Mapping[str, Any],
    worlds: tuple[Mapping[str, Intervention], ...],
    outcome: str,
) -> None:
    scm.require(outcome, "outcome")
    if scm.observations:
        raise SCMError("the SCM holds observed data: give covariates as `rows` instead.")
    for world in worlds:
        do(scm, world)  # raises where the intervention makes no sense
        for name in world:
            if name in rows:
                raise SCMError(
                    f"{name!r} is both set by do and conditioned on: drop it from the rows."
                )
    if outcome in rows:
        raise SCMError(
            f"the outcome {outcome!r} is among the rows; for units whose outcome is known use "
            "counterfactual()."
        )
    scm.require_known_parameters()
    for name in scm.require(rows, "covariate"):
        node = scm.nodes[name]
        if not node.per_row:
            raise SCMError(f"{name!r} is a parameter: set it by do instead.")
        if node.inputs and isinstance(node.noise, Empirical):
            raise SCMError(
                f"covariate {name!r}: its noise resamples observed residuals, which have no "
                "density: leave it out, or use interventional()."
            )
        if not (node.is_recoverable or node.is_discrete):
            raise SCMError(
                f"covariate {name!r}: its density given its value is not known. Leave it out, or "
                "give node(..., inverse=...)."
            )


def _row_count(
    scm: SCM, x: Mapping[str, Any], worlds: tuple[Mapping[str, Intervention], ...]
) -> int:
    lengths = {np.shape(value)[0] for value in x.values()}
    lengths |= {
        np.shape(v)[0] for w in worlds for v in w.values() if not callable(v) and np.ndim(v)
    }
    if scm.rows is not None:
        raise SCMError("an earlier do set one value per row: give it as `do` of the question.")
    if len(lengths) > 1:
        raise SCMError(f"numbers of rows disagree: {sorted(lengths)}.")
    return int(lengths.pop()) if lengths else 1


def _weighted(
    scm: SCM,
    covariates: Mapping[str, jax.Array],
    worlds: list[dict[str, Any]],
    outcome: str,
    key: jax.Array,
    samples: int,
) -> Estimate:
    """Self-normalised importance sampling for one row: all of `covariates` are ()."""
    noise = draw_noise(scm, key, samples)
    if _own_noise_averages_out(scm, covariates, worlds, outcome):
        noise[outcome] = jnp.broadcast_to(scm.nodes[outcome].noise.loc, noise[outcome].shape)
    log_weight = jnp.zeros(samples)
    values: dict[str, jax.Array] = {}
    for name, node in scm.nodes.items():
        if name not in covariates:
            values[name] = node.transform(node.natural(values, noise.get(name)))
            continue
        observed = jnp.broadcast_to(covariates[name], (samples,))
        if node.is_recoverable:
            noise[name] = jnp.broadcast_to(node.recover(values, observed), (samples,))
            if not isinstance(node.noise, Empirical):  # of a root: the same for all draws
                log_weight = log_weight + node.log_density(values, observed)
        else:
            drawn = node.transform(node.natural(values, noise[name]))
            log_weight = log_weight + jnp.where(drawn == observed, 0.0, -jnp.inf)
        values[name] = observed
    weight = jax.nn.softmax(log_weight)
    outcomes = [propagate_named(do(scm, world), noise, samples)[outcome] for world in worlds]
    y = outcomes[-1] - outcomes[0] if len(outcomes) > 1 else outcomes[0]
    # Centred, so that an outcome that the row determines gets an error of exactly zero.
    mean = y[0] + jnp.sum(weight * (y - y[0]))
    error = jnp.sqrt(jnp.sum(weight**2 * (y - mean) ** 2))
    possible = jnp.any(log_weight > -jnp.inf)  # else the weights are NaN, and so is the answer
    return Estimate(mean, error, jnp.where(possible, 1.0 / jnp.sum(weight**2), 0.0))


def _own_noise_averages_out(
    scm: SCM, covariates: Mapping[str, Any], worlds: list[dict[str, Any]], outcome: str
) -> bool:
    """Whether the outcome's own noise is additive and unconditioned: its mean can stand for it."""
    node = scm.nodes[outcome]
    return (
        isinstance(node.noise, Noise)
        and node.per_row
        and node.is_recoverable
        and not node.takes_noise
        and not any(outcome in world for world in worlds)
        and not scm.descendants(outcome) & set(covariates)
    )


def _is_linear_gaussian(
    scm: SCM,
    rows: Mapping[str, Any],
    worlds: tuple[Mapping[str, Intervention], ...],
    outcome: str,
) -> bool:
    """Whether covariates and outcome are jointly Gaussian, as far as concrete values tell."""
    outputs = [(scm, set(rows)), *((do(scm, world), {outcome}) for world in worlds)]
    return all(
        _is_linear_gaussian_node(model, model.nodes[name])
        for model, names in outputs
        for name in names | model.ancestors(names)
        if model.nodes[name].per_row
    )


def _is_linear_gaussian_node(scm: SCM, node: Node) -> bool:
    mechanism, noise = node.mechanism, node.noise
    if node.transforms or not (
        noise is None or (isinstance(noise, Noise) and _equals(noise.family, _GAUSSIAN))
    ):
        return False
    if mechanism is None or isinstance(mechanism, Constant):
        return True
    if not isinstance(mechanism, Linear):
        return False
    factors = [node.parents[w.position] for w in mechanism.weights if isinstance(w, Argument)]
    factors += [node.scale_parent] if node.scale_parent else []
    constant = not any(scm.nodes[name].per_row for name in factors)
    return constant and _equals(mechanism.nonlinearity, _IDENTITY)


def _equals(index: Any, wanted: int) -> bool:
    return not isinstance(index, jax.core.Tracer) and bool(np.all(np.asarray(index) == wanted))


def _exact(
    scm: SCM,
    x: Mapping[str, jax.Array],
    columns: list[dict[str, jax.Array]],
    outcome: str,
    size: int,
) -> jax.Array:
    """Mean of the outcome given jointly Gaussian covariates, from Jacobians in the noise."""
    random = [name for name, node in scm.nodes.items() if node.is_random and node.per_row]
    scales = jnp.array([getattr(scm.nodes[n].noise, "scale", 1.0) for n in random])
    means = jnp.array([getattr(scm.nodes[n].noise, "loc", 0.0) for n in random])

    def linear_part(model: SCM, outputs: list[str]) -> tuple[jax.Array, jax.Array]:
        def values(standard: jax.Array) -> jax.Array:
            noise = dict(zip(random, means + scales * standard, strict=True))
            found = propagate_named(model, noise)
            return jnp.stack([jnp.asarray(found[name], jnp.float32) for name in outputs])

        zero = jnp.zeros(len(random))
        return values(zero), jax.jacfwd(values)(zero)

    covariates = list(x)
    observed = jnp.stack([x[name] for name in covariates], axis=-1) if x else jnp.zeros((size, 0))

    def mean(settings: Mapping[str, jax.Array], row: jax.Array) -> jax.Array:
        centre, slope = linear_part(do(scm, settings), [outcome])
        if not covariates:
            return centre[0]
        x_centre, x_slope = linear_part(scm, covariates)
        # In units of their own spread: a covariate of small units is no rounding of another.
        spread = jnp.linalg.norm(x_slope, axis=1)
        spread = jnp.where(spread > 0, spread, 1.0)
        gain = slope[0] @ jnp.linalg.pinv(x_slope / spread[:, None])
        return centre[0] + gain @ ((row - x_centre) / spread)

    def contrast(settings: list[dict[str, jax.Array]], row: jax.Array) -> jax.Array:
        means = [mean(one, row) for one in settings]
        return means[-1] - means[0] if len(means) > 1 else means[0]

    return jax.vmap(contrast, axis_size=size)(columns, observed)
