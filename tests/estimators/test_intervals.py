"""Intervals of effects: their standard errors, and the least that these may be."""

import math

import numpy as np
import pandas as pd
import pytest

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor, effects
from dopfn_jax.estimators.views import random_part
from tests.estimators.small import ROWS, table


def test_an_interval_is_centred_deterministic_and_wider_for_more_confidence(fitted) -> None:
    low, high = fitted.ate_interval()
    assert (low + high) / 2 == pytest.approx(fitted.ate(), rel=1e-6)
    assert high - low > 1e-3
    assert fitted.ate_interval(table()[0]) == (low, high)
    lower, higher = fitted.ate_interval(alpha=0.01)
    assert (higher - lower) / (high - low) == pytest.approx(2.575829 / 1.959964, rel=1e-4)


def test_the_summary_says_what_each_interval_says(fitted, monkeypatch) -> None:
    monkeypatch.setattr(effects, "INTERVAL_ROWS", 3)  # random ones of more rows
    summary = fitted.summary()
    for name in ("ate", "att", "atc"):
        alone = getattr(fitted, f"{name}_interval")()
        assert getattr(summary, f"{name}_interval") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("effect", "distant"), [(-4.0, False), (20.0, True)])
def test_an_average_is_no_surer_than_its_doubly_robust_rival(checkpoint, effect, distant) -> None:
    X, t, y = table()
    y = y + effect * t  # untrained weights hardly see it
    model = DoPFNRegressor(checkpoint, n_resamples=4).fit(X, t, y)
    chance = model.overlap().propensity.clip(0.05, 0.95)
    control, treated = (model.predict(X, arm) for arm in (0, 1))
    # As the textbook has it.
    scores = treated + t * (y - treated) / chance - control - (1 - t) * (y - control) / (1 - chance)
    error = (scores - (treated - control)).std(ddof=1) / np.sqrt(ROWS)
    ends = (scores.mean() - 1.644854 * error, scores.mean() + 1.644854 * error)
    assert model.aipw_ate() == pytest.approx(scores.mean(), rel=1e-4)
    assert model.aipw_ate_interval(alpha=0.1) == pytest.approx(ends, rel=1e-4)
    distance = abs(model.aipw_ate() - model.ate())
    spread = model._resampled_effects(model.table_.x)[0].mean(axis=1).std(ddof=1)
    assert (distance > error) == distant and error > spread
    low, high = model.ate_interval()
    assert (high - low) / 2 == pytest.approx(1.959964 * max(error, distance), rel=1e-4)


def test_the_doubly_robust_estimate_finds_an_effect_that_the_network_misses(checkpoint) -> None:
    generator = np.random.default_rng(0)
    x, t = generator.normal(size=(400, 2)), generator.integers(0, 2, 400)
    y = x[:, 0] + 3 * t + generator.normal(size=400)
    model = DoPFNRegressor(checkpoint).fit(x, t, y)
    assert abs(model.ate() - 3) > 1
    low, high = model.aipw_ate_interval(alpha=0.01)
    assert 0 < low < 3 < high


def test_a_trial_that_treats_few_is_weighted_by_their_true_share(checkpoint) -> None:
    """By a share of 0.05 instead, errors would count 0.4 times."""
    generator = np.random.default_rng(0)
    t = np.arange(600) % 50 == 0
    y = generator.normal(size=600)
    for X in (None, generator.normal(size=(600, 2))):
        model = DoPFNRegressor(checkpoint).fit(X, t, y)
        chance = model.overlap().propensity
        assert model.overlap().extreme_share < 0.01 and np.median(chance) < 0.03
        chance = chance.clip(0.01)
        residuals = (y - model.predict(X, t)) * np.where(t, 1 / chance, -1 / (1 - chance))
        low, high = model.aipw_ate_interval(alpha=0.05)
        error = residuals.std(ddof=1) / np.sqrt(600)
        assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=1e-3)


def test_seed_decides_the_halves(checkpoint, fitted) -> None:
    other = DoPFNRegressor(checkpoint, n_resamples=6, random_state=1).fit(*table())
    assert (other.cate_interval()[0] != fitted.cate_interval()[0]).any()


def test_halves_are_fitted_like_tables(checkpoint, fitted) -> None:
    X, t, y = table()
    generator = np.random.default_rng(0)
    halves = [random_part(t.astype(np.float32), 0.5, generator) for _ in range(6)]
    # In batches of four, of which the second has to be filled up.
    effects, factor = fitted._resampled_effects(fitted.table_.x)
    assert effects.shape == (6, ROWS)
    assert factor == 1
    together = effects.mean(axis=1)
    for i in (0, 5):
        half = halves[i]
        alone = DoPFNRegressor(checkpoint).fit(X.iloc[half], t[half], y[half]).ate(X)
        assert together[i] == pytest.approx(alone, abs=1e-5 * y.std())


def test_many_rows_share_the_error_of_some(fitted, monkeypatch) -> None:
    X = pd.concat([table()[0]] * 3)
    monkeypatch.setattr(effects, "INTERVAL_ROWS", ROWS)
    low, high = fitted.ate_interval(X)
    assert (low + high) / 2 == pytest.approx(fitted.ate(X), rel=1e-6)
    low_of_all, high_of_all = fitted.ate_interval()
    assert 0.3 < (high - low) / (high_of_all - low_of_all) < 3


def test_halves_keep_the_balance_of_the_arms() -> None:
    t = (np.arange(101) < 31).astype(np.float32)
    generator = np.random.default_rng(0)
    sizes = set()
    for _ in range(50):
        half = random_part(t, 0.5, generator)
        assert len(set(half)) == len(half)
        sizes.add((int(t[half].sum()), len(half)))
    assert sizes == {(15, 50), (16, 51)}
    assert len(random_part(np.float32([0, 1, 1]), 0.5, generator)) == 2


def test_spread_over_halves_is_the_standard_error() -> None:
    """Shown for the difference in means, whose standard error has a formula."""
    generator = np.random.default_rng(0)
    t = (np.arange(400) < 120).astype(np.float32)
    y = generator.normal(size=400) * np.where(t, 3.0, 1.0)

    def difference(rows: np.ndarray) -> float:
        return y[rows][t[rows] == 1].mean() - y[rows][t[rows] == 0].mean()

    spread = np.std([difference(random_part(t, 0.5, generator)) for _ in range(2000)])
    error = math.sqrt(y[t == 1].var() / 120 + y[t == 0].var() / 280)
    assert spread == pytest.approx(error, rel=0.05)


def test_refusals(checkpoint, fitted) -> None:
    for interval in (fitted.ate_interval, fitted.summary):
        with pytest.raises(ValueError, match=r"alpha is 1\.5, but must lie between 0 and 1"):
            interval(alpha=1.5)
    X, _, y = table()
    model = DoPFNRegressor(checkpoint).fit(X, np.arange(ROWS) == 2, y)
    with pytest.raises(TableError, match=r"single row with treatment 1: .*at least 2 rows"):
        model.ate_interval()
