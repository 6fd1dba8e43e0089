import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from dopfn_jax.scm import (
    SCM,
    SCMError,
    do,
    half_normal,
    linear,
    node,
    normal,
    observe,
    parameter,
    sample,
)

KEY = jax.random.key(0)
ROWS = 50_000


def confounded() -> SCM:
    """u -> t, u -> y, t -> m -> y; all linear and Gaussian."""
    return SCM(
        {
            "u": normal(0, 2),
            "t": node(linear({"u": 0.5}, bias=1.0), normal()),
            "m": node(linear({"t": 2.0}), normal(scale=0.5)),
            "y": node(linear({"m": 1.5, "u": -1.0}, bias=3.0), normal(scale=0.1)),
        }
    )


def test_interventional_mean_and_variance_are_the_closed_forms() -> None:
    y = sample(do(confounded(), {"t": 2.0}), KEY, ROWS)["y"]
    # y = 3 + 1.5 (2 t + e_m) - u + e_y
    variance = 1.5**2 * 0.5**2 + 2.0**2 + 0.1**2
    error = np.sqrt(variance / ROWS)
    assert float(y.mean()) == pytest.approx(3 + 3 * 2.0, abs=4 * error)
    assert float(y.var()) == pytest.approx(variance, rel=0.03)


def test_observational_mean_and_variance_are_the_closed_forms() -> None:
    y = sample(confounded(), KEY, ROWS)["y"]
    # y = 3 + 3 t + 1.5 e_m - u + e_y with t = 1 + u / 2 + e_t
    variance = (3 * 0.5 - 1) ** 2 * 4 + 9 + 1.5**2 * 0.25 + 0.01
    assert float(y.mean()) == pytest.approx(6.0, abs=0.06)
    assert float(y.var()) == pytest.approx(variance, rel=0.03)


def test_do_cuts_incoming_edges_and_leaves_the_original_alone() -> None:
    scm = confounded()
    cut = do(scm, {"t": 1.0})
    assert cut.parents("t") == ()
    assert cut.descendants("u") == {"y"}
    assert scm.parents("t") == ("u",)
    rows, before = sample(cut, KEY, 10), sample(scm, KEY, 10)
    np.testing.assert_array_equal(rows["t"], np.ones(10))
    np.testing.assert_array_equal(rows["u"], before["u"])


def test_do_on_a_root_equals_conditioning_on_it() -> None:
    value = jnp.linspace(-1, 1, 10)
    by_do = sample(do(confounded(), {"u": value}), KEY)
    by_observing = sample(observe(confounded(), {"u": value}), KEY)
    jax.tree.map(np.testing.assert_array_equal, by_do, by_observing)


def test_do_on_the_outcome_changes_nothing_above() -> None:
    rows, before = sample(do(confounded(), {"y": 7.0}), KEY, 10), sample(confounded(), KEY, 10)
    np.testing.assert_array_equal(rows["y"], np.full(10, 7.0))
    for name in "utm":
        np.testing.assert_array_equal(rows[name], before[name])


def test_a_do_that_cuts_every_path_leaves_no_effect() -> None:
    mediator_set = do(confounded(), {"m": 0.0})
    y0, y1 = (sample(do(mediator_set, {"t": t}), KEY, 10)["y"] for t in (0.0, 1.0))
    np.testing.assert_array_equal(y0, y1)
    assert "t" not in do(confounded(), {"m": 0.0}, prune=True, outputs="y").names


def test_the_later_of_two_dos_on_one_node_holds() -> None:
    twice = do(do(confounded(), {"t": 5.0}), {"t": 1.0})
    jax.tree.map(
        np.testing.assert_array_equal,
        sample(twice, KEY, 10),
        sample(do(confounded(), {"t": 1.0}), KEY, 10),
    )


def test_dos_on_two_nodes_commute() -> None:
    one = do(do(confounded(), {"t": 5.0}), {"u": 1.0})
    other = do(do(confounded(), {"u": 1.0}), {"t": 5.0})
    jax.tree.map(np.testing.assert_array_equal, sample(one, KEY, 10), sample(other, KEY, 10))


