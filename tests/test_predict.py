import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.predict import ate, cate, cid, encode, predict

ROWS, QUERIES, COVARIATES = 24, 5, 3
QUERY_T = np.array([0, 1, 0, 1, 1], np.float32)
# 1e-5 of the outcome's standard deviation, which is 3.
TOLERANCE = 3e-5


@functools.cache
def random_model(features_per_token: int) -> DoPFN:
    """An untrained model, made in one compilation, whose answers differ from row to row."""

    def build() -> DoPFN:
        config = ModelConfig(
            width=16,
            layers=2,
            heads=2,
            features_per_token=features_per_token,
            linear_fit=True,
            buckets=16,
        )
        model = DoPFN(config, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())


@pytest.fixture(params=[0, 1], ids=["row tokens", "cell tokens"])
def model(request: pytest.FixtureRequest) -> DoPFN:
    return random_model(request.param)


def tables(count: int) -> tuple[np.ndarray, ...]:
    """Context covariates, treatment, outcome and query covariates of several tables."""
    generator = np.random.default_rng(0)
    x, query = (generator.normal(size=(count, n, COVARIATES)) for n in (ROWS, QUERIES))
    t = generator.integers(2, size=(count, ROWS))
    y = 3 * x[..., 0] + t * x[..., 1] + generator.normal(size=(count, ROWS)) + 10
    return tuple(part.astype(np.float32) for part in (x, t, y, query))


def table() -> list[np.ndarray]:
    return [part[0] for part in tables(1)]


# Compiled once for all tests that share a model and a shape.
jitted_encode, jitted_cate = jax.jit(encode), jax.jit(cate)


def effects(model, x, t, y, query, mask=None, covariate_mask=None) -> np.ndarray:
    """CATE of the query rows."""
    mask = np.ones(len(x), bool) if mask is None else mask
    covariate_mask = np.ones(x.shape[1], bool) if covariate_mask is None else covariate_mask
    context = jitted_encode(model, x, t, y, mask, covariate_mask)
    return np.asarray(jitted_cate(model, context, query))


def test_vmap_over_tables_changes_nothing() -> None:
    model, (x, t, y, query) = random_model(0), tables(2)
    contexts = jax.jit(jax.vmap(encode, in_axes=(None, 0, 0, 0)))(model, x, t, y)
    mapped = jax.jit(jax.vmap(cate, in_axes=(None, 0, 0)))(model, contexts, query)
    assert mapped.shape == (2, QUERIES)
    for i in range(2):
        one_by_one = effects(model, x[i], t[i], y[i], query[i])
        np.testing.assert_allclose(mapped[i], one_by_one, atol=TOLERANCE)
        assert one_by_one.std() > 0.01


def test_a_kept_context_answers_like_the_whole_model() -> None:
    model, (x, t, y, query) = random_model(0), table()
    masks = np.ones(ROWS, bool), np.ones(COVARIATES, bool)
    context = jitted_encode(model, x, t, y, *masks)
    answer = jax.jit(predict)(model, context, query, QUERY_T)
    batch = jax.tree.map(lambda part: part[None], (x, t, y, *masks, query, QUERY_T))
    logits, scaler = jax.jit(lambda model, *batch: model(*batch))(model, *batch)
    assert answer.batch_shape == (QUERIES,)
    np.testing.assert_allclose(answer.logits, logits[0], atol=1e-5)
    borders = scaler.y_loc[0, 0] + scaler.y_scale[0, 0] * model.borders[...]
    np.testing.assert_allclose(answer.borders, borders, rtol=1e-5)


def test_effects_are_differences_of_means() -> None:
    @jax.jit
    def answers(model, context, query):
        arms = [predict(model, context, query, jnp.full(QUERIES, arm)).mean for arm in (0, 1)]
        some = ate(model, context, query, jnp.arange(QUERIES) < 2)
        every = ate(model, context, query)
        return arms, cid(model, context, query, 1), cate(model, context, query), every, some

    model, (x, t, y, query) = random_model(0), table()
    context = jitted_encode(model, x, t, y, np.ones(ROWS, bool), np.ones(COVARIATES, bool))
    (control, treated), expected, effect, every, some = answers(model, context, query)
    np.testing.assert_allclose(expected, treated, rtol=1e-6)
    np.testing.assert_allclose(effect, treated - control, atol=1e-5)
    np.testing.assert_allclose(every, np.mean(effect), rtol=1e-5)
    np.testing.assert_allclose(some, np.mean(effect[:2]), rtol=1e-5)


def test_padding_changes_nothing(model: DoPFN) -> None:
    x, t, y, query = table()
    padded = effects(
        model,
        np.pad(x, ((0, 8), (0, 2)), constant_values=np.nan),
        np.pad(t, (0, 8), constant_values=np.nan),
        np.pad(y, (0, 8), constant_values=np.inf),
        np.pad(query, ((0, 0), (0, 2)), constant_values=7.0),
        np.arange(ROWS + 8) < ROWS,
        np.arange(COVARIATES + 2) < COVARIATES,
    )
    np.testing.assert_allclose(padded, effects(model, x, t, y, query), atol=TOLERANCE)


