import copy
import dataclasses
import math

import jax
import numpy as np
import pandas as pd
import pytest

from dopfn_jax.cells import TableError
from dopfn_jax.columns import Scale
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.subgroups import group_rows
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.tables import Schema
from tests.estimators.small import ROWS, assert_same, table


class TestVocabulary:
    def test_effect_is_a_directed_difference_of_means(self, fitted) -> None:
        X, t, _ = table()
        cate = fitted.cate(X)
        np.testing.assert_array_equal(fitted.effect(X), cate)
        np.testing.assert_array_equal(fitted.effect(X, T0=1, T1=0), -cate)
        np.testing.assert_array_equal(fitted.effect(X, T0=t, T1=1 - t), (1 - 2 * t) * cate)
        assert not fitted.effect(X, T0=1, T1=1).any()
        assert_same(fitted.effect(X, 0, t), fitted.predict(X, t) - fitted.predict(X, 0))

    def test_averages_over_arms_and_subgroups(self, fitted) -> None:
        X, t, _ = table()
        cate = fitted.cate()
        assert fitted.att() == pytest.approx(cate[t == 1].mean())
        assert fitted.atc() == pytest.approx(cate[t == 0].mean())
        old = X["age"].to_numpy() > 0
        by_mask = fitted.ate(by=old)
        assert by_mask[True] == pytest.approx(cate[old].mean())
        assert by_mask[False] == pytest.approx(cate[~old].mean())
        bins = pd.cut(X["age"], 3, labels=["young", "middle", "old"])
        assert fitted.ate(X, by=bins)["middle"] == pytest.approx(cate[bins == "middle"].mean())

    def test_indexes_of_several_levels_are_not_compared_with_others(self, checkpoint) -> None:
        X, t, y = table()
        index = pd.MultiIndex.from_arrays([np.arange(ROWS) // 3, np.arange(ROWS)])
        model = DoPFNRegressor(checkpoint).fit(X, pd.Series(t, index=index), y)
        np.testing.assert_array_equal(model.cate(), DoPFNRegressor(checkpoint).fit(X, t, y).cate())
        assert model.ate(by=X[["age"]] > 0).tolist() == model.ate(by=X["age"] > 0).tolist()

    def test_a_column_names_subgroups(self, checkpoint) -> None:
        X, t, y = table()
        sizes = np.array(["small", "large", None, "large"] * 4, object)
        model = DoPFNRegressor(checkpoint, n_resamples=4).fit(X.assign(dose=sizes), t, y)
        effects, ends = model.ate(by="dose"), model.ate_interval(by="dose")
        assert effects.index.name == "dose"
        assert [label for label in effects.index if isinstance(label, str)] == ["large", "small"]
        assert len(effects) == 3
        assert effects["large"] == pytest.approx(model.cate()[sizes == "large"].mean())
        assert ends.columns.tolist() == ["lower", "upper"]
        assert_same((ends["lower"] + ends["upper"]) / 2, effects)

    @pytest.mark.parametrize("values", [(123456, 234567), (0.1, 0.30000001), (-3, 1e6)])
    def test_numbers_that_name_subgroups_are_those_of_the_column(self, checkpoint, values) -> None:
        X, t, y = table()
        X = X.assign(dose=np.resize(np.repeat(values, 2), ROWS))
        labels = DoPFNRegressor(checkpoint).fit(X, t, y).ate(by="dose").index
        np.testing.assert_allclose(labels, values, rtol=1e-7)

    def test_levels_of_an_order_keep_it(self, checkpoint) -> None:
        X, t, y = table()
        doses = pd.Categorical(["low", "mid", "high", None] * 4, ["low", "mid", "high"], True)
        model = DoPFNRegressor(checkpoint).fit(X.assign(dose=doses), t, y)
        effects = model.ate(by="dose")
        assert effects.index.tolist()[:3] == ["low", "mid", "high"] and len(effects) == 4
        assert effects["mid"] == pytest.approx(model.cate()[doses == "mid"].mean())

    def test_missing_labels_are_no_text(self, fitted) -> None:
        labels = ["a", "b", "a", np.nan] * 4
        assert fitted.ate(by=labels).index[:2].tolist() == ["a", "b"]
        assert fitted.ate(by=labels).index.isna().tolist() == [False, False, True]

    def test_intervals_share_one_standard_error(self, fitted) -> None:
        X, t, _ = table()
        effects, _ = fitted._resampled_effects(fitted.table_.x)
        low, high = fitted.cate_interval()
        assert_same((high - low) / 2, 1.959964 * effects.std(axis=0, ddof=1))
        assert_same((high + low) / 2, fitted.cate())
        low, high = fitted.att_interval()
        error = effects[:, t == 1].mean(axis=1).std(ddof=1)
        error = max(error, fitted._least_errors(1)[0])
        assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-4)
        low, high = fitted.effect_interval(X, T0=1, T1=t)
        assert ((high - low) > 0).tolist() == (t == 0).tolist()
        both = fitted.ate_interval(by=np.zeros(ROWS))
        assert both.loc[0].tolist() == pytest.approx(fitted.ate_interval(), rel=1e-6)

    def test_no_error_is_smaller_than_what_the_averages_own_rows_show(self, fitted) -> None:
        """As AIPW would correct the average: in all rows, in a subgroup, in the treated."""
        residuals, propensity = fitted._weighted_residuals()
        rows = np.flatnonzero(fitted.table_.x[:, 0] > 0)
        treated = residuals * propensity / propensity.mean()
        corrections = (residuals, residuals[rows], treated)
        least = [max(abs(c.mean()), c.std(ddof=1) / math.sqrt(len(c))) for c in corrections]
        found = fitted._least_errors(None, rows, 1)
        assert found == pytest.approx([least[0], max(least[:2]), max(least[0], least[2])])
        own = fitted.ate_interval(by=fitted.table_.x[:, 0] > 0).loc[True]
        assert own["upper"] - own["lower"] >= 2 * 1.95996 * found[1]
        one = fitted._least_errors(rows[:1])[0]
        assert one == pytest.approx(max(least[0], abs(residuals[rows[0]])))

    @pytest.mark.parametrize(
        ("by", "message"),
        [
            ("weight", "by is 'weight', but the covariates are"),
            (np.zeros(3), "by has 3 labels, but there are 16 rows"),
            (np.zeros((16, 2)), r"by has shape \(16, 2\), but must hold one label per row"),
        ],
    )
    def test_refusals(self, fitted, by, message: str) -> None:
        with pytest.raises(TableError, match=message):
            fitted.ate(by=by)
        with pytest.raises(TableError, match="T1 has 2 values, but X has 16 rows"):
            fitted.effect(T1=[0, 1])
        with pytest.raises(TableError, match="T0: treatment t must hold 0 and 1"):
            fitted.effect(T0=2)
        resampled_once = copy.copy(fitted).set_params(n_resamples=1)
        with pytest.raises(ValueError, match="n_resamples is 1, but must be 2 or more"):
            resampled_once.ate_interval()

    def test_labels_in_another_order_are_refused(self, fitted) -> None:
        X, _, _ = table()
        old = (X["age"] > 0).iloc[::-1]
        with pytest.raises(TableError, match=r"X and by have .* pass by\.loc\[X\.index\]"):
            fitted.ate(X, by=old)
        with pytest.raises(TableError, match=r"or by\.to_numpy\(\) if they are side by side"):
            fitted.ate(X, by=old)
        with pytest.raises(TableError, match="X and by have the same index in another order"):
            fitted.ate_interval(X, by=old)
        arms = old.astype(int)
        for ask in (fitted.predict, fitted.predict_distribution):
            with pytest.raises(TableError, match="X and t have the same index in another order"):
                ask(X, arms)
        for ask in (fitted.effect, fitted.effect_interval):
            with pytest.raises(TableError, match="X and T1 have the same index in another order"):
                ask(X, 0, arms)
        assert fitted.ate(X, by=old.loc[X.index]).tolist() == fitted.ate(by=old[::-1]).tolist()

    def test_names_that_are_numbers(self) -> None:
        X, t, y = table()
        schema, part = Schema.fit(X.set_axis([3, 4, 5], axis=1) > 0, t, y)
        groups = group_rows(4, part.x, schema)
        assert list(groups) == [0.0, 1.0]
        assert groups[1.0].tolist() == np.flatnonzero(X["dose"] > 0).tolist()

    @pytest.mark.parametrize(
        "values",
        [
            [0.0, 0.1, 0.2],
            [20200101.0, 20200102.0, 20200215.0],
            [-1e-30, 2e-30, 5e-30],
            [0.0, 1.0, 1e6],
        ],
    )
    def test_labels_are_the_numbers_of_the_column(self, values: list[float]) -> None:
        column = np.resize(values, 31)
        schema, part = Schema.fit(column[:, None], np.arange(31) % 2, np.arange(31.0))
        groups = group_rows(0, part.x, schema)
        np.testing.assert_allclose(list(groups), values, rtol=1e-12, atol=1e-45)
        for value, rows in groups.items():
            np.testing.assert_allclose(column[rows], value, rtol=1e-12, atol=1e-45)

    def test_labels_of_numeric_categories(self) -> None:
        sizes = pd.DataFrame({"size": pd.Categorical([0.1, 1, 2] * 4)})
        schema, part = Schema.fit(sizes, np.arange(12) % 2, np.arange(12.0))
        assert list(group_rows("size", part.x, schema)) == ["0.1", "1", "2"]

    def test_too_many_subgroups(self, fitted) -> None:
        x = np.zeros((60, 3), np.float32)
        with pytest.raises(TableError, match=r"60 different values.* pandas\.cut"):
            group_rows(np.arange(60), x, fitted.schema_)


class TestIndividualEffects:
    def test_bounds_hold_for_every_dependence(self, fitted) -> None:
        """Of the same two marginals, coupled the same way, the opposite way, and not at all."""
        X, _, _ = table()
        alpha, levels = 0.2, (np.arange(4000) + 0.5) / 4000
        low, high = fitted.individual_effect_interval(X, alpha=alpha)
        answers = [fitted.predict(X, arm, "quantiles", levels) for arm in (0, 1)]
        shuffled = np.random.default_rng(0).permutation(4000)
        for order in (slice(None), slice(None, None, -1), shuffled):
            effects = answers[1] - answers[0][:, order]
            inside = (effects >= low[:, None]) & (effects <= high[:, None])
            assert (inside.mean(axis=1) >= 1 - alpha - 0.005).all()
        assert (low < fitted.cate(X)).all() and (high > fitted.cate(X)).all()

    def test_bounds_are_the_quantiles_of_the_worst_dependence(self, fitted) -> None:
        """The upper bound on the 0.9 quantile is reached (Fan and Park, 2010, section 2)."""
        X, _, _ = table()
        _, high = fitted.individual_effect_interval(X[:1], alpha=0.2)
        count = 4000  # as above, so that it compiles nothing
        levels = (np.arange(count) + 0.5) / count
        control, treated = (fitted.predict(X[:1], arm, "quantiles", levels)[0] for arm in (0, 1))
        # The top tenth and a bit of y(1) meets the lowest of y(0), in the same order.
        shift = int(0.9 * count) - 1
        effects = treated - np.roll(control, shift)
        assert np.quantile(effects, 0.9 + 2 / count) >= high[0] - 0.05 * abs(high[0])

    def test_binary_bounds(self, checkpoint, monkeypatch) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, t, y > 10)
        probabilities = iter(np.array([[0.5, 0.0, 1.0, 0.01], [0.5, 1.0, 0.0, 0.02]]))

        def means(*_: object) -> np.ndarray:
            outcome = model.schema_.outcome
            return (next(probabilities)[None] - outcome.loc) / outcome.scale

        monkeypatch.setattr(model, "_means", means)
        low, high = model.individual_effect_interval(X[:4], alpha=0.1)
        assert low.tolist() == [-1, 1, -1, 0]
        assert high.tolist() == [1, 1, -1, 0]


