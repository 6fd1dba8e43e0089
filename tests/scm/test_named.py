import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest

from dopfn_jax.config import PriorConfig
from dopfn_jax.prior import Roles, sample_scm, sample_table
from dopfn_jax.scm import (
    SCM,
    SCMError,
    bernoulli,
    binary,
    counterfactual,
    do,
    gumbel,
    half_normal,
    laplace,
    linear,
    node,
    normal,
    observe,
    parameter,
    propagate,
    sample,
    student_t,
    uniform,
)
from dopfn_jax.scm.distributions import empirical
from dopfn_jax.scm.forward import draw_noise, propagate_named
from dopfn_jax.scm.noise import sample_noise
from dopfn_jax.scm.sampled import from_arrays

CONFOUNDED = PriorConfig(case_study="observed_confounder")


def chain() -> SCM:
    return SCM(
        {
            "c": node(linear({"b": 0.5}, bias=1.0, nonlinearity="tanh"), normal(0.0, 0.1)),
            "b": node(lambda a: jnp.sin(a), laplace(scale=0.2)),
            "a": normal(2.0, 3.0),
        }
    )


def test_nodes_are_sorted_topologically_whatever_their_order() -> None:
    scm = chain()
    assert scm.names == ("a", "b", "c")
    assert scm.edges == (("a", "b"), ("b", "c"))
    assert scm.ancestors("c") == {"a", "b"}
    assert scm.descendants("a") == {"b", "c"}
    assert scm.children("a") == ("b",)


def test_values_follow_the_structural_equations() -> None:
    scm = chain()
    noise = {name: jnp.array([0.3, -1.0]) for name in scm.names}
    values = propagate_named(scm, noise)
    np.testing.assert_allclose(values["a"], noise["a"])
    np.testing.assert_allclose(values["b"], np.sin(noise["a"]) + noise["b"], rtol=1e-6)
    expected = np.tanh(1 + 0.5 * values["b"]) + noise["c"]
    np.testing.assert_allclose(values["c"], expected, rtol=1e-6)


def test_the_same_key_gives_a_node_the_same_noise_in_any_scm() -> None:
    key = jax.random.key(0)
    alone = sample(SCM({"a": normal()}), key, 5)
    among = sample(SCM({"z": normal(), "a": normal()}), key, 5)
    np.testing.assert_array_equal(alone["a"], among["a"])
    assert not np.allclose(among["a"], among["z"])


@pytest.mark.parametrize(
    ("distribution", "mean", "deviation"),
    [
        (normal(1, 2), 1, 2),
        (laplace(1, 2), 1, 2),
        (student_t(1, 0.5), 1, 0.5),
        (gumbel(1, 2), 1, 2),
        (half_normal(2.0), 2 * np.sqrt(2 / np.pi), 2 * np.sqrt(1 - 2 / np.pi)),
        (uniform(1, 3), 2, 2 / np.sqrt(12)),
        (bernoulli(0.3), 0.3, np.sqrt(0.21)),
        (empirical([1.0, 2.0, 3.0]), 2, np.sqrt(2 / 3)),
    ],
)
def test_distributions_have_their_mean_and_standard_deviation(
    distribution, mean, deviation
) -> None:
    draws = np.asarray(distribution.sample(jax.random.key(1), (200_000,)), np.float64)
    assert draws.mean() == pytest.approx(mean, abs=0.03)
    # Three degrees of freedom have no fourth moment.
    assert draws.std() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("family", [normal, laplace, student_t, gumbel])
def test_log_density_is_that_of_numpyro(family) -> None:
    pytest.importorskip("numpyro")
    from dopfn_jax.scm.fit import to_numpyro

    x = jnp.linspace(-4, 6, 21)
    ours = family(0.7, 1.3)
    np.testing.assert_allclose(ours.log_prob(x), to_numpyro(ours).log_prob(x), rtol=2e-4, atol=1e-5)