def test_order_of_rows_and_columns_does_not_matter(model: DoPFN) -> None:
    x, t, y, query = table()
    rows, columns = np.random.default_rng(1).permutation(ROWS), [2, 0, 1]
    shuffled = effects(model, x[rows][:, columns], t[rows], y[rows], query[:, columns])
    np.testing.assert_allclose(shuffled, effects(model, x, t, y, query), atol=TOLERANCE)


def test_answers_follow_the_units_of_outcome_and_covariates(model: DoPFN) -> None:
    x, t, y, query = table()
    scale, shift = np.float32([1e3, 0.01, 2.0]), np.float32([5.0, -1.0, 0.0])
    scaled = effects(model, x * scale + shift, t, 40 * y - 7, query * scale + shift)
    expected = 40 * effects(model, x, t, y, query)
    np.testing.assert_allclose(scaled, expected, atol=40 * TOLERANCE)


def test_effects_keep_their_precision_far_from_zero() -> None:
    """Near 1e6 float32 holds sixteenths: these outcomes and their mean, but no answer between."""
    model, (x, t, y, query) = random_model(0), table()
    sixteenths = np.round(16 * y)
    sixteenths[0] -= sixteenths.sum() % ROWS
    y = sixteenths / 16
    far = effects(model, x, t, y + np.float32(1e6), query)
    np.testing.assert_allclose(far, effects(model, x, t, y, query), atol=TOLERANCE)


def test_derivatives_are_those_of_the_answers() -> None:
    """By a query's covariates, and by covariates and outcomes of the context."""
    model, (x, t, y, query) = random_model(0), table()

    @jax.jit
    def answer(query: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return cid(model, encode(model, x, t, y), query, 1.0).mean()

    arguments = (query, x, y)
    slopes = jax.jit(jax.grad(answer, argnums=(0, 1, 2)))(*arguments)
    generator = np.random.default_rng(1)
    for place, slope in enumerate(slopes):
        direction = generator.normal(size=slope.shape).astype(np.float32)
        step = 1e-2 / np.linalg.norm(direction)
        ends = []
        for sign in (-1, 1):
            moved = list(arguments)
            moved[place] = moved[place] + sign * step * direction
            ends.append(float(answer(*moved)))
        difference = (ends[1] - ends[0]) / (2 * step)
        assert float((slope * direction).sum()) == pytest.approx(difference, rel=0.03, abs=0.01)


def test_what_a_column_that_does_not_exist_holds_reaches_no_derivative() -> None:
    model, (x, t, y, query) = random_model(0), table()
    exists = np.array([True, True, False])

    def total(x: jax.Array, query: jax.Array) -> jax.Array:
        context = encode(model, x, t, y, np.ones(len(x), bool), exists)
        return cate(model, context, query).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    expected = gradients(x, query)
    for values in (x, query):
        values[:, 2] = np.inf
    for gradient, other in zip(gradients(x, query), expected, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)


def test_a_query_row_is_answered_on_its_own(model: DoPFN) -> None:
    x, t, y, query = table()
    others = query.copy()
    others[1:] = 100 * query[1:]
    first = effects(model, x, t, y, others)[0]
    np.testing.assert_allclose(first, effects(model, x, t, y, query)[0], atol=1e-5)


def test_a_table_without_covariates(model: DoPFN) -> None:
    x, t, y, query = table()
    answer = effects(model, x[:, :0], t, y, query[:, :0])
    masked = effects(model, x, t, y, query, covariate_mask=np.zeros(COVARIATES, bool))
    np.testing.assert_allclose(answer, masked, atol=TOLERANCE)
    assert np.ptp(answer) < 1e-5  # nothing tells the rows apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros(ROWS)}, r"x has shape \(24,\).*must be \(N, F\)"),
        ({"t": np.zeros(3)}, r"t \(3,\)"),
        ({"y": np.zeros((ROWS, 1))}, r"y \(24, 1\).*jax.vmap"),
        ({"mask": np.ones(2, bool)}, r"mask \(2,\)"),
        ({"covariate_mask": np.ones(2, bool)}, r"covariate_mask \(2,\)"),
    ],
)
def test_context_of_a_wrong_shape(change: dict[str, np.ndarray], message: str) -> None:
    x, t, y, _ = table()
    with pytest.raises(ValueError, match=message):
        encode(random_model(0), **{"x": x, "t": t, "y": y, **change})


def test_query_of_a_wrong_shape() -> None:
    model, (x, t, y, query) = random_model(0), table()
    context = jitted_encode(model, x, t, y, np.ones(ROWS, bool), np.ones(COVARIATES, bool))
    for wrong in (query[:, :2], query[0], query[None]):
        with pytest.raises(ValueError, match=r"must be \(M, 3\)"):
            predict(model, context, wrong, 1)
    with pytest.raises(ValueError, match=r"query_t has shape \(2,\)"):
        predict(model, context, query, np.zeros(2))
    with pytest.raises(ValueError, match=r"query_mask has shape \(2,\), but must be \(5,\)"):
        ate(model, context, query, np.ones(2, bool))
    several = jax.tree.map(lambda part: part[None], context)
    with pytest.raises(ValueError, match=r"several tables: call this inside jax\.vmap"):
        predict(model, several, query, 1)