@pytest.fixture(scope="module")
def model(checkpoint) -> DoPFNRegressor:
    """Fitted on a 0/1 outcome."""
    X, t, y = table()
    return DoPFNRegressor(checkpoint, n_resamples=4).fit(X, t, y > 10)


class TestBinaryOutcome:
    def test_answers_are_probabilities(self, model) -> None:
        X, t, _ = table()
        far = X * 100
        p = model.predict(far, t)
        assert ((p >= 0) & (p <= 1)).all()
        assert model.predict(far, t, "median").tolist() == (p > 0.5).tolist()
        quantiles = model.predict(far, t, "quantiles", [0.25, 0.75])
        assert quantiles[:, 0].tolist() == (p > 0.75).tolist()
        assert quantiles[:, 1].tolist() == (p > 0.25).tolist()
        assert np.abs(model.cate(far)).max() <= 1
        assert_same(model.cate(far), model.predict(far, 1) - model.predict(far, 0))

    def test_rounding_does_not_leave_zero_to_one(self, model, monkeypatch) -> None:
        schema = dataclasses.replace(model.schema_, outcome=Scale(0.85, 0.4))
        monkeypatch.setattr(model, "schema_", schema)
        monkeypatch.setattr(model, "_means", lambda *_: np.array([model._bounds]))
        assert schema.outcome.restore(model._bounds).min() < 0
        assert model.predict(table()[0][:2], 1).tolist() == [0, 1]

    def test_samples_are_zeros_and_ones(self, model) -> None:
        X, t, _ = table()
        draws = model.sample(X, t, 4000)
        assert set(np.unique(draws)) <= {0.0, 1.0}
        np.testing.assert_allclose(draws.mean(axis=0), model.predict(X, t), atol=0.04)

    def test_numbers_other_than_0_and_1_stay_numbers(self, checkpoint) -> None:
        X, t, y = table()
        assert not DoPFNRegressor(checkpoint).fit(X, t, 1 + (y > 10)).schema_.binary_outcome


