"""Multi-head attention over one axis of tokens, with keys and values that can be kept.

Axes: B tasks, A an axis along which tokens do not mix, N tokens that are read, M tokens that read,
D width, H heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

# Keys and values of the tokens that are read, each (B, A, N, H, D / H).
KeysValues = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Scaled dot-product attention of (B, A, M, D) to (B, A, N, D) tokens, per B and A."""

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def project(axes: tuple[str, str], scale: float = 1.0) -> nnx.Linear:
            init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            return nnx.Linear(
                width,
                width,
                use_bias=False,
                kernel_init=init,
                kernel_metadata={"axes": axes},
                dtype=dtype,
                rngs=rngs,
            )

        self.heads = heads
        self.query = project(("embed", "heads"))
        self.key = project(("embed", "heads"))
        self.value = project(("embed", "heads"))
        self.out = project(("heads", "embed"), scale=0.1)

    def keys_values(self, tokens: jax.Array) -> KeysValues:
        """Keys and values of (B, A, N, D) tokens."""
        return self._split_heads(self.key(tokens)), self._split_heads(self.value(tokens))

    def __call__(self, tokens: jax.Array, keys_values: KeysValues, mask: jax.Array) -> jax.Array:
        """What each token reads.

        Args:
            tokens: (B, A, M, D), the ones that read.
            keys_values: of the ones that are read.
            mask: (B, N) bool, those of them that exist; the others must be finite all the same.

        Returns:
            (B, A, M, D).
        """
        keys, values = keys_values
        # Scaling the queries instead of the scores saves a pass over the largest array.
        queries = self._split_heads(self.query(tokens)) * (keys.shape[-1] ** -0.5)
        scores = jnp.einsum("bamhd,banhd->bahmn", queries, keys).astype(jnp.float32)
        # Adding the mask instead of selecting by it saves another, in the backward pass.
        bias = jnp.where(mask, 0.0, -1e30)[:, None, None, None, :]
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(values.dtype)
        mixed = jnp.einsum("bahmn,banhd->bamhd", weights, values)
        return self.out(mixed.reshape(tokens.shape))

    def _split_heads(self, tokens: jax.Array) -> jax.Array:
        *leading, width = tokens.shape
        return tokens.reshape(*leading, self.heads, width // self.heads)
