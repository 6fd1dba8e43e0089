import builtins
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from dopfn_jax.scm import (
    SCM,
    Posterior,
    SCMError,
    bernoulli,
    binary,
    do,
    fit,
    half_normal,
    linear,
    node,
    normal,
    observe,
    parameter,
    sample,
)
from dopfn_jax.scm.distributions import empirical

KEY = jax.random.key(0)
COEFFICIENTS = ("beta_y0", "beta_ay", "beta_by", "beta_cy", "sigma_y")
# Means and standard deviations of PyMC's own posterior on the same data, 4 chains x 1,000 draws.
PYMC = {
    "beta_ay": (1.5095, 0.0236),
    "beta_by": (0.7372, 0.0217),
    "beta_cy": (0.3094, 0.0221),
    "sigma_y": (0.2164, 0.0159),
    "beta_y0": (0.0235, 0.0214),
}


def linear_model() -> SCM:
    return SCM(
        {
            **{name: parameter(normal()) for name in COEFFICIENTS[:4]},
            "sigma_y": parameter(half_normal()),
            "a": normal(),
            "b": normal(),
            "c": normal(),
            "y_mu": linear({"a": "beta_ay", "b": "beta_by", "c": "beta_cy"}, bias="beta_y0"),
            "y": node(linear({"y_mu": 1.0}), normal(scale="sigma_y")),
        }
    )


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    folder = Path(__file__).parents[2] / "examples" / "data"
    return pd.read_csv(folder / "pymc_do_operator.csv")


@pytest.fixture(scope="module")
def posterior(table: pd.DataFrame) -> Posterior:
    pytest.importorskip("numpyro")
    return fit(linear_model(), table[["a", "b", "c", "y"]], KEY)


def test_posterior_agrees_with_pymc(posterior: Posterior) -> None:
    assert {name: draws.shape for name, draws in posterior.draws.items()} == {
        name: (4, 1000) for name in COEFFICIENTS
    }
    for name, (mean, deviation) in PYMC.items():
        draws = np.asarray(posterior.draws[name])
        # Both runs have a Monte Carlo error; some 2,000 effective draws each.
        assert draws.mean() == pytest.approx(mean, abs=4 * deviation * np.sqrt(2 / 2000)), name
        assert draws.std() == pytest.approx(deviation, rel=0.15), name
    assert not np.asarray(posterior.statistics["diverging"]).any()


def test_scenarios_agree_with_pymc(posterior: Posterior, table: pd.DataFrame) -> None:
    for intervention, column in ((0.0, "y_b=0"), (lambda b: 5 * b, "y_b=5b")):
        values = posterior.predictive(KEY, do={"b": intervention}, outputs=("b", "y_mu"))
        assert values["y_mu"].shape == (4, 1000, 100)
        mean = np.asarray(values["y_mu"]).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, table[column], atol=0.02)
    np.testing.assert_allclose(values["b"][2, 3], 5 * table["b"], rtol=1e-5)


def test_predictive_replicates_and_predicts_for_new_rows(posterior: Posterior) -> None:
    replicate = posterior.predictive(KEY, redraw="y", outputs="y")["y"]
    data = np.asarray(posterior.scm.observations["y"])
    residual = np.asarray(replicate) - data
    assert 0.2 < residual.std() < 0.4
    renewed = posterior.predictive(KEY, redraw=("a", "b", "c", "y"), outputs="y")["y"]
    assert renewed.shape == (4, 1000, 100)
    rows = {"a": np.zeros(3), "b": np.array([0.0, 1.0, 2.0]), "c": np.zeros(3)}
    means = posterior.predictive(KEY, rows=rows, outputs="y_mu")["y_mu"].mean(axis=(0, 1))
    assert means.shape == (3,)
    np.testing.assert_allclose(np.diff(means), PYMC["beta_by"][0], atol=0.01)


def test_counterfactual_keeps_the_units_noise_in_every_draw(posterior: Posterior) -> None:
    what_if = posterior.counterfactual({"b": 0.0}, outputs="y")["y"]
    data = posterior.scm.observations
    beta = np.asarray(posterior.draws["beta_by"])[..., None]
    expected = np.asarray(data["y"]) - beta * np.asarray(data["b"])
    np.testing.assert_allclose(what_if, expected, atol=1e-4)


