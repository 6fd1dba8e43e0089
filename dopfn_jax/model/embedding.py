"""From cells to tokens: one for each cell (or group of columns), or one for each row.

Axes: B tasks, N context rows, R rows of either kind, F covariates, C tokens per row, D width, P
features of a cell.

Everything here is standardised: covariates (NaN where missing) and outcome by the context's mean
and standard deviation, and finite where a row or column does not exist.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dopfn_jax.config import ModelConfig


@flax.struct.dataclass
class Columns:
    """What the context says about the columns, for context and query rows alike.

    Attributes:
        mask: (B, F) bool, columns that exist.
        token_mask: (B, C) bool, tokens of a row that exist.
        readout: (B, F, P, D) linear map from a cell's P features to the row's token, or None where
            a row has several tokens.
    """

    mask: jax.Array
    token_mask: jax.Array
    readout: jax.Array | None = None


class CellEmbedding(nnx.Module):
    """A token for each group of covariates, one for the treatment, one for the outcome (the last).

    Covariates are exchangeable where a group is one column. Otherwise groups are, and the place of
    a column in its group matters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.group = config.features_per_token
        self.cells = nnx.Linear(2 * self.group, config.width, rngs=rngs)
        self.treatment = nnx.Linear(1, config.width, rngs=rngs)
        self.outcome = OutcomeEmbedding(config.width, rngs=rngs)

    def columns(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array,
        covariate_mask: jax.Array,
    ) -> Columns:
        """Which tokens exist.

        Takes what `RowEmbedding.columns` takes; only `covariate_mask`, (B, F) bool, counts.
        """
        groups = _group(covariate_mask, self.group).any(axis=-1)
        token_mask = jnp.pad(groups, ((0, 0), (0, 2)), constant_values=True)
        return Columns(covariate_mask, token_mask)

    def __call__(
        self, columns: Columns, x: jax.Array, t: jax.Array, y: jax.Array | None
    ) -> jax.Array:
        """Tokens (B, C, R, D), C = ceil(F / group) + 2.

        Args:
            columns: from `columns`.
            x: (B, R, F) covariates, 0 where the column does not exist.
            t: (B, R) treatment.
            y: (B, R) outcome of context rows; None for query rows.
        """
        missing = jnp.isnan(x)
        cells = jnp.stack([jnp.where(missing, 0.0, x), missing.astype(x.dtype)], axis=-1)
        grouped = _group(cells.reshape(*x.shape[:-1], 2 * x.shape[-1]), 2 * self.group)
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

    Every cell gets P features of its value. The context's moments between these features and
    features of (t, y) describe a column; a small network turns the description into the column's
    own (P, D) map; a row's token is the sum over its cells. So columns are told apart by what they
    do, not by where they stand, and a row costs one matrix product whatever the network that makes
    the maps.
    """

    CELL_FEATURES = 16
    OUTCOME_FEATURES = 16
    DESCRIPTION = 128

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        p, j, h = self.CELL_FEATURES, self.OUTCOME_FEATURES, self.DESCRIPTION
        # Random soft steps at first: centres over the range of a standardised value.
        self.cell_slope = nnx.Param(1.0 + jax.random.uniform(rngs.params(), (p - 2,), jnp.float32))
        self.cell_shift = nnx.Param(jnp.linspace(-2.5, 2.5, p - 2, dtype=jnp.float32))
        self.moments = nnx.Linear(3, j - 4, rngs=rngs)
        self.describe = nnx.Linear(p * j, h, rngs=rngs)
        self.mix = nnx.Linear(h, h, rngs=rngs)
        self.pool = nnx.Linear(h, h, use_bias=False, rngs=rngs)
        self.readout = nnx.Linear(h, p * config.width, rngs=rngs)
        self.treatment = nnx.Linear(1, config.width, rngs=rngs)
        self.outcome = OutcomeEmbedding(config.width, rngs=rngs)

    def columns(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array,
        covariate_mask: jax.Array,
    ) -> Columns:
        """Each column's map, from its moments with treatment and outcome.

        Args:
            x: (B, N, F) covariates of the context.
            t: (B, N) treatment.
            y: (B, N) outcome.
            mask: (B, N) bool, rows that exist.
            covariate_mask: (B, F) bool, columns that exist.
        """
        ty = jnp.stack([t, y, t * y], axis=-1)
        ones = jnp.ones_like(t)[..., None]
        outcome_features = jnp.concatenate([ones, ty, jnp.tanh(self.moments(ty))], axis=-1)
        outcome_features = jnp.where(mask[..., None], outcome_features, 0.0)
        rows = jnp.maximum(mask.sum(axis=-1, dtype=x.dtype), 1.0)[:, None, None]
        moments = jnp.einsum("bnfp,bnj->bfpj", self._cell_features(x), outcome_features)
        tasks, features, p, j = moments.shape
        moments = moments.reshape(tasks, features, p * j) / rows
        description = nnx.gelu(self.describe(moments))
        # A column also hears what the others are like on average.
        exists = covariate_mask[..., None]
        others = jnp.where(exists, description, 0.0).sum(axis=1, keepdims=True)
        count = jnp.maximum(exists.sum(axis=1, keepdims=True, dtype=x.dtype), 1.0)
        description = nnx.gelu(self.mix(description) + self.pool(others / count))
        # Keeps the sum over cells at the scale of one embedding.
        readout = jnp.where(exists, self.readout(description) / p**0.5, 0.0)
        readout = readout.reshape(tasks, features, p, self.readout.out_features // p)
        return Columns(covariate_mask, jnp.ones((tasks, 1), bool), readout)

    def __call__(
        self, columns: Columns, x: jax.Array, t: jax.Array, y: jax.Array | None
    ) -> jax.Array:
        """Tokens (B, 1, R, D); arguments as for `CellEmbedding`."""
        tokens = jnp.einsum("brfp,bfpd->brd", self._cell_features(x), columns.readout)
        tokens = tokens + self.treatment(t[..., None]) + self.outcome(y, t.shape)
        return tokens[:, None]

    def _cell_features(self, x: jax.Array) -> jax.Array:
        """(B, R, F) -> (B, R, F, P); a missing cell has its own feature and no value."""
        missing = jnp.isnan(x)[..., None]
        value = jnp.where(missing, 0.0, x[..., None])
        slope, shift = (
            jnp.reshape(p[...], (1, 1, 1, -1)) for p in (self.cell_slope, self.cell_shift)
        )
        steps = jnp.where(missing, 0.0, jnp.tanh(slope * (value - shift)))
        return jnp.concatenate([value, missing.astype(x.dtype), steps], axis=-1)


class OutcomeEmbedding(nnx.Module):
    """The outcome of a context row, or the mark of a row whose outcome is asked for."""

    FEATURES = 32

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.shift = nnx.Param(jnp.linspace(-3.0, 3.0, self.FEATURES - 1, dtype=jnp.float32))
        self.project = nnx.Linear(self.FEATURES, width, rngs=rngs)
        self.unknown = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), jnp.float32))

    def __call__(self, y: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
        """(B, R) outcomes, or None with the shape (B, R) -> (B, R, D)."""
        if y is None:
            return jnp.broadcast_to(self.unknown[...], (*shape, self.unknown.shape[0]))
        steps = jnp.tanh(2.0 * (y[..., None] - self.shift[...].reshape(1, 1, -1)))
        return self.project(jnp.concatenate([y[..., None], steps], axis=-1))


def _group(values: jax.Array, size: int) -> jax.Array:
    """(..., F) -> (..., ceil(F / size), size), filled up with zeros."""
    *leading, length = values.shape
    groups = -(-length // size)
    values = jnp.pad(values, [(0, 0)] * len(leading) + [(0, groups * size - length)])
    return values.reshape(*leading, groups, size)
