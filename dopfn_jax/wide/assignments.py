"""How units come by their treatment. To add a way, write it here and name it in ASSIGNMENTS.

Args of all:
    score: (R,) what the covariates say, standardised.
    u: (R,) uniform draws, one per unit.
    rate: () wanted share of treated units.
    steepness: () how strongly the score decides where it does not decide alone.

Returns of all: (R,) bool, True where treated.
"""

import jax
import jax.numpy as jnp


def threshold(score: jax.Array, u: jax.Array, rate: jax.Array, steepness: jax.Array) -> jax.Array:
    """Treated where the score is high: no overlap, as in the paper's prior.

    Units with equal scores are treated alike, so where many are equal fewer than wanted are.
    """
    return score > jnp.quantile(score, 1.0 - rate)


def logistic(score: jax.Array, u: jax.Array, rate: jax.Array, steepness: jax.Array) -> jax.Array:
    """Bernoulli(sigmoid(steepness * score + b)): from a trial to a threshold."""
    logit = steepness * score
    # The shift that gives about the wanted rate on average, for normal scores (probit formula);
    # steep scores give rare arms about half of it.
    shift = jnp.sqrt(1.0 + jnp.pi / 8.0 * steepness**2) * jax.scipy.special.logit(rate)
    return u < jax.nn.sigmoid(logit + shift)


def coin(score: jax.Array, u: jax.Array, rate: jax.Array, steepness: jax.Array) -> jax.Array:
    """Independent of everything: a randomised trial."""
    return u < rate


ASSIGNMENTS = {"threshold": threshold, "logistic": logistic, "coin": coin}
