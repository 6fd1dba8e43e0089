"""The transformer: context rows read each other, query rows read the context, nobody a query.

Axes: B tasks, N context rows, M query rows, R rows of either kind, F covariates, C tokens per row,
D width, H heads, L layers, Q buckets. Tokens are (B, C, R, D).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.attention import Attention, KeysValues
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.model.embedding import CellEmbedding, Columns, RowEmbedding
from dopfn_jax.model.linear_fit import LEANINGS, ROW_FEATURES, LinearFit, leanings
from dopfn_jax.model.standardise import LINEAR_RANGE, Scaler, compress

Carry = TypeVar("Carry")


@flax.struct.dataclass
class EncodedContext:
    """A context that has been read once and answers any number of queries.

    Attributes:
        scaler: standardisation of covariates and outcome.
        columns: description of the columns.
        fit: regressions of the context, if the model reads them.
        keys_values: of every layer, (L, B, C, H, D / H, N) and (L, B, C, H, N, D / H).
        mask: (B, N) bool, context rows that exist.
    """

    scaler: Scaler
    columns: Columns
    fit: LinearFit | None
    keys_values: KeysValues
    mask: jax.Array


class Layer(nnx.Module):
    """Attention among a row's tokens (where there are several) and to the context's rows, then MLP.

    Pre-norm; the MLP's activation is a squared ReLU.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(config.width, use_bias=False, dtype=dtype, rngs=rngs)

        def attention() -> Attention:
            return Attention(config.width, config.heads, dtype=dtype, rngs=rngs)

        self.several_tokens = config.features_per_token > 0
        if self.several_tokens:
            self.token_norm, self.token_attention = norm(), attention()
        self.row_norm, self.row_attention = norm(), attention()
        self.mlp_norm = norm()
        hidden = config.mlp_ratio * config.width
        self.up = nnx.Linear(
            config.width, hidden, kernel_metadata={"axes": ("embed", "mlp")}, dtype=dtype, rngs=rngs
        )
        self.down = nnx.Linear(
            hidden,
            config.width,
            kernel_init=nnx.initializers.variance_scaling(0.1, "fan_in", "normal"),
            kernel_metadata={"axes": ("mlp", "embed")},
            dtype=dtype,
            rngs=rngs,
        )

    def context(
        self, tokens: jax.Array, token_mask: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """Context tokens after this layer, and the keys and values that queries need of them.

        Args:
            tokens: (B, C, N, D).
            token_mask: (B, C) bool, tokens of a row that exist.
            mask: (B, N) bool, context rows that exist.
        """
        tokens = self._mix_tokens(tokens, token_mask)
        normed = self.row_norm(tokens)
        keys_values = self.row_attention.keys_values(normed)
        return self._mix_rows(tokens, normed, keys_values, mask), keys_values

    def last_context(self, tokens: jax.Array, token_mask: jax.Array) -> KeysValues:
        """Only the keys and values: after the last layer nobody reads context tokens."""
        return self.row_attention.keys_values(self.row_norm(self._mix_tokens(tokens, token_mask)))

    def query(
        self, tokens: jax.Array, token_mask: jax.Array, keys_values: KeysValues, mask: jax.Array
    ) -> jax.Array:
        """Query tokens (B, C, M, D) after this layer; other arguments as for and from `context`."""
        tokens = self._mix_tokens(tokens, token_mask)
        return self._mix_rows(tokens, self.row_norm(tokens), keys_values, mask)

    def _mix_tokens(self, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
        if not self.several_tokens:
            return tokens
        by_row = self.token_norm(jnp.swapaxes(tokens, 1, 2))
        mixed = self.token_attention(by_row, self.token_attention.keys_values(by_row), token_mask)
        return tokens + jnp.swapaxes(mixed, 1, 2)

    def _mix_rows(
        self, tokens: jax.Array, normed: jax.Array, keys_values: KeysValues, mask: jax.Array
    ) -> jax.Array:
        tokens = tokens + self.row_attention(normed, keys_values, mask)
        return tokens + self.down(jnp.square(nnx.relu(self.up(self.mlp_norm(tokens)))))


class DoPFN(nnx.Module):
    """q(y | do(t), x, context): predicts interventional outcomes in context (Do-PFN, section 3).

    A pytree: pass it through `jax.jit` and `jax.vmap` like any other. `borders` are the (Q + 1,)
    bucket borders of standardised y; they are fixed before training and stored with the weights.

    Rows, columns and tasks that do not exist may hold anything and change no answer. What exists
    must be finite, but for missing covariates, which are NaN.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        embedding = CellEmbedding if config.features_per_token else RowEmbedding
        self.embedding = embedding(config, rngs=rngs)
        if config.linear_fit:
            self.linear_fit = nnx.Linear(ROW_FEATURES, config.width, rngs=rngs)
        if config.linear_tilt:
            self.tilt = nnx.Linear(
                2 * config.width, LEANINGS, kernel_init=nnx.initializers.zeros, rngs=rngs
            )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.layers = stack(rngs)
        self.head_norm = nnx.LayerNorm(config.width, use_bias=False, rngs=rngs)
        self.head_hidden = nnx.Linear(config.width, 2 * config.width, rngs=rngs)
        self.head = nnx.Linear(
            2 * config.width, config.buckets, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )
        self.borders = nnx.Variable(jnp.linspace(-3.0, 3.0, config.buckets + 1, dtype=jnp.float32))

    def encode_context(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array,
        covariate_mask: jax.Array,
    ) -> EncodedContext:
        """Reads the context once, for any number of calls of `decode`.

        Args:
            x: (B, N, F) covariates, NaN where missing; F = 0 is legal.
            t: (B, N) treatment, 0 or 1.
            y: (B, N) outcome, in its own units.
            mask: (B, N) bool, rows that exist.
            covariate_mask: (B, F) bool, columns that exist.
        """
        scaler, columns, fit, tokens = self._embed_context(x, t, y, mask, covariate_mask)

        def step(tokens: jax.Array, layer: Layer) -> tuple[jax.Array, KeysValues]:
            return layer.context(tokens, columns.token_mask, mask)

        layers, last = self._split_layers()
        tokens, keys_values = self._scan(step, tokens, layers)
        last_keys_values = last.last_context(tokens, columns.token_mask)
        keys_values = jax.tree.map(
            lambda others, own: jnp.concatenate([others, own[None]]), keys_values, last_keys_values
        )
        return EncodedContext(scaler, columns, fit, keys_values, mask)

    def decode(self, encoded: EncodedContext, x: jax.Array, t: jax.Array) -> jax.Array:
        """Logits of queries, each of which is answered as if it were the only one.

        Args:
            encoded: from `encode_context`.
            x: (B, M, F) covariates, NaN where missing.
            t: (B, M) treatment that is set, 0 or 1.

        Returns:
            (B, M, Q) float32 logits, on the standardised y axis.
        """
        tokens, leaning = self._embed_query(encoded.scaler, encoded.columns, encoded.fit, x, t)

        def step(tokens: jax.Array, inputs: tuple[Layer, KeysValues]) -> tuple[jax.Array, None]:
            layer, keys_values = inputs
            return layer.query(tokens, encoded.columns.token_mask, keys_values, encoded.mask), None

        tokens, _ = self._scan(step, tokens, self.layers, encoded.keys_values)
        return self._logits(tokens, leaning)

    def __call__(
        self,
        context_x: jax.Array,
        context_t: jax.Array,
        context_y: jax.Array,
        context_mask: jax.Array,
        covariate_mask: jax.Array,
        query_x: jax.Array,
        query_t: jax.Array,
    ) -> tuple[jax.Array, Scaler]:
        """Logits (B, M, Q) and the standardisation; arguments as for the two halves.

        Equal to `decode(encode_context(...), ...)`, without keeping the keys and values of all
        layers at once.
        """
        scaler, columns, fit, context = self._embed_context(
            context_x, context_t, context_y, context_mask, covariate_mask
        )
        query, leaning = self._embed_query(scaler, columns, fit, query_x, query_t)

        def step(
            tokens: tuple[jax.Array, jax.Array], layer: Layer
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            context, query = tokens
            context, keys_values = layer.context(context, columns.token_mask, context_mask)
            query = layer.query(query, columns.token_mask, keys_values, context_mask)
            return (context, query), None

        layers, last = self._split_layers()
        (context, query), _ = self._scan(step, (context, query), layers)
        keys_values = last.last_context(context, columns.token_mask)
        query = last.query(query, columns.token_mask, keys_values, context_mask)
        return self._logits(query, leaning), scaler

    def distribution(self, logits: jax.Array) -> BarDistribution:
        """The bar distribution of standardised y."""
        return BarDistribution(logits=logits, borders=self.borders[...])

    def _embed_context(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array,
        covariate_mask: jax.Array,
    ) -> tuple[Scaler, Columns, LinearFit | None, jax.Array]:
        scaler = Scaler.fit(x, y, mask)
        # Zeros where nothing exists: a weight of 0 would not silence a NaN.
        exists = mask[..., None] & covariate_mask[:, None]
        x = jnp.where(exists, scaler.covariates(x), 0.0)
        t = jnp.where(mask, t, 0.0)
        y = jnp.where(mask, compress(scaler.outcome(y)), 0.0)
        columns = self.embedding.columns(x, t, y, mask, covariate_mask)
        fit = LinearFit.fit(x, t, y, mask, covariate_mask) if self.config.linear_fit else None
        return scaler, columns, fit, self._embed(columns, fit, x, t, y)[0]

    def _embed_query(
        self, scaler: Scaler, columns: Columns, fit: LinearFit | None, x: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        x = jnp.where(columns.mask[:, None], scaler.covariates(x), 0.0)
        return self._embed(columns, fit, x, t, None)

    def _embed(
        self,
        columns: Columns,
        fit: LinearFit | None,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Tokens (B, C, R, D), and leanings (B, R, LEANINGS) of the regressions if they are used.

        What the regressions say also goes to the last token, which is read out.
        """
        tokens = self.embedding(columns, x, t, y)
        if fit is None:
            return tokens, None
        features = fit.row_features(x, t, y)
        leaning = leanings(features, t) if self.config.linear_tilt else None
        return tokens.at[:, -1].add(self.linear_fit(features)), leaning

    def _scan(
        self,
        step: Callable[[Carry, Any], tuple[Carry, Any]],
        carry: Carry,
        layers: Layer,
        inputs: KeysValues | None = None,
    ) -> tuple[Carry, Any]:
        """Runs `step(carry, layer)`, or `step(carry, (layer, inputs[l]))`, over stacked layers."""
        graphdef, state = nnx.split(layers)

        def body(carry: Carry, scanned: Any) -> tuple[Carry, Any]:
            if inputs is None:
                return step(carry, nnx.merge(graphdef, scanned))
            return step(carry, (nnx.merge(graphdef, scanned[0]), scanned[1]))

        dtype = jnp.dtype(self.config.compute_dtype)
        carry = jax.tree.map(lambda tokens: tokens.astype(dtype), carry)
        body = jax.checkpoint(body) if self.config.remat else body
        return jax.lax.scan(body, carry, state if inputs is None else (state, inputs))

    def _split_layers(self) -> tuple[Layer, Layer]:
        """All layers but the last, stacked, and the last."""
        graphdef, state = nnx.split(self.layers)
        others = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[:-1], state))
        return others, nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[-1], state))

    def _logits(self, tokens: jax.Array, leaning: jax.Array | None) -> jax.Array:
        """Logits (B, M, Q) from the last token of each row and its leanings (B, M, LEANINGS).

        As the product with an exponential family: what a row leans to is multiplied by how much
        the network trusts it, and tilts its density along y.
        """
        tokens = self.head_norm(tokens[:, -1].astype(jnp.float32))
        hidden = nnx.gelu(self.head_hidden(tokens))
        logits = self.head(hidden)
        if leaning is None:
            return logits
        borders = self.borders[...]
        # In units that keep the first steps of training from shaking the outermost buckets.
        middles = compress((borders[1:] + borders[:-1]) / 2) / LINEAR_RANGE
        return logits + jnp.einsum("bml,bml,q->bmq", self.tilt(hidden), leaning, middles)
