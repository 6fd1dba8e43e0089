"""Two ridge regressions of a context, whose predictions the transformer reads beside the cells.

Averaging noise away over hundreds of rows and dozens of columns is what least squares does exactly
and what a small transformer learns last; given its answers, the network only has to learn when to
trust them and what they miss. Context rows get leave-one-out predictions, so they look like those
of query rows, however many columns there are.

Axes: B tasks, N context rows, R rows of either kind, F covariates, P terms of a regression.

Everything here is standardised: covariates (NaN where missing) and outcome by the context's mean
and standard deviation.
"""

import flax.struct
import jax
import jax.numpy as jnp

from dopfn_jax.model.standardise import compress

# Numbers per row: prediction and effect of the rich fit, prediction of the cautious one, leverage,
# effect of the cautious one, and both fits' share of explained variance, left-one-out.
ROW_FEATURES = 7
# Numbers per row that `leanings` makes of them.
LEANINGS = 4
# Penalty: this, plus this per context row; in units of a standardised term. It also bounds how much
# the normal matrix can magnify rounding where rows are fewer than terms.
_PENALTY, _PENALTY_PER_ROW = 1.0, 1e-3
# Squares grow no further beyond so many standard deviations.
_WIDEST = 5.0
# A row's leverage is 1 where it alone decides its prediction: leaving it out says nothing then.
_LEAST_SLACK = 0.1
# Accelerators would round products to TF32 or bfloat16; what nearly noiseless outcomes leave over
# is smaller than that.
_exactly = jax.default_matmul_precision("highest")


