import json

import numpy as np
import pandas as pd
import pytest

from dopfn_jax import DoPFNRegressor
from dopfn_jax.evaluation.released import evaluate, load_datasets, normalised_mse
from scripts.evaluate import compare


@pytest.fixture
def folder(tmp_path):
    """A case study of one dataset: y = 2 t + x, with effect 2 and x known."""
    rng = np.random.default_rng(0)
    x, t, t_set = rng.normal(size=40), np.arange(40) % 2, np.arange(40) // 2 % 2
    path = tmp_path / "toy" / "01.npz"
    path.parent.mkdir()
    np.savez(
        path,
        x_obs=np.stack([t, x], 1).astype(np.float32),
        y_obs=(2 * t + x).astype(np.float32),
        x_int=np.stack([t_set, x], 1).astype(np.float32),
        y_int=(2 * t_set + x).astype(np.float32),
        y0=x.astype(np.float32),
        y1=(2 + x).astype(np.float32),
        cid0=x.astype(np.float32),
        cid1=(2 + x).astype(np.float32),
        meta=json.dumps({}),
    )
    return tmp_path


class Oracle(DoPFNRegressor):
    """Knows the toy's mechanism, but overstates the effect by 1."""

    def fit(self, X, t, y):
        return self

    def predict(self, X, t, **options):
        return 2 * t + X[:, 0]

    def cate(self, X=None):
        return np.full(len(X), 3.0)


def test_split_halves_the_rows_and_pairs_queries_with_their_own_outcome(folder):
    (data,) = load_datasets(folder)
    assert len(data.y) == len(data.query_y) == 20
    assert not set(data.x[:, 0]) & set(data.query_x[:, 0])
    np.testing.assert_allclose(data.query_y, 2 * data.query_t + data.query_x[:, 0], rtol=1e-6)
    np.testing.assert_allclose(data.effect, 2.0, rtol=1e-6)


def test_errors_of_an_estimator_and_of_the_exact_answer(folder):
    table = evaluate(Oracle(), folder).set_index(["task", "method"]).nmse
    (data,) = load_datasets(folder)
    assert table["cid", "dopfn"] < 1e-12
    assert table["cid", "floor"] < 1e-12
    assert table["cate", "dopfn"] == pytest.approx(1 / np.ptp(data.query_y) ** 2, rel=1e-5)


def test_a_folder_without_datasets_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="npz"):
        next(load_datasets(tmp_path))


def test_normalised_mse_divides_by_the_squared_range():
    assert normalised_mse(np.array([1.0, -1.0]), np.array([0.0, 10.0])) == pytest.approx(0.01)


def test_comparison_uses_the_same_datasets_and_leaves_floors_out():
    columns = ["case", "dataset", "task", "method", "nmse"]
    ours = [("a", 1, "cid", "dopfn", 2e-3), ("a", 1, "cid", "floor", 1e-3)]
    peers = [
        ("a", 1, "cid", "rf", 4e-3),
        ("a", 2, "cid", "rf", 100.0),  # we have no answer there
        ("a", 1, "cid", "linear", 5e-3),
        ("a", 1, "cid", "floor_unit_noise", 1e-9),
    ]
    row = compare(pd.DataFrame(ours, columns=columns), pd.DataFrame(peers, columns=columns), "cid")
    assert row.loc["a", "best baseline"] == pytest.approx(4.0)
    assert row.loc["a", "method"] == "rf"
    assert row.loc["a", "ratio"] == pytest.approx(0.5)
