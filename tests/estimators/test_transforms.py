import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.transforms import TRANSFORMS, Monotone, TableTransform
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.tables import Table
from tests.estimators.small import assert_same, table

cdf = jax.jit(BarDistribution.cdf)
SAMPLES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40)


@pytest.mark.parametrize("fit", [Monotone.normal_scores, Monotone.signed_log])
@given(values=SAMPLES)
def test_every_map_is_increasing_and_leads_back(fit, values: list[float]) -> None:
    assume(fit == Monotone.normal_scores or np.ptp(values) > 1e-3)  # no outcome is constant
    image = fit(values)
    span = np.ptp(values) or 1.0
    grid = np.linspace(min(values) - 2 * span, max(values) + 2 * span, 50)
    assert (np.diff(image(grid)) > 0).all()
    np.testing.assert_allclose(image.inverse(image(grid)), grid, atol=1e-6 * span)
    assert np.isnan(image(np.nan))


def test_scores_are_normal_quantiles_of_ranks() -> None:
    image = Monotone.normal_scores([5.0, 1.0, np.nan, 1.0, 30.0])
    # Ranks 1/4 (twice, half-way through half of the rows), 5/8 and 7/8.
    np.testing.assert_allclose(image([1.0, 5.0, 30.0]), [-0.67449, 0.31864, 1.15035], atol=1e-5)
    # Beyond its ends it goes on with its average slope.
    slope = (1.15035 + 0.67449) / 29
    np.testing.assert_allclose(image([59.0]), [1.15035 + 29 * slope], atol=1e-4)
    unknown = Monotone.normal_scores([np.nan, np.nan])
    assert unknown(3.0) == 3.0


def test_a_signed_logarithm_is_linear_inside_and_logarithmic_outside() -> None:
    values = np.concatenate([np.linspace(-1, 1, 1001), [-1e6, 1e6]])
    image = Monotone.signed_log(values)
    assert image(0.0) == pytest.approx(0, abs=1e-9)
    assert image(1e6) - image(1e6 / 4) == pytest.approx(np.log(4), abs=5e-3)
    assert image(1e6) == pytest.approx(-image(-1e6))


def test_buckets_keep_their_mass_on_the_way_back() -> None:
    generator = np.random.default_rng(0)
    y = np.exp(2 * generator.normal(size=200)).astype(np.float32)
    transform = TableTransform.fit("log_y", Table(np.zeros((200, 0), np.float32), y, y))
    answer = BarDistribution(
        jnp.asarray(generator.normal(size=(5, 16)), jnp.float32), jnp.linspace(-2.0, 4.0, 17)
    )
    restored = transform.restore(answer)
    below = (cdf(part, part.borders[1:-1, None]) for part in (restored, answer))
    np.testing.assert_allclose(*below, atol=1e-5)
    np.testing.assert_allclose(transform.outcome(restored.borders), answer.borders, atol=1e-3)


def test_borders_stay_apart_where_outcomes_are_equal() -> None:
    y = np.repeat(np.float32([0, 1e-6, 5]), [90, 90, 20])
    transform = TableTransform.fit("quantile_y", Table(np.zeros((200, 0), np.float32), y, y))
    answer = BarDistribution(jnp.zeros((1, 500)), jnp.linspace(-4.0, 4.0, 501))
    assert (np.diff(transform.restore(answer).borders) > 0).all()


def test_ranks_do_not_change_with_the_units(checkpoint) -> None:
    """What an increasing function makes of a column has the same ranks."""
    X, t, y = table()
    cube, exponential = (y - y.mean()) ** 3, np.exp(X)
    by_y = [
        DoPFNRegressor(checkpoint, transforms=("quantile_y",)).fit(X, t, outcome)
        for outcome in (y, cube)
    ]
    logits = [model.predict_distribution(X, 1).logits for model in by_y]
    assert_same(*logits)
    assert by_y[1].predict(X, 1).min() > cube.min() - np.ptp(cube)
    by_x = [
        DoPFNRegressor(checkpoint, transforms=("quantile_x",)).fit(covariates, t, y)
        for covariates in (X, exponential)
    ]
    assert_same(by_x[0].cate(X), by_x[1].cate(exponential))
    assert np.abs(by_x[0].cate(X) - DoPFNRegressor(checkpoint).fit(X, t, y).cate(X)).max() > 1e-3


def test_two_values_have_no_shape_to_lose(checkpoint) -> None:
    X, t, y = table()
    plain, *transformed = (
        DoPFNRegressor(checkpoint, transforms=(name,)).fit(X, t, y > 10).predict(X, 1)
        for name in ("none", "quantile_y", "log_y")
    )
    for answer in transformed:
        np.testing.assert_array_equal(answer, plain)


def test_members_are_averaged_in_probability(checkpoint) -> None:
    _, t, y = table()
    names = ("none", "log_y", "quantile_y")
    members = [
        DoPFNRegressor(checkpoint, transforms=(name,)).fit(None, t, np.exp(y / 4)) for name in names
    ]
    together = DoPFNRegressor(checkpoint, n_estimators=3, transforms=names)
    together.fit(None, t, np.exp(y / 4))
    means = [model.predict(None, [0, 1]) for model in members]
    assert np.ptp(means, axis=0).min() > 1e-4
    assert_same(together.predict(None, [0, 1]), np.mean(means, axis=0))
    assert_same(together.cate(), np.mean([model.cate() for model in members], axis=0))
    mixture = together.predict_distribution(None, [0, 1])
    borders = mixture.borders[1:-1, None]
    below = [cdf(model.predict_distribution(None, [0, 1]), borders) for model in members]
    np.testing.assert_allclose(cdf(mixture, borders), np.mean(below, axis=0), atol=1e-5)


def test_missing_cells_and_saving(checkpoint, tmp_path) -> None:
    X, t, y = table()
    X.iloc[::3, 1] = np.nan
    settings = {"n_estimators": 4, "transforms": TRANSFORMS, "random_state": None}
    model = DoPFNRegressor(checkpoint, **settings).fit(X, t, y)
    assert np.isfinite(model.cate()).all()
    model.save(tmp_path / "model")
    loaded = DoPFNRegressor.load(tmp_path / "model")
    assert loaded.transforms == TRANSFORMS
    # Without a seed of their own its members would see the columns in other orders.
    np.testing.assert_array_equal(loaded.cate(), model.cate())


def test_what_makes_no_sense_is_refused(checkpoint) -> None:
    for transforms, message in {
        ("rank",): r"transforms are \('rank',\), but must be a tuple of some of 'none', 'quanti",
        (): r"transforms are \(\), but must be",
        ("none", "log_y"): "2 entries, but n_estimators is 1: every one needs a member",
    }.items():
        with pytest.raises(ValueError, match=message):
            DoPFNRegressor(checkpoint, transforms=transforms).fit(*table())