class TestSample:
    def test_has_the_distribution_that_was_predicted(self, fitted) -> None:
        X, t, _ = table()
        draws = fitted.sample(X, t, 4000)
        assert draws.shape == (4000, ROWS)
        median = fitted.predict(X, t, "median")
        np.testing.assert_allclose((draws <= median).mean(axis=0), 0.5, atol=0.04)
        low, high = fitted.predict(X, t, "quantiles", [0.1, 0.9]).T
        inside = ((draws > low) & (draws < high)).mean(axis=0)
        np.testing.assert_allclose(inside, 0.8, atol=0.04)

    def test_draws_under_the_two_treatments_are_independent(self, fitted) -> None:
        """So their differences are no individual effects; and rows are independent, too."""
        X, t, _ = table()
        control, treated = (fitted.sample(X, arm, 4000) for arm in (0, 1))
        mixed = fitted.sample(X, t, 4000)
        np.testing.assert_allclose(mixed, np.where(t, treated, control), rtol=1e-4)
        for first, second in ((control, treated), (control[:, 1:], control[:, :-1])):
            pairs = zip(first.T, second.T, strict=True)
            correlations = [np.corrcoef(*map(np.argsort, map(np.argsort, p)))[0, 1] for p in pairs]
            assert np.abs(correlations).max() < 0.08  # five standard errors

    def test_seeds(self, fitted) -> None:
        X, _, _ = table()
        first = fitted.sample(X, 1, 3)
        np.testing.assert_array_equal(first, fitted.sample(X, 1, 3))
        other = fitted.sample(X, 1, 3, key=7)
        assert not np.array_equal(first, other)
        for same in (np.int64(7), jax.random.key(7)):
            np.testing.assert_array_equal(other, fitted.sample(X, 1, 3, key=same))
        with pytest.raises(ValueError, match="n is 0, but must be 1 or more"):
            fitted.sample(X, 1, 0)