@flax.struct.dataclass
class Ridge:
    """A ridge regression: coefficients (B, P), and the inverse of its normal matrix (B, P, P)."""

    coefficients: jax.Array
    inverse: jax.Array

    @classmethod
    def fit(cls, gram: jax.Array, moments: jax.Array, penalty: jax.Array) -> "Ridge":
        """Solves (gram + diag(penalty)) c = moments; all zero where rounding forbids it.

        Args:
            gram: (B, P, P) sums of products of the terms.
            moments: (B, P) sums of their products with the outcome.
            penalty: (B, P), positive.
        """
        inverse = invert(gram + jax.vmap(jnp.diag)(penalty))
        solved = jnp.isfinite(inverse).all(axis=(-2, -1), keepdims=True)
        inverse = jnp.where(solved, inverse, 0.0)
        return cls(jnp.einsum("bpq,bq->bp", inverse, moments), inverse)

    def predict(self, terms: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Predictions and leverages, (B, R) each, of rows with these terms (B, R, P).

        Args:
            terms: of the rows.
            y: (B, R) their outcomes if the rows were fitted: each is then predicted without itself.
        """
        fitted = jnp.einsum("brp,bp->br", terms, self.coefficients)
        leverage = jnp.einsum("brp,bpq,brq->br", terms, self.inverse, terms)
        if y is None:
            # On the scale of fitted rows: what it would be had the row been among them.
            return fitted, leverage / (1.0 + leverage)
        slack = jnp.maximum(1.0 - leverage, _LEAST_SLACK)
        return y - (y - fitted) / slack, leverage


def invert(matrix: jax.Array) -> jax.Array:
    """Inverses of positive definite matrices (B, P, P), not finite where rounding forbids it.

    Gauss-Jordan elimination, and a step of Newton's method that takes most of its rounding out.
    Nothing but products and sums: a library's factorisation would be another program on every
    platform, cannot be exported for all of them, and has deadlocked XLA's thread pool on CPUs.
    """

    def eliminate(k: jax.Array, a: jax.Array) -> jax.Array:
        chosen = jnp.arange(a.shape[-1]) == k
        row = jax.lax.dynamic_index_in_dim(a, k, axis=1)
        column = jax.lax.dynamic_index_in_dim(a, k, axis=2)
        pivot = jax.lax.dynamic_index_in_dim(row, k, axis=2)
        scaled = jnp.where(chosen[None, None], 1.0, row) / pivot
        kept = jnp.where(chosen[None, :, None] | chosen[None, None], 0.0, a)
        return jnp.where(chosen[None, :, None], scaled, kept - column * scaled)

    inverse = jax.lax.fori_loop(0, matrix.shape[-1], eliminate, matrix)
    return 2.0 * inverse - inverse @ (matrix @ inverse)


@flax.struct.dataclass
class LinearFit:
    """A rich fit (squares, and products with the treatment) and a cautious one (neither).

    Attributes:
        t_loc, t_scale: (B, 1), of the treatment.
        covariate_mask: (B, F) bool, columns that exist.
        rich, cautious: the regressions, P = 2 + 3 F and P = 2 + F.
        explained: (B, 2) by fit, share of the outcome's variance, left-one-out, at least -1.
    """

    t_loc: jax.Array
    t_scale: jax.Array
    covariate_mask: jax.Array
    rich: Ridge
    cautious: Ridge
    explained: jax.Array

    @classmethod
    @_exactly
    def fit(
        cls, x: jax.Array, t: jax.Array, y: jax.Array, mask: jax.Array, covariate_mask: jax.Array
    ) -> "LinearFit":
        """Fits the context.

        Args:
            x: (B, N, F) covariates.
            t: (B, N) treatment.
            y: (B, N) outcome.
            mask: (B, N) bool, rows that exist.
            covariate_mask: (B, F) bool, columns that exist.
        """
        exists = mask.astype(t.dtype)
        rows = jnp.maximum(exists.sum(axis=1, keepdims=True), 1.0)
        t_loc = (t * exists).sum(axis=1, keepdims=True) / rows
        variance = (jnp.square(t - t_loc) * exists).sum(axis=1, keepdims=True) / rows
        t_scale = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
        terms = _terms(x, (t - t_loc) / t_scale, covariate_mask) * exists[..., None]
        y = y * exists
        gram = jnp.einsum("bnp,bnq->bpq", terms, terms)
        moments = jnp.einsum("bnp,bn->bp", terms, y)
        penalty = jnp.broadcast_to(_PENALTY + _PENALTY_PER_ROW * rows, moments.shape)
        rich = Ridge.fit(gram, moments, penalty)
        # As if all columns together explained about as much as the noise.
        few, covariates = 2 + x.shape[-1], covariate_mask.sum(axis=-1, keepdims=True)
        extra = jnp.where(jnp.arange(few)[None] < 2, 0.0, covariates.astype(t.dtype))
        cautious = Ridge.fit(gram[:, :few, :few], moments[:, :few], penalty[:, :few] + extra)
        total = jnp.maximum(jnp.square(y).sum(axis=1), 1e-6)
        explained = []
        for ridge in (rich, cautious):
            error = (y - ridge.predict(terms[..., : ridge.coefficients.shape[-1]], y)[0]) * exists
            explained.append(1.0 - jnp.minimum(jnp.square(error).sum(axis=1) / total, 2.0))
        return cls(t_loc, t_scale, covariate_mask, rich, cautious, jnp.stack(explained, axis=-1))

    @_exactly
    def row_features(self, x: jax.Array, t: jax.Array, y: jax.Array | None) -> jax.Array:
        """What the fits say about each row: (B, R, ROW_FEATURES).

        Args:
            x: (B, R, F) covariates.
            t: (B, R) treatment.
            y: (B, R) outcome of context rows; None for query rows.
        """
        terms = _terms(x, (t - self.t_loc) / self.t_scale, self.covariate_mask)
        few = self.cautious.coefficients.shape[-1]
        rich, leverage = self.rich.predict(terms, y)
        cautious, _ = self.cautious.predict(terms[..., :few], y)
        coefficients, columns = self.rich.coefficients, x.shape[-1]
        by_column = coefficients[:, 2 + 2 * columns :]
        varying = jnp.einsum("brf,bf->br", terms[..., 2 : 2 + columns], by_column)
        rich_effect = (coefficients[:, 1:2] + varying) / self.t_scale
        cautious_effect = self.cautious.coefficients[:, 1:2] / self.t_scale
        shared = (cautious_effect, *jnp.split(self.explained, 2, axis=-1))
        shared = tuple(jnp.broadcast_to(value, t.shape) for value in shared)
        return compress(jnp.stack([rich, rich_effect, cautious, leverage, *shared], axis=-1))


def leanings(features: jax.Array, t: jax.Array) -> jax.Array:
    """Where the fits say that y lies, and which way the treatment moves it: (B, R, LEANINGS).

    Args:
        features: (B, R, ROW_FEATURES) of `LinearFit.row_features`.
        t: (B, R) treatment.
    """
    rich, rich_effect, cautious, _, effect, *_ = jnp.moveaxis(features, -1, 0)
    arm = t - 0.5
    return jnp.stack([rich, cautious, rich_effect * arm, effect * arm], axis=-1)


def _terms(x: jax.Array, t: jax.Array, covariate_mask: jax.Array) -> jax.Array:
    """(B, R, 2 + 3 F): one, treatment, covariates, their squares, their products with treatment."""
    known = covariate_mask[:, None] & ~jnp.isnan(x)
    z = jnp.where(known, x, 0.0)
    square = jnp.where(known, jnp.square(jnp.clip(z, -_WIDEST, _WIDEST)) - 1.0, 0.0)
    arm = t[..., None]
    return jnp.concatenate([jnp.ones_like(arm), arm, z, square, arm * z], axis=-1)
