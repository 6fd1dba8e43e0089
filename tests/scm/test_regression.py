import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeRegressor

from dopfn_jax.scm import (
    SCM,
    SCMError,
    binary,
    counterfactual,
    do,
    fit_mechanisms,
    interventional,
    linear,
    node,
    normal,
    parameter,
    sample,
)

KEY = jax.random.key(0)
GRAPH = {"t": ["x"], "y": ["t", "x"]}


def truth() -> SCM:
    return SCM(
        {
            "x": normal(),
            "t": node(binary(linear({"x": 1.0})), normal()),
            "y": node(linear({"t": 2.0, "x": -1.0}, bias=0.5), normal(scale=0.2)),
        }
    )


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.DataFrame({k: np.asarray(v) for k, v in sample(truth(), KEY, 600).items()})


def test_linear_mechanisms_recover_the_coefficients(table: pd.DataFrame) -> None:
    fitted = fit_mechanisms(GRAPH, table)
    mechanism = fitted.nodes["y"].mechanism
    found = [float(value) for value in (*mechanism.weights, mechanism.bias)]
    np.testing.assert_allclose(found, [2.0, -1.0, 0.5], atol=0.05)
    noise = fitted.nodes["y"].noise.sample(KEY, (5000,))
    assert float(noise.std()) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("graph", [networkx.DiGraph([("x", "t"), ("t", "y"), ("x", "y")]), truth()])
def test_a_graph_may_be_networkx_or_an_scm(graph, table: pd.DataFrame) -> None:
    assert set(fit_mechanisms(graph, table).edges) == set(truth().edges)


def test_interventional_and_counterfactual_predictions(table: pd.DataFrame) -> None:
    fitted = fit_mechanisms(GRAPH, table, {"t": LogisticRegression()})
    rows = table.iloc[:50]
    mean = interventional(fitted, rows, {"t": 1.0}, KEY, samples=200)
    np.testing.assert_allclose(mean["y"], 2.5 - rows["x"], atol=0.1)
    np.testing.assert_allclose(mean["x"], rows["x"], rtol=1e-5)
    traced = jax.jit(lambda x: interventional(fitted, {"x": x}, {"t": 1.0}, KEY, samples=200)["y"])
    np.testing.assert_allclose(traced(rows["x"].to_numpy()), mean["y"], atol=0.1)
    unit = counterfactual(fitted, rows, {"t": 1.0})["y"]
    np.testing.assert_allclose(unit, rows["y"] + 2 * (1 - rows["t"]), atol=0.1)


def test_a_scikit_learn_regressor_is_a_mechanism_also_under_jit_and_vmap(
    table: pd.DataFrame,
) -> None:
    fitted = fit_mechanisms(GRAPH, table, {"y": DecisionTreeRegressor(max_depth=6)})
    eager = sample(do(fitted, {"t": 1.0}), KEY, 40)["y"]
    compiled = jax.jit(lambda v: sample(do(fitted, {"t": v}), KEY, 40)["y"])
    np.testing.assert_allclose(compiled(jnp.float32(1.0)), eager, rtol=1e-5)
    both = jax.vmap(lambda v: sample(do(fitted, {"t": v}), KEY, 40)["y"])(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(both[1], eager, rtol=1e-5)
    assert float(jnp.mean(both[1] - both[0])) == pytest.approx(2.0, abs=0.2)


def test_a_classifier_makes_a_binary_node(table: pd.DataFrame) -> None:
    fitted = fit_mechanisms(GRAPH, table, {"t": LogisticRegression()})
    t = np.asarray(sample(fitted, KEY, 2000)["t"])
    assert set(np.unique(t)) == {0.0, 1.0}
    assert t.mean() == pytest.approx(table["t"].mean(), abs=0.05)
    with pytest.raises(SCMError, match="noise of 't' cannot be recovered"):
        counterfactual(fitted, table.iloc[:5], {"x": 0.0})


def test_residuals_are_out_of_fold(table: pd.DataFrame) -> None:
    flexible = DecisionTreeRegressor()
    honest = fit_mechanisms(GRAPH, table, {"y": flexible}, folds=3).nodes["y"].noise.values
    fitted = fit_mechanisms(GRAPH, table, {"y": flexible}, folds=0).nodes["y"].noise.values
    assert fitted.std() < 1e-4 < 0.2 < honest.std()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"y": ["z"]}, {"y": np.ones(20)}), "no data on node 'z'"),
        (({"y": ["x"]}, {"y": np.ones(4), "x": np.ones(4)}), "4 rows are too few"),
        (({"y": ["x"]}, {"y": np.ones(20), "x": np.full(20, np.nan)}), "'x' must be"),
        (({"y": ["x"]}, {"y": np.ones(20), "x": np.ones(19)}), "differ in length"),
        (({"y": ["x"]}, {"y": np.ones(20), "x": np.ones(20)}, "forest"), "regressor 'forest'"),
        (({"y": ["x"]}, {"y": np.ones(20), "x": np.ones(20)}, {"x": "linear"}), "has no parents"),
        (
            ({"y": ["x"]}, {"y": np.arange(20), "x": np.ones(20)}, LogisticRegression()),
            "must hold 0 and 1",
        ),
    ],
)
def test_nonsense_is_refused_by_name(arguments, message) -> None:
    with pytest.raises(SCMError, match=message):
        fit_mechanisms(*arguments)


def test_rows_may_hold_parameters() -> None:
    scm = SCM(
        {
            "slope": parameter(normal()),
            "a": normal(),
            "y": node(linear({"a": "slope"}), normal()),
        }
    )
    known = do(scm, {"slope": 0.7})
    rows = sample(known, KEY, 5)
    assert next(iter(rows)) == "slope"
    means = interventional(known, rows, {"y": 0.0}, KEY)
    np.testing.assert_allclose(means["a"], rows["a"], rtol=1e-5)
    with pytest.raises(SCMError, match="interventional: a hold no rows"):
        interventional(known, {"a": 50.0}, {"y": 0.0}, KEY)


def test_a_mean_over_an_unknown_parameter_is_refused() -> None:
    scm = SCM(
        {
            "slope": parameter(normal()),
            "a": normal(),
            "y": node(linear({"a": "slope"}), normal()),
        }
    )
    with pytest.raises(SCMError, match="parameter 'slope' is unknown"):
        interventional(scm, {"a": np.ones(2)}, {"a": 1.0}, jax.random.key(0))
    known = do(scm, {"slope": 2.0})
    answer = interventional(known, {"a": np.ones(2)}, {"a": 1.0}, jax.random.key(0), 1000)
    np.testing.assert_allclose(answer["y"], 2.0, atol=0.15)