def test_the_draws_are_scms(posterior: Posterior) -> None:
    scms = posterior.scms()
    few = jax.tree.map(lambda leaf: leaf[0, :5], scms)
    y = jax.vmap(lambda scm: sample(do(scm, {"a": 1.0, "b": 0.0, "c": 0.0}), KEY, 100, "y_mu"))(few)
    total = posterior.draws["beta_y0"] + posterior.draws["beta_ay"]
    np.testing.assert_allclose(y["y_mu"][:, 0], total[0, :5], rtol=1e-5)


def test_inference_data(posterior: Posterior) -> None:
    arviz = pytest.importorskip("arviz")
    replicate = posterior.predictive(KEY, redraw="y", outputs="y")
    data = posterior.to_inference_data(posterior_predictive=replicate)
    summary = arviz.summary(data)
    assert (summary["r_hat"] < 1.02).all()
    assert (summary["ess_bulk"] > 1500).all()
    assert data.posterior_predictive["y"].shape == (4, 1000, 100)
    assert data.observed_data["y"].shape == (100,)


def test_map_is_the_mode_of_a_conjugate_posterior() -> None:
    pytest.importorskip("numpyro")
    scm = SCM(
        {
            "w": parameter(normal(1.0, 2.0)),
            "x": normal(),
            "y": node(linear({"x": "w"}), normal(scale=0.5)),
        }
    )
    rows = sample(do(scm, {"w": -1.5}), KEY, 40, ("x", "y"))
    mode = fit(scm, rows, KEY, method="map").mean()["w"]
    precision = jnp.sum(rows["x"] ** 2) / 0.25 + 1 / 4
    mean = (jnp.sum(rows["x"] * rows["y"]) / 0.25 + 1 / 4) / precision
    assert float(mode) == pytest.approx(float(mean), abs=1e-3)


def test_map_of_nodes_without_data() -> None:
    """z -> x: the mode of the noise of z given x is the conditional mean, row by row."""
    pytest.importorskip("numpyro")
    scm = SCM(
        {
            "z": normal(),
            "x": node(linear({"z": 2.0}), normal()),
            "w": node(linear({"x": 1.0}), normal()),
        }
    )
    x = np.array([-1.0, 0.0, 3.0])
    posterior = fit(scm, {"x": x}, KEY, method="map")
    np.testing.assert_allclose(posterior.mean()["z"], 2 * x / 5, atol=1e-3)
    effect = posterior.predictive(KEY, do={"x": 1.0}, outputs=("z", "x"))
    np.testing.assert_allclose(effect["z"][0, 0], 2 * x / 5, atol=1e-3)


def test_map_leaves_the_saddle_of_a_product_of_unknowns() -> None:
    pytest.importorskip("numpyro")
    scm = SCM(
        {
            "a": parameter(normal()),
            "b": parameter(normal()),
            "x": normal(),
            "y": node(lambda a, b, x: a * b * x, normal(scale=0.1)),
        }
    )
    x = np.linspace(-1.0, 1.0, 50)
    mode = fit(scm, {"x": x, "y": 2.0 * x}, KEY, method="map").mean()
    assert mode["a"] * mode["b"] == pytest.approx(2.0, abs=0.05)


def test_data_that_a_function_changes_are_fitted_as_they_were() -> None:
    pytest.importorskip("numpyro")
    scm = SCM({"w": parameter(normal(0, 10)), "b": node(lambda w: w, normal())})
    changed = do(observe(scm, {"b": np.full(50, 3.0)}), {"b": lambda b: 2 * b})
    posterior = fit(changed, {}, KEY, method="map")
    assert posterior.mean()["w"] == pytest.approx(3.0, abs=0.01)
    np.testing.assert_allclose(posterior.predictive(KEY)["b"], 6.0)


