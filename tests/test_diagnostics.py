import dataclasses

import numpy as np
import pytest

from dopfn_jax.config import Config, TableShape
from dopfn_jax.diagnostics import (
    kinds_of_tables,
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [ROWS, 500])
def test_the_order_of_rows_does_not_matter_beyond_chance(rows):
    x, t, y = confounded_table(1.0)
    y = (y > 2.5).astype(float)
    expected = table_statistics(x, t, y)
    by_arm = np.argsort(t)
    alternating = by_arm.reshape(2, -1).T.ravel()
    for order in (by_arm, alternating, np.argsort(y), np.argsort(x[:, 0])):
        found = table_statistics(x[order], t[order], y[order], rows)
        for name in ("treated_share", "overlap_auc", "outcome_r2", "adjusted_difference"):
            assert found[name] == pytest.approx(expected[name], abs=0.15), name
        assert found["outcome_levels"] == 2 / rows


def test_rare_arms_and_outcomes_are_among_the_rows_that_are_drawn():
    x, t, y = np.zeros((ROWS, 1)), np.zeros(ROWS), np.zeros(ROWS)
    t[7], y[ROWS // 2] = 1.0, 1.0
    statistics = table_statistics(x, t, y, 50)
    assert statistics["treated_share"] == 1 / 50 and statistics["outcome_levels"] == 2 / 50
    assert all(np.isfinite(value) for value in statistics.values())


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


SMALL = Config.load("smoke", ["prior.min_nodes=3", "prior.max_nodes=5"])
SHAPE = TableShape(rows=257, context=(256, 256), tasks=1)


def test_tables_of_a_prior_are_like_it_and_others_are_not():
    prior = prior_statistics(SMALL, SHAPE, tables=60)
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


def test_a_prior_without_a_valid_table_is_named():
    huge = dataclasses.replace(SMALL.prior, root_scale=(1e30, 1e30), noise_scale=1e30)
    with pytest.raises(ValueError, match="0 of 60 tables are valid: does a new part"):
        prior_statistics(dataclasses.replace(SMALL, prior=huge), SHAPE, tables=60)


def test_kinds_of_tables_have_the_columns_of_the_shapes_of_about_that_length():
    config = Config.load("cpu_wide")
    columns = {
        rows: kinds_of_tables(config, rows)["wide prior"].covariates
        for rows in (2, 16, 64, 256, 1024, 100_000)
    }
    few, many = (1, 8), (2, 64)
    assert columns == {2: few, 16: few, 64: (1, 24), 256: (1, 64), 1024: many, 100_000: (20, 64)}
    kind = kinds_of_tables(config, 64)["paper's prior"]
    assert (kind.context, kind.wide) == ((64, 64), False)


def test_what_cannot_be_told_and_what_is_plain_are_not_unlike():
    ranges = {"treated_share": (0.1, 0.9), "outcome_tail": (1.2, 9.0), "overlap_auc": (0.3, 0.9)}
    plain = {"treated_share": float("nan"), "outcome_tail": 1.0, "overlap_auc": 0.2}
    assert unlike(plain, ranges) == {}
    strange = {"treated_share": 0.05, "outcome_tail": 9.5, "overlap_auc": 0.95}
    assert unlike(strange, ranges) == {name: (strange[name], *ranges[name]) for name in ranges}


def ranges_around(statistics, width):
    return {name: (value - width, value + width) for name, value in statistics.items()}


def test_a_table_is_compared_by_as_many_rows_as_those_that_are_remembered():
    x, t, y = confounded_table(1.0)
    y = np.round(y)
    own = table_statistics(x, t, y, 1024)
    remembered = {64: ranges_around(own, 0.0), 1024: ranges_around(own, 1e-6)}
    assert unlike_usual(x, t, y, remembered) == {}
    assert unlike_usual(x[:30], t[:30], y[:30], remembered) == {}
    short = unlike_usual(x[:1000], t[:1000], y[:1000], remembered)
    assert "outcome_r2" in short and "covariates" not in short
    value, low, high = short["outcome_levels"]
    assert value * 64 == round(value * 64) and low == high == own["outcome_levels"]


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