def test_a_numpyro_distribution_is_noise() -> None:
    dist = pytest.importorskip("numpyro.distributions")
    rows = sample(SCM({"a": dist.Exponential(2.0)}), jax.random.key(0), 20_000)["a"]
    assert float(rows.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            {"y": lambda ages: ages, "age": normal()},
            r"'y': unknown parent 'ages'; did you mean 'age'",
        ),
        ({"a": lambda b: b, "b": lambda a: a}, r"cycle: [ab] -> [ab] -> [ab]"),
        ({"a": lambda a: a}, "cycle: a -> a"),
        ({"a": normal(), "b": lambda a: a[:2]}, r"'b': its mechanism maps rows .* shape \(2,\)"),
        ({"a": normal(), "b": lambda a: a[:, None]}, "Write one node per entry"),
        ({"a": normal(), "b": lambda a: a @ jnp.ones(3)}, "'b': its mechanism fails on parents"),
        ({"a": normal(), "p": parameter(normal(), lambda a: a)}, "'p' depends on 'a'.*varies"),
        ({"a": 3.0}, "'a' = 3.0: give node"),
        ({"": normal()}, "non-empty strings"),
        ({"a": lambda *x: x}, "'a': parents of mechanism"),
        ({"a": lambda noise: noise}, "'a': the mechanism takes `noise`"),
        ({"y": normal(scale="sigma")}, "'y': unknown parent 'sigma'"),
        ({"p": parameter(normal([0.0, 1.0, 2.0]))}, r"'p': its distribution draws \(3,\)"),
        ({"a": normal([0.0, 1.0, 2.0])}, "'a': its distribution cannot be drawn"),
        (
            {"noise": normal(60, 5), "y": node(lambda noise: noise, normal())},
            "'y': its mechanism's argument `noise` is the node's own noise",
        ),
    ],
)
def test_an_impossible_scm_is_refused_by_name(nodes, message) -> None:
    with pytest.raises(SCMError, match=message):
        SCM(nodes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: node(), "mechanism, noise, or both"),
        (lambda: node(3.0), "cannot be called"),
        (lambda: node(noise=1.0), "no distribution"),
        (lambda: node(lambda a: a, parents="a"), r"write parents=\('a',\)"),
        (lambda: node(lambda a: a, inverse=lambda v: v), "inverse is only for"),
        (lambda: node(lambda a, noise: a * noise, normal(scale="s")), "must scale it itself"),
        (lambda: normal(scale=0.0), "scale = 0.0 must be positive"),
        (lambda: normal(1.0, "sigma"), "put the mean into the mechanism"),
        (lambda: linear({}, nonlinearity="sine"), "choose from identity"),
        (lambda: linear({"a": [1.0, 2.0]}), "one number or the name"),
        (lambda: bernoulli(1.5), r"must lie in \[0, 1\]"),
        (lambda: uniform(1.0, 1.0), "must be positive"),
        (lambda: normal("mu", 1.0), r"node\(linear\(\{'mu': 1.0\}\), normal\("),
        (lambda: uniform("low", 1.0), "uniform: low = 'low' must be a number"),
        (lambda: half_normal("tau"), "half_normal: scale = 'tau' must be a number"),
        (lambda: bernoulli("p"), r"'p' must be a number; node\(lambda p, noise: noise < p"),
    ],
)
def test_an_impossible_node_is_refused(build, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_parents_with_names_that_are_no_identifiers() -> None:
    scm = SCM(
        {"Shopping Event?": bernoulli(), "y": node(lambda t: 2 * t, parents=["Shopping Event?"])}
    )
    rows = sample(scm, jax.random.key(0), 10)
    np.testing.assert_array_equal(rows["y"], 2 * rows["Shopping Event?"])


def test_parameters_are_nodes_of_one_value() -> None:
    scm = SCM(
        {
            "mu": parameter(normal()),
            "slope": parameter(normal(scale="tau"), linear({}, bias="mu")),
            "tau": parameter(half_normal()),
            "double": lambda slope: 2 * slope,
            "x": normal(),
            "y": node(linear({"x": "slope"}, bias="double"), normal(scale="tau")),
        }
    )
    rows = sample(scm, jax.random.key(3), 6)
    assert {name: value.shape for name, value in rows.items()} == {
        "mu": (), "slope": (), "tau": (), "double": (), "x": (6,), "y": (6,),
    }  # fmt: skip
    assert scm.parameters == ("mu", "tau", "slope", "double")
    assert scm.unknown_parameters == ("mu", "tau", "slope")


def test_booleans_and_whole_numbers_are_values_like_any_other() -> None:
    scm = SCM(
        {
            "smokes": node(lambda noise: noise < 0.5, uniform()),
            "drinks": node(lambda noise: noise < 0.5, uniform()),
            "risk": lambda smokes, drinks: smokes + drinks,
            "less": lambda smokes: -smokes,
            "level": node(lambda risk: jnp.round(risk).astype(int), normal()),
        }
    )
    rows = sample(scm, jax.random.key(0), 2_000)
    assert {value.dtype for value in rows.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(rows["risk"], rows["smokes"] + rows["drinks"])
    assert rows["risk"].mean() == pytest.approx(1.0, abs=0.05)
    np.testing.assert_array_equal(rows["less"], -rows["smokes"])
    observed = observe(scm, {name: rows[name] for name in ("smokes", "drinks")})
    again = sample(observed, jax.random.key(1), outputs="risk")["risk"]
    np.testing.assert_array_equal(again, rows["risk"])
    doubled = do(scm, {"smokes": lambda smokes: smokes > 2})
    assert sample(doubled, jax.random.key(0), 20)["smokes"].max() == 0.0


def test_nodes_that_do_has_set_may_be_built_upon() -> None:
    for value in (3.0, np.arange(5.0)):
        changed = do(chain(), {"b": value})
        scm = SCM({**changed.nodes, "z": node(linear({"b": 1.0}))})
        assert scm.parameters == ()
        rows = sample(scm, jax.random.key(0), 5)
        np.testing.assert_allclose(rows["z"], np.broadcast_to(value, 5))
        np.testing.assert_array_equal(rows["c"], sample(changed, jax.random.key(0), 5)["c"])
        again = sample(do(scm, {"b": np.ones(5)}), jax.random.key(0))
        np.testing.assert_allclose(again["z"], 1.0)


def test_densities_far_out_have_gradients() -> None:
    """Of a family that is not a number of its own: the others must not spoil it."""
    for family in range(4):
        noise = normal(scale=0.02).replace(
            family=np.int32(family), families=("gaussian", "laplace", "student_t", "gumbel")
        )
        if family < 3:  # to the left the Gumbel's own density ends
            assert np.isfinite(jax.grad(noise.log_prob)(-2.0))
        assert np.isfinite(jax.grad(noise.log_prob)(2.0))


def test_a_scale_in_a_node_scales_the_noise() -> None:
    scm = SCM({"sigma": parameter(half_normal()), "y": node(noise=normal(scale="sigma"))})
    key = jax.random.key(0)
    one, three = (sample(do(scm, {"sigma": s}), key, 50)["y"] for s in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_text_names_equation_and_state() -> None:
    scm = SCM(
        {
            "beta": parameter(normal()),
            "a": normal(0, 2),
            "t": node(binary(linear({"a": 1.5}), 0.25), normal()),
            "y": node(
                linear({"a": "beta", "t": -0.5}, bias=1.0, nonlinearity="relu"), normal(scale=0.1)
            ),
        }
    )
    assert str(scm).splitlines() == [
        "beta = normal(0, 1)  [parameter]",
        "a    = normal(0, 2)",
        "t    = binary(1.5 a + normal(0, 1))",
        "y    = relu(1 + beta a - 0.5 t) + normal(0, 0.1)",
    ]
    after = str(do(observe(scm, {"a": [1.0, 2.0]}), {"t": 1.0})).splitlines()
    assert after[1:3] == ["a    = normal(0, 2)  [observed]", "t    = 1  [do]"]


def test_graphviz_draws_every_edge() -> None:
    pytest.importorskip("graphviz")
    source = do(chain(), {"b": lambda b: 5 * b}).to_graphviz().source
    assert 'a -> "b (natural)"' in source
    assert '"b (natural)" -> b' in source
    assert "b -> c" in source


def test_networkx_round_trip() -> None:
    scm = chain()
    graph = scm.to_networkx()
    assert set(graph.edges) == set(scm.edges)
    again = SCM.from_networkx(graph)
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, sample(scm, key, 5), sample(again, key, 5))


def test_a_plain_networkx_graph_becomes_linear() -> None:
    graph = networkx.DiGraph()
    graph.add_edge("a", "b", weight=3.0)
    graph.add_edge("b", "c")
    rows = sample(do(SCM.from_networkx(graph), {"a": 2.0}), jax.random.key(0), 20_000)
    assert float(rows["c"].mean()) == pytest.approx(6.0, abs=0.06)
    with pytest.raises(SCMError, match="'c' uses parents"):
        SCM.from_networkx(graph, {"c": lambda a: a})
    with pytest.raises(SCMError, match="'d' is not in the graph"):
        SCM.from_networkx(graph, {"d": normal()})


@pytest.mark.parametrize("seed", range(2))
def test_named_and_array_form_propagate_alike(seed: int) -> None:
    prior = PriorConfig(noise_families=("gaussian", "laplace", "student_t", "gumbel"))
    arrays, _ = jax.jit(sample_scm, static_argnums=1)(jax.random.key(seed), prior)
    names = [f"z{k}" for k in range(prior.nodes)]
    scm = from_arrays(arrays, names)
    noise = sample_noise(jax.random.key(9), arrays.noise_family, arrays.noise_scale, 20)
    named_noise = {name: noise[names.index(name)] for name in scm.names}
    middle = names[2]
    for values, named in (
        (propagate(arrays, noise), propagate_named(scm, named_noise)),
        (
            propagate(arrays, noise, (2, jnp.full(20, 1.5))),
            propagate_named(do(scm, {middle: 1.5}), named_noise, 20),
        ),
    ):
        for name, column in named.items():
            np.testing.assert_allclose(column, values[names.index(name)], rtol=1e-4, atol=1e-5)


def test_array_form_round_trip_propagates_alike() -> None:
    scm = SCM.from_prior(jax.random.key(2))
    arrays = scm.to_arrays()
    noise = draw_noise(scm, jax.random.key(0), 30)
    values = propagate(arrays, jnp.stack([noise[name] for name in scm.names]))
    for row, name in enumerate(scm.names):
        expected = propagate_named(scm, noise)[name]
        np.testing.assert_allclose(values[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"a": normal(1.0)}, "'a' needs centred noise"),
        ({"a": normal(), "b": node(lambda a: a, normal())}, "'b' has a mechanism other"),
        ({"a": normal(), "b": node(linear({"a": 1}, bias=1.0), normal())}, "'b' has a bias"),
        ({"w": parameter(normal()), "a": node(linear({}, bias="w"), normal())}, "'w' is"),
        (
            {"a": normal(), "b": normal(), "c": node(linear({"a": "b", "b": 1.0}), normal())},
            "'c' .* has a coefficient that is another node",
        ),
    ],
)
def test_what_arrays_cannot_hold_is_refused(nodes, message) -> None:
    with pytest.raises(SCMError, match=message):
        SCM(nodes).to_arrays()