def test_a_function_maps_the_natural_value() -> None:
    before = sample(confounded(), KEY, 10)
    after = sample(do(confounded(), {"t": lambda t: 5 * t}), KEY, 10)
    np.testing.assert_allclose(after["t"], 5 * before["t"], rtol=1e-6)
    np.testing.assert_allclose(after["y"] - before["y"], 3 * 4 * before["t"], rtol=1e-4, atol=1e-4)
    twice = do(do(confounded(), {"t": lambda t: 5 * t}), {"t": lambda t: t + 1})
    np.testing.assert_allclose(sample(twice, KEY, 10)["t"], 5 * before["t"] + 1, rtol=1e-6)
    of_value = do(do(confounded(), {"t": 3.0}), {"t": lambda t: t + 1})
    np.testing.assert_array_equal(sample(of_value, KEY, 10)["t"], np.full(10, 4.0))


def test_do_then_observe_takes_data_from_the_intervened_world() -> None:
    scm = observe(do(confounded(), {"t": 1.0}), {"u": [0.0, 1.0]})
    rows = sample(scm, KEY)
    np.testing.assert_array_equal(rows["t"], [1.0, 1.0])
    np.testing.assert_array_equal(rows["u"], [0.0, 1.0])


def test_data_on_a_node_that_do_has_set_conflict() -> None:
    with pytest.raises(SCMError, match="'t' is set by do"):
        observe(do(confounded(), {"t": 1.0}), {"t": [0.0, 1.0]})


def test_observe_then_do_keeps_data_above_and_releases_those_below() -> None:
    before = observe(confounded(), {"u": [0.0, 1.0], "t": [1.0, 2.0], "y": [9.0, 9.0]})
    after = do(before, {"t": lambda t: 5 * t})
    assert set(after.observations) == {"u", "t"}
    rows = sample(after, KEY)
    np.testing.assert_array_equal(rows["t"], [5.0, 10.0])
    assert not np.allclose(rows["y"], 9.0)
    assert set(before.observations) == {"u", "t", "y"}


def test_data_are_natural_values_only_where_no_ancestor_is_set() -> None:
    scm = SCM({"a": normal(), "b": node(linear({"a": 1.0}), normal(scale=0.1))})
    observed = observe(scm, {"a": [10.0, 10.0], "b": [10.0, 10.0]})

    def more(b):
        return b + 1

    np.testing.assert_array_equal(sample(do(observed, {"b": more}), KEY)["b"], [11.0, 11.0])
    at_once = sample(do(observed, {"a": 0.0, "b": more}), KEY, 2)["b"]
    assert np.all(np.abs(at_once - 1.0) < 0.5)
    for first, second in (({"a": 0.0}, {"b": more}), ({"b": more}, {"a": 0.0})):
        in_turn = sample(do(do(observed, first), second), KEY, 2)["b"]
        np.testing.assert_array_equal(in_turn, at_once)


def test_data_that_a_function_changes_still_tell_about_their_causes() -> None:
    """u -> b, u -> y: what b was says what u is, whatever b is set to."""
    scm = SCM({"u": normal(), "b": node(linear({"u": 1.0}), normal())})
    scm = SCM({**scm.nodes, "y": node(linear({"u": 1.0, "b": 1.0}), normal())})
    changed = do(observe(scm, {"b": [3.0]}), {"b": lambda b: 2 * b})
    np.testing.assert_array_equal(sample(changed, KEY, outputs="b")["b"], [6.0])
    with pytest.raises(SCMError, match="'b' is observed and tells about 'u'"):
        sample(changed, KEY, outputs="y")


@pytest.mark.parametrize("function", [linear({"u": 0.2}), lambda u: 0.2 * u])
def test_a_new_mechanism_is_no_function_of_the_natural_value(function) -> None:
    with pytest.raises(SCMError, match="the function of 't' takes 'u', another node"):
        do(confounded(), {"t": function})


def test_functions_whose_argument_cannot_be_named_are_no_new_mechanisms() -> None:
    scm = SCM({"x": normal(), "b": node(linear({"x": 1.0}), normal())})
    assert sample(do(scm, {"b": jnp.abs}), KEY, 20)["b"].min() >= 0.0


def test_sampling_forward_against_data_is_refused() -> None:
    scm = observe(confounded(), {"y": [1.0, 2.0]})
    with pytest.raises(SCMError, match="'y' is observed and tells about 'm'"):
        sample(scm, KEY)
    complete = observe(scm, {"u": [1.0, 2.0], "t": [1.0, 2.0], "m": [1.0, 2.0]})
    np.testing.assert_array_equal(sample(complete, KEY)["y"], [1.0, 2.0])


