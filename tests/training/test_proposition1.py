"""Proposition 1 of the Do-PFN paper: training on tasks leads to the posterior predictive.

A conjugate prior gives that in closed form: y | do(t) ~ Normal(mu_t, NOISE^2) in both the table and
the queries, mu_0 and mu_1 ~ Normal(0, 1), and a covariate that has nothing to do with it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dopfn_jax.config import ModelConfig, TrainingConfig
from dopfn_jax.model.bar_distribution import fit_borders
from dopfn_jax.model.standardise import Scaler
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task
from dopfn_jax.training.optimizer import make_optimizer
from dopfn_jax.training.step import score

NOISE = 0.5
TASKS, CONTEXT, QUERIES = 64, 12, 12


@pytest.fixture(scope="module", autouse=True)
def _optimise() -> Iterator[None]:
    """Hundreds of steps: worth a program that is compiled well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Posterior(NamedTuple):
    """Of each query's outcome, (B, M), in units of y."""

    mean: jax.Array
    deviation: jax.Array


@jax.jit
def sample(key: jax.Array) -> tuple[Task, Posterior]:
    keys = jax.random.split(key, 6)
    means = jax.random.normal(keys[0], (TASKS, 2))
    t = jax.random.bernoulli(keys[1], 0.4, (TASKS, CONTEXT + QUERIES)).astype(int)
    y = jnp.take_along_axis(means, t, axis=1) + NOISE * jax.random.normal(keys[2], t.shape)
    x = jax.random.normal(keys[3], (*t.shape, 1))
    rows = jax.random.randint(keys[4], (TASKS, 1), 6, CONTEXT + 1)
    mask = jnp.arange(CONTEXT)[None] < rows
    task = Task(
        context_x=x[:, :CONTEXT],
        context_t=t[:, :CONTEXT].astype(float),
        context_y=jnp.where(mask, y[:, :CONTEXT], 0.0),
        context_mask=mask,
        query_x=x[:, CONTEXT:],
        query_t=t[:, CONTEXT:].astype(float),
        query_y=y[:, CONTEXT:],
        query_mask=jnp.ones((TASKS, QUERIES), bool),
        covariate_mask=jnp.ones((TASKS, 1), bool),
        valid=jnp.ones(TASKS, bool),
    )
    same_arm = mask[:, None] & (t[:, :CONTEXT][:, None] == t[:, CONTEXT:][..., None])
    precision = same_arm.sum(axis=-1) / NOISE**2 + 1.0
    total = jnp.where(same_arm, task.context_y[:, None], 0.0).sum(axis=-1)
    return task, Posterior(total / NOISE**2 / precision, jnp.sqrt(NOISE**2 + 1 / precision))


def normal_log_prob(y: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    return jax.scipy.stats.norm.logpdf(y, mean, deviation)


@jax.jit
def report(model: DoPFN, key: jax.Array) -> dict[str, jax.Array]:
    """NLL above that of the closed form, and distance of the means in its standard deviations."""
    keys = jax.random.split(key, 8)
    results = [report_on(model, *sample(k)) for k in keys]
    return jax.tree.map(lambda *values: jnp.stack(values).mean(), *results)


def report_on(model: DoPFN, task: Task, posterior: Posterior) -> dict[str, jax.Array]:
    scaler = Scaler.fit(task.context_x, task.context_y, task.context_mask)
    best = -normal_log_prob(task.query_y, *posterior).mean()
    # A density per standard deviation of the table becomes one per unit of y.
    units = jnp.log(scaler.y_scale).mean()
    logits, _ = model(
        task.context_x,
        task.context_t,
        task.context_y,
        task.context_mask,
        task.covariate_mask,
        task.query_x,
        task.query_t,
    )
    mean = model.distribution(logits).mean * scaler.y_scale + scaler.y_loc
    blind = normal_log_prob(task.query_y, scaler.y_loc, scaler.y_scale)

    def distance(mean: jax.Array) -> jax.Array:
        return jnp.sqrt((((mean - posterior.mean) / posterior.deviation) ** 2).mean())

    return {
        "nll": score(model, task).loss + units - best,
        "mean": distance(mean),
        "blind_nll": -blind.mean() - best,
        "blind_mean": distance(jnp.broadcast_to(scaler.y_loc, mean.shape)),
    }


def train(steps: int, width: int) -> tuple[DoPFN, DoPFN]:
    """The model before and after training."""
    config = ModelConfig(
        width=width, layers=2, heads=2, mlp_ratio=2, features_per_token=0, buckets=40
    )
    # Built under jit: one program instead of one for every operation.
    model = nnx.jit(lambda: DoPFN(config, rngs=nnx.Rngs(0)))()
    task, _ = sample(jax.random.key(1))
    scaler = Scaler.fit(task.context_x, task.context_y, task.context_mask)
    model.borders[...] = fit_borders(scaler.outcome(task.query_y).ravel(), config.buckets)
    graphdef, params, constants = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(
        TrainingConfig(steps=steps, optimizer="adamw", learning_rate=4e-3, warmup_steps=50)
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


def test_closed_form_is_calibrated() -> None:
    """The test's own yardstick: standardised residuals are standard normal."""
    task, posterior = sample(jax.random.key(5))
    z = (task.query_y - posterior.mean) / posterior.deviation
    assert abs(float(z.mean())) < 0.15
    assert abs(float(z.std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("steps", "width", "nll", "mean"),
    [(600, 32, 0.06, 0.25), pytest.param(4000, 64, 0.02, 0.12, marks=pytest.mark.slow)],
)
def test_the_model_approaches_the_posterior_predictive(
    steps: int, width: int, nll: float, mean: float
) -> None:
    untrained, trained = train(steps, width)
    before = {name: float(v) for name, v in report(untrained, jax.random.key(9)).items()}
    after = {name: float(v) for name, v in report(trained, jax.random.key(9)).items()}
    # What a model that had learned nothing, or did not read the table, would show.
    assert min(before["nll"], after["blind_nll"]) > 5 * nll, (before, after)
    assert min(before["mean"], after["blind_mean"]) > 2.5 * mean, (before, after)
    # Nothing beats the posterior predictive by more than chance.
    assert -0.02 < after["nll"] < nll, after
    assert after["mean"] < mean, after
