"""Proposition 1 of the Do-PFN paper: training on tasks leads to the posterior predictive.

Here it has a closed form. Outcomes are y = a + s (m t + noise), in the table and in the queries
alike, with standard normal noise, an effect m ~ Normal(0, EFFECT^2), and a covariate that has
nothing to do with it. The model standardises y by the table, so it cannot know a or s; the best
prediction of that kind is the posterior under the prior da ds / s (the right Haar measure of
locations and scales), whatever a and s are. Given s, (a, s m) is normal: a normal-inverse-gamma
model, whose posterior predictive is a Student t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import scipy.stats
from flax import nnx

from dopfn_jax.config import ModelConfig, TrainingConfig
from dopfn_jax.model.bar_distribution import fit_borders
from dopfn_jax.model.standardise import Scaler
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task
from dopfn_jax.training.optimizer import make_optimizer
from dopfn_jax.training.score import answer, score

EFFECT = 2.0
TASKS, CONTEXT, QUERIES = 32, 12, 8


pytestmark = pytest.mark.usefixtures("optimise")


class Posterior(NamedTuple):
    """Student t of each query's outcome, (B, M), in units of y."""

    degrees: jax.Array
    mean: jax.Array
    scale: jax.Array


@jax.jit
def sample(key: jax.Array) -> tuple[Task, Posterior]:
    keys = jax.random.split(key, 6)
    location, scale = 3.0, 5.0  # any will do
    effect = EFFECT * jax.random.normal(keys[0], (TASKS, 1))
    t = jax.random.bernoulli(keys[1], 0.4, (TASKS, CONTEXT + QUERIES)).astype(float)
    y = location + scale * (effect * t + jax.random.normal(keys[2], t.shape))
    x = jax.random.normal(keys[3], (*t.shape, 1))
    rows = jax.random.randint(keys[4], (TASKS, 1), 6, CONTEXT + 1)
    mask = jnp.arange(CONTEXT)[None] < rows
    task = Task(
        context_x=x[:, :CONTEXT],
        context_t=t[:, :CONTEXT],
        context_y=jnp.where(mask, y[:, :CONTEXT], 0.0),
        context_mask=mask,
        query_x=x[:, CONTEXT:],
        query_t=t[:, CONTEXT:],
        query_y=y[:, CONTEXT:],
        query_mask=jnp.ones((TASKS, QUERIES), bool),
        covariate_mask=jnp.ones((TASKS, 1), bool),
        valid=jnp.ones(TASKS, bool),
    )
    return task, jax.vmap(posterior_of)(task)


def posterior_of(task: Task) -> Posterior:
    """Bayesian linear regression of y on (1, t), of one table."""

    def design(t: jax.Array) -> jax.Array:
        return jnp.stack([jnp.ones_like(t), t], axis=1)

    x = jnp.where(task.context_mask[:, None], design(task.context_t), 0.0)
    degrees = task.context_mask.sum() - 1
    precision = x.T @ x + jnp.diag(jnp.array([0.0, 1 / EFFECT**2]))
    # Centred, so that nothing cancels in the sum of squares.
    centre = task.context_y.sum() / task.context_mask.sum()
    y = jnp.where(task.context_mask, task.context_y - centre, 0.0)
    coefficients = jnp.linalg.solve(precision, x.T @ y)
    variance = (y @ y - coefficients @ precision @ coefficients) / degrees
    query = design(task.query_t)
    spread = 1 + jnp.einsum("mi,ij,mj->m", query, jnp.linalg.inv(precision), query)
    return Posterior(
        jnp.full(QUERIES, degrees), centre + query @ coefficients, jnp.sqrt(variance * spread)
    )


@jax.jit
def report(model: DoPFN, key: jax.Array) -> dict[str, jax.Array]:
    """NLL above that of the closed form, and distance of the means in its scales."""
    # One after another: a program for one batch compiles in an eighth of the time.
    results = jax.lax.map(lambda k: report_on(model, *sample(k)), jax.random.split(key, 8))
    return jax.tree.map(jnp.mean, results)


def report_on(model: DoPFN, task: Task, posterior: Posterior) -> dict[str, jax.Array]:
    scaler = Scaler.fit(task.context_x, task.context_y, task.context_mask)
    best = -jax.scipy.stats.t.logpdf(task.query_y, *posterior).mean()
    # A density per standard deviation of the table becomes one per unit of y.
    units = jnp.log(scaler.y_scale).mean()
    logits, _ = answer(model, task)
    mean = model.distribution(logits).mean * scaler.y_scale + scaler.y_loc
    blind = jax.scipy.stats.norm.logpdf(task.query_y, scaler.y_loc, scaler.y_scale)

    def distance(mean: jax.Array) -> jax.Array:
        return jnp.sqrt((((mean - posterior.mean) / posterior.scale) ** 2).mean())

    return {
        "nll": score(model, task).loss + units - best,
        "mean": distance(mean),
        "blind_nll": -blind.mean() - best,
        "blind_mean": distance(jnp.broadcast_to(scaler.y_loc, mean.shape)),
    }


def standardised_outcomes() -> jax.Array:
    tasks, _ = jax.vmap(sample)(jax.random.split(jax.random.key(1), 16))
    task = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tasks)
    scaler = Scaler.fit(task.context_x, task.context_y, task.context_mask)
    return scaler.outcome(task.query_y).ravel()


def train(steps: int, width: int) -> tuple[DoPFN, DoPFN]:
    """The model before and after training."""
    config = ModelConfig(
        width=width, layers=2, heads=2, mlp_ratio=2, features_per_token=0, buckets=100
    )
    # Built under jit: one program instead of one for every operation.
    model = nnx.jit(lambda: DoPFN(config, rngs=nnx.Rngs(0)))()
    model.borders[...] = fit_borders(standardised_outcomes(), config.buckets, uniform_share=0.5)
    graphdef, params, constants = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(
        TrainingConfig(steps=steps, optimizer="adamw", learning_rate=5e-3, warmup_steps=50)
    )

    def step(carry, key):
        params, opt_state = carry
        task, _ = sample(key)
        gradient = jax.grad(lambda p: score(nnx.merge(graphdef, p, constants), task).loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def run(params: nnx.State) -> nnx.State:
        keys = jax.random.split(jax.random.key(2), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return model, nnx.merge(graphdef, run(params), constants)


def test_the_closed_form_is_calibrated() -> None:
    """The test's own yardstick: outcomes are uniform in their posterior quantiles."""
    task, posterior = sample(jax.random.key(5))
    z = (task.query_y - posterior.mean) / posterior.scale
    quantiles = scipy.stats.t.cdf(z, posterior.degrees)
    assert scipy.stats.kstest(quantiles.ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("steps", "width", "nll", "mean"),
    [(600, 32, 0.07, 0.2), pytest.param(4000, 64, 0.035, 0.08, marks=pytest.mark.slow)],
)
def test_the_model_approaches_the_posterior_predictive(
    steps: int, width: int, nll: float, mean: float
) -> None:
    untrained, trained = train(steps, width)
    before = {name: float(v) for name, v in report(untrained, jax.random.key(9)).items()}
    after = {name: float(v) for name, v in report(trained, jax.random.key(9)).items()}
    # What a model that had learned nothing, or did not read the table, would show.
    assert min(before["nll"], after["blind_nll"]) > 3 * nll, (before, after)
    assert min(before["mean"], after["blind_mean"]) > 3 * mean, (before, after)
    # Nothing beats the posterior predictive by more than chance.
    assert -0.02 < after["nll"] < nll, after
    assert after["mean"] < mean, after
