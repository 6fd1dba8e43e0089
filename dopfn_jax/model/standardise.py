"""Standardisation by the context, which makes every answer equivariant to affine changes of y and of each covariate."""

import flax.struct
import jax
import jax.numpy as jnp

# Beyond this many standard deviations inputs grow logarithmically: heavy tails stay ordered and finite.
LINEAR_RANGE = 5.0


@flax.struct.dataclass
class Scaler:
    """Location and scale of covariates and outcome, from the context rows. Leading batch axes as the task has.

    Attributes:
        x_loc, x_scale: (B, 1, F), in the units of the covariates.
        y_loc, y_scale: (B, 1), in the units of the outcome.
    """

    x_loc: jax.Array
    x_scale: jax.Array
    y_loc: jax.Array
    y_scale: jax.Array

    @classmethod
    def fit(cls, context_x: jax.Array, context_y: jax.Array, context_mask: jax.Array) -> "Scaler":
        """Mean and standard deviation over the rows that exist and the cells that are not NaN.

        A column or outcome without spread gets scale 1, so that it maps to 0.

        Args:
            context_x: (B, N, F) covariates.
            context_y: (B, N) outcomes.
            context_mask: (B, N) bool.
        """
        x_loc, x_scale = _mean_and_deviation(context_x, context_mask[..., None] & ~jnp.isnan(context_x))
        y_loc, y_scale = _mean_and_deviation(context_y, context_mask)
        return cls(x_loc, x_scale, y_loc, y_scale)

    def covariates(self, x: jax.Array) -> jax.Array:
        """Standardised covariates, NaN where missing. (B, R, F) -> (B, R, F)."""
        return compress((x - self.x_loc) / self.x_scale)

    def outcome(self, y: jax.Array) -> jax.Array:
        """Standardised outcomes, not compressed. (B, R) -> (B, R)."""
        return (y - self.y_loc) / self.y_scale


def compress(z: jax.Array) -> jax.Array:
    """Identity up to LINEAR_RANGE, logarithmic beyond, with a continuous derivative."""
    excess = jnp.maximum(jnp.abs(z) - LINEAR_RANGE, 0.0)
    return jnp.clip(z, -LINEAR_RANGE, LINEAR_RANGE) + jnp.sign(z) * jnp.log1p(excess)


def _mean_and_deviation(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masked mean and standard deviation over axis 1, kept as an axis of length 1."""
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    present = jnp.where(mask, values, 0.0)
    mean = present.sum(axis=1, keepdims=True) / count
    centred = jnp.where(mask, values - mean, 0.0)
    deviation = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    # Rounding leaves a constant column with a spread of a few units in the last place.
    varies = deviation > 1e-6 * jnp.abs(present).max(axis=1, keepdims=True)
    return mean, jnp.where(varies, deviation, 1.0)
