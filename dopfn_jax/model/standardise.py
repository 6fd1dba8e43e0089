"""Standardisation by the context rows.

It makes every answer follow affine changes (a > 0) of the outcome and ignore those of a covariate.

Axes: B tasks, N context rows, R rows of either kind, F covariates.
"""

import dataclasses

import jax
import jax.numpy as jnp

# Beyond this many standard deviations inputs grow logarithmically, so that heavy tails stay ordered
# and finite.
LINEAR_RANGE = 5.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaler:
    """Location and scale of covariates and outcome, from the context rows.

    Attributes:
        x_loc: (B, 1, F), in the units of the covariates.
        x_scale: (B, 1, F), positive, in the units of the covariates.
        y_loc: (B, 1), in the units of the outcome.
        y_scale: (B, 1), positive, in the units of the outcome.
    """

    x_loc: jax.Array
    x_scale: jax.Array
    y_loc: jax.Array
    y_scale: jax.Array

    @classmethod
    def fit(cls, context_x: jax.Array, context_y: jax.Array, context_mask: jax.Array) -> "Scaler":
        """Mean and standard deviation over the rows that exist and the cells that are not NaN.

        A covariate or outcome without spread gets scale 1, so that it maps to 0; one without any
        value also gets location 0.

        Args:
            context_x: (B, N, F) covariates, NaN where missing.
            context_y: (B, N) outcomes.
            context_mask: (B, N) bool, rows that exist.
        """
        present = context_mask[..., None] & ~jnp.isnan(context_x)
        x_loc, x_scale = _mean_and_deviation(context_x, present)
        y_loc, y_scale = _mean_and_deviation(context_y, context_mask)
        return cls(x_loc, x_scale, y_loc, y_scale)

    def covariates(self, x: jax.Array) -> jax.Array:
        """Standardised and compressed covariates, NaN where missing: (B, R, F) -> (B, R, F)."""
        missing = jnp.isnan(x)
        # A value in place of NaN keeps NaN out of the derivatives by location and scale.
        standardised = (jnp.where(missing, self.x_loc, x) - self.x_loc) / self.x_scale
        return jnp.where(missing, jnp.nan, compress(standardised))

    def outcome(self, y: jax.Array) -> jax.Array:
        """Standardised outcomes, not compressed: (B, R) -> (B, R)."""
        return (y - self.y_loc) / self.y_scale


def compress(z: jax.Array) -> jax.Array:
    """Identity up to LINEAR_RANGE, logarithmic beyond, with a continuous derivative."""
    excess = jnp.maximum(jnp.abs(z) - LINEAR_RANGE, 0.0)
    return jnp.clip(z, -LINEAR_RANGE, LINEAR_RANGE) + jnp.sign(z) * jnp.log1p(excess)


def expand(z: jax.Array) -> jax.Array:
    """The inverse of `compress`."""
    excess = jnp.maximum(jnp.abs(z) - LINEAR_RANGE, 0.0)
    return jnp.clip(z, -LINEAR_RANGE, LINEAR_RANGE) + jnp.sign(z) * jnp.expm1(excess)


def _mean_and_deviation(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masked mean and standard deviation over axis 1, kept as an axis of length 1."""
    count = jnp.maximum(mask.sum(axis=1, keepdims=True, dtype=values.dtype), 1.0)

    def mean_of(present: jax.Array) -> jax.Array:
        return present.sum(axis=1, keepdims=True) / count

    def largest_of(present: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.abs(present).max(axis=1, keepdims=True, initial=0.0))

    present = jnp.where(mask, values, 0.0)
    mean = mean_of(present)
    # A second step takes the rounding out of the first, so that a constant maps to 0 exactly.
    mean = mean + mean_of(jnp.where(mask, values - mean, 0.0))
    centred = jnp.where(mask, values - mean, 0.0)
    # In units of the spread, squares neither overflow nor vanish, whatever the unit of the values.
    spread = largest_of(centred)
    spread = jnp.where(spread > 0, spread, 1.0)
    variance = mean_of(jnp.square(centred / spread))
    # Rounding leaves a constant with a spread of a few units in the last place.
    varies = spread * jnp.sqrt(variance) > 1e-6 * largest_of(present)
    return mean, jnp.where(varies, spread * jnp.sqrt(jnp.where(varies, variance, 1.0)), 1.0)