class TestEnsemble:
    def test_is_the_average_of_its_members(self, checkpoint, fitted) -> None:
        X, t, _ = table()
        model = DoPFNRegressor(checkpoint, n_estimators=3, n_resamples=4).fit(*table())
        members = model._member_effects(model.table_.x)
        assert_same(members[0], fitted.cate())
        assert np.abs(members[1] - members[0]).max() > 1e-3
        assert_same(model.cate(), members.mean(axis=0))
        mixture = model.predict_distribution(X, t)
        assert isinstance(mixture, BarDistribution)
        assert_same(mixture.mean, model.predict(X, t))
        again = DoPFNRegressor(checkpoint, n_estimators=3, n_resamples=4).fit(*table())
        np.testing.assert_array_equal(again.cate(), model.cate())

    @pytest.mark.slow
    def test_a_long_table_is_read_in_random_parts(self, checkpoint) -> None:
        X, t, y = table(40)
        model = DoPFNRegressor(checkpoint, n_estimators=3, n_resamples=4, max_context=16)
        model.fit(X, t, y)
        parts = [view.rows for view in model.views_]
        assert all(14 <= len(set(rows)) == len(rows) <= 16 for rows in parts)
        assert len({tuple(sorted(rows)) for rows in parts}) == 3
        first = parts[0]
        alone = DoPFNRegressor(checkpoint).fit(X.iloc[first], t[first], y[first])
        assert_same(model._member_effects(model.table_.x)[0], alone.cate(X), 1e-3)
        # Their outcomes have different scales, so the mixture has buckets of its own.
        mixture = model.predict_distribution(X, 1)
        np.testing.assert_allclose(mixture.masses.sum(axis=1), 1, rtol=1e-5)
        assert_same(mixture.mean, model.predict(X, 1), 0.03)  # of 16 wide buckets
        # Settings that change after the fit do not change what has been fitted.
        model.set_params(n_estimators=9)
        effects, factor = model._resampled_effects(model.table_.x[:2])
        assert factor == pytest.approx((15 / 40) / (25 / 40) + 1 / 3)
        assert model.summary().member_spread > 0
        assert math.isfinite(effects.sum())


def test_without_cache_nothing_is_kept_and_nothing_changes(checkpoint, fitted) -> None:
    X, t, _ = table()
    model = DoPFNRegressor(checkpoint, cache=False).fit(*table())
    assert model.contexts_ == []
    assert model.cache_bytes_ == 0 < fitted.cache_bytes_
    np.testing.assert_allclose(model.cate(), fitted.cate(), rtol=1e-5)
    np.testing.assert_allclose(model.predict(X, t), fitted.predict(X, t), rtol=1e-5)
    quantiles = [m.predict(X, t, "quantiles") for m in (model, fitted)]
    np.testing.assert_allclose(*quantiles, rtol=1e-5)


def test_devices(checkpoint, fitted) -> None:
    model = DoPFNRegressor(checkpoint, device="cpu").fit(*table())
    assert_same(model.cate(), fitted.cate())
    for name in ("tpu", "cpu:99", "cpu:first"):
        with pytest.raises(ValueError, match=rf"device is '{name}', but there are only cpu:0"):
            DoPFNRegressor(checkpoint, device=name).fit(*table())
