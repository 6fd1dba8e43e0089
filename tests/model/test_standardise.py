"""Standardisation by the context against NumPy, and at the edges of what float32 holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.model.standardise import LINEAR_RANGE, Scaler, compress, expand

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TASKS, ROWS, COVARIATES = 2, 8, 3
fit = jax.jit(Scaler.fit)


def _context(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariates with some cells missing, outcomes, and a mask that ends early."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (TASKS, ROWS, COVARIATES)).astype(np.float32)
    x[:, 1::3, 0] = np.nan
    y = rng.normal(-1.0, 0.5, (TASKS, ROWS)).astype(np.float32)
    mask = np.arange(ROWS) < np.array([[ROWS - 2], [ROWS]])
    return x, y, mask


def test_location_and_scale_are_the_mean_and_deviation_of_what_exists():
    x, y, mask = _context()
    scaler = fit(x, y, mask)
    for task in range(TASKS):
        rows = mask[task]
        for loc, scale, values in (
            (scaler.x_loc[task, 0], scaler.x_scale[task, 0], x[task, rows]),
            (scaler.y_loc[task, 0], scaler.y_scale[task, 0], y[task, rows]),
        ):
            np.testing.assert_allclose(loc, np.nanmean(values, axis=0), rtol=1e-5)
            np.testing.assert_allclose(scale, np.nanstd(values, axis=0), rtol=1e-5)
    assert scaler.x_loc.shape == scaler.x_scale.shape == (TASKS, 1, COVARIATES)
    assert scaler.y_loc.shape == scaler.y_scale.shape == (TASKS, 1)


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_rows_that_do_not_exist_do_not_count(garbage: float):
    x, y, mask = _context()
    expected = fit(x, y, mask)
    x[~mask], y[~mask] = garbage, garbage
    jax.tree.map(np.testing.assert_array_equal, fit(x, y, mask), expected)


def test_standardised_covariates_keep_missing_cells_and_outcomes_are_not_compressed():
    x, y, mask = _context()
    scaler = fit(x, y, mask)
    x[0, 0, 1] += 1000 * scaler.x_scale[0, 0, 1]
    z = np.asarray(scaler.covariates(x))
    np.testing.assert_array_equal(np.isnan(z), np.isnan(x))
    assert LINEAR_RANGE < z[0, 0, 1] < LINEAR_RANGE + 10
    far = y + 100 * scaler.y_scale
    np.testing.assert_allclose(scaler.outcome(far) - scaler.outcome(y), 100, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -123.456, 1e8 / 3, 3e30, 1e-30])
def test_a_constant_maps_to_zero(value: float):
    x = np.full((TASKS, ROWS, COVARIATES), value, np.float32)
    scaler = fit(x, x[..., 0], np.ones((TASKS, ROWS), bool))
    np.testing.assert_array_equal(scaler.x_scale, 1)
    np.testing.assert_array_equal(scaler.y_scale, 1)
    np.testing.assert_array_equal(scaler.covariates(x), 0)
    np.testing.assert_array_equal(scaler.outcome(x[..., 0]), 0)


def test_a_spread_of_rounding_errors_counts_as_constant():
    x, y, mask = _context()
    y[:] = np.float32(7.7) * (1 + 1e-7 * np.arange(ROWS, dtype=np.float32))
    assert len(np.unique(y)) > 1
    np.testing.assert_array_equal(fit(x, y, mask).y_scale, 1)


def test_a_column_without_values_gets_location_zero_and_scale_one():
    x, y, mask = _context()
    x[:, :, 1] = np.nan
    scaler = fit(x, y, mask)
    np.testing.assert_array_equal(scaler.x_loc[..., 1], 0)
    np.testing.assert_array_equal(scaler.x_scale[..., 1], 1)
    x[0, 0, 1] = 2.0
    np.testing.assert_array_equal(scaler.covariates(x)[0, 0, 1], 2.0)


def test_tables_without_covariates_or_rows_are_legal():
    x, y, mask = _context()
    assert fit(x[..., :0], y, mask).x_loc.shape == (TASKS, 1, 0)
    empty = fit(x, y, np.zeros_like(mask))
    np.testing.assert_array_equal(empty.y_loc, 0)
    np.testing.assert_array_equal(empty.y_scale, 1)


@pytest.mark.parametrize("unit", [1e-30, 1e-19, 1e19, 1e30])
def test_any_unit_of_measurement_will_do(unit: float):
    x, y, mask = _context()
    expected, scaler = fit(x, y, mask), fit(x * np.float32(unit), y * np.float32(unit), mask)
    z, z_expected = scaler.covariates(x * np.float32(unit)), expected.covariates(x)
    np.testing.assert_allclose(z, z_expected, atol=1e-5)
    z, z_expected = scaler.outcome(y * np.float32(unit)), expected.outcome(y)
    np.testing.assert_allclose(z, z_expected, atol=1e-5)


def test_a_large_offset_costs_no_more_than_its_own_rounding():
    rng = np.random.default_rng(0)
    y = (1e5 + rng.normal(size=(1, 5000))).astype(np.float32)
    exact = (y - y.mean(dtype=np.float64)) / y.std(dtype=np.float64)
    z = fit(y[..., None], y, np.ones(y.shape, bool)).outcome(y)
    np.testing.assert_allclose(z, exact, atol=np.spacing(np.float32(1e5)))


def test_compress_is_the_identity_in_range_and_increasing_and_smooth_beyond():
    z = np.linspace(-20, 20, 4001, dtype=np.float32)
    squeezed = np.asarray(compress(z))
    inside = np.abs(z) <= LINEAR_RANGE
    np.testing.assert_array_equal(squeezed[inside], z[inside])
    steps = np.diff(squeezed)
    assert (steps > 0).all()
    assert steps.max() < 0.0101
    np.testing.assert_allclose(compress(-z), -squeezed)
    np.testing.assert_allclose(expand(squeezed), z, rtol=1e-4)
    slope = jax.vmap(jax.grad(compress))(jnp.float32(LINEAR_RANGE) + jnp.array([-1e-4, 1e-4]))
    np.testing.assert_allclose(slope, 1, atol=2e-4)
    assert np.isfinite(compress(np.float32(3e38)))


def test_derivatives_are_finite_where_cells_are_missing_and_where_nothing_varies():
    x, y, mask = _context()
    x[:, :, 1], x[:, :, 2], y[1] = 4.0, np.nan, -2.0

    def total(x: jax.Array, y: jax.Array) -> jax.Array:
        scaler = Scaler.fit(x, y, mask)
        return jnp.nansum(scaler.covariates(x) ** 2) + jnp.sum(scaler.outcome(y) ** 3)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(x, y):
        assert np.isfinite(gradient).all()
