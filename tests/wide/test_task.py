"""Tasks of the wide prior: that each field of its config does what it says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dopfn_jax.config import ConfigError, WidePriorConfig
from dopfn_jax.prior import Task
from dopfn_jax.wide.task import sample_wide_tasks

# Few parts, so that it compiles quickly; fields of this one are then changed.
PLAIN = WidePriorConfig(
    graphs=("erdos_renyi",),
    mechanisms=("linear",),
    noise_families=("gaussian",),
    column_kinds=("continuous",),
    hidden_share=0.0,
    max_hidden=1,
    post_treatment_share=0.0,
    max_post_treatment=1,
    assignments=("coin",),
    treated_rate=(0.3, 0.7),
    effects=("constant",),
    links=("identity",),
    outcome_kinds=("continuous",),
    missing_share=0.0,
    duplicate_share=0.0,
    mirrored_share=0.0,
)
ROWS, CONTEXT, COVARIATES = 96, (40, 64), (2, 6)


# Each compiles a program of its own, so there are few.
CONFOUNDED = dataclasses.replace(
    PLAIN, assignments=("logistic",), steepness=(3.0, 3.0), noise_ratio=(0.02, 0.05)
)
THRESHOLDED = dataclasses.replace(
    PLAIN,
    assignments=("threshold",),
    effects=("zero",),
    outcome_kinds=("binary",),
    missing_share=1.0,
)
EVERYTHING = WidePriorConfig()


@functools.cache
def tasks(prior: WidePriorConfig) -> Task:
    """64 tasks with their potential outcomes."""

    @jax.jit
    def sample(key: jax.Array) -> Task:
        keys = jax.random.split(key, 64)
        return sample_wide_tasks(keys, prior, ROWS, CONTEXT, COVARIATES, potential_outcomes=True)

    return jax.device_get(sample(jax.random.key(0)))


def standardised_mean_differences(batch: Task) -> np.ndarray:
    """|Difference of arm means| of each column's context, in standard deviations; gaps as 0."""
    differences = []
    for i in np.flatnonzero(batch.valid):
        rows, columns = batch.context_mask[i], batch.covariate_mask[i]
        x, t = np.nan_to_num(batch.context_x[i][rows][:, columns]), batch.context_t[i][rows] > 0.5
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
        differences.extend(np.abs(x[t].mean(0) - x[~t].mean(0)))
    return np.array(differences)


def test_shapes_masks_and_dtypes_are_those_of_every_task():
    batch = tasks(PLAIN)
    low, high = CONTEXT
    assert batch.context_x.shape == (64, high, 6)
    assert batch.query_x.shape == (64, ROWS - low, 6)
    assert batch.valid.mean() > 0.95
    context = batch.context_mask.sum(axis=1)
    assert context.min() >= low and context.max() <= high and len(set(context)) > 10
    np.testing.assert_array_equal(context + batch.query_mask.sum(axis=1), ROWS)
    shown = batch.covariate_mask.sum(axis=1)
    assert set(shown) == {2, 3, 4, 5, 6}
    assert set(np.unique(batch.context_t)) == {0.0, 1.0}
    assert not batch.context_x[~np.broadcast_to(batch.covariate_mask[:, None], (64, high, 6))].any()


def test_the_target_is_the_potential_outcome_of_the_treatment_set():
    batch = tasks(PLAIN)
    treated = (batch.query_t > 0.5) & batch.query_mask
    assert 0.4 < treated.sum() / batch.query_mask.sum() < 0.6
    np.testing.assert_array_equal(batch.query_y[treated], batch.y1[treated])
    control = (batch.query_t < 0.5) & batch.query_mask
    np.testing.assert_array_equal(batch.query_y[control], batch.y0[control])


def effects(batch: Task) -> np.ndarray:
    """Individual effects of the query rows of valid tasks, NaN for rows that do not exist."""
    return np.where(batch.query_mask, batch.y1 - batch.y0, np.nan)[batch.valid]


def test_effects_are_constant_or_zero_where_the_config_says_so():
    constant = effects(tasks(PLAIN))
    np.testing.assert_allclose(np.nanstd(constant, axis=1), 0.0, atol=1e-5)
    assert np.nanmean(np.abs(constant)) > 0.05
    np.testing.assert_array_equal(tasks(THRESHOLDED).y0, tasks(THRESHOLDED).y1)


def test_a_mirrored_outcome_changes_its_sign_and_nothing_else():
    plain, mirrored = tasks(PLAIN), tasks(dataclasses.replace(PLAIN, mirrored_share=1.0))
    for name in ("context_y", "query_y", "y0", "y1"):
        np.testing.assert_array_equal(getattr(plain, name), -getattr(mirrored, name))
    for name in ("context_x", "context_t", "query_x", "query_t"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(mirrored, name))


def test_effects_of_the_full_prior_are_zero_constant_and_varying():
    everything = effects(tasks(EVERYTHING))
    spread, size = np.nanstd(everything, axis=1), np.nanmean(np.abs(everything), axis=1)
    assert (size < 1e-6).mean() > 0.05
    assert ((spread < 1e-5) & (size > 1e-3)).mean() > 0.05
    assert (spread > 0.05).mean() > 0.3


def test_a_coin_balances_the_arms_and_a_score_does_not():
    coin, logistic, threshold = (
        standardised_mean_differences(tasks(prior)).mean()
        for prior in (PLAIN, CONFOUNDED, THRESHOLDED)
    )
    # Two means of about 26 rows each differ by 0.22 on average.
    assert coin < 0.3
    assert logistic > 1.5 * coin
    assert threshold > 1.5 * coin


