import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.config import PriorConfig
from dopfn_jax.scm import (
    SCM,
    SCMError,
    bernoulli,
    binary,
    d_separated,
    do,
    fit_mechanisms,
    is_backdoor_set,
    is_frontdoor_set,
    linear,
    node,
    normal,
    parameter,
    sample,
    true_ate,
    true_cate,
    true_cid,
    uniform,
)

KEY = jax.random.key(0)


def hidden_confounder(kind: str = "exact") -> SCM:
    """u -> t, u -> y, u -> x, t -> y. As functions the mechanisms are opaque: Monte Carlo."""
    y = linear({"t": 2.0, "u": 1.5}) if kind == "exact" else lambda t, u: 2 * t + 1.5 * u
    return SCM(
        {
            "u": normal(1.0, 2.0),
            "x": node(linear({"u": 1.0}), normal()),
            "t": node(linear({"u": 1.0}), normal()),
            "y": node(y, normal(scale=0.3)),
        }
    )


X = np.array([-1.0, 0.0, 2.5])
# u given x: precision 1/4 + 1, mean (1/4 + x) / that.
U_GIVEN_X = (0.25 + X) / 1.25


def test_exact_cid_is_the_closed_form() -> None:
    estimate = true_cid(hidden_confounder(), {"x": X}, {"t": 3.0}, "y", KEY)
    np.testing.assert_allclose(estimate.value, 6 + 1.5 * U_GIVEN_X, rtol=1e-5)
    np.testing.assert_array_equal(estimate.standard_error, np.zeros(3))


def test_monte_carlo_cid_lies_within_its_error() -> None:
    t = np.array([3.0, 0.0, -1.0])
    estimate = true_cid(hidden_confounder("opaque"), {"x": X}, {"t": t}, "y", KEY, samples=20_000)
    truth = 2 * t + 1.5 * U_GIVEN_X
    assert (np.asarray(estimate.standard_error) > 0).all()
    assert (np.asarray(estimate.standard_error) < 0.05).all()
    deviation = np.abs(np.asarray(estimate.value) - truth) / np.asarray(estimate.standard_error)
    assert (deviation < 4).all()
    assert (np.asarray(estimate.effective_samples) < 20_000).all()


def test_cate_shares_its_draws() -> None:
    estimate = true_cate(hidden_confounder("opaque"), {"x": X}, "t", "y", KEY, samples=100)
    np.testing.assert_allclose(estimate.value, 2.0, rtol=1e-4)
    np.testing.assert_allclose(estimate.standard_error, 0.0, atol=1e-5)


def test_ate_exact_and_by_monte_carlo() -> None:
    exact = true_ate(hidden_confounder(), "t", "y", KEY)
    assert exact.value.shape == ()
    assert float(exact.value) == pytest.approx(2.0)
    assert float(exact.standard_error) == 0
    squared = SCM({"x": normal(), "t": normal(), "y": node(lambda t, x: t * x**2, normal())})
    estimate = true_ate(squared, "t", "y", KEY, samples=10_000)
    assert float(estimate.standard_error) == pytest.approx(np.sqrt(2 / 10_000), rel=0.1)
    assert float(estimate.value) == pytest.approx(1.0, abs=4 * float(estimate.standard_error))


def test_covariates_below_the_treatment_are_pre_treatment_values() -> None:
    """t -> x, u -> x, u -> y: x without the intervention tells about u, not about the set t."""
    scm = SCM(
        {
            "u": normal(),
            "t": normal(),
            "x": node(linear({"t": 1.0, "u": 1.0}), normal()),
            "y": node(linear({"x": 1.0, "u": 1.0}), normal()),
        }
    )
    x = np.array([3.0])
    estimate = true_cid(scm, {"x": x}, {"t": 5.0}, "y", KEY)
    # E[u | x] = E[e_x | x] = x / 3; y = 5 + u + e_x + u.
    assert float(estimate.value[0]) == pytest.approx(5 + 3 * 1.0, rel=1e-5)


def test_an_outcome_that_the_row_determines_is_exact_without_being_gaussian() -> None:
    scm = SCM({"x": normal(), "t": normal(), "y": node(lambda t, x: jnp.sin(t * x), normal())})
    estimate = true_cid(scm, {"x": X}, {"t": 2.0}, "y", KEY, samples=50)
    np.testing.assert_allclose(estimate.value, np.sin(2 * X), rtol=1e-5)
    np.testing.assert_array_equal(estimate.standard_error, np.zeros(3))


