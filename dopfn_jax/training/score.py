"""How well a model answers a batch of tasks: likelihood, errors of outcomes, errors of effects."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dopfn_jax.model.standardise import Scaler
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task

# Standardised targets beyond this are moved to it, so that the mean loss does not hang on a few
# heavy tails. It lies in the outermost buckets, within which no gradient depends on the target.
TARGET_LIMIT = 60.0
# Errors of effects count linearly beyond as many predicted standard deviations.
EFFECT_LIMIT = 3.0


def ask_both_arms(task: Task, rows: int) -> Task:
    """The last `rows` query rows, each asked under its `query_t` and then under the other arm.

    Args:
        task: a batch of tasks with their potential outcomes.
        rows: R, at most M.

    Returns:
        A batch with 2 R query rows, of which i and i + R are the same unit, with the same noise.

    Raises:
        ValueError: the tasks came without potential outcomes.
    """
    if task.y0 is None or task.y1 is None:
        raise ValueError("task.y0 is None: sample tasks with potential_outcomes=True")

    def twice(values: jax.Array, others: jax.Array) -> jax.Array:
        return jnp.concatenate([values[..., -rows:], others[..., -rows:]], axis=-1)

    other_t = jnp.where(task.query_mask, 1.0 - task.query_t, 0.0)
    other_y = jnp.where(other_t > 0.5, task.y1, task.y0)
    return dataclasses.replace(
        task,
        query_x=jnp.concatenate([task.query_x[:, -rows:]] * 2, axis=1),
        query_t=twice(task.query_t, other_t),
        query_y=twice(task.query_y, other_y),
        query_mask=twice(task.query_mask, task.query_mask),
        y0=None,
        y1=None,
        query_draws=None
        if task.query_draws is None or task.other_draws is None
        else twice(task.query_draws, task.other_draws),
        other_draws=None,
    )


@flax.struct.dataclass
class Score:
    """How well a model answers the queries of a batch of tasks, on the standardised y axis.

    Attributes:
        log_likelihood: (B, M) of the targets; where rows have several draws, their mean.
        error: (B, M) the mean less the target, or less the mean of its draws.
        variance: (B, M) that the model predicts.
        weight: (B, M) 1, or 0 where the row or its task is masked.
    """

    log_likelihood: jax.Array
    error: jax.Array
    variance: jax.Array
    weight: jax.Array

    @property
    def total(self) -> jax.Array:
        """Sum of the negative log-likelihoods of the rows that count, ()."""
        return -(self.log_likelihood * self.weight).sum()

    @property
    def loss(self) -> jax.Array:
        """Their mean, () (Do-PFN, Algorithm 1)."""
        return self.total / jnp.maximum(self.weight.sum(), 1.0)

    @property
    def effect_error(self) -> jax.Array:
        """(B, M / 2) errors of the units' effects, for the queries of `ask_both_arms`.

        The noise that a unit has under either treatment alike is in neither of them.
        """
        return self.error[:, : self.error.shape[1] // 2] - self.error[:, self.error.shape[1] // 2 :]

    @property
    def effect_total(self) -> jax.Array:
        """Sum over rows of the Huber loss of the effects, in predicted standard deviations, ().

        The unit is not trained by it, so that the conditional mean of the effect has the least
        loss but for what lies beyond EFFECT_LIMIT.
        """
        half = self.error.shape[1] // 2
        spread = jnp.sqrt((self.variance[:, :half] + self.variance[:, half:]) / 2)
        errors = self.effect_error / jax.lax.stop_gradient(spread)
        return (
            2 * (optax.losses.huber_loss(errors, delta=EFFECT_LIMIT) * self.weight[:, :half]).sum()
        )


def answer(model: DoPFN, task: Task) -> tuple[jax.Array, Scaler]:
    """The model's logits (B, M, Q) for the queries of a batch of tasks, and its standardisation."""
    return model(
        task.context_x,
        task.context_t,
        task.context_y,
        task.context_mask,
        task.covariate_mask,
        task.query_x,
        task.query_t,
    )


def score(model: DoPFN, task: Task) -> Score:
    """Compares the model's answers with the targets of a batch of tasks."""
    logits, scaler = answer(model, task)
    prediction, target = model.distribution(logits), scaler.outcome(task.query_y)
    targets = target[None]
    if task.query_draws is not None:
        draws = jax.vmap(scaler.outcome, in_axes=1)(task.query_draws)
        targets = jnp.concatenate([targets, draws])
    limited = jnp.clip(targets, -TARGET_LIMIT, TARGET_LIMIT)
    return Score(
        log_likelihood=prediction.log_prob(limited).mean(axis=0),
        error=prediction.mean - targets.mean(axis=0),
        variance=prediction.variance,
        weight=(task.query_mask & task.valid[:, None]).astype(jnp.float32),
    )
