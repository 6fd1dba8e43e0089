import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.interop.econml import DoPFNCateEstimator
from tests.estimators.small import ROWS


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, ...]:
    """Covariates, treatment and outcome; the effect is the first covariate."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 3))
    t = generator.permutation(np.arange(ROWS) % 2)
    return x, t, t * x[:, 0] + 0.1 * generator.normal(size=ROWS)


def test_speaks_the_vocabulary_of_econml(checkpoint, table) -> None:
    x, t, y = table
    estimator = DoPFNCateEstimator(DoPFNRegressor(checkpoint, n_resamples=4)).fit(y, t, X=x)
    effects = DoPFNRegressor(checkpoint).fit(x, t, y).cate(x)
    np.testing.assert_array_equal(estimator.effect(x), effects)
    np.testing.assert_array_equal(estimator.effect(x, T0=1, T1=0), -effects)
    # As of TLearner, LinearDML and others.
    assert estimator.const_marginal_effect(x).shape == (ROWS, 1)
    assert estimator.const_marginal_ate(x) == pytest.approx([effects.mean()])
    column = clone(estimator).fit(y[:, None], t, X=x)
    assert column.const_marginal_effect(x).shape == (ROWS, 1, 1)
    np.testing.assert_array_equal(column.effect(x), effects[:, None])
    assert estimator.ate(x) == pytest.approx(effects.mean())
    low, high = estimator.effect_interval(x, alpha=0.1)
    assert (low < effects).all() and (effects < high).all()
    assert estimator.ate_interval(x, alpha=0.1) == estimator.model_.ate_interval(x, alpha=0.1)
    ends = estimator.const_marginal_effect_interval(x, alpha=0.1)
    np.testing.assert_array_equal(ends, np.reshape([low, high], (2, ROWS, 1)))
    low, high = estimator.ate_interval(x)
    assert estimator.ate_interval(x, T0=0, T1=1) == (low, high)
    assert estimator.ate_interval(x, T0=1, T1=0) == (-high, -low)
    with pytest.raises(TableError, match="T0 and T1 must be single numbers"):
        estimator.ate_interval(x, T0=t, T1=1)


def test_controls_are_covariates_that_queries_lack(checkpoint, table) -> None:
    x, t, y = table
    estimator = DoPFNCateEstimator(DoPFNRegressor(checkpoint)).fit(y, t, X=x[:, :1], W=x[:, 1:])
    unknown = x.copy()
    unknown[:, 1:] = np.nan
    expected = DoPFNRegressor(checkpoint).fit(x, t, y).cate(unknown)
    np.testing.assert_allclose(estimator.effect(x[:, :1]), expected, rtol=1e-5)
    fitted = DoPFNRegressor(checkpoint).fit(x, t, y)
    np.testing.assert_allclose(estimator.effect(), fitted.cate(), rtol=1e-5)
    assert estimator.ate() == pytest.approx(fitted.ate(), rel=1e-5)
    with pytest.raises(TableError, match="fit cannot use sample_weight: leave it out"):
        clone(estimator).fit(y, t, X=x, sample_weight=np.ones(ROWS))
    with pytest.raises(TableError, match="X has 16 rows, but W has 3"):
        clone(estimator).fit(y, t, X=x, W=x[:3])


def test_controls_may_be_frames_vectors_or_alone(checkpoint, table) -> None:
    x, t, y = table
    rows = np.arange(100, 100 + ROWS)
    X = pd.DataFrame({"age": x[:, 0]}, index=rows)
    W = pd.DataFrame({"site": np.where(x[:, 1] > 0, "a", "b"), "income": x[:, 2]}, index=rows)
    estimator = DoPFNCateEstimator(DoPFNRegressor(checkpoint)).fit(y, t, X=X, W=W)
    direct = DoPFNRegressor(checkpoint).fit(X.join(W), t, y)
    expected = direct.cate(X.assign(site=None, income=np.nan))
    assert list(estimator.model_.feature_names_in_) == ["age", "site", "income"]
    treatment = pd.Series(t, index=rows, name="drug")
    with pytest.raises(TableError, match="X holds the treatment t as its column 'drug'"):
        clone(estimator).fit(y, treatment, X=X.assign(drug=treatment), W=W)
    np.testing.assert_allclose(estimator.effect(X[:5]), expected[:5], rtol=1e-5)

    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = clone(estimator).fit(
        pd.Series(y, index=rows).iloc[order],
        treatment.iloc[order],
        X=X.iloc[order],
        W=W.iloc[order],
    )
    asked = {"T0": pd.Series(0, index=rows).iloc[order], "T1": pd.Series(1, index=rows).iloc[order]}
    np.testing.assert_allclose(shuffled.effect(X.iloc[order], **asked), expected[order], rtol=1e-4)
    with pytest.raises(TableError, match="X and T0 have the same index in another order"):
        shuffled.effect(X, T0=asked["T0"])

    estimator.fit(y, t, X=x[:, :1], W=x[:, 1])
    expected = DoPFNRegressor(checkpoint).fit(x[:, :2], t, y).cate(x[:, :2] * [1, np.nan])
    np.testing.assert_allclose(estimator.effect(x[:, :1]), expected, rtol=1e-5)

    estimator.fit(y, t, W=W)
    np.testing.assert_array_equal(estimator.effect(), estimator.model_.cate())


def test_arrays_are_matched_with_named_columns_by_position(checkpoint, table) -> None:
    x, t, y = table
    X = pd.DataFrame(x[:, :2], columns=["age", "dose"])
    W = pd.DataFrame({"w": x[:, 2]}) if x.shape[1] > 2 else pd.DataFrame({"w": x[:, 1]})
    estimator = DoPFNCateEstimator(DoPFNRegressor(checkpoint)).fit(
        y, t, X=X, W=W, sample_weight=None
    )
    np.testing.assert_allclose(estimator.effect(X.to_numpy()), estimator.effect(X))


def test_scorers_of_econml_take_it(checkpoint, table) -> None:
    pytest.importorskip("econml")
    from econml.cate_interpreter import SingleTreePolicyInterpreter
    from econml.metalearners import TLearner
    from econml.score import EnsembleCateEstimator, RScorer
    from econml.validate import DRTester

    x, t, y = table
    estimator = DoPFNCateEstimator(DoPFNRegressor(checkpoint, n_resamples=4)).fit(y, t, X=x)
    nuisances = {"model_t": LogisticRegression(), "model_y": LinearRegression()}
    scorer = RScorer(**nuisances, discrete_treatment=True, random_state=0).fit(y, t, X=x)
    residuals_y, residuals_t = scorer.lineardml_._cached_values.nuisances
    predicted = estimator.effect(x) * residuals_t[:, 0]
    loss = np.mean((residuals_y - predicted) ** 2)
    assert scorer.score(estimator) == pytest.approx(1 - loss / scorer.base_score_)
    ensemble = EnsembleCateEstimator(cate_models=[estimator], weights=np.ones(1))
    np.testing.assert_allclose(ensemble.effect(x), estimator.effect(x))
    learner = TLearner(models=LinearRegression()).fit(y, t, X=x)
    both = EnsembleCateEstimator(cate_models=[estimator, learner], weights=np.ones(2) / 2)
    expected = (estimator.effect(x) + learner.effect(x)) / 2
    np.testing.assert_allclose(both.const_marginal_effect(x)[:, 0], expected)

    policy = SingleTreePolicyInterpreter(risk_level=0.1, max_depth=1).interpret(estimator, x)
    assert set(policy.treat(x)) <= {0, 1}

    tester = DRTester(
        model_regression=LinearRegression(), model_propensity=LogisticRegression(), cate=estimator
    )
    tester.fit_nuisance(x, t, y, x, t, y)
    assert np.isfinite(tester.evaluate_blp(x, x).params).all()
