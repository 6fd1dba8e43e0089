import json

import numpy as np
import pytest

from dopfn_jax.evaluation.datasets import load_dataset
from dopfn_jax.evaluation.generated import STUDIES, draw_dataset, write_dataset
from dopfn_jax.scm.case_studies import CASE_STUDIES


@pytest.fixture(scope="module")
def small():
    return draw_dataset(STUDIES["small"], "small", 1)


def test_every_case_study_has_a_distribution():
    assert set(STUDIES) == {*CASE_STUDIES, "small", "graph_complexity"}


def test_a_dataset_is_a_function_of_its_name_number_and_seed(small):
    again = draw_dataset(STUDIES["small"], "small", 1)
    assert all(np.array_equal(small[name], again[name]) for name in small)
    for other in (("small", 2, 0), ("large", 1, 0), ("small", 1, 1)):
        name, number, shift = other
        drawn = draw_dataset(STUDIES["small"], name, number, seed=20_251 + shift)
        assert not np.array_equal(drawn["y_obs"], small["y_obs"])


def test_outcomes_are_those_of_the_same_unit(small):
    t = small["x_obs"][:, 0]
    np.testing.assert_array_equal(np.where(t > 0.5, small["y1"], small["y0"]), small["y_obs"])
    t_in = small["x_int"][:, 0]
    np.testing.assert_array_equal(np.where(t_in > 0.5, small["y1"], small["y0"]), small["y_int"])
    assert set(t) == set(t_in) == {0.0, 1.0}


def test_the_truth_misses_the_outcome_by_its_own_noise_only(small):
    """With the confounder shown, y(t) - E[y | do(t), x] is the outcome's noise: the same twice."""
    noise = json.loads(small["meta"])["functions"]["y"]["noise_std"]
    residuals = [small["y0"] - small["cid0"], small["y1"] - small["cid1"]]
    np.testing.assert_allclose(*residuals, atol=1e-5)
    assert np.std(residuals[0]) == pytest.approx(noise, rel=0.5)


def test_files_read_as_the_released_ones_do(tmp_path):
    path = tmp_path / "small" / "003.npz"
    write_dataset(path, STUDIES["small"], "small", 3)
    data = load_dataset(path, "generated")
    assert data.key == ("generated", "small", 3)
    assert data.graph == {"x0": (), "t": ("x0",), "y": ("x0", "t")}
    assert not data.is_degenerate
    assert [file.name for file in path.parent.iterdir()] == ["003.npz"]