def test_a_known_scm_makes_tasks_for_do_pfn() -> None:
    scm = SCM(
        {
            "x": normal(),
            "t": node(linear({"x": 0.5}), normal()),
            "y": node(linear({"t": 2.0, "x": 1.0}), normal(scale=0.1)),
        }
    )
    roles = Roles(
        treatment=jnp.int32(1),
        outcome=jnp.int32(2),
        covariates=jnp.array([0], jnp.int32),
        covariate_mask=jnp.ones(1, bool),
    )
    prior = PriorConfig(case_study="observed_confounder")
    draw = jax.jit(sample_table, static_argnums=(3, 4, 5, 6))
    table = draw(jax.random.key(0), scm.to_arrays(), roles, prior, 64, (32, 32), True)
    assert bool(table.valid)
    np.testing.assert_allclose(table.y1 - table.y0, 2.0, rtol=1e-4)


def test_from_prior_names_roles() -> None:
    scm = SCM.from_prior(jax.random.key(0), PriorConfig(min_nodes=10, max_hidden=3))
    assert {"t", "y", "x1"} <= set(scm.names)
    assert set(scm.names) == {"t", "y"} | {n for n in scm.names if n[0] in "xu" and n[1:].isdigit()}
    rows = sample(scm, jax.random.key(1), 200)
    assert set(np.unique(rows["t"])) <= {0.0, 1.0}


