"""The bar distribution against numerical integrals, closed forms from SciPy, and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dopfn_jax.model.bar_distribution import FARTHEST, BarDistribution, fit_borders
from dopfn_jax.model.standardise import LINEAR_RANGE

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BORDERS = np.array([-2.0, -1.2, -0.5, -0.1, 0.2, 0.9, 1.0, 2.5, 4.0], np.float32)
# Most mass in the middle, in the lower tail, in the upper tail (more than half of it).
LOGITS = np.array(
    [
        [0.0, 0.3, -1.0, 2.0, 1.0, 0.5, -2.0, 0.1],
        [4.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
        [-1.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 4.0],
    ],
    np.float32,
)
BATCH = len(LOGITS)
LOG_MASSES = scipy.special.log_softmax(LOGITS.astype(np.float64), axis=-1)
TAIL_SCALES = np.diff(BORDERS)[[0, -1]] / scipy.stats.norm.ppf(0.75)


@pytest.fixture
def bars() -> BarDistribution:
    return BarDistribution(jnp.asarray(LOGITS), jnp.asarray(BORDERS))


@functools.partial(jax.jit, static_argnums=1)
def _call(bars: BarDistribution, method: str, argument: jax.typing.ArrayLike) -> jax.Array:
    return getattr(bars, method)(argument)


@jax.jit
def _answers(bars: BarDistribution, y: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    return {
        "log_prob": bars.log_prob(y),
        "prob": bars.prob(y),
        "cdf": bars.cdf(y),
        "crps": bars.crps(y),
        "quantile": bars.quantile(jnp.array([1e-5, 0.1, 0.5, 0.8, 0.9999])),
        "masses": bars.masses,
        "mean": bars.mean,
        "median": bars.median,
        "mode": bars.mode,
        "variance": bars.variance,
        "entropy": bars.entropy,
        "sample": bars.sample(key, (2,)),
        "average": bars.average().mean,
    }


def _answer(bars: BarDistribution, name: str) -> jax.Array:
    """One of the answers that take no argument; compiled together, because that is faster."""
    return _answers(bars, jnp.zeros((5, BATCH)), jax.random.key(0))[name]


def _per_row(values: np.ndarray | list[float]) -> np.ndarray:
    """The same y for each distribution: (G,) -> (G, BATCH)."""
    return np.repeat(np.asarray(values, np.float32)[:, None], BATCH, axis=1)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Mid-points and widths of cells that straddle no border and reach 12 tail scales out: (G,)."""
    edges = np.array([BORDERS[1] - 15, *BORDERS[1:-1], BORDERS[-2] + 30], np.float64)
    cells = [8000, *[200] * (len(edges) - 3), 8000]
    parts = [np.linspace(*ends, n + 1) for *ends, n in zip(edges, edges[1:], cells, strict=False)]
    middles = [(part[1:] + part[:-1]) / 2 for part in parts]
    return np.concatenate(middles), np.concatenate([np.diff(part) for part in parts])