def test_prune_keeps_what_can_influence_the_outputs() -> None:
    scm = SCM({**confounded().nodes, "z": normal(), "w": node(linear({"y": 1.0}), normal())})
    assert set(scm.prune("m").names) == {"u", "t", "m"}
    pruned = do(scm, {"t": 1.0}, prune=True, outputs="m")
    assert set(pruned.names) == {"t", "m"}
    np.testing.assert_array_equal(
        sample(pruned, KEY, 10)["m"], sample(do(scm, {"t": 1.0}), KEY, 10)["m"]
    )
    assert set(do(scm, {"m": 1.0}, prune=True).names) == {"u", "m", "y", "w"}


def test_prune_keeps_data_that_tell_about_the_outputs() -> None:
    scm = observe(confounded(), {"y": [1.0, 2.0]})
    assert set(scm.prune("u").names) == {"u", "t", "m", "y"}


PARAMETRIC = SCM(
    {"s": parameter(half_normal()), "d": lambda s: 2 * s, "a": node(noise=normal(scale="s"))}
)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: do(confounded(), {"T": 1.0}), r"node 'T'; did you mean 't'.*Nodes: u, t, m, y"),
        (lambda: do(confounded(), {"t": jnp.ones((2, 2))}), r"'t' has shape \(2, 2\)"),
        (lambda: do(confounded(), {"t": np.nan}), "'t' holds values that are not finite"),
        (lambda: do(confounded(), {"t": "high"}), "'t' = 'high' is not numeric"),
        (lambda: do(confounded(), {"t": np.ones(2), "u": np.ones(3)}), "rows disagree: 'u' has 3"),
        (lambda: do(confounded(), {"t": lambda t: t[:1]}), "function of 't' maps shape"),
        (lambda: do(confounded(), {"t": lambda t: t.nothing}), "function of 't' fails"),
        (lambda: do(PARAMETRIC, {"s": np.ones(3)}), "'s' has shape .* is a parameter"),
        (lambda: do(observe(confounded(), {"u": np.ones(3)}), {"t": np.ones(2)}), "rows disagree"),
        (lambda: do(confounded(), {"t": 1.0}, prune=True, outputs="Y"), "unknown output 'Y'"),
        (lambda: observe(confounded(), {"v": np.ones(3)}), "unknown node 'v'"),
        (lambda: observe(confounded(), {"u": 1.0}), r"'u' has shape \(\), but must be \(R,\)"),
        (lambda: observe(confounded(), {"u": [1.0, np.nan]}), "not finite"),
        (lambda: observe(confounded(), {"u": np.ones(3), "t": np.ones(2)}), "rows disagree"),
        (lambda: observe(PARAMETRIC, {"s": np.ones(2)}), "must be one number: a parameter"),
        (lambda: observe(PARAMETRIC, {"d": 1.0}), "'d' is a deterministic function"),
        (
            lambda: observe(observe(confounded(), {"u": np.ones(3)}), {"u": np.ones(3)}),
            "already observed",
        ),
        (lambda: sample(confounded(), KEY), "say how many rows"),
        (lambda: sample(observe(confounded(), {"u": np.ones(3)}), KEY, 4), "n = 4, but .* 3 rows"),
        (lambda: sample(confounded(), KEY, 3, outputs="yy"), "unknown output 'yy'"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(act, message) -> None:
    with pytest.raises(SCMError, match=message):
        act()


def test_a_data_frame_is_data() -> None:
    frame = pd.DataFrame({"u": [0.0, 1.0], "t": [1, 2]})
    assert set(observe(confounded(), frame).observations) == {"u", "t"}


def test_jit_and_vmap_over_interventions() -> None:
    @jax.jit
    @jax.vmap
    def mean(value: jax.Array) -> jax.Array:
        return sample(do(confounded(), {"t": value}), KEY, 100)["y"].mean()

    means = mean(jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(jnp.diff(means), 3.0, rtol=1e-4)


def test_no_tracer_leaks(checking_leaks) -> None:
    jax.jit(lambda v: sample(do(confounded(), {"t": v}), KEY, 4)["y"])(1.0)