def test_from_prior_of_a_random_graph_is_refused_under_vmap() -> None:
    with pytest.raises(SCMError, match="case_study"):
        jax.vmap(SCM.from_prior)(jax.random.split(jax.random.key(0), 2))


def test_a_thousand_scms_of_one_structure() -> None:
    keys = jax.random.split(jax.random.key(0), 1000)
    scms = jax.jit(jax.vmap(lambda key: SCM.from_prior(key, CONFOUNDED)))(keys)

    @jax.jit
    @jax.vmap
    def effect_and_gap(scm: SCM, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, treated, control = (
            sample(world, key, 16) for world in (scm, do(scm, {"t": 1.0}), do(scm, {"t": 0.0}))
        )
        what_if = counterfactual(scm, rows, {"t": 1.0})
        gap = jnp.abs(what_if["y"] - treated["y"]) / (1 + jnp.abs(treated["y"]))
        return jnp.mean(treated["y"] - control["y"]), gap.max()

    effects, gaps = effect_and_gap(scms, keys)
    assert effects.shape == (1000,)
    assert len(np.unique(np.asarray(effects))) > 500
    assert float(gaps.max()) < 1e-4
    # The same as one by one.
    third = SCM.from_prior(keys[3], CONFOUNDED)
    y1, y0 = (sample(do(third, {"t": v}), keys[3], 16)["y"] for v in (1.0, 0.0))
    np.testing.assert_allclose(effects[3], jnp.mean(y1 - y0), rtol=1e-3, atol=1e-5)


def test_gradients_reach_the_coefficients() -> None:
    scm = SCM({"a": normal(), "y": linear({"a": 2.0}, bias=1.0)})

    def mean(scm: SCM) -> jax.Array:
        return sample(do(scm, {"a": 3.0}), jax.random.key(0), 4)["y"].mean()

    gradient = jax.grad(mean, allow_int=True)(scm)
    assert float(gradient.nodes["y"].mechanism.weights[0]) == pytest.approx(3.0)
