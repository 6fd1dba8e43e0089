import numpy as np
import pandas as pd
import pytest

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor

pytest.importorskip("dowhy")
from dowhy import CausalModel

from dopfn_jax.interop.dowhy import DoPFNEstimator

NAME = "backdoor.dopfn_jax.interop.dowhy.DoPFNEstimator"
ROWS = 15  # five bins of three


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    """A confounder that is text, a modifier, and a column that is no covariate."""
    generator = np.random.default_rng(0)
    columns = generator.normal(size=(2, ROWS))
    frame = pd.DataFrame({"age": columns[0], "other": columns[1]})
    frame["site"] = generator.choice(["a", "b"], ROWS)
    frame["drug"] = generator.permutation(np.arange(ROWS) % 2)
    noise = generator.normal(size=ROWS)
    return frame.assign(weight=frame["drug"] * frame["age"] + (frame["site"] == "a") + noise)


@pytest.fixture(scope="module")
def model(data: pd.DataFrame) -> CausalModel:
    roles = {"treatment": "drug", "outcome": "weight", "common_causes": ["site"]}
    return CausalModel(data, **roles, effect_modifiers=["age"])


@pytest.fixture(scope="module")
def direct(data: pd.DataFrame, checkpoint) -> DoPFNRegressor:
    """What the adapter should ask."""
    regressor = DoPFNRegressor(checkpoint, n_resamples=4)
    return regressor.fit(data[["site", "age"]], data["drug"], data["weight"])


@pytest.fixture(scope="module")
def ask(model: CausalModel, checkpoint):
    def ask(**options):
        params = {"init_params": {"checkpoint": checkpoint, "n_resamples": 4}}
        estimand = model.identify_effect(proceed_when_unidentifiable=True)
        return model.estimate_effect(estimand, NAME, method_params=params, **options)

    return ask


def test_gives_the_regressors_answers(ask, direct: DoPFNRegressor, data: pd.DataFrame) -> None:
    estimate = ask()
    assert estimate.value == pytest.approx(direct.ate(), rel=1e-5)
    np.testing.assert_allclose(estimate.cate_estimates, direct.cate(), rtol=1e-5)
    np.testing.assert_allclose(
        estimate.get_confidence_intervals(0.9), direct.ate_interval(alpha=0.1), rtol=1e-5
    )
    low, high = direct.ate_interval()
    assert estimate.get_standard_error() == pytest.approx((high - low) / 3.919928, rel=1e-4)
    # By five bins of age, of three rows each.
    assert estimate.conditional_estimates.mean() == pytest.approx(direct.ate(), rel=1e-4)
    assert "p(weight | do(drug), site, age)" in str(estimate)
    assert isinstance(estimate.estimator, DoPFNEstimator)


def test_modifiers_may_be_text(data: pd.DataFrame, checkpoint) -> None:
    roles = {"treatment": "drug", "outcome": "weight", "common_causes": ["age"]}
    model = CausalModel(data, **roles, effect_modifiers=["site"])
    params = {"init_params": {"checkpoint": checkpoint}}
    estimate = model.estimate_effect(model.identify_effect(), NAME, method_params=params)
    direct = DoPFNRegressor(checkpoint).fit(data[["age", "site"]], data["drug"], data["weight"])
    by_site = estimate.conditional_estimates
    np.testing.assert_allclose(by_site, direct.ate(by="site")[by_site.index], rtol=1e-4)


def test_units_and_directions(ask, direct: DoPFNRegressor, data: pd.DataFrame) -> None:
    assert ask(target_units="att").value == pytest.approx(direct.att(), rel=1e-4)
    assert ask(target_units="atc").value == pytest.approx(direct.atc(), rel=1e-4)
    old = data[data["age"] > 0]
    expected = pytest.approx(direct.ate(old[["site", "age"]]), rel=1e-4)
    assert ask(target_units=lambda frame: frame["age"] > 0).value == expected
    assert ask(target_units=old).value == expected
    with pytest.raises(TableError, match="target_units is 'treated', but must be 'ate', 'att'"):
        ask(target_units="treated")
    backwards = ask(treatment_value=0, control_value=1)
    assert backwards.value == pytest.approx(-direct.ate(), rel=1e-5)
    low, high = backwards.get_confidence_intervals(0.95)
    assert low < backwards.value < high


def test_refuters_take_the_estimate(ask, model: CausalModel) -> None:
    estimate = ask()
    for method, options in {
        "placebo_treatment_refuter": {"placebo_type": "permute"},
        "random_common_cause": {},
        "data_subset_refuter": {"subset_fraction": 0.8},
    }.items():
        refutation = model.refute_estimate(
            estimate.target_estimand, estimate, method, num_simulations=2, **options
        )
        assert np.isfinite(refutation.new_effect)
        assert refutation.new_effect != estimate.value


@pytest.mark.parametrize("method", ["iv", "frontdoor"])
def test_other_identifications_are_refused(data: pd.DataFrame, checkpoint, method: str) -> None:
    """Without an adjustment set: z -> drug -> dose -> weight, and a hidden common cause."""
    table = data.assign(z=data["drug"], dose=data["drug"] * data["age"])
    graph = (
        "digraph { z -> drug; drug -> dose; dose -> weight; U -> drug; U -> weight; "
        'U [unobserved="yes"]; }'
    )
    model = CausalModel(table, treatment="drug", outcome="weight", graph=graph)
    estimand = model.identify_effect(proceed_when_unidentifiable=True)
    name = NAME.replace("backdoor", method, 1)
    params = {"init_params": {"checkpoint": checkpoint}}
    with pytest.raises(TableError, match=f"identified by '{method}'"):
        model.estimate_effect(estimand, name, method_params=params)
