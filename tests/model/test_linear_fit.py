"""The regressions that rows carry, against least squares written out in NumPy."""

import jax
import numpy as np
import pytest

from dopfn_jax.model.linear_fit import (
    _PENALTY,
    _PENALTY_PER_ROW,
    LEANINGS,
    ROW_FEATURES,
    LinearFit,
    invert,
    leanings,
)

N, F = 40, 3
FAST = {"xla_backend_optimization_level": 0}
RICH, RICH_EFFECT, CAUTIOUS, LEVERAGE, CAUTIOUS_EFFECT, RICH_SHARE, CAUTIOUS_SHARE = range(7)


def _fit_and_read(x, t, y, mask, covariate_mask, query_x, query_t):
    fit = LinearFit.fit(x, t, y, mask, covariate_mask)
    return fit.row_features(x, t, y), fit.row_features(query_x, query_t, None)


_compiled = jax.jit(_fit_and_read, compiler_options=FAST)


def features(x, t, y, query_x, query_t, mask=None, covariate_mask=None):
    """Of context and query rows, for one task."""
    mask = np.ones(len(x), bool) if mask is None else mask
    covariate_mask = np.ones(x.shape[1], bool) if covariate_mask is None else covariate_mask
    arrays = (x, t, y, mask, covariate_mask, query_x, query_t)
    single = [a[None] if a.dtype == bool else a[None].astype(np.float32) for a in arrays]
    context, query = (np.asarray(found)[0] for found in _compiled(*single))
    assert context.shape == (len(x), ROW_FEATURES)
    return context, query


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    x = random.normal(size=(N + 10, F))
    t = (random.random(N + 10) < 0.4).astype(float)
    y = x[:, 0] + 0.5 * x[:, 1] ** 2 + t * (1.5 - x[:, 2]) + 0.1 * random.normal(size=N + 10)
    y = (y - y[:N].mean()) / y[:N].std()
    return x[:N], t[:N], y[:N], x[N:], t[N:]


def terms(x, t, reference_t):
    t = (t - reference_t.mean()) / reference_t.std()
    squares = np.clip(x, -3, 3) ** 2 - 1
    return np.column_stack([np.ones(len(x)), t, x, squares, t[:, None] * x])


def solve(design, y, extra=0.0):
    penalty = np.full(design.shape[1], _PENALTY + _PENALTY_PER_ROW * N)
    penalty[2:] += extra
    return np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ y)


def test_context_rows_are_predicted_without_themselves(table):
    x, t, y, *_ = table
    context, _ = features(*table)
    design = terms(x, t, t)
    for row in (0, 7, 39):
        others = np.arange(N) != row
        rich = design[row] @ solve(design[others], y[others])
        cautious = design[row, : 2 + F] @ solve(design[others, : 2 + F], y[others], extra=F)
        assert context[row, RICH] == pytest.approx(rich, abs=2e-4)
        assert context[row, CAUTIOUS] == pytest.approx(cautious, abs=2e-4)
    explained = 1 - np.sum((y - context[:, RICH]) ** 2) / np.sum(y**2)
    np.testing.assert_allclose(context[:, RICH_SHARE], explained, atol=1e-4)
    assert explained > 0.9 > context[0, CAUTIOUS_SHARE]


def test_queries_are_predicted_from_all_rows(table):
    x, t, y, query_x, query_t = table
    _, query = features(*table)
    design, asked = terms(x, t, t), terms(query_x, query_t, t)
    np.testing.assert_allclose(query[:, RICH], asked @ solve(design, y), atol=2e-4)
    inverse = np.linalg.inv(
        design.T @ design + (_PENALTY + _PENALTY_PER_ROW * N) * np.eye(2 + 3 * F)
    )
    leverage = np.einsum("rp,pq,rq->r", asked, inverse, asked)
    np.testing.assert_allclose(query[:, LEVERAGE], leverage / (1 + leverage), atol=2e-4)


def test_effects_are_differences_of_the_arms(table):
    x, t, y, query_x, _ = table
    ones = np.ones(len(query_x))
    (_, low), (_, high) = (features(x, t, y, query_x, arm * ones) for arm in (0, 1))
    np.testing.assert_allclose(low[:, RICH_EFFECT], high[:, RICH] - low[:, RICH], atol=1e-4)
    np.testing.assert_allclose(
        low[:, CAUTIOUS_EFFECT], high[:, CAUTIOUS] - low[:, CAUTIOUS], atol=1e-4
    )


def test_padding_changes_nothing(table):
    x, t, y, query_x, query_t = table
    context, query = features(*table)
    padded_x = np.pad(x, ((0, 5), (0, 2)))
    mask, columns = np.arange(N + 5) < N, np.arange(F + 2) < F
    more_context, more_query = features(
        padded_x, np.pad(t, (0, 5)), np.pad(y, (0, 5)), np.pad(query_x, ((0, 0), (0, 2))), query_t,
        mask, columns,
    )  # fmt: skip
    np.testing.assert_allclose(more_context[:N], context, atol=1e-4)
    np.testing.assert_allclose(more_query, query, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 40])
def test_awkward_tables_stay_finite(table, rows):
    x, _, y, query_x, query_t = table
    x = np.column_stack([x[:, 0], x[:, 0], np.zeros(N)])
    x[::3, 1] = np.nan
    x[0, 0] = 9.0
    context, query = features(x[:rows], np.ones(rows), y[:rows], query_x, query_t)
    assert np.isfinite(context).all() and np.isfinite(query).all()
    assert np.abs(query).max() < 10


@pytest.mark.parametrize(("terms", "rows"), [(11, 9), (60, 40), (60, 2000)])
def test_inverse_of_normal_matrices(terms, rows):
    design = np.random.default_rng(0).normal(size=(2, rows, terms))
    design[..., 1] = design[..., 0]
    matrix = np.einsum("bnp,bnq->bpq", design, design) + (0.1 + 1e-3 * rows) * np.eye(terms)
    exact = np.linalg.inv(matrix)
    found = np.asarray(jax.jit(invert, compiler_options=FAST)(matrix.astype(np.float32)))
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_no_device_rounds_its_products(table):
    x, t, y = (part[None].astype(np.float32) for part in table[:3])
    mask, columns = np.ones(y.shape, bool), np.ones((1, F), bool)
    program = str(jax.make_jaxpr(_fit_and_read)(x, t, y, mask, columns, x, t))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST") > 0


def test_leanings_are_the_predictions_and_what_the_arm_adds_to_them(table):
    *_, query_t = table
    _, query = features(*table)
    found = np.asarray(leanings(query[None], query_t[None]))[0]
    assert found.shape == (10, LEANINGS)
    np.testing.assert_allclose(found[:, 0], query[:, RICH], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], query[:, CAUTIOUS], rtol=1e-6)
    # Half of the effect up under treatment, half of it down without.
    half = np.where(query_t == 1, 0.5, -0.5)
    np.testing.assert_allclose(found[:, 2], half * query[:, RICH_EFFECT], rtol=1e-6)
    np.testing.assert_allclose(found[:, 3], half * query[:, CAUTIOUS_EFFECT], rtol=1e-6)
    assert abs(found[:, 2:]).max() > 0.1
