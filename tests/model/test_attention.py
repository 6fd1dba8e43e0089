"""Attention against a loop in NumPy, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from dopfn_jax.model import attention as attention_module
from dopfn_jax.model.attention import Attention, attend_by_scores, attend_fused, uses_cudnn

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, A, N, M, D, H = 2, 3, 5, 4, 8, 2


@pytest.fixture(scope="module")
def attention() -> Attention:
    abstract = nnx.eval_shape(lambda: Attention(D, H, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract)


@pytest.fixture
def tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    reading, read = rng.normal(size=(B, A, M, D)), rng.normal(size=(B, A, N, D))
    mask = np.array([[True, True, False, True, False], [False, True, True, True, True]])
    return reading.astype(np.float32), read.astype(np.float32), mask


@jax.jit
def _attend(attention: Attention, reading: jax.Array, read: jax.Array, mask: jax.Array):
    return attention(reading, attention.keys_values(read), mask)


def test_equals_a_loop_over_tasks_heads_and_tokens(attention: Attention, tokens):
    reading, read, mask = tokens
    query, key, value, out = (
        np.asarray(getattr(attention, name).kernel[...], np.float64)
        for name in ("query", "key", "value", "out")
    )
    expected = np.zeros((B, A, M, D))
    for b, a, m in np.ndindex(B, A, M):
        heads = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            q, k, v = (
                (values @ kernel[:, part])
                for values, kernel in (
                    (reading[b, a, m], query),
                    (read[b, a], key),
                    (read[b, a], value),
                )
            )
            weights = scipy.special.softmax(np.where(mask[b], k @ q / np.sqrt(D / H), -np.inf))
            heads.append(weights @ v)
        expected[b, a, m] = np.concatenate(heads) @ out
    np.testing.assert_allclose(
        _attend(attention, reading, read, mask), expected, rtol=1e-4, atol=1e-4
    )


def test_masked_tokens_are_not_read(attention: Attention, tokens):
    reading, read, mask = tokens
    other = np.where(mask[:, None, :, None], read, 1e4).astype(np.float32)
    expected = _attend(attention, reading, read, mask)
    np.testing.assert_array_equal(_attend(attention, reading, other, mask), expected)


def test_finite_where_every_token_is_masked(attention: Attention, tokens):
    reading, read, mask = tokens
    assert np.isfinite(_attend(attention, reading, read, np.zeros_like(mask))).all()


def test_keys_and_values_have_one_slice_per_head(attention: Attention, tokens):
    _, read, _ = tokens
    keys, values = attention.keys_values(jnp.asarray(read))
    assert keys.shape == (B, A, H, D // H, N)
    assert values.shape == (B, A, H, N, D // H)


def test_bfloat16_stays_close_and_keeps_its_parameters_in_float32(attention: Attention, tokens):
    low = nnx.eval_shape(lambda: Attention(D, H, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)))
    low = nnx.merge(nnx.graphdef(low), nnx.state(attention))
    reading, read, mask = tokens
    exact = _attend(attention, reading, read, mask)
    rounded = _attend(low, jnp.bfloat16(reading), jnp.bfloat16(read), mask)
    assert rounded.dtype == jnp.bfloat16
    assert low.query.kernel.dtype == jnp.float32
    scale = np.abs(exact).max()
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.1 * scale)


def test_kernels_name_their_axes(attention: Attention):
    for name in ("query", "key", "value"):
        assert getattr(attention, name).kernel.get_metadata("axes") == ("embed", "heads")
    assert attention.out.kernel.get_metadata("axes") == ("heads", "embed")


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "chosen"),
    [
        ("cuda", "bfloat16", 32, True),
        ("cuda", "float16", 64, True),
        ("cuda", "float32", 32, False),
        ("cuda", "bfloat16", 36, False),  # no multiple of 8
        ("cuda", "bfloat16", 128, False),  # no room for the mask
        ("cpu", "bfloat16", 32, False),
        ("gpu", "bfloat16", 32, False),  # ROCm
        ("tpu", "bfloat16", 32, False),
    ],
)
def test_cudnn_is_chosen_where_it_can_be(platform: str, dtype: str, width: int, chosen: bool):
    queries = jax.ShapeDtypeStruct((B, A, M, H, width), jnp.dtype(dtype))
    assert uses_cudnn(queries, platform) is chosen


def test_the_fused_form_means_the_same():
    """With XLA in cuDNN's place: values and gradients; finite where all tokens are masked."""
    rng = np.random.default_rng(2)
    queries, keys, values = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((B, A, M, H, 8), (B, A, H, 8, N), (B, A, H, N, 8))
    )
    mask = np.array([[True, False, True, True, False], [False] * N])
    weight = rng.normal(size=queries.shape).astype(np.float32)

    def run(attend):
        def total(queries, keys, values):
            out = attend(queries, keys, values, mask)
            return (out * weight)[0].sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(
            queries, keys, values
        )

    have = run(lambda *arrays: attend_fused(*arrays, implementation="xla"))
    want = run(attend_by_scores)
    (_, out), (_, expected) = have[0], want[0]
    assert out.shape == queries.shape
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0], expected[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(have[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_of_queries_give_the_same_answers_and_gradients(
    attention: Attention, tokens, monkeypatch
):
    """Two queries have as many scores as are allowed at a time: the last block is filled up."""
    _, read, mask = tokens

    def total(attention, read):
        out = attention(read, attention.keys_values(read), mask)
        return (out * np.cos(np.arange(out.size)).reshape(out.shape)).sum(), out

    def run():
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(attention, read)

    want = run()
    monkeypatch.setitem(attention_module._SCORES_AT_ONCE, "cpu", 2 * B * A * H * N)
    assert N % 2 == 1
    have = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), have, want)
