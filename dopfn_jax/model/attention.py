"""Multi-head attention over one axis of tokens, with keys and values that can be kept.

Axes: B tasks, A an axis along which tokens do not mix, N tokens that are read, M tokens that read,
D width, H heads.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

# Keys (B, A, H, D / H, N) and values (B, A, H, N, D / H) of the tokens that are read: as the second
# operands of their products stand, so that a few queries wait for no transposition on a CPU.
KeysValues = tuple[jax.Array, jax.Array]

# Added to the scores of tokens that do not exist. Fused kernels compute scores twice, and would
# take the exponential of what the larger number leaves of their difference.
_NEVER, _NEVER_FUSED = -1e30, -1e5
# How many scores a device computes at a time: few enough for a CPU's cache (4 MB), or 256 MB.
_SCORES_AT_ONCE = {"cpu": 2**20, "elsewhere": 2**26}
# Widths of a head that cuDNN takes: multiples of 8, up to 128 before Hopper.
_CUDNN_STEP, _CUDNN_WIDEST = 8, 128
_PORTABLE: ContextVar[bool] = ContextVar("_PORTABLE", default=False)


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
        keys, values = self._split_heads(self.key(tokens)), self._split_heads(self.value(tokens))
        return jnp.moveaxis(keys, -3, -1), jnp.moveaxis(values, -3, -2)

    def __call__(self, tokens: jax.Array, keys_values: KeysValues, mask: jax.Array) -> jax.Array:
        """What each token reads.

        Args:
            tokens: (B, A, M, D), the ones that read.
            keys_values: of the ones that are read.
            mask: (B, N) bool, those of them that exist; the others must be finite all the same.

        Returns:
            (B, A, M, D).
        """
        queries = self._split_heads(self.query(tokens))
        attend = attend_fused if uses_cudnn(queries, _platform()) else attend_by_scores
        return self.out(attend(queries, *keys_values, mask).reshape(tokens.shape))

    def _split_heads(self, tokens: jax.Array) -> jax.Array:
        *leading, width = tokens.shape
        return tokens.reshape(*leading, self.heads, width // self.heads)


@contextmanager
def for_every_platform() -> Iterator[None]:
    """Within it programs are traced that do not suit the platform of this process alone."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def uses_cudnn(queries: jax.Array, platform: str) -> bool:
    """Whether cuDNN's fused attention can compute this: on CUDA, in 16 bits, at this head width.

    One step of the width is needed for the mask.
    """
    width = queries.shape[-1]
    fits = width % _CUDNN_STEP == 0 and width + _CUDNN_STEP <= _CUDNN_WIDEST
    if _PORTABLE.get():
        return False
    return platform == "cuda" and queries.dtype in (jnp.bfloat16, jnp.float16) and fits


def _platform() -> str:
    """JAX calls CUDA and ROCm alike "gpu"; only the first has cuDNN."""
    platform = jax.default_backend()
    on_cuda = platform == "gpu" and "cuda" in jax.devices()[0].client.platform_version
    return "cuda" if on_cuda else platform


def scores_at_once() -> int:
    """How many attention scores a device of the default kind holds at a time."""
    return _SCORES_AT_ONCE.get(_platform(), _SCORES_AT_ONCE["elsewhere"])


def attend_by_scores(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention with the scores in memory: any platform, any dtype.

    Where there are more than `scores_at_once`, blocks of queries are answered one after another,
    and once more in the backward pass.

    Args:
        queries: (B, A, M, H, D / H).
        keys: (B, A, H, D / H, N).
        values: (B, A, H, N, D / H).
        mask: (B, N) bool, tokens that exist.

    Returns:
        (B, A, M, H, D / H).
    """
    attend = partial(_attend_at_once, keys=keys, values=values, mask=mask)
    tasks, across, rows, heads, width = queries.shape
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    scores = tasks * across * heads * rows * keys.shape[-1]
    most = devices * scores_at_once()
    # An exported program does not know how many rows there will be: it computes all at once.
    if not isinstance(scores, int) or scores <= most:
        return attend(queries)
    blocks = min(rows, math.ceil(scores / most))
    size = math.ceil(rows / blocks)
    blocks = math.ceil(rows / size)
    filled = jnp.pad(queries, ((0, 0), (0, 0), (0, blocks * size - rows), (0, 0), (0, 0)))
    by_block = filled.reshape(tasks, across, blocks, size, heads, width)
    answers = jax.lax.map(jax.checkpoint(attend), jnp.moveaxis(by_block, 2, 0))
    return jnp.moveaxis(answers, 0, 2).reshape(filled.shape)[:, :, :rows]


def _attend_at_once(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    # Scaling the queries instead of the scores saves a pass over the largest array.
    queries = jnp.swapaxes(queries * (queries.shape[-1] ** -0.5), 2, 3)
    scores = jnp.einsum("bahmd,bahdn->bahmn", queries, keys).astype(jnp.float32)
    # Adding the mask instead of selecting by it saves another, in the backward pass.
    scores = scores + jnp.where(mask, 0.0, _NEVER)[:, None, None, None, :]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Dividing what was read, not the weights, saves one more, and two in the backward pass.
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    # Rows after heads, here and in the product above, and what is read as the second operand: with
    # values or keys as the first a CPU takes half as long again, and so does the backward pass.
    read = jnp.einsum("bahmn,bahnd->bahmd", weights, values, preferred_element_type=jnp.float32)
    return jnp.swapaxes(read / total, 2, 3).astype(values.dtype)


def attend_fused(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The same by `jax.nn.dot_product_attention`, which on a GPU keeps the scores on the chip.

    cuDNN takes a mask as a bias of the scores' full size, at even lengths only. So the mask becomes
    one more coordinate of queries (1) and keys (0, or a very negative number), in one more step of
    the head's width.
    """
    tasks, across, _, heads, width = queries.shape
    scale = width**-0.5
    keys, values = jnp.moveaxis(keys, -1, -3), jnp.moveaxis(values, -2, -3)

    def fold(array: jax.Array, extra: jax.Array | float) -> jax.Array:
        shape = (*array.shape[:-1], _CUDNN_STEP)
        first = jnp.arange(_CUDNN_STEP) == 0
        column = jnp.where(first, jnp.broadcast_to(extra, shape), 0.0).astype(array.dtype)
        wider = jnp.concatenate([array, column], axis=-1)
        return wider.reshape(tasks * across, -1, heads, width + _CUDNN_STEP)

    never = jnp.where(mask, 0.0, _NEVER_FUSED)[:, None, :, None, None]
    mixed = jax.nn.dot_product_attention(
        fold(queries, 1.0),
        fold(keys, never),
        fold(values, 0.0),
        scale=scale,
        implementation=implementation,
    )
    return mixed[..., :width].reshape(queries.shape)
