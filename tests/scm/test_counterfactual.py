import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.config import PriorConfig
from dopfn_jax.scm import (
    SCM,
    SCMError,
    binary,
    counterfactual,
    do,
    linear,
    node,
    normal,
    observe,
    parameter,
    sample,
)

KEY = jax.random.key(0)


def linear_gaussian() -> SCM:
    return SCM(
        {
            "u": normal(),
            "t": node(linear({"u": 0.5}), normal()),
            "m": node(linear({"t": 2.0}), normal()),
            "y": node(linear({"m": 1.5, "u": -1.0, "t": 0.25}), normal()),
        }
    )


def test_linear_counterfactual_is_the_closed_form() -> None:
    rows = sample(linear_gaussian(), KEY, 20)
    what_if = counterfactual(linear_gaussian(), rows, {"t": 2.0})
    change = 2.0 - rows["t"]
    np.testing.assert_array_equal(what_if["u"], rows["u"])
    np.testing.assert_allclose(what_if["m"], rows["m"] + 2 * change, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(what_if["y"], rows["y"] + 3.25 * change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_counterfactual_of_a_sampled_scm_is_its_potential_outcome(seed: int) -> None:
    scm = SCM.from_prior(jax.random.key(seed), PriorConfig(min_nodes=6, max_nodes=6))
    rows = sample(scm, KEY, 30)
    truth = sample(do(scm, {"t": 1.0}), KEY, 30)
    # The treatment is binary, but set: its noise is not needed.
    what_if = counterfactual(scm, rows, {"t": 1.0})
    for name in scm.names:
        np.testing.assert_allclose(what_if[name], truth[name], rtol=1e-3, atol=1e-4)


def test_the_factual_treatment_gives_the_facts() -> None:
    rows = sample(linear_gaussian(), KEY, 20)
    what_if = counterfactual(linear_gaussian(), rows, {"t": rows["t"]})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), what_if, rows)


def test_a_function_acts_on_the_observed_value_even_of_a_binary_node() -> None:
    scm = SCM(
        {
            "x": normal(),
            "t": node(binary(linear({"x": 1.0})), normal()),
            "y": node(linear({"t": 3.0}), normal()),
        }
    )
    rows = sample(scm, KEY, 20)
    flipped = counterfactual(scm, rows, {"t": lambda t: 1 - t})
    np.testing.assert_array_equal(flipped["t"], 1 - rows["t"])
    np.testing.assert_allclose(flipped["y"], rows["y"] + 3 * (1 - 2 * rows["t"]), atol=1e-5)


def test_a_function_below_another_intervention_acts_on_the_counterfactual_value() -> None:
    rows = sample(linear_gaussian(), KEY, 20)
    what_if = counterfactual(linear_gaussian(), rows, {"t": 0.0, "m": lambda m: 5 * m})
    natural = rows["m"] - 2 * rows["t"]
    np.testing.assert_allclose(what_if["m"], 5 * natural, rtol=1e-4, atol=1e-4)


def multiplicative(inverse=None) -> SCM:
    return SCM(
        {"t": normal(), "y": node(lambda t, noise: jnp.exp(t) * noise, normal(), inverse=inverse)}
    )


def test_an_inverse_makes_any_mechanism_recoverable() -> None:
    scm = multiplicative(lambda value, t: value * jnp.exp(-t))
    rows = sample(scm, KEY, 20)
    what_if = counterfactual(scm, rows, {"t": lambda t: t + 1})
    np.testing.assert_allclose(what_if["y"], rows["y"] * np.e, rtol=1e-4)


def test_noise_that_cannot_be_recovered_is_refused_with_the_remedy() -> None:
    rows = sample(multiplicative(), KEY, 5)
    with pytest.raises(SCMError, match=r"'y': the noise of 'y' cannot.*inverse="):
        counterfactual(multiplicative(), rows, {"t": 1.0})
    assert set(counterfactual(multiplicative(), rows, {"t": 1.0}, outputs="t")) == {"t"}


def test_hidden_nodes_matter_only_where_noise_needs_them() -> None:
    scm = linear_gaussian()
    rows = sample(scm, KEY, 5)
    no_u = {name: rows[name] for name in "tmy"}
    with pytest.raises(
        SCMError, match="noise of 'y' cannot be recovered, since 'u' is not observed"
    ):
        counterfactual(scm, no_u, {"t": 1.0})
    only_m = counterfactual(scm, no_u, {"t": 1.0}, outputs=("m",))
    np.testing.assert_allclose(only_m["m"], rows["m"] + 2 * (1 - rows["t"]), atol=1e-5)
    with pytest.raises(SCMError, match=r"'y': the noise of 'm' cannot|'m' is not observed"):
        counterfactual(scm, {name: rows[name] for name in "uty"}, {"t": 1.0})


def test_deterministic_nodes_are_computed_and_checked() -> None:
    scm = SCM({"a": normal(), "d": lambda a: 2 * a, "y": node(linear({"d": 1.0}), normal())})
    rows = sample(scm, KEY, 5)
    without = counterfactual(scm, {"a": rows["a"], "y": rows["y"]}, {"a": 0.0})
    np.testing.assert_allclose(without["y"], rows["y"] - 2 * rows["a"], atol=1e-5)
    np.testing.assert_array_equal(without["d"], np.zeros(5))
    with pytest.raises(SCMError, match="give 'd' values that differ"):
        counterfactual(scm, {**rows, "d": rows["d"] + 1}, {"a": 0.0})


def test_unknown_parameters_must_be_set() -> None:
    scm = SCM({"b": parameter(normal()), "a": normal(), "y": node(linear({"a": "b"}), normal())})
    rows = {"a": np.ones(3), "y": np.ones(3)}
    with pytest.raises(SCMError, match="since 'b' is not observed"):
        counterfactual(scm, rows, {"a": 0.0})
    known = do(scm, {"b": 2.0})
    np.testing.assert_allclose(counterfactual(known, rows, {"a": 0.0})["y"], -np.ones(3))
    np.testing.assert_allclose(
        counterfactual(observe(scm, {**rows, "b": 2.0}), {}, {"a": 0.0})["y"], -np.ones(3)
    )


@pytest.mark.parametrize(
    ("rows", "intervention", "message"),
    [
        ({"v": np.ones(3)}, {"t": 1.0}, "unknown node 'v'"),
        ({"u": np.ones(3)}, {"T": 1.0}, "unknown node 'T'"),
        ({"u": np.ones(3)}, {"t": np.ones(2)}, "3 observed rows, but do has 2"),
    ],
)
def test_nonsense_is_refused(rows, intervention, message) -> None:
    with pytest.raises(SCMError, match=message):
        counterfactual(linear_gaussian(), rows, intervention)


def test_jit_and_vmap() -> None:
    scm = linear_gaussian()
    rows = sample(scm, KEY, 8)

    @jax.jit
    def what_if(scm: SCM, values: jax.Array) -> jax.Array:
        return jax.vmap(lambda value: counterfactual(scm, rows, {"t": value})["y"])(values)

    y = what_if(scm, jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(jnp.diff(y, axis=0), 3.25, rtol=1e-4)
