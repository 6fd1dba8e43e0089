"""From cells to tokens: a token per cell (or group of columns), or one token per row by a column encoder."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dopfn_jax.config import ModelConfig


@flax.struct.dataclass
class Columns:
    """What the context says about the columns; made once per table, used for context and query rows alike.

    Attributes:
        mask: (B, F) bool, columns that exist.
        token_mask: (B, C) bool, tokens of a row that exist.
        readout: (B, F, P, D) linear map from a cell's P features to the row token, or None for cell tokens.
    """

    mask: jax.Array
    token_mask: jax.Array
    readout: jax.Array | None = None


class CellEmbedding(nnx.Module):
    """Tokens of a row: one for each group of covariates, one for the treatment, one for the outcome (the last)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.group = config.features_per_token
        self.cells = nnx.Linear(2 * self.group, config.width, rngs=rngs)
        self.treatment = nnx.Linear(1, config.width, rngs=rngs)
        self.outcome = OutcomeEmbedding(config.width, rngs=rngs)

    def columns(self, x: jax.Array, t: jax.Array, y: jax.Array, mask: jax.Array, covariate_mask: jax.Array) -> Columns:
        groups = _group(covariate_mask, self.group).any(axis=-1)
        return Columns(covariate_mask, jnp.pad(groups, ((0, 0), (0, 2)), constant_values=True))

    def __call__(self, columns: Columns, x: jax.Array, t: jax.Array, y: jax.Array | None) -> jax.Array:
        missing = jnp.isnan(x)
        cells = jnp.stack([jnp.where(missing, 0.0, x), missing.astype(x.dtype)], axis=-1)
        grouped = _group(cells.reshape(*x.shape[:-1], -1), 2 * self.group)
        tokens = jnp.concatenate(
            [
                self.cells(grouped),
                self.treatment(t[..., None])[:, :, None],
                self.outcome(y, t.shape)[:, :, None],
            ],
            axis=2,
        )
        return jnp.swapaxes(tokens, 1, 2)


class RowEmbedding(nnx.Module):
    """One token per row, for any number of columns in any order.

    Every cell gets P features of its value. The context's moments between these features and features of (t, y)
    describe a column; a small network turns the description into the column's own (P, D) map; a row's token is the
    sum over its cells. So columns are told apart by what they do, not by where they stand, and a row costs one
    matrix product whatever the network that makes the maps.
    """

    CELL_FEATURES = 16
    OUTCOME_FEATURES = 16
    DESCRIPTION = 128

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        p, j, h = self.CELL_FEATURES, self.OUTCOME_FEATURES, self.DESCRIPTION
        # Random soft steps at first: centres over the range of a standardised value.
        self.cell_slope = nnx.Param(1.0 + jax.random.uniform(rngs.params(), (p - 2,)))
        self.cell_shift = nnx.Param(jnp.linspace(-2.5, 2.5, p - 2))
        self.moments = nnx.Linear(3, j - 4, rngs=rngs)
        self.describe = nnx.Linear(p * j, h, rngs=rngs)
        self.mix = nnx.Linear(h, h, rngs=rngs)
        self.pool = nnx.Linear(h, h, use_bias=False, rngs=rngs)
        self.readout = nnx.Linear(h, p * config.width, rngs=rngs)
        self.treatment = nnx.Linear(1, config.width, rngs=rngs)
        self.outcome = OutcomeEmbedding(config.width, rngs=rngs)

    def columns(self, x: jax.Array, t: jax.Array, y: jax.Array, mask: jax.Array, covariate_mask: jax.Array) -> Columns:
        ty = jnp.stack([t, y, t * y], axis=-1)
        ones = jnp.ones_like(t)[..., None]
        outcome_features = jnp.concatenate([ones, ty, jnp.tanh(self.moments(ty))], axis=-1)
        outcome_features = jnp.where(mask[..., None], outcome_features, 0.0)
        rows = mask.sum(axis=-1)[:, None, None, None]
        moments = jnp.einsum("bnfp,bnj->bfpj", self._cell_features(x), outcome_features) / rows
        description = nnx.gelu(self.describe(moments.reshape(*moments.shape[:2], -1)))
        # A column also hears what the others are like on average.
        exists = covariate_mask[..., None]
        others = jnp.where(exists, description, 0.0).sum(axis=1, keepdims=True)
        others = self.pool(others / jnp.maximum(exists.sum(axis=1, keepdims=True), 1))
        description = nnx.gelu(self.mix(description) + others)
        # Keeps the sum over cells at the scale of one embedding.
        readout = self.readout(description).reshape(*moments.shape[:3], -1) / self.CELL_FEATURES**0.5
        readout = jnp.where(exists[..., None], readout, 0.0)
        return Columns(covariate_mask, jnp.ones((x.shape[0], 1), bool), readout)

    def __call__(self, columns: Columns, x: jax.Array, t: jax.Array, y: jax.Array | None) -> jax.Array:
        tokens = jnp.einsum("brfp,bfpd->brd", self._cell_features(x), columns.readout)
        tokens = tokens + self.treatment(t[..., None]) + self.outcome(y, t.shape)
        return tokens[:, None]

    def _cell_features(self, x: jax.Array) -> jax.Array:
        """(B, R, F) -> (B, R, F, P); a missing cell has its own feature and no value."""
        missing = jnp.isnan(x)[..., None]
        value = jnp.where(missing, 0.0, x[..., None])
        slope, shift = (jnp.reshape(p[...], (1, 1, 1, -1)) for p in (self.cell_slope, self.cell_shift))
        steps = jnp.where(missing, 0.0, jnp.tanh(slope * (value - shift)))
        return jnp.concatenate([value, missing.astype(x.dtype), steps], axis=-1)


class OutcomeEmbedding(nnx.Module):
    """The outcome of a context row, or the mark of a row whose outcome is asked for."""

    FEATURES = 32

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.shift = nnx.Param(jnp.linspace(-3.0, 3.0, self.FEATURES - 1))
        self.project = nnx.Linear(self.FEATURES, width, rngs=rngs)
        self.unknown = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))

    def __call__(self, y: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
        """(B, R) outcomes, or None with the shape (B, R) -> (B, R, D)."""
        if y is None:
            return jnp.broadcast_to(self.unknown[...], (*shape, self.unknown.shape[0]))
        steps = jnp.tanh(2.0 * (y[..., None] - self.shift[...].reshape(1, 1, -1)))
        return self.project(jnp.concatenate([y[..., None], steps], axis=-1))


def _group(values: jax.Array, size: int) -> jax.Array:
    """(..., F) -> (..., ceil(F / size), size), filled up with zeros."""
    fill = -values.shape[-1] % size
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, fill)])
    return values.reshape(*values.shape[:-1], -1, size)