def test_noise_that_is_not_added_does_not_average_out() -> None:
    scm = SCM(
        {
            "t": normal(),
            "y": node(
                lambda t, noise: jnp.exp(t + noise),
                normal(),
                inverse=lambda value, t: jnp.log(value) - t,
            ),
            "z": node(linear({"t": 1.0}), normal(scale=0.5)),
        }
    )
    estimate = true_cid(scm, {}, {"t": 0.2}, "y", KEY, samples=100_000)
    assert 0 < estimate.standard_error < 0.02
    assert abs(estimate.value - np.exp(0.7)) < 4 * estimate.standard_error
    # Nor does what is added, where a function of the outcome is asked about.
    estimate = true_cid(scm, {}, {"t": 0.2, "z": jnp.square}, "z", KEY, samples=100_000)
    assert abs(estimate.value - (0.04 + 0.25)) < 4 * estimate.standard_error


def test_a_binary_covariate_is_conditioned_on_by_rejection() -> None:
    scm = SCM(
        {
            "u": normal(),
            "x": node(binary(linear({"u": 1.0})), normal(scale=1e-3)),
            "t": normal(),
            "y": node(linear({"u": 1.0, "t": 1.0}), normal()),
        }
    )
    estimate = true_cid(scm, {"x": [0.0, 1.0]}, {"t": 0.0}, "y", KEY, samples=20_000)
    half_normal_mean = np.sqrt(2 / np.pi)
    np.testing.assert_allclose(estimate.value, [-half_normal_mean, half_normal_mean], atol=0.03)


def test_cid_of_a_sampled_scm_matches_its_potential_outcomes_on_average() -> None:
    scm = SCM.from_prior(jax.random.key(1), PriorConfig(case_study="unobserved_confounder"))
    rows = sample(scm, KEY, 32)
    y1 = sample(do(scm, {"t": 1.0}), KEY, 32)["y"]
    estimate = true_cid(scm, {"x1": rows["x1"]}, {"t": 1.0}, "y", KEY, samples=500)
    residual = np.asarray(y1 - estimate.value)
    assert abs(residual.mean()) < 4 * residual.std() / np.sqrt(32)
    assert residual.std() < np.asarray(y1).std()


def test_effects_on_an_outcome_that_is_true_or_false() -> None:
    scm = SCM(
        {
            "x": normal(),
            "t": bernoulli(),
            "y": node(lambda x, t, noise: noise < jax.nn.sigmoid(x + t), uniform()),
        }
    )
    effect = true_cate(scm, {"x": [0.0, 1.0]}, "t", "y", KEY)
    expected = jax.nn.sigmoid(jnp.array([1.0, 2.0])) - jax.nn.sigmoid(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(effect.value, expected, atol=0.03)


def test_effects_of_a_fitted_scm_given_roots() -> None:
    data = sample(hidden_confounder(), KEY, 200)
    scm = fit_mechanisms({"t": ["u"], "y": ["u", "t"], "x": ["u"]}, data)
    effect = true_cate(scm, {"u": data["u"][:3]}, "t", "y", KEY, samples=2_000)
    np.testing.assert_allclose(effect.value, 2.0, atol=0.05)
    with pytest.raises(SCMError, match=r"covariate 'x': .* use interventional\(\)"):
        true_cate(scm, {"x": data["x"][:3]}, "t", "y", KEY)


def test_a_question_without_anything_random() -> None:
    scm = SCM({"t": node(lambda b: b), "b": parameter(normal()), "y": node(lambda t: 2 * t)})
    assert true_ate(do(scm, {"b": 1.0}), "y", "y", KEY).value == 1.0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: true_cid(s, {"x": X}, {"t": 1.0}, "Y", KEY), "unknown outcome 'Y'"),
        (lambda s: true_cid(s, {"v": X}, {"t": 1.0}, "y", KEY), "unknown node 'v'|covariate 'v'"),
        (lambda s: true_cid(s, {"t": X}, {"t": 1.0}, "y", KEY), "'t' is both set by do"),
        (lambda s: true_cid(s, {"y": X}, {"t": 1.0}, "y", KEY), "outcome 'y' is among the rows"),
        (lambda s: true_cid(s, {"x": X}, {"t": np.ones(2)}, "y", KEY), "rows disagree"),
        (lambda s: true_cate(s, {"x": X}, "T", "y", KEY), "unknown node 'T'"),
        (
            lambda s: true_ate(SCM({**s.nodes, "w": parameter(normal())}), "t", "y", KEY),
            "parameter 'w' is unknown",
        ),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(ask, message) -> None:
    with pytest.raises(SCMError, match=message):
        ask(hidden_confounder())


