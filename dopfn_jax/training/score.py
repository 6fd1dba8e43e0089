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
# Average effects need be no more exact than this, in standard deviations of y.
EFFECT_TOLERANCE = 0.05


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
        query_t: (B, M) the treatment that was asked about.
        per_noise: (B, 1) variance of a difference in means of the context's arms, where noise has
            variance 1.
    """

    log_likelihood: jax.Array
    error: jax.Array
    variance: jax.Array
    weight: jax.Array
    query_t: jax.Array
    per_noise: jax.Array

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
        half = self.error.shape[1] // 2
        sign = jnp.where(self.query_t[:, :half] > 0.5, 1.0, -1.0)
        return sign * (self.error[:, :half] - self.error[:, half:])

    @property
    def effect_total(self) -> jax.Array:
        """Sum over rows of the Huber loss of the effects, in predicted standard deviations, ().

        The unit is not trained by it, so that the conditional mean of the effect has the least
        loss but for what lies beyond EFFECT_LIMIT.
        """
        errors = self.effect_error / jnp.sqrt(self._noise)
        weight = self.weight[:, : errors.shape[1]]
        return 2 * (optax.losses.huber_loss(errors, delta=EFFECT_LIMIT) * weight).sum()

    @property
    def average_effect_total(self) -> jax.Array:
        """Sum over rows of the Huber loss of their task's average effect, ().

        In standard errors that a difference in means would have, or EFFECT_TOLERANCE: so, other
        than in `effect_total`, tasks that are mostly noise count as much as others.
        """
        weight = self.weight[:, : self.error.shape[1] // 2]
        rows = weight.sum(axis=1)
        error, noise = (
            (values * weight).sum(axis=1) / jnp.maximum(rows, 1.0)
            for values in (self.effect_error, self._noise)
        )
        errors = error / jnp.sqrt(EFFECT_TOLERANCE**2 + noise * self.per_noise[:, 0])
        return 2 * (optax.losses.huber_loss(errors, delta=EFFECT_LIMIT) * rows).sum()

    @property
    def _noise(self) -> jax.Array:
        """Predicted variance, mean of both arms, (B, M / 2); errors do not train it."""
        half = self.error.shape[1] // 2
        return jax.lax.stop_gradient((self.variance[:, :half] + self.variance[:, half:]) / 2)


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
    treated = (task.context_mask & (task.context_t > 0.5)).sum(axis=1, keepdims=True)
    controls = task.context_mask.sum(axis=1, keepdims=True) - treated
    limited = jnp.clip(targets, -TARGET_LIMIT, TARGET_LIMIT)
    return Score(
        log_likelihood=prediction.log_prob(limited).mean(axis=0),
        error=prediction.mean - targets.mean(axis=0),
        variance=prediction.variance,
        weight=(task.query_mask & task.valid[:, None]).astype(jnp.float32),
        query_t=task.query_t,
        per_noise=1.0 / jnp.maximum(treated, 1) + 1.0 / jnp.maximum(controls, 1),
    )
