"""The named parts of the wide prior, each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.wide.assignments import ASSIGNMENTS
from dopfn_jax.wide.columns import COLUMN_KINDS, OUTCOME_KINDS
from dopfn_jax.wide.effects import EFFECTS, LINKS
from dopfn_jax.wide.graphs import GRAPHS
from dopfn_jax.wide.mechanisms import INDICES, MECHANISMS
from dopfn_jax.wide.registry import apply, pick

ROWS = 4000


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_is_a_finite_function_that_varies_with_its_indices(name):
    keys = jax.random.split(jax.random.key(0), 3)
    s = jax.random.normal(keys[0], (5, INDICES, ROWS))
    a = jax.random.uniform(keys[1], (5, INDICES, 1), minval=-2.0, maxval=2.0)
    b = jax.random.normal(keys[2], (5, INDICES, 1))
    result = MECHANISMS[name](s, a, b)
    assert result.shape == (5, ROWS)
    assert jnp.isfinite(result).all()
    assert (result.std(axis=-1) > 0.01).all()


def test_a_tree_takes_few_values_and_a_product_is_no_sum():
    s = jax.random.normal(jax.random.key(1), (INDICES, ROWS))
    a, b = jnp.array([[1.0], [0.5], [-2.0], [7.0]]), jnp.zeros((INDICES, 1))
    assert len(np.unique(MECHANISMS["tree"](s, a, b))) == 8
    np.testing.assert_allclose(MECHANISMS["product"](s, a, b), s[0] * s[1], rtol=1e-6)


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("steepness", [0.1, 5.0])
def test_an_assignment_treats_the_wanted_share(name, rate, steepness):
    score, u = (
        jax.random.normal(jax.random.key(2), (ROWS,)),
        jax.random.uniform(jax.random.key(3), (ROWS,)),
    )
    treated = ASSIGNMENTS[name](score, u, jnp.float32(rate), jnp.float32(steepness))
    assert abs(float(treated.mean()) - rate) < 0.03
    gap = float(score[treated].mean() - score[~treated].mean())
    if name in ("threshold", "logistic"):
        assert gap > 0.05
    elif name == "coin":
        assert abs(gap) < 0.15


@pytest.mark.parametrize("name", COLUMN_KINDS)
def test_a_kind_of_column_is_finite_and_varies(name):
    u, v = (jax.random.uniform(jax.random.key(seed), (50, 1)) for seed in (4, 5))
    z = 3.0 * jax.random.normal(jax.random.key(6), (50, ROWS))
    values = COLUMN_KINDS[name](z, u, v)
    assert jnp.isfinite(values).all()
    assert (values.std(axis=-1) > 0.0).all()


def test_discrete_kinds_have_few_values():
    u, v = (jax.random.uniform(jax.random.key(seed), (50, 1)) for seed in (4, 5))
    z = jax.random.normal(jax.random.key(6), (50, ROWS))

    def levels(name: str) -> set[int]:
        return {len(np.unique(row)) for row in COLUMN_KINDS[name](z, u, v)}

    assert levels("binary") == {2}
    assert levels("categorical") == {5, 7}
    assert min(levels("ordinal")) >= 3 and max(levels("ordinal")) <= 25
    counts = OUTCOME_KINDS["count"](z, u, v)
    assert (counts == jnp.floor(counts)).all() and (counts >= 0).all()


def test_effects_have_the_mean_and_the_spread_that_they_are_given():
    modifiers = jax.random.normal(jax.random.key(7), (ROWS,))
    modifiers = (modifiers - modifiers.mean()) / modifiers.std()
    values = {name: f(jnp.float32(0.5), modifiers, jnp.float32(2.0)) for name, f in EFFECTS.items()}
    assert not values["zero"].any()
    np.testing.assert_allclose(values["constant"], 0.5)
    np.testing.assert_allclose(values["varying"].mean(), 0.5, atol=1e-4)
    np.testing.assert_allclose(values["varying"].std(), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_finite_far_out(name):
    assert jnp.isfinite(LINKS[name](jnp.linspace(-1e3, 1e3, 101))).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gives_every_child_of_a_second_layer_a_possible_parent(name):
    hub = jax.random.uniform(jax.random.key(8), (8,))
    number = jnp.arange(8)
    propensity = GRAPHS[name](hub, jnp.arange(4), number % 4, 2 - number // 4)
    assert propensity.shape == (4, 8)
    assert (propensity >= 0).all() and (propensity.sum(axis=1) > 0).all()


def test_layered_graphs_use_the_layer_before_and_factors_the_first():
    hub, child, number = jnp.zeros(8), jnp.arange(4), jnp.arange(8)
    layer = 2 - number // 4
    assert not GRAPHS["layered"](hub, child, number % 4, layer)[:, :4].any()
    assert not GRAPHS["factors"](hub, child, number % 4, layer)[:, 4:].any()


def test_apply_takes_the_named_part_entry_by_entry():
    parts = {"double": lambda x: 2 * x, "negate": lambda x: -x, "unused": lambda x: x / 0}
    ids = jnp.array([[0], [1], [0]])
    x = jnp.arange(6.0).reshape(3, 2)
    expected = jnp.array([[0.0, 2.0], [-2.0, -3.0], [8.0, 10.0]])
    np.testing.assert_array_equal(apply(parts, ("double", "negate"), ids, x), expected)


def test_pick_is_uniform_over_the_names():
    ids = pick(jax.random.uniform(jax.random.key(9), (9000,)), ("a", "b", "c"))
    np.testing.assert_allclose(jnp.bincount(ids, length=3) / 9000, 1 / 3, atol=0.02)
