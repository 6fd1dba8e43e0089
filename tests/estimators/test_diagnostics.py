import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.diagnostics import estimate_overlap, number_format
from dopfn_jax.tables import Table
from tests.estimators.small import ROWS, table


def confounded(slope: float, rows: int = 2000) -> Table:
    """A treatment that follows the first covariate with this slope on the logit scale."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 2)).astype(np.float32)
    t = (generator.logistic(size=rows) < slope * x[:, 0]).astype(np.float32)
    return Table(x, t, x[:, 0])


class TestOverlap:
    def test_propensities_are_those_that_made_the_treatment(self) -> None:
        table = confounded(1.0)
        overlap = estimate_overlap(table)
        truth = 1 / (1 + np.exp(-table.x[:, 0]))
        assert np.abs(overlap.propensity - truth).mean() < 0.03
        assert overlap.arm_sizes == (int((table.t == 0).sum()), int((table.t == 1).sum()))
        assert overlap.warnings == []

    def test_effective_sizes(self) -> None:
        overlap = estimate_overlap(confounded(0.0))
        np.testing.assert_allclose(overlap.effective_sizes, overlap.arm_sizes, rtol=0.02)
        poor = estimate_overlap(confounded(6.0))
        for effective, rows in zip(poor.effective_sizes, poor.arm_sizes, strict=True):
            assert effective < 0.3 * rows
        assert poor.extreme_share > 0.3
        text = " ".join(poor.warnings)
        assert "poor overlap" in text and "could almost be told" in text

    def test_tables_at_the_edge(self) -> None:
        table = confounded(1.0, rows=40)
        none = estimate_overlap(table._replace(x=table.x[:, :0]))
        assert np.ptp(none.propensity) == 0
        missing = np.where(np.arange(40)[:, None] % 3 == 0, np.nan, table.x)
        assert np.isfinite(estimate_overlap(table._replace(x=missing)).propensity).all()
        few = table._replace(t=(np.arange(40) < 3).astype(np.float32))
        assert any(
            "only 3 rows with treatment 1" in line for line in estimate_overlap(few).warnings
        )

    def test_a_missing_cell_may_tell_the_treatment(self) -> None:
        table = confounded(0.0)
        x = table.x.copy()
        x[table.t == 1, 1] = np.nan
        assert estimate_overlap(table._replace(x=x)).extreme_share > 0.9

    def test_a_single_row_is_refused(self, checkpoint) -> None:
        X, _, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, np.arange(ROWS) == 2, y)
        with pytest.raises(TableError, match="single row with treatment 1: overlap needs"):
            model.overlap()


class TestPlacebo:
    def test_compares_with_shuffled_treatments(self, fitted) -> None:
        placebo = fitted.placebo(5)
        assert placebo.placebo_ates.shape == (5,)
        assert placebo.ate == pytest.approx(fitted.ate(), abs=1e-5 * table()[2].std())
        assert len(set(placebo.placebo_ates)) == 5
        beyond = np.count_nonzero(np.abs(placebo.placebo_ates) >= abs(placebo.ate))
        assert placebo.p_value == pytest.approx((1 + beyond) / 6)
        with pytest.raises(ValueError, match="n is 0"):
            fitted.placebo(0)


class TestSummary:
    def test_says_where_answers_miss_the_outcomes_of_an_arm(self, checkpoint) -> None:
        """Untrained weights know no outcomes; two arms without any noise leave nothing to say."""
        generator = np.random.default_rng(0)
        t = np.arange(64) % 2
        noisy = 50 * t + generator.normal(size=64)
        found = DoPFNRegressor(checkpoint).fit(None, t, noisy).summary().warnings
        assert [w for w in found if w.startswith("the answers under treatment 1 lie")]
        found = DoPFNRegressor(checkpoint).fit(None, t, 50.0 * t).summary().warnings
        assert not [w for w in found if w.startswith("the answers under")]

    def test_holds_the_answers_of_the_methods(self, fitted) -> None:
        _, t, y = table()
        summary = fitted.summary(alpha=0.1)
        for name in ("ate", "att", "atc", "aipw_ate"):
            assert getattr(summary, name) == pytest.approx(getattr(fitted, name)())
            ends = getattr(fitted, f"{name}_interval")(alpha=0.1)
            assert getattr(summary, f"{name}_interval") == pytest.approx(ends, rel=1e-4)
        difference = y[t == 1].mean() - y[t == 0].mean()
        assert summary.difference_in_means == pytest.approx(difference, rel=1e-5)
        assert (summary.rows, summary.arm_sizes) == (ROWS, (8, 8))
        assert summary.cache_bytes == fitted.cache_bytes_

    def test_says_that_observational_weights_know_no_effects(self, checkpoint) -> None:
        prior = dataclasses.replace(checkpoint.config.prior, target="observational")
        config = dataclasses.replace(checkpoint.config, prior=prior)
        ablation = dataclasses.replace(checkpoint, config=config)
        for weights, said in ((ablation, True), (checkpoint, False)):
            found = DoPFNRegressor(weights, n_resamples=2).fit(*table()).summary().warnings
            assert any("associations, not effects" in line for line in found) == said

    def test_prints_and_becomes_json(self, fitted) -> None:
        summary = fitted.summary()
        text = str(summary)
        for part in ("16 rows, 3 covariates", "95 % interval", "ATT, the treated", "only 8 rows"):
            assert part in text
        assert "not hidden confounding" in text
        assert json.loads(json.dumps(summary.to_dict()))["ate"] == summary.ate

    def test_a_binary_outcome_is_said_to_be_one(self, checkpoint) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint, n_resamples=4).fit(X, t, pd.Series(y > 10))
        assert "difference of probabilities" in str(model.summary())


def test_numbers_show_the_digits_that_an_interval_leaves() -> None:
    assert number_format(1.7)(2.345) == "2.3"
    assert number_format(0.04)(-1.0) == "-1.000"
    assert number_format(900.0)(12345.6) == "12,350"
    assert number_format(4.5)(-0.04) == "0.0"
