import dataclasses

import numpy as np
import pytest

from dopfn_jax.config import Config, TableShape
from dopfn_jax.diagnostics import (
    prior_statistics,
    table_statistics,
    unlike,
    unlike_usual,
    usual,
    usual_tables,
)

ROWS = 4000


def confounded_table(steepness: float, seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, 3))
    t = (random.random(ROWS) < 1 / (1 + np.exp(-steepness * x[:, 0]))).astype(float)
    y = 2.0 * x[:, 0] + t + random.normal(size=ROWS)
    return x, t, y


def test_statistics_of_a_table_that_is_known():
    x, t, y = confounded_table(steepness=1.0)
    statistics = table_statistics(x, t, y)
    assert statistics["covariates"] == 3
    assert statistics["treated_share"] == t.mean()
    # The AUC of the true score of a logistic model with coefficient 1.
    assert statistics["overlap_auc"] == pytest.approx(0.74, abs=0.03)
    assert statistics["adjusted_difference"] == pytest.approx(1 / y.std(), abs=0.05)
    assert statistics["difference"] > 2 * statistics["adjusted_difference"]
    assert statistics["outcome_r2"] == pytest.approx(1 - 1 / y.var(), abs=0.03)
    assert statistics["outcome_levels"] == 1.0
    assert statistics["missing_cells"] == statistics["discrete_columns"] == 0.0


def test_overlap_from_a_trial_to_none():
    trial, steep = (table_statistics(*confounded_table(s))["overlap_auc"] for s in (0.0, 50.0))
    assert trial == pytest.approx(0.5, abs=0.03)
    assert steep > 0.97


def test_units_do_not_matter():
    x, t, y = confounded_table(1.0)
    first, second = table_statistics(x, t, y), table_statistics(100.0 * x - 7.0, t, 1e-3 * y + 5.0)
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-6), name


def test_missing_discrete_and_duplicate_columns():
    x, t, y = confounded_table(1.0)
    x = np.column_stack([x, x[:, 0], x[:, 1] > 0, np.full(ROWS, 3.0)])
    x[: ROWS // 2, 1] = np.nan
    statistics = table_statistics(x, t, y)
    assert statistics["missing_cells"] == pytest.approx(1 / 12)
    assert statistics["discrete_columns"] == pytest.approx(2 / 6)
    assert statistics["column_correlation"] > 1 / 15
    assert all(np.isfinite(value) for value in statistics.values())


def test_a_table_without_covariates():
    _, t, y = confounded_table(0.0)
    statistics = table_statistics(np.zeros((ROWS, 0)), t, y)
    assert statistics["covariates"] == 0
    assert statistics["overlap_auc"] == pytest.approx(0.5, abs=0.03)
    assert all(np.isfinite(value) for value in statistics.values())


def test_tables_of_a_prior_are_like_it_and_others_are_not():
    config = Config.load("smoke")
    config = dataclasses.replace(
        config, prior=dataclasses.replace(config.prior, min_nodes=3, max_nodes=5)
    )
    shape = TableShape(rows=257, context=(256, 256), tasks=1)
    prior = prior_statistics(config, shape, tables=60)
    sizes = {len(values) for values in prior.values()}
    assert len(sizes) == 1 and sizes.pop() > 50
    assert set(prior["covariates"]) <= {0.0, 1.0, 2.0, 3.0}

    middle = {name: float(np.median(values)) for name, values in prior.items()}
    assert unlike(middle, usual(prior)) == {}
    x, t, y = confounded_table(1.0)
    strange = unlike(table_statistics(np.tile(x, 5), t, np.round(y)), usual(prior))
    value, low, high = strange["covariates"]
    assert value == 15.0 and 0.0 <= low <= 1.0 and high <= 3.0
    assert "outcome_levels" in strange


def ranges_around(statistics, width):
    return {name: (value - width, value + width) for name, value in statistics.items()}


def test_a_table_is_compared_with_tables_of_its_length():
    x, t, y = confounded_table(1.0)
    own = table_statistics(x, t, y)
    remembered = {64: ranges_around(own, 0.0), 1024: ranges_around(own, 1e-6)}
    assert unlike_usual(x, t, y, remembered) == {}
    assert unlike_usual(x[:30], t[:30], y[:30], remembered) == {}
    short = unlike_usual(x[:70], t[:70], y[:70], remembered)
    assert "outcome_r2" in short and "covariates" not in short
    value, low, high = short["treated_share"]
    assert value == t[:70].mean() and low == high == t.mean()


@pytest.mark.slow
def test_what_is_usual_covers_the_tables_of_the_prior():
    config = Config.load("smoke")
    remembered = usual_tables(config, tables=80)
    shape = TableShape(rows=257, context=(256, 256), tasks=1)
    fresh = prior_statistics(config, shape, tables=80, seed=1)
    inside = [
        np.mean((low <= fresh[name]) & (fresh[name] <= high))
        for name, (low, high) in remembered[256].items()
    ]
    assert min(inside) > 0.9