def _density(bars: BarDistribution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid (G, 1), probability of each cell (G, BATCH), density (G, BATCH)."""
    y, width = _grid()
    density = np.asarray(_call(bars, "prob", _per_row(y)), np.float64)
    return y[:, None], width[:, None] * density, density


def test_density_integrates_to_one_and_splits_as_the_masses(bars):
    y, cells, _ = _density(bars)
    np.testing.assert_allclose(cells.sum(0), 1, rtol=1e-5)
    bucket = np.searchsorted(BORDERS[1:-1], y[:, 0])
    masses = np.stack([cells[bucket == i].sum(0) for i in range(LOGITS.shape[1])], axis=-1)
    np.testing.assert_allclose(masses, np.exp(LOG_MASSES), rtol=1e-5)
    np.testing.assert_allclose(_answer(bars, "masses"), masses, rtol=1e-5)


def test_log_prob_is_that_of_uniforms_and_half_normals(bars):
    lower = scipy.stats.halfnorm.logpdf(BORDERS[1] + 3, scale=TAIL_SCALES[0]) + LOG_MASSES[:, 0]
    inner = LOG_MASSES[:, 4] - np.log(0.7)
    upper = scipy.stats.halfnorm.logpdf(7 - BORDERS[-2], scale=TAIL_SCALES[1]) + LOG_MASSES[:, -1]
    expected = np.stack([lower, inner, upper])
    y = _per_row([-3.0, 0.5, 7.0])
    np.testing.assert_allclose(_call(bars, "log_prob", y), expected, rtol=1e-5)
    np.testing.assert_allclose(_call(bars, "prob", y), np.exp(expected), rtol=1e-5)


def test_cdf_is_the_integral_of_the_density(bars):
    y, cells, _ = _density(bars)
    below = np.cumsum(cells, axis=0) - cells / 2
    np.testing.assert_allclose(_call(bars, "cdf", _per_row(y[:, 0])), below, atol=2e-5)


def test_half_of_a_tail_lies_within_its_bucket_and_all_within_infinity(bars):
    ends = _call(bars, "cdf", _per_row([-np.inf, BORDERS[0], BORDERS[-1], np.inf]))
    lower, upper = np.exp(LOG_MASSES[:, 0]), np.exp(LOG_MASSES[:, -1])
    np.testing.assert_allclose(ends[1], lower / 2, rtol=1e-5)
    np.testing.assert_allclose(ends[2], 1 - upper / 2, rtol=1e-5)
    np.testing.assert_array_equal(ends[0], 0)
    np.testing.assert_array_equal(ends[3], 1)


def test_gradient_of_cdf_is_the_density(bars):
    y = _per_row([-4.0, -1.9, -0.7, 0.0, 0.95, 2.0, 3.0, 8.0])
    slope = jax.jit(jax.grad(lambda y: bars.cdf(y).sum()))(y)
    np.testing.assert_allclose(slope, _call(bars, "prob", y), rtol=1e-5)


def test_quantile_inverts_cdf(bars):
    q = np.array([1e-6, 1e-3, 0.01, 0.2, 0.5, 0.500001, 0.7, 0.99, 0.9999], np.float32)
    y = np.asarray(_call(bars, "quantile", q))
    assert y.shape == (BATCH, len(q))
    assert (np.diff(y, axis=-1) > 0).all()
    np.testing.assert_allclose(_call(bars, "cdf", y.T), _per_row(q), rtol=2e-5, atol=2e-7)
    np.testing.assert_allclose(_answer(bars, "median"), y[:, 4], rtol=1e-6)


def test_quantile_deep_in_the_tails_is_that_of_the_half_normal(bars):
    q = np.array([1e-4, 1e-12, 1e-30, 1 - 2.0**-24], np.float32)
    y = _call(bars, "quantile", q)
    below = scipy.stats.norm.ppf(q[None, :3] / np.exp(LOG_MASSES[:, :1]) / 2)
    np.testing.assert_allclose(y[:, :3], BORDERS[1] + TAIL_SCALES[0] * below, rtol=1e-5)
    above = scipy.stats.norm.isf(2.0**-24 / np.exp(LOG_MASSES[:, -1]) / 2)
    np.testing.assert_allclose(y[:, 3], BORDERS[-2] + TAIL_SCALES[1] * above, rtol=1e-5)


def test_quantile_in_a_light_upper_tail_keeps_its_precision(bars):
    # Counted from below, this bucket's mass, down to 1e-7, would be rounded to a multiple of 6e-8.
    logits = LOGITS.copy()
    logits[:, -1] = -12
    rest = 2.0**-24
    light = BarDistribution(jnp.asarray(logits), bars.borders)
    y = _call(light, "quantile", np.array([0.1, 0.5, 0.9, 1 - rest], np.float32))
    masses = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    above = scipy.stats.norm.isf(rest / masses[:, -1] / 2)
    np.testing.assert_allclose(y[:, 3], BORDERS[-2] + TAIL_SCALES[1] * above, rtol=1e-5)


def test_quantiles_at_zero_and_one_are_infinite_even_without_tail_mass(bars):
    q = np.array([0.0, 1e-3, 0.999, 1.0], np.float32)
    logits = LOGITS.copy()
    logits[:, [0, -1]] = -np.inf
    boxed = BarDistribution(jnp.asarray(logits), bars.borders)
    for distribution in (bars, boxed):
        y = np.asarray(_call(distribution, "quantile", q))
        np.testing.assert_array_equal(y[:, [0, 3]], [[-np.inf, np.inf]] * BATCH)
    assert (BORDERS[1] < y[:, 1]).all() and (y[:, 2] < BORDERS[-2]).all()
    assert np.isfinite(_answer(boxed, "entropy")).all()


def test_moments_and_entropy_equal_integrals(bars):
    y, cells, density = _density(bars)
    mean = (cells * y).sum(0)
    variance = (cells * (y - mean) ** 2).sum(0)
    np.testing.assert_allclose(_answer(bars, "mean"), mean, rtol=1e-4)
    np.testing.assert_allclose(_answer(bars, "variance"), variance, rtol=1e-4)
    entropy = -scipy.special.xlogy(cells, density).sum(0)
    np.testing.assert_allclose(_answer(bars, "entropy"), entropy, rtol=1e-4)


def test_mode_is_where_the_density_peaks(bars):
    mode = np.asarray(_answer(bars, "mode"))
    np.testing.assert_allclose(mode, [0.05, BORDERS[1], BORDERS[-2]], atol=1e-6)
    _, _, density = _density(bars)
    just_inside = mode + np.array([0, -1e-4, 1e-4], np.float32)
    at_mode = _call(bars, "prob", _per_row([0.0]) + just_inside)
    np.testing.assert_allclose(at_mode[0], density.max(0), rtol=1e-3)


def test_mode_ranks_a_tail_by_its_peak_not_by_its_mass():
    # As wide as its neighbour, a tail peaks at 0.54 of the density of a uniform bucket.
    logits = np.full((BATCH, 8), -9, np.float32)
    logits[:, 1] = 0
    logits[:, 0] = [0.5, 0.7, 0.0]
    bars = BarDistribution(jnp.asarray(logits), jnp.asarray(np.arange(9, dtype=np.float32)))
    np.testing.assert_allclose(_answer(bars, "mode"), [1.5, 1.0, 1.5])


def test_crps_equals_its_integral(bars):
    x, width = _grid()
    cdf = np.asarray(_call(bars, "cdf", _per_row(x)), np.float64)
    # Borders and cell edges, so that no cell straddles y.
    y = np.array([-8.7, -2.7, -0.5, 0.05, 0.9, 2.5, 4.0, 10.0])
    squares = (cdf[None] - (x[:, None] >= y[:, None, None])) ** 2
    expected = (width[:, None] * squares).sum(1)
    np.testing.assert_allclose(_call(bars, "crps", _per_row(y)), expected, rtol=1e-4)


def test_log_prob_and_its_gradients_are_finite_and_right_far_out(bars):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradients(logits, y):
        return BarDistribution(logits, bars.borders).log_prob(y).sum()

    for y, bucket, inner_border, scale in (
        (-1e5, 0, BORDERS[1], TAIL_SCALES[0]),
        (1e5, -1, BORDERS[-2], TAIL_SCALES[1]),
    ):
        log_prob, (in_logits, in_y) = value_and_gradients(bars.logits, jnp.full(BATCH, y))
        assert np.isfinite(log_prob)
        np.testing.assert_allclose(in_y, (inner_border - y) / scale**2, rtol=1e-4)
        one_hot = np.eye(LOGITS.shape[1])[bucket]
        np.testing.assert_allclose(in_logits, one_hot - np.exp(LOG_MASSES), atol=1e-6)


def test_gradients_are_finite_everywhere(bars):
    y = _per_row([-1e6, -3.0, *BORDERS, 0.05, 9.0, 1e6])

    @jax.jit
    @functools.partial(jax.jacrev, argnums=(0, 1))
    def jacobians(logits, y):
        bars = BarDistribution(logits, jnp.asarray(BORDERS))
        totals = {"log_prob": bars.log_prob(y), "cdf": bars.cdf(y), "crps": bars.crps(y)}
        totals |= {"mean": bars.mean, "variance": bars.variance, "entropy": bars.entropy}
        totals |= {"quantile": bars.quantile(jnp.array([0.05, 0.5, 0.95]))}
        return {name: total.sum() for name, total in totals.items()}

    for sharpness in (1, 80):
        for name, gradients in jacobians(sharpness * bars.logits, y).items():
            for gradient in gradients:
                assert np.isfinite(gradient).all(), name


def test_gradient_of_the_median_by_the_borders_is_where_it_lies():
    borders = jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    gradient = jax.grad(lambda borders: BarDistribution(jnp.zeros(4), borders).median)(borders)
    np.testing.assert_allclose(gradient, [0, 0, 1, 0, 0], atol=1e-6)


def test_every_answer_is_affine_equivariant(bars):
    loc, scale = -3.0, 2.5
    y = _per_row([-5.0, -1.0, 0.1, 3.0, 9.0])
    key = jax.random.key(0)
    expected = _answers(bars, y, key)
    actual = _answers(bars.affine(loc, scale), loc + scale * y, key)
    shifts = {"log_prob": -np.log(scale), "entropy": np.log(scale), "cdf": 0, "masses": 0}
    factors = {"prob": 1 / scale, "crps": scale, "variance": scale**2}
    for name, value in expected.items():
        if name in shifts:
            want = value + shifts[name]
        elif name in factors:
            want = value * factors[name]
        else:
            want = loc + scale * value
        np.testing.assert_allclose(actual[name], want, rtol=2e-5, atol=2e-5, err_msg=name)


def test_samples_follow_the_cdf_independently(bars):
    draw = jax.jit(bars.sample, static_argnums=1)
    samples = np.asarray(draw(jax.random.key(1), (4000,)))
    levels = np.asarray(_call(bars, "cdf", samples))
    assert levels.shape == (4000, BATCH)
    for row in range(BATCH):
        assert scipy.stats.kstest(levels[:, row], "uniform").pvalue > 0.01
    assert np.abs(np.corrcoef(levels.T)[np.triu_indices(BATCH, 1)]).max() < 0.05
    np.testing.assert_allclose(samples.mean(0), _answer(bars, "mean"), atol=0.1)
    np.testing.assert_allclose(samples.var(0), _answer(bars, "variance"), rtol=0.1)


def test_sample_axes_lead_and_batch_axes_keep_their_place():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 8)).astype(np.float32)
    bars = BarDistribution(jnp.asarray(logits), jnp.asarray(BORDERS))
    one = BarDistribution(jnp.asarray(logits[1, 2]), bars.borders)
    y = rng.standard_normal((5, 4, 2, 3)).astype(np.float32)
    answers = jax.jit(lambda bars, y: (bars.log_prob(y), bars.cdf(y), bars.crps(y)))
    for of_all, of_one in zip(answers(bars, y), answers(one, y[3, 1, 1, 2]), strict=True):
        assert of_all.shape == (5, 4, 2, 3)
        np.testing.assert_allclose(of_all[3, 1, 1, 2], of_one, rtol=1e-5)
    quantiles = jax.eval_shape(bars.quantile, jnp.array([0.1, 0.9]))
    samples = jax.eval_shape(lambda: bars.sample(jax.random.key(0), (5, 4)))
    assert quantiles.shape == (2, 3, 2) and samples.shape == (5, 4, 2, 3)
    assert jax.eval_shape(bars.log_prob, 0.0).shape == jax.eval_shape(bars.quantile, 0.5).shape
    assert jax.eval_shape(bars.log_prob, 0.0).shape == (2, 3)


def test_vmap_over_borders_equals_a_loop():
    stacked = BarDistribution(
        jnp.asarray(np.stack([LOGITS, LOGITS[::-1]])),
        jnp.asarray(np.stack([BORDERS, 3 * BORDERS + 1])),
    )
    y = 3 * np.random.default_rng(0).standard_normal((2, 5, BATCH)).astype(np.float32)
    key = jax.random.key(2)
    mapped = jax.vmap(_answers, in_axes=(0, 0, None))(stacked, y, key)
    for i in range(2):
        alone = _answers(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), y[i], key)
        for name, value in alone.items():
            np.testing.assert_allclose(mapped[name][i], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_affine_maps_over_one_loc_and_scale_per_task(bars):
    loc, scale = jnp.array([1.0, -2.0, 0.0]), jnp.array([2.0, 0.5, 1.0])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def moved_mean(logits, loc, scale):
        return BarDistribution(logits, bars.borders).affine(loc, scale).mean

    expected = loc + scale * _answer(bars, "mean")
    np.testing.assert_allclose(moved_mean(bars.logits, loc, scale), expected, rtol=1e-5, atol=1e-6)


def test_average_is_the_mixture(bars):
    y = np.array([-6.0, -1.0, 0.1, 3.0, 9.0], np.float32)
    average = jax.jit(BarDistribution.average, static_argnums=1)
    mixture = average(bars, 0)
    assert mixture.batch_shape == ()
    expected = np.asarray(_call(bars, "prob", _per_row(y))).mean(-1)
    np.testing.assert_allclose(_call(mixture, "prob", y), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(mixture.logits).sum(), 1, rtol=1e-5)
    # The two axes of a batch of (BATCH, 2): either may be averaged over.
    stacked = BarDistribution(jnp.asarray(np.stack([LOGITS, LOGITS], axis=1)), bars.borders)
    np.testing.assert_allclose(average(stacked, 0).logits[1], mixture.logits, rtol=1e-5)
    np.testing.assert_allclose(average(stacked, 1).logits, LOG_MASSES, rtol=1e-5)


def test_half_precision_logits_give_single_precision_answers(bars):
    logits = LOGITS.astype(np.float16)
    half = BarDistribution(jnp.asarray(logits), bars.borders)
    exact = BarDistribution(jnp.asarray(logits.astype(np.float32)), bars.borders)
    y = _per_row([-3.0, 0.5, 7.0])
    actual = _call(half, "log_prob", y)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, _call(exact, "log_prob", y), rtol=1e-6)


def test_wrong_shapes_are_refused(bars):
    stacked = BarDistribution(bars.logits, jnp.tile(bars.borders, (BATCH, 1)))
    short = BarDistribution(bars.logits, bars.borders[:-1])
    for wrong in (stacked, short):
        for answer in ("mean", "variance", "mode", "median", "entropy", "average"):
            with pytest.raises(ValueError, match="where borders have leading axes"):
                getattr(wrong, answer)()
        for answer in ("log_prob", "prob", "cdf", "crps", "quantile"):
            with pytest.raises(ValueError, match="where borders have leading axes"):
                getattr(wrong, answer)(0.3)
    with pytest.raises(ValueError, match="scalar"):
        bars.affine(jnp.zeros(BATCH), 1.0)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"scale is {scale}, but must be positive"):
            bars.affine(0.0, scale)
    with pytest.raises(ValueError, match="ravel"):
        bars.quantile(jnp.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="axis"):
        bars.average(axis=1)


def test_fitted_borders_share_the_samples_equally():
    samples = np.random.default_rng(0).standard_normal(20_000)
    borders = np.asarray(fit_borders(samples, 20))
    assert borders.dtype == np.float32 and borders.shape == (21,)
    counts = np.bincount(np.searchsorted(borders[1:-1], samples), minlength=20)
    np.testing.assert_allclose(counts / len(samples), 1 / 20, atol=2e-4)
    np.testing.assert_allclose(borders[[0, -1]], np.quantile(samples, [0.005, 0.995]), rtol=1e-5)
    np.testing.assert_allclose(fit_borders(jnp.asarray(samples), 20), borders, atol=1e-5)


def test_fitted_borders_suit_the_samples():
    # Equal logits must describe the samples about as well as the density they came from.
    samples = np.random.default_rng(1).standard_normal(20_000)
    bars = BarDistribution(jnp.zeros(100), fit_borders(samples, 100))
    np.testing.assert_allclose(
        -np.mean(_call(bars, "log_prob", samples)), 0.5 * np.log(2 * np.pi * np.e), atol=0.03
    )


def test_uniform_share_spaces_that_many_borders_equally_and_far_out_in_proportion():
    samples = np.random.default_rng(2).standard_t(2, 20_000)
    all_even = np.asarray(fit_borders(samples, 200, 1.0))[1:-1]
    assert all_even.shape == (199,)
    np.testing.assert_allclose(all_even[[0, -1]], [-FARTHEST, FARTHEST], rtol=1e-5)
    widths, middles = np.diff(all_even), (all_even[1:] + all_even[:-1]) / 2
    central = np.abs(all_even[1:]).clip(np.abs(all_even[:-1])) < LINEAR_RANGE
    np.testing.assert_allclose(widths[central], widths[central][0], rtol=1e-4)
    far = np.abs(middles) > LINEAR_RANGE + 1
    share = widths[far] / (np.abs(middles[far]) - LINEAR_RANGE + 1)
    np.testing.assert_allclose(share, share[0], rtol=1e-2)
    half = np.asarray(fit_borders(samples, 51, 0.5))
    even = np.asarray(fit_borders(samples, 26, 1.0))[1:-1]
    assert np.abs(half[:, None] - even).min(0).max() < 1e-2
    quantiles = np.quantile(samples, np.linspace(0, 1, 27)[1:-1])
    assert np.abs(half[:, None] - quantiles).min(0).max() < 1e-2
    assert half.shape == (52,)


def test_the_mean_follows_a_far_outcome():
    # All of the mass where y is: the mean is off by less than the bucket, 5 % of y.
    bars = BarDistribution(jnp.zeros(448), fit_borders(np.linspace(-3, 3, 1000), 448, 0.5))
    for y in (-40.0, -12.0, 6.0, 9.0, 30.0):
        bucket = np.searchsorted(np.asarray(bars.borders), y) - 1
        sure = BarDistribution(jnp.where(jnp.arange(448) == bucket, 0.0, -50.0), bars.borders)
        assert abs(float(sure.mean) - y) < 0.05 * abs(y)


@pytest.mark.parametrize("uniform_share", [0.0, 0.3])
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda rng: rng.standard_cauchy(5000), id="heavy tails"),
        pytest.param(lambda rng: rng.integers(0, 2, 5000), id="binary"),
        pytest.param(lambda rng: rng.poisson(0.3, 5000) + 1000.0, id="counts far from zero"),
        pytest.param(
            lambda rng: np.where(rng.random(5000) < 0.9, 0, rng.standard_normal(5000)), id="atom"
        ),
        pytest.param(lambda rng: np.array([0.0, 1.0]), id="two samples"),
    ],
)
def test_borders_increase_strictly_and_make_sane_tails(samples, uniform_share):
    samples = samples(np.random.default_rng(3))
    borders = np.asarray(fit_borders(samples, 100, uniform_share))
    assert borders.shape == (101,) and np.isfinite(borders).all()
    widths = np.diff(borders)
    span = borders[-1] - borders[0]
    assert widths.min() > 5e-7 * np.ptp(np.quantile(samples, [0.001, 0.999]))
    assert min(widths[0], widths[-1]) > 4e-3 * span
    low, high = np.quantile(samples, [0.001, 0.999])
    assert borders[0] <= low + 1e-4 * span and borders[-1] >= high - 1e-4 * span
    assert span < 1.05 * max(high - low, (high + 3 * FARTHEST) * (uniform_share > 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 2)), 5), "1-D"),
        ((np.array([0.0, np.nan]), 5), "finite"),
        ((np.arange(9.0), 2), "buckets"),
        ((np.arange(9.0), 5, 1.5), "uniform_share"),
        ((np.ones(9), 5), "equal"),
    ],
)
def test_fit_borders_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_borders(*arguments)
