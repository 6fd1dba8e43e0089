"""What the whole model promises whatever its weights: who reads whom, and what changes no answer.

The models are small and untrained, with weights large enough everywhere that every path from input
to answer counts and a broken promise shows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.model.standardise import LINEAR_RANGE, Scaler
from dopfn_jax.model.transformer import DoPFN, EncodedContext

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Axes of every batch: the last rows of the context and the last column are padding.
B, N, M, F = 3, 12, 6, 4
ROWS, COLUMNS = 9, 3
BUCKETS = 16
# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0}


class Task(NamedTuple):
    """The model's arguments."""

    context_x: np.ndarray
    context_t: np.ndarray
    context_y: np.ndarray
    context_mask: np.ndarray
    covariate_mask: np.ndarray
    query_x: np.ndarray
    query_t: np.ndarray

    @property
    def context(self) -> tuple[np.ndarray, ...]:
        return self[:5]


def _task() -> Task:
    """Tasks with a strong effect; covariates in units of their own, the first one binary."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, N + M, F))
    x[..., 0] = x[..., 0] > 0
    x = x * [1, 0.1, 20, 1] + [0, 5, -30, 0]
    t = rng.integers(0, 2, (B, N + M))
    y = 2 * t * x[..., 0] - 10 * (x[..., 1] - 5) + 0.3 * rng.normal(size=(B, N + M))
    x, t, y = (a.astype(np.float32) for a in (x, t, y))
    return Task(
        context_x=x[:, :N],
        context_t=t[:, :N],
        context_y=y[:, :N],
        context_mask=np.arange(N) < np.full((B, 1), ROWS),
        covariate_mask=np.arange(F) < np.full((B, 1), COLUMNS),
        query_x=x[:, N:],
        query_t=t[:, N:],
    )


def _model(features_per_token: int, **changes: Any) -> DoPFN:
    config = ModelConfig(
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2,
        buckets=BUCKETS,
        features_per_token=features_per_token,
        linear_fit=features_per_token == 0,
        **{"linear_tilt": features_per_token == 0, **changes},
    )
    rng = np.random.default_rng(1)

    def weight(path: tuple, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = jax.tree_util.keystr(path), abstract.shape
        if "borders" in name:
            return jnp.linspace(-3.0, 3.0, *shape)
        if "scale" in name:
            return jnp.ones(shape)
        size = 2 / np.sqrt(shape[-2]) if "kernel" in name else 1.0
        size = 0.1 if "bias" in name or "unknown" in name else size
        return jnp.asarray(size * rng.normal(size=shape), abstract.dtype)

    abstract = nnx.eval_shape(lambda: DoPFN(config, rngs=nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(weight, abstract)


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["rows", "cells", "groups"])
def model(request: pytest.FixtureRequest) -> DoPFN:
    return _model(request.param)


@pytest.fixture(scope="module")
def answer(model: DoPFN) -> np.ndarray:
    """Bucket probabilities (B, M, Q) for the tasks as they are."""
    return _answer(model, _task())


@pytest.fixture
def task() -> Task:
    return _task()


_call = jax.jit(lambda model, task: model(*task), compiler_options=FAST)
_encode = jax.jit(DoPFN.encode_context, compiler_options=FAST)
_decode = jax.jit(DoPFN.decode, compiler_options=FAST)


def _masses(logits: jax.Array) -> np.ndarray:
    return scipy.special.softmax(np.asarray(logits), axis=-1)


def _answer(model: DoPFN, task: Task) -> np.ndarray:
    return _masses(_call(model, task)[0])


def _assert_same(actual: np.ndarray, expected: np.ndarray, tolerance: float = 5e-4) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def _assert_differs(actual: np.ndarray, other: np.ndarray) -> None:
    """Most of the (..., Q) answers move by far more than the tolerance of `_assert_same`."""
    assert np.median(np.abs(actual - other).max(axis=-1)) > 0.01


def _changed(values: np.ndarray, index: tuple, new: float | np.ndarray) -> np.ndarray:
    values = values.copy()
    values[index] = new
    return values


def _select(task: Task, rows: slice | np.ndarray, columns: slice | np.ndarray) -> Task:
    """Some of the context rows and of the columns, in that order."""
    x, t, y, mask, covariates, query_x, query_t = task
    return Task(
        x[:, rows, columns],
        t[:, rows],
        y[:, rows],
        mask[:, rows],
        covariates[:, columns],
        query_x[..., columns],
        query_t,
    )


def test_a_tilt_leans_by_arm_as_the_regressions_do(task: Task) -> None:
    """By the cautious effect alone, with trust 1: half of it up, half of it down, along y."""

    def logits(trust: float, arm: float) -> np.ndarray:
        model = _model(0)
        model.tilt.kernel[...] = jnp.zeros_like(model.tilt.kernel[...])
        model.tilt.bias[...] = jnp.array([0.0, 0.0, 0.0, trust])
        asked = task._replace(query_t=np.full_like(task.query_t, arm))
        return np.asarray(_call(model, asked)[0])

    middles = np.linspace(-3, 3, BUCKETS + 1)
    middles = (middles[1:] + middles[:-1]) / 2 / LINEAR_RANGE
    treated, control = (logits(1.0, arm) - logits(0.0, arm) for arm in (1.0, 0.0))
    np.testing.assert_allclose(treated, -control, atol=2e-5)
    effects = treated @ middles / (middles @ middles)
    np.testing.assert_allclose(treated, effects[..., None] * middles, atol=2e-5)
    np.testing.assert_allclose(effects, effects[:, :1] + np.zeros(M), atol=2e-5)
    assert (abs(effects) > 5e-4).all() and abs(effects).max() > 0.1


class TestOrder:
    def test_of_context_rows_does_not_matter(self, model, task, answer):
        order = np.random.default_rng(2).permutation(N)
        _assert_same(_answer(model, _select(task, order, slice(None))), answer)

    def test_of_queries_is_the_order_of_answers(self, model, task, answer):
        order = np.random.default_rng(3).permutation(M)
        shuffled = task._replace(query_x=task.query_x[:, order], query_t=task.query_t[:, order])
        _assert_same(_answer(model, shuffled), answer[:, order])

    def test_of_covariates_does_not_matter_beyond_groups(self, model, task, answer):
        # In groups of two only whole groups are exchangeable: the place within a group has a weight
        # of its own, and which columns share a token changes the answer.
        grouped = model.config.features_per_token == 2
        order = np.array([2, 3, 0, 1] if grouped else [3, 1, 0, 2])
        _assert_same(_answer(model, _select(task, slice(None), order)), answer)


class TestPadding:
    @pytest.mark.parametrize("garbage", [-1e6, np.inf, np.nan])
    def test_may_hold_anything(self, model, task, answer, garbage):
        padded = Task(
            context_x=np.where(
                task.context_mask[..., None] & task.covariate_mask[:, None], task.context_x, garbage
            ),
            context_t=np.where(task.context_mask, task.context_t, garbage),
            context_y=np.where(task.context_mask, task.context_y, garbage),
            context_mask=task.context_mask,
            covariate_mask=task.covariate_mask,
            query_x=np.where(task.covariate_mask[:, None], task.query_x, garbage),
            query_t=task.query_t,
        )
        padded = Task(*(a if a.dtype == bool else a.astype(np.float32) for a in padded))
        _assert_same(_answer(model, padded), answer)

    def test_and_batching_change_nothing(self, model, task, answer):
        alone = _select(task, slice(ROWS), slice(COLUMNS))
        for i in range(B):
            one = Task(*(a[i : i + 1] for a in alone))
            _assert_same(_answer(model, one), answer[i : i + 1])

    def test_tasks_are_answered_finitely_and_change_nothing(self, model, task, answer):
        empty = Task(*(_changed(a, (1,), 0) for a in task))
        padded = _answer(model, empty)
        assert np.isfinite(padded).all()
        _assert_same(padded[[0, 2]], answer[[0, 2]])


class TestQueries:
    def test_in_chunks_of_a_context_encoded_once(self, model, task, answer):
        encoded = _encode(model, *task.context)
        chunks = [
            _decode(model, encoded, task.query_x[:, rows], task.query_t[:, rows])
            for rows in (slice(0, M // 2), slice(M // 2, M))
        ]
        _assert_same(_masses(jnp.concatenate(chunks, axis=1)), answer)
        assert isinstance(encoded, EncodedContext)
        keys, values = encoded.keys_values
        tokens = {0: 1, 1: F + 2, 2: F // 2 + 2}[model.config.features_per_token]
        assert keys.shape == (2, B, tokens, 2, 16, N)
        assert values.shape == (2, B, tokens, 2, N, 16)

    def test_do_not_read_each_other(self, model, task, answer):
        others = np.arange(M) != 2
        changed = task._replace(
            query_x=_changed(task.query_x, (slice(None), others), 77.0),
            query_t=_changed(task.query_t, (slice(None), others), 1 - task.query_t[:, others]),
        )
        changed = _answer(model, changed)
        _assert_same(changed[:, 2], answer[:, 2])
        _assert_differs(changed[:, others], answer[:, others])

    def test_depend_on_their_treatment_and_on_every_covariate(self, model, task, answer):
        _assert_differs(_answer(model, task._replace(query_t=1 - task.query_t)), answer)
        for column in range(COLUMNS):
            higher = task.query_x[..., column] + task.query_x[..., column].std()
            x = _changed(task.query_x, (..., column), higher)
            _assert_differs(_answer(model, task._replace(query_x=x)), answer)

    def test_depend_on_treatments_and_outcomes_of_the_context(self, model, task, answer):
        for change in (
            {"context_t": 1 - task.context_t},
            {"context_y": np.roll(task.context_y, 1, axis=0)},
        ):
            _assert_differs(_answer(model, task._replace(**change)), answer)

    def test_treatment_is_not_one_more_covariate(self, model, task, answer):
        swapped = task._replace(
            context_x=_changed(task.context_x, (..., 0), task.context_t),
            context_t=task.context_x[..., 0],
            query_x=_changed(task.query_x, (..., 0), task.query_t),
            query_t=task.query_x[..., 0],
        )
        _assert_differs(_answer(model, swapped), answer)


class TestUnits:
    @pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (250.0, -4e3), (1e20, 1e20)])
    def test_answers_follow_those_of_the_outcome(self, model, task, answer, scale, shift):
        y = (scale * task.context_y + shift).astype(np.float32)
        logits, scaler = _call(model, task._replace(context_y=y))
        _assert_same(_masses(logits), answer, tolerance=1e-3)
        borders = model.borders[...]
        expected = _summaries(borders, *_call(model, task))
        spread = scale * task.context_y.std()
        for actual, value in zip(_summaries(borders, logits, scaler), expected, strict=True):
            np.testing.assert_allclose(actual, scale * value + shift, atol=1e-3 * spread)

    def test_of_the_covariates_do_not_matter(self, model, task, answer):
        scale = np.array([1e-3, 40, 1e15, 1], np.float32)
        shift = np.array([0.1, -3e3, 0, 2], np.float32)
        changed = task._replace(
            context_x=scale * task.context_x + shift, query_x=scale * task.query_x + shift
        )
        _assert_same(_answer(model, changed), answer, tolerance=1e-3)


@functools.partial(jax.jit, compiler_options=FAST)
def _summaries(
    borders: jax.Array, logits: jax.Array, scaler: Scaler
) -> tuple[jax.Array, jax.Array]:
    """Mean (B, M) and quantiles (B, M, S) of each query, in the units of the outcome."""

    def of_one(logits: jax.Array, scaler: Scaler) -> tuple[jax.Array, jax.Array]:
        distribution = BarDistribution(logits, borders)
        distribution = distribution.affine(scaler.y_loc[0], scaler.y_scale[0])
        return distribution.mean, distribution.quantile(jnp.array([0.1, 0.5, 0.9]))

    return jax.vmap(of_one)(logits, scaler)


class TestTables:
    def test_missing_cells_count_as_missing(self, model, task, answer):
        rng = np.random.default_rng(4)
        holes = (rng.random(task.context_x.shape) < 0.3, rng.random(task.query_x.shape) < 0.5)
        answers = [
            _answer(
                model,
                task._replace(
                    context_x=np.where(holes[0], value, task.context_x).astype(np.float32),
                    query_x=np.where(holes[1], value, task.query_x).astype(np.float32),
                ),
            )
            for value in (np.nan, 0.0)
        ]
        assert np.isfinite(answers[0]).all()
        _assert_differs(answers[0], answers[1])
        _assert_differs(answers[0], answer)

    def test_a_column_may_miss_from_every_row_or_from_every_context_row(self, model, task):
        nowhere_in_context = task._replace(context_x=_changed(task.context_x, (..., 1), np.nan))
        nowhere = nowhere_in_context._replace(query_x=_changed(task.query_x, (..., 1), np.nan))
        assert np.isfinite(_answer(model, nowhere_in_context)).all()
        assert np.isfinite(_answer(model, nowhere)).all()

    def test_may_have_no_covariates_and_two_rows(self, model, task):
        bare = Task(*(a[:1] for a in _select(task, slice(2), slice(0))))
        answer = _answer(model, bare)
        assert answer.shape == (1, M, BUCKETS)
        assert np.isfinite(answer).all()
        # The same table among padding.
        padded = task._replace(
            context_mask=np.arange(N) < np.full((B, 1), 2),
            covariate_mask=np.zeros((B, F), bool),
        )
        _assert_same(_answer(model, padded)[:1], answer)

    def test_may_hold_constants(self, model, task):
        context_x = _changed(task.context_x, (..., 1), 7.0)
        constant = task._replace(
            context_x=context_x,
            query_x=_changed(task.query_x, (..., 1), 7.0),
            context_y=np.full_like(task.context_y, -3.0),
            context_t=np.ones_like(task.context_t),
        )
        logits, scaler = _call(model, constant)
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(scaler.y_loc, -3)
        np.testing.assert_array_equal(scaler.y_scale, 1)
        # A query may hold a value that the context never showed.
        assert np.isfinite(_answer(model, task._replace(context_x=context_x))).all()


@functools.partial(jax.jit, compiler_options=FAST)
def _vmapped(model: DoPFN, task: Task) -> jax.Array:
    def of_one(task: Task) -> jax.Array:
        return model(*(a[None] for a in task))[0][0]

    return jax.vmap(of_one)(task)


class TestTransformations:
    @pytest.mark.parametrize("features_per_token", [0, 1])
    def test_vmap_over_single_tasks_is_the_batch(self, features_per_token, task):
        model = _model(features_per_token)
        _assert_same(_masses(_vmapped(model, task)), _answer(model, task))

    @pytest.mark.slow
    @pytest.mark.parametrize("features_per_token", [0, 2])
    def test_jit_changes_nothing(self, features_per_token, task):
        model = _model(features_per_token)
        logits, _ = model(*map(jnp.asarray, task))
        _assert_same(_masses(logits), _answer(model, task))

    @pytest.mark.parametrize("features_per_token", [0, 2])
    def test_bfloat16_stays_close(self, features_per_token, task):
        low = _model(features_per_token, compute_dtype="bfloat16")
        # Flax itself leaves promotion to JAX here.
        with jax.numpy_dtype_promotion("standard"):
            logits, scaler = _call(low, task)
        assert logits.dtype == scaler.y_loc.dtype == jnp.float32
        assert low.layers.up.kernel.dtype == jnp.float32
        exact = _answer(_model(features_per_token), task)
        _assert_same(_masses(logits), exact, tolerance=0.1)


def _loss(model: DoPFN, task: Task) -> jax.Array:
    logits, scaler = model(*task)
    target = scaler.outcome(task.context_y[:, :M])
    return -model.distribution(logits).log_prob(target).mean()


_gradients = jax.jit(jax.grad(_loss, argnums=(0, 1), allow_int=True), compiler_options=FAST)


def _hard_task() -> Task:
    """Outliers, missing cells and constants."""
    task = _task()
    x, y, query_x = task.context_x.copy(), task.context_y.copy(), task.query_x.copy()
    x[0, 3], y[0, 5], query_x[0, 1] = 1e6, -1e6, -1e6
    x[1, ::2, 0], x[1, :, 2], query_x[1, 2:4] = np.nan, np.nan, np.nan
    x[2, :, 1], y[2] = 5.0, 1.0
    return task._replace(context_x=x, context_y=y, query_x=query_x)


@functools.cache
def _hard_gradients(features_per_token: int) -> tuple[DoPFN, Task]:
    """Gradients of the loss by the weights and by the inputs."""
    return _gradients(_model(features_per_token), _hard_task())


class TestGradients:
    @pytest.mark.parametrize("features_per_token", [0, 2])
    def test_are_finite_and_reach_every_weight(self, features_per_token):
        by_model, by_task = _hard_gradients(features_per_token)
        for path, leaf in jax.tree_util.tree_leaves_with_path(by_model):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
        for name in ("context_x", "context_t", "context_y", "query_x", "query_t"):
            assert np.isfinite(getattr(by_task, name)).all(), name

    def test_do_not_change_where_layers_are_recomputed(self, task):
        recomputing = _model(0, remat=True)
        _assert_same(_answer(recomputing, task), _answer(_model(0), task))
        actual, _ = _gradients(recomputing, _hard_task())
        expected, _ = _hard_gradients(0)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4 * np.abs(e).max())


class TestParameters:
    def test_are_as_many_as_in_the_paper(self):
        model = nnx.eval_shape(lambda: DoPFN(ModelConfig(), rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        # The paper says 7.3 million; 12 layers of 591,360 make up most of them.
        assert count == 7_216_643

    @pytest.mark.parametrize("features_per_token", [0, 1])
    def test_of_the_layers_name_the_axes_that_may_be_sharded(self, features_per_token):
        config = ModelConfig(features_per_token=features_per_token)
        model = nnx.eval_shape(lambda: DoPFN(config, rngs=nnx.Rngs(0)))
        parameters = nnx.to_flat_state(nnx.state(model.layers, nnx.Param))
        axes = {path: p.get_metadata("axes", None) for path, p in parameters if p.ndim == 3}
        assert len(axes) == (10 if features_per_token else 6)
        for path, names in axes.items():
            wide = "mlp" if path[-2] in ("up", "down") else "heads"
            inwards = path[-2] in ("out", "down")
            assert names == ((wide, "embed") if inwards else ("embed", wide)), path
