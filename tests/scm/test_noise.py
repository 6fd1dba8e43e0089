"""Every family of noise against SciPy, centred and scaled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dopfn_jax.scm.noise import NOISE_FAMILIES, sample_noise

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS = 20_000
# Two nodes of each family.
FAMILY = np.tile(np.arange(len(NOISE_FAMILIES)), 2)
SCALE = np.array([0.1, 0.5, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0], np.float32)
STANDARD = {
    "gaussian": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=math.sqrt(1 / 2)),
    "student_t": scipy.stats.t(3, scale=math.sqrt(1 / 3)),
    "gumbel": scipy.stats.gumbel_r(
        -np.euler_gamma * math.sqrt(6) / math.pi, math.sqrt(6) / math.pi
    ),
}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sample(key, family, scale, rows, families=NOISE_FAMILIES):
    return sample_noise(key, family, scale, rows, families)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.asarray(_sample(jax.random.key(0), FAMILY, SCALE, ROWS))


def test_the_reference_distributions_are_standardised():
    for distribution in STANDARD.values():
        np.testing.assert_allclose(distribution.stats(), [0, 1], atol=1e-9)


def test_every_node_follows_its_family_at_its_scale(noise):
    for node, (family, scale) in enumerate(zip(FAMILY, SCALE, strict=True)):
        expected = STANDARD[NOISE_FAMILIES[family]]
        assert scipy.stats.kstest(noise[node] / scale, expected.cdf).pvalue > 1e-3
        for other in STANDARD.values():
            if other is not expected:
                assert scipy.stats.kstest(noise[node] / scale, other.cdf).pvalue < 1e-6


def test_nodes_and_rows_are_independent(noise):
    ranks = scipy.stats.rankdata(noise, axis=1)
    between = np.corrcoef(ranks)[np.triu_indices(len(FAMILY), 1)]
    along = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in ranks]
    assert max(np.abs(between).max(), np.abs(along).max()) < 5 / math.sqrt(ROWS)


def test_families_that_no_node_has_may_be_left_out():
    some = FAMILY % 2
    expected = _sample(jax.random.key(1), some, SCALE, ROWS)
    fewer = _sample(jax.random.key(1), some, SCALE, ROWS, NOISE_FAMILIES[:2])
    np.testing.assert_allclose(fewer, expected, rtol=1e-6)


def test_a_family_that_was_left_out_is_not_taken_for_no_noise():
    scale = np.where(np.arange(len(SCALE)) == 1, np.float32(0), SCALE)
    fewer = _sample(jax.random.key(1), FAMILY, scale, 5, NOISE_FAMILIES[:1])
    known = (FAMILY == 0) | (scale == 0)
    np.testing.assert_array_equal(np.isfinite(fewer).all(axis=1), known)


@pytest.mark.parametrize("end", [0.0, 1 - 2.0**-23])
def test_the_ends_of_the_uniform_draws_give_no_outlier(monkeypatch, end):
    # Student-t noise is a power of a uniform draw: close to 0 it would be astronomically large.
    def uniform(key, shape=(), dtype=jnp.float32, minval=0.0, maxval=1.0):
        return jnp.full(shape, minval + end * (maxval - minval), dtype)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    student_t = np.full(1, NOISE_FAMILIES.index("student_t"))
    draw = sample_noise(jax.random.key(0), student_t, np.ones(1, np.float32), 1, ("student_t",))
    assert abs(draw.item()) < 1000