def test_a_function_on_a_node_without_data_is_applied_once() -> None:
    pytest.importorskip("numpyro")
    scm = SCM(
        {
            "a": normal(),
            "m": node(linear({"a": 1.0}), normal()),
            "y": node(linear({"m": 1.0}), normal(scale=0.01)),
        }
    )
    changed = do(scm, {"m": lambda m: 2 * m})
    data = {"a": np.zeros(3), "y": np.array([-2.0, 0.5, 6.0])}
    posterior = fit(changed, data, KEY, method="map")
    np.testing.assert_allclose(posterior.mean()["m"], data["y"] / 2, atol=0.01)
    again = posterior.predictive(KEY, redraw="y")
    np.testing.assert_allclose(again["m"][0, 0], data["y"], atol=0.02)
    np.testing.assert_allclose(again["y"][0, 0], data["y"], atol=0.06)


@pytest.mark.parametrize(
    ("scm", "data", "message"),
    [
        (linear_model(), {}, "no data"),
        (linear_model(), {"Y": np.ones(3)}, "unknown node 'Y'; did you mean 'y'"),
        (linear_model(), {"y_mu": np.ones(3)}, "'y_mu' is a deterministic function"),
        (SCM({"a": normal()}), {"a": np.ones(3)}, "nothing that is unknown"),
        (
            do(observe(linear_model(), {"y": np.ones(3)}), {"a": 1.0}),
            {"b": np.ones(3)},
            "A `do` releases the data below it",
        ),
        (
            SCM({"t": node(binary(), normal()), "y": node(linear({"t": 3.0}), normal())}),
            {"y": np.ones(3)},
            "'t' is unknown and discrete",
        ),
        (
            SCM({"w": parameter(normal()), "y": node(linear({}, bias="w"), bernoulli())}),
            {"y": np.ones(3)},
            "density of 'y' given its parents is not known",
        ),
        (
            SCM({"u": bernoulli(), "y": node(linear({"u": 1.0}), normal())}),
            {"y": np.ones(3)},
            "'u' is unknown and discrete",
        ),
        (
            SCM({"w": parameter(normal()), "y": node(lambda w, noise: w * noise, normal())}),
            {"y": np.ones(3)},
            "density of 'y' given its parents is not known",
        ),
        (
            SCM({"w": parameter(normal()), "y": node(lambda w: w, empirical([0.0, 1.0]))}),
            {"y": np.ones(3)},
            "density of 'y' given its parents is not known",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(scm, data, message) -> None:
    pytest.importorskip("numpyro")
    with pytest.raises(SCMError, match=message):
        fit(scm, data, KEY)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 'nuts' or 'map'"):
        fit(linear_model(), {"y": np.ones(3)}, KEY, method="vi")  # type: ignore[arg-type]


def test_without_numpyro_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.partition(".")[0] == "numpyro":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"dopfn-jax\[bayes\]"):
        fit(linear_model(), {"y": np.ones(3)}, KEY)


def test_data_under_do_fit_the_same_parameters() -> None:
    """Data from a world in which b was set tell about the coefficients just as well."""
    pytest.importorskip("numpyro")
    scm = SCM(
        {
            "w": parameter(normal()),
            "u": normal(),
            "b": node(linear({"u": 1.0}), normal()),
            "y": node(linear({"b": "w", "u": 1.0}), normal(scale=0.1)),
        }
    )
    world = do(scm, {"b": jnp.linspace(-1, 1, 200)})
    rows = sample(do(world, {"w": 0.8}), KEY, outputs=("u", "y"))
    mode = fit(observe(world, rows), {}, KEY, method="map").mean()["w"]
    assert float(mode) == pytest.approx(0.8, abs=0.05)


def test_the_same_model_in_pymc(posterior: Posterior, table: pd.DataFrame) -> None:
    pymc = pytest.importorskip("pymc")
    with pymc.Model():
        beta = {name: pymc.Normal(name) for name in COEFFICIENTS[:4]}
        sigma = pymc.HalfNormal("sigma_y")
        mean = beta["beta_y0"] + sum(beta[f"beta_{n}y"] * table[n].to_numpy() for n in "abc")
        pymc.Normal("y", mean, sigma, observed=table["y"].to_numpy())
        theirs = pymc.sample(1000, chains=4, cores=1, random_seed=1, progressbar=False)
    for name in COEFFICIENTS:
        draws = np.asarray(theirs.posterior[name])
        error = 4 * draws.std() * np.sqrt(2 / 2000)
        assert float(posterior.mean()[name]) == pytest.approx(draws.mean(), abs=error), name