def test_the_only_column_may_be_a_descendant_of_the_treatment():
    prior = dataclasses.replace(PLAIN, post_treatment_share=1.0)

    @jax.jit
    def sample(key: jax.Array) -> Task:
        return sample_wide_tasks(jax.random.split(key, 64), prior, ROWS, CONTEXT, (1, 1))

    # A coin decides the treatment: only what descends from it differs between the arms.
    differences = standardised_mean_differences(jax.device_get(sample(jax.random.key(1))))
    assert 0.15 < (differences > 0.8).mean() < 0.6


def test_adjusting_for_the_columns_removes_the_bias_where_none_is_hidden():
    """Linear mechanisms and hardly any noise: least squares on (t, x) finds the effect."""
    batch = tasks(CONFOUNDED)
    adjusted, naive = [], []
    for i in np.flatnonzero(batch.valid):
        rows = batch.context_mask[i]
        x, t, y = batch.context_x[i][rows], batch.context_t[i][rows], batch.context_y[i][rows]
        design = np.column_stack([t, np.ones_like(t), x])
        truth = (batch.y1[i] - batch.y0[i])[batch.query_mask[i]].mean()
        adjusted.append(abs(np.linalg.lstsq(design, y, rcond=None)[0][0] - truth))
        naive.append(abs(y[t > 0.5].mean() - y[t < 0.5].mean() - truth))
    assert np.median(adjusted) < 0.03
    assert np.mean(naive) > 5 * np.mean(adjusted)


def test_outcomes_are_binary_and_cells_missing_where_the_config_says_so():
    batch = tasks(THRESHOLDED)
    assert set(np.unique(batch.context_y)) <= {0.0, 1.0}
    assert set(np.unique(batch.y1)) <= {0.0, 1.0}
    assert 0.02 < np.isnan(batch.context_x).mean() < 0.4
    assert not np.isnan(tasks(PLAIN).context_x).any()


def test_every_part_together_gives_finite_tables():
    batch = tasks(EVERYTHING)
    assert batch.valid.mean() > 0.8
    for values in (batch.context_y, batch.query_y, np.nan_to_num(batch.context_x)):
        assert np.isfinite(values).all()
    assert np.isnan(batch.context_x).any()


def sample_with_draws(prior: WidePriorConfig) -> Task:
    sample = jax.jit(
        lambda keys: sample_wide_tasks(
            keys, prior, ROWS, CONTEXT, COVARIATES, potential_outcomes=True, outcome_draws=33
        )
    )
    return jax.device_get(sample(jax.random.split(jax.random.key(0), 64)))


def test_further_draws_have_the_outcomes_distribution_and_change_nothing_else():
    prior = dataclasses.replace(PLAIN, noise_ratio=(0.5, 2.0))
    with_draws, without = sample_with_draws(prior), tasks(prior)
    for name in ("context_x", "context_y", "query_y", "y0", "y1", "query_mask"):
        np.testing.assert_array_equal(getattr(with_draws, name), getattr(without, name))
    assert without.query_draws is None
    draws, rows = with_draws.query_draws, with_draws.query_mask & with_draws.valid[:, None]
    assert draws.shape == (64, 32, ROWS - CONTEXT[0])
    assert not np.moveaxis(draws, 1, 2)[~rows].any()
    # 32 draws and `query_y` are 33 draws of the same: it ranks anywhere among them.
    rank = (draws < with_draws.query_y[:, None]).mean(axis=1)[rows]
    assert 0.45 < rank.mean() < 0.55 and 0.22 < (np.abs(rank - 0.5) > 0.375).mean() < 0.30
    # Under the other treatment a draw has the same noise: it is moved as the outcome is.
    other_y = np.where(with_draws.query_t > 0.5, with_draws.y0, with_draws.y1)
    moved = np.broadcast_to((other_y - with_draws.query_y)[:, None], draws.shape)
    additive = np.broadcast_to(rows[:, None], draws.shape)
    np.testing.assert_allclose(
        (with_draws.other_draws - draws)[additive], moved[additive], atol=1e-4
    )
    assert np.abs(moved[additive]).mean() > 0.05
    # Their noise is drawn for each row: no common part is left in a row's mean.
    noise = (with_draws.query_y - draws.mean(axis=1))[rows]
    other = (draws[:, 0] - draws.mean(axis=1))[rows]
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.1


def test_noise_that_a_column_tells_of_is_not_drawn_anew():
    prior = dataclasses.replace(PLAIN, post_treatment_share=1.0, noise_ratio=(0.5, 2.0))
    batch = sample_with_draws(prior)
    rows = batch.query_mask & batch.valid[:, None]
    close = np.isclose(batch.query_draws, batch.query_y[:, None], rtol=1e-5, atol=1e-5)
    same = close.mean(axis=(1, 2), where=rows[:, None])[batch.valid]
    assert ((same < 0.01) | (same == 1.0)).all()
    # Four of ten nodes after the treatment hear the outcome; here there is one.
    assert 0.2 < same.mean() < 0.65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanisms": ("cubic",)}, "mechanisms = 'cubic': choose from linear"),
        ({"assignments": ()}, "assignments = (): give at least one of threshold"),
        ({"noise_ratio": (2.0, 1.0)}, "noise_ratio = (2.0, 1.0): needs 0 < low <= high"),
        ({"treated_rate": (0.1, 1.5)}, "treated_rate = (0.1, 1.5): must be below 1"),
        ({"hidden_share": 2.0}, "hidden_share = 2.0: is a share"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        WidePriorConfig(**changes)
    assert message in str(error.value)
