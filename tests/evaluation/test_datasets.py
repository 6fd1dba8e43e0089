import numpy as np
import pytest

from dopfn_jax.evaluation.datasets import _is_confounded, load_datasets, marginalise


def test_split_halves_the_rows_and_pairs_queries_with_their_own_outcome(toy):
    (data,) = load_datasets(toy)
    assert len(data.y) == len(data.query_y) == 20
    assert not set(data.x[:, 0]) & set(data.query_x[:, 0])
    np.testing.assert_allclose(data.query_y, 2 * data.query_t + data.query_x[:, 0], rtol=1e-6)
    np.testing.assert_allclose(data.unit_y, 2 * data.unit_t + data.query_x[:, 0], rtol=1e-6)
    np.testing.assert_allclose(data.effect, 2.0, rtol=1e-6)


def test_the_graph_is_that_of_the_shown_nodes(toy):
    (data,) = load_datasets(toy)
    assert data.graph == {"t": (), "x0": ("t",), "y": ("t", "x0")}
    assert data.facts["hidden"] == 1
    assert data.facts["confounded"] == 0


def test_a_hidden_confounder_is_told_from_a_hidden_cause_of_one_side():
    edges = [("u", "t"), ("t", "y"), ("v", "u"), ("v", "y")]
    nodes = ["v", "u", "t", "y"]
    assert marginalise(nodes, edges, {"t": "t", "y": "y", "v": "x0"}) == {
        "x0": (),
        "t": ("x0",),
        "y": ("x0", "t"),
    }
    meta = {"edges": edges, "t_key": "t", "y_key": "y"}
    assert _is_confounded(meta, {"u", "v"})
    assert not _is_confounded(meta, {"u"})  # v, the common cause, is shown
    assert not _is_confounded(meta, {"v"})  # it reaches t through u, which is shown


def test_a_fingerprint_changes_with_one_number(toy):
    (data,) = load_datasets(toy)
    (again,) = load_datasets(toy)
    assert data.fingerprint == again.fingerprint
    again.query_x[3, 0] += 1e-3
    assert data.fingerprint != again.fingerprint


def test_a_folder_without_datasets_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="npz"):
        next(load_datasets(tmp_path))
