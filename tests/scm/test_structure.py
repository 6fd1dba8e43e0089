"""The transitive closure."""

import jax
import numpy as np
import pytest

from dopfn_jax.scm.structure import descendants


def _closure_by_search(adjacency: np.ndarray) -> np.ndarray:
    reach = np.zeros_like(adjacency)
    for start in range(len(adjacency)):
        found = {start}
        while new := set(np.flatnonzero(adjacency[:, sorted(found)].any(axis=1))) - found:
            found |= new
        reach[sorted(found - {start}), start] = True
    return reach


@pytest.mark.parametrize("nodes", [1, 2, 3, 9])
def test_a_chain_reaches_from_end_to_end(nodes):
    chain = np.eye(nodes, k=-1, dtype=bool)
    np.testing.assert_array_equal(descendants(chain), np.tri(nodes, k=-1, dtype=bool))


def test_descendants_are_what_a_search_finds():
    rng = np.random.default_rng(0)
    share = rng.uniform(0, 0.6, (60, 1, 1))
    adjacency = np.tril(rng.random((60, 9, 9)) < share, -1)
    expected = np.stack([_closure_by_search(graph) for graph in adjacency])
    np.testing.assert_array_equal(jax.vmap(descendants)(adjacency), expected)