def graph(*edges: str) -> SCM:
    """An SCM from edges such as "a>b"."""
    pairs = [edge.split(">") for edge in edges]
    names = sorted({name for pair in pairs for name in pair})
    weights = {name: {p: 1.0 for p, c in pairs if c == name} for name in names}
    return SCM({name: node(linear(weights[name]), normal()) for name in names})


def test_d_separation_of_chain_fork_and_collider() -> None:
    chain, fork, collider = graph("a>b", "b>c"), graph("b>a", "b>c"), graph("a>b", "c>b", "b>d")
    for scm in (chain, fork):
        assert not d_separated(scm, "a", "c")
        assert d_separated(scm, "a", "c", "b")
    assert d_separated(collider, "a", "c")
    assert not d_separated(collider, "a", "c", "b")
    assert not d_separated(collider, "a", "c", "d")


def test_d_separation_after_do() -> None:
    scm = graph("u>t", "u>y", "t>y")
    assert d_separated(do(scm, {"t": 1.0}), "u", "t")
    assert not d_separated(do(scm, {"t": lambda t: 5 * t}), "u", "t")


def test_backdoor_criterion() -> None:
    scm = graph("z>t", "z>y", "t>m", "m>y", "t>w", "y>w")
    assert not is_backdoor_set(scm, "t", "y")
    assert is_backdoor_set(scm, "t", "y", "z")
    assert not is_backdoor_set(scm, "t", "y", ["z", "m"])
    m_bias = graph("u>t", "u>z", "v>z", "v>y", "t>y")
    assert is_backdoor_set(m_bias, "t", "y")
    assert not is_backdoor_set(m_bias, "t", "y", "z")


def test_frontdoor_criterion() -> None:
    front = graph("u>t", "u>y", "t>m", "m>y")
    assert is_frontdoor_set(front, "t", "y", "m")
    assert not is_frontdoor_set(front, "t", "y", [])
    assert not is_frontdoor_set(graph("u>t", "u>y", "t>m", "m>y", "t>y"), "t", "y", "m")
    assert not is_frontdoor_set(graph("u>t", "u>y", "u>m", "t>m", "m>y"), "t", "y", "m")


def test_overlapping_or_unknown_sets_are_refused() -> None:
    scm = graph("a>b")
    with pytest.raises(SCMError, match="'a' appears in more than one"):
        d_separated(scm, "a", "b", "a")
    with pytest.raises(SCMError, match="unknown node 'z'"):
        is_backdoor_set(scm, "a", "b", "z")


def test_without_networkx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "networkx":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"dopfn-jax\[graphs\]"):
        d_separated(graph("a>b"), "a", "b")


def test_a_row_that_the_scm_never_makes_has_no_answer():
    never_one = node(binary(threshold=50.0), normal())
    scm = SCM({"x": never_one, "t": normal(), "y": node(lambda t, x: t + x, normal())})
    estimate = true_cid(scm, {"x": [0.0, 1.0]}, {"t": 1.0}, "y", KEY, samples=100)
    assert np.isfinite(estimate.value[0]) and estimate.effective_samples[0] > 50
    assert np.isnan(estimate.value[1]) and estimate.effective_samples[1] == 0


@pytest.mark.parametrize(("income", "rate"), [(1.0, 1.0), (20_000.0, 0.01)])
def test_the_exact_answer_does_not_depend_on_the_units_of_covariates(income, rate) -> None:
    scm = SCM(
        {
            "income": normal(0, income),
            "rate": normal(0, rate),
            "t": node(linear({"income": 1 / income}), normal()),
            "y": node(linear({"rate": 1 / rate, "t": 1.0, "income": 1 / income}), normal()),
        }
    )
    rows = {"income": [0.0, income], "rate": [2 * rate, 2 * rate]}
    np.testing.assert_allclose(true_cid(scm, rows, {"t": 0.0}, "y", KEY).value, [2, 3], rtol=1e-5)


def test_a_covariate_with_discrete_noise_tells_about_its_parents() -> None:
    scm = SCM(
        {
            "u": bernoulli(0.2),
            "x": node(linear({"u": 1.0}), bernoulli()),
            "t": normal(),
            "y": node(linear({"u": 1.0, "t": 1.0}), normal(scale=0.1)),
        }
    )
    rows = {"x": [0.0, 1.0, 2.0, 0.5]}
    answer = true_cid(scm, rows, {"t": 0.0}, "y", KEY)
    np.testing.assert_allclose(answer.value[:3], [0.0, 0.2, 1.0], atol=0.03)
    assert np.isnan(answer.value[3]) and answer.effective_samples[3] == 0
