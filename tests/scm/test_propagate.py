"""Propagation by hand, by NumPy, and under interventions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.propagate import propagate
from dopfn_jax.scm.structure import SCM, descendants

pytestmark = pytest.mark.usefixtures("strict_dtypes")

MECHANISMS = {
    "identity": lambda x: x,
    "square": np.square,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}
TASKS, NODES, ROWS = 40, 6, 8


def _scm(weights, mechanisms, **fields) -> SCM:
    k = len(mechanisms)
    ids = [MECHANISM_NAMES.index(name) for name in mechanisms]
    scm = SCM(
        adjacency=jnp.array(weights) != 0,
        weights=jnp.array(weights, jnp.float32),
        mechanism=jnp.array(ids, jnp.int32),
        noise_family=jnp.zeros(k, jnp.int32),
        noise_scale=jnp.ones(k),
        binary=jnp.zeros(k, bool),
        threshold=jnp.zeros(k),
        active=jnp.ones(k, bool),
    )
    return dataclasses.replace(scm, **fields)


# a -> b -> c and a -> c; two rows.
THREE_NODES = _scm([[0, 0, 0], [0.5, 0, 0], [-1, 2, 0]], ["tanh", "relu", "square"])
THREE_NOISES = jnp.array([[1.0, -2.0], [0.1, 0.2], [0.01, 0.02]])


def test_three_nodes_by_hand():
    # b = relu(0.5) + 0.1, relu(-1) + 0.2; c = (-1 + 2 * 0.6)^2 + 0.01, (2 + 2 * 0.2)^2 + 0.02.
    expected = [[1, -2], [0.6, 0.2], [0.05, 5.78]]
    np.testing.assert_allclose(propagate(THREE_NODES, THREE_NOISES), expected, rtol=1e-5)


def test_three_nodes_under_do_by_hand():
    # c = (-1 + 2 * 1)^2 + 0.01, (2 + 2 * 3)^2 + 0.02.
    values = propagate(THREE_NODES, THREE_NOISES, (1, jnp.array([1.0, 3.0])))
    np.testing.assert_allclose(values, [[1, -2], [1, 3], [1.01, 64.02]], rtol=1e-5)


def test_children_see_the_binary_value_by_hand():
    # b is 0.6, 0.2 before its threshold; c = (-1 + 2 * 1)^2 + 0.01, (2 + 2 * 0)^2 + 0.02.
    binary = dataclasses.replace(
        THREE_NODES, binary=jnp.array([False, True, False]), threshold=jnp.array([9.0, 0.5, 9.0])
    )
    expected = [[1, -2], [1, 0], [1.01, 4.02]]
    np.testing.assert_allclose(propagate(binary, THREE_NOISES), expected, rtol=1e-5)


def test_a_value_at_the_threshold_is_one_and_do_overrides_it():
    root = _scm([[0]], ["identity"], binary=jnp.array([True]), threshold=jnp.array([0.5]))
    noise = jnp.array([[0.4, 0.5, 0.6]])
    np.testing.assert_array_equal(propagate(root, noise), [[0, 1, 1]])
    done = propagate(root, noise, (0, jnp.array([7.0, 0.2, -1.0])))
    np.testing.assert_array_equal(done, jnp.array([[7.0, 0.2, -1.0]]))


@functools.cache
def _random_scms() -> tuple[SCM, np.ndarray]:
    rng = np.random.default_rng(0)
    edges = np.tril(rng.random((TASKS, NODES, NODES)) < 0.4, -1)
    scms = [
        _scm(
            np.where(graph, rng.uniform(-1, 1, graph.shape), 0),
            rng.choice(MECHANISM_NAMES, NODES),
            binary=jnp.asarray(rng.random(NODES) < 0.2),
            threshold=jnp.asarray(rng.normal(size=NODES), jnp.float32),
        )
        for graph in edges
    ]
    noise = rng.normal(size=(TASKS, NODES, ROWS)).astype(np.float32)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *scms), noise


_propagate_all = jax.jit(jax.vmap(propagate))


def test_random_scms_equal_a_numpy_loop():
    scms, noise = _random_scms()
    expected = np.zeros(noise.shape)
    for i in range(TASKS):
        for k in range(NODES):
            g = MECHANISMS[MECHANISM_NAMES[scms.mechanism[i, k]]]
            expected[i, k] = g(scms.weights[i, k] @ expected[i]) + noise[i, k]
            if scms.binary[i, k]:
                expected[i, k] = expected[i, k] >= scms.threshold[i, k]
    np.testing.assert_allclose(_propagate_all(scms, noise), expected, rtol=1e-4, atol=1e-5)


def test_an_intervention_changes_descendants_only():
    scms, noise = _random_scms()
    rng = np.random.default_rng(1)
    node = rng.integers(NODES, size=TASKS)
    settings = rng.normal(size=(TASKS, ROWS)).astype(np.float32)
    before = np.asarray(_propagate_all(scms, noise))
    after = np.asarray(_propagate_all(scms, noise, (node, settings)))
    np.testing.assert_array_equal(after[np.arange(TASKS), node], settings)

    reach = np.asarray(jax.vmap(descendants)(scms.adjacency))[np.arange(TASKS), :, node]
    may_change = reach | (np.arange(NODES) == node[:, None])
    np.testing.assert_array_equal(after[~may_change], before[~may_change])
    # Squares, ReLUs and thresholds may hide a change in a row, not in most.
    assert (after[reach] != before[reach]).mean() > 0.5
