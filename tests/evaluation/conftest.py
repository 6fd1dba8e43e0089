import json
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def toy(tmp_path):
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
        meta=json.dumps(
            {
                "nodes": ["b", "h", "a", "c"],
                "edges": [["a", "h"], ["h", "b"], ["a", "c"], ["c", "b"]],
                "t_key": "a",
                "y_key": "b",
                "x_keys": ["a", "c"],
                "noise_std": 0.1,
            }
        ),
    )
    return tmp_path


@pytest.fixture
def released():
    """The folder of files that may not be redistributed, from the environment."""
    folder = Path(os.environ.get("DOPFN_DATA", ""), "case_studies_dev")
    if "DOPFN_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set DOPFN_DATA to the folder that holds case_studies_dev")
    return folder
