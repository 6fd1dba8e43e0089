"""Saved estimators: what comes back, and what is refused."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dopfn_jax.checkpoints import CheckpointError, save_checkpoint
from dopfn_jax.estimators import DoPFNRegressor, archive
from tests.estimators.small import assert_same, table


def test_a_fresh_process_gives_the_same_answers(fitted, tmp_path) -> None:
    path, query = tmp_path / "deep" / "effects.dopfn", tmp_path / "query.csv"
    fitted.save(path)
    table()[0].to_csv(query, index=False)
    program = (
        "import json, sys, pandas as pd; from dopfn_jax import DoPFNRegressor;"
        "model = DoPFNRegressor.load(sys.argv[1]); X = pd.read_csv(sys.argv[2]);"
        "print(json.dumps([model.cate(X).tolist(), model.ate_interval()]))"
    )
    command = [sys.executable, "-c", program, path, query]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    effects, interval = json.loads(result.stdout)
    assert_same(effects, fitted.cate())
    assert_same(interval, fitted.ate_interval())


def test_settings_and_names_come_back(checkpoint, tmp_path) -> None:
    folder = tmp_path / "weights"
    save_checkpoint(folder, checkpoint.model, checkpoint.config, 0)
    X, t, y = table()
    model = DoPFNRegressor(folder, n_resamples=5, random_state=None).fit(
        X.assign(dose=np.where(X["dose"] > 0, "yes", "no")), t, y
    )
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # a second time replaces the first
    loaded = DoPFNRegressor.load(tmp_path / "model")
    assert loaded.get_params() == {**model.get_params(), "checkpoint": str(folder)}
    assert loaded.schema_ == model.schema_
    assert loaded.checkpoint_.name == str(folder)
    assert loaded.feature_names_in_.tolist() == ["age", "dose", "score"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "weights"]
    np.testing.assert_array_equal(loaded.cate(), model.cate())


def test_what_was_set_after_fit_does_not_change_what_was_read(checkpoint, tmp_path) -> None:
    X, t, y = table()
    model = DoPFNRegressor(checkpoint, n_resamples=5).fit(X, t, y)
    expected = model.cate()
    model.set_params(n_estimators=4, random_state=5, transforms=("none", "quantile_y"))
    model.save(tmp_path / "model")
    loaded = DoPFNRegressor.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.cate(), expected)
    assert loaded.ate_interval() == model.ate_interval()


def test_nothing_else_is_overwritten(fitted, tmp_path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("precious")
    for path in (data, tmp_path):
        with pytest.raises(FileExistsError, match="is no saved estimator: choose another name"):
            fitted.save(path)
    assert data.read_text() == "precious"


def test_a_failure_leaves_the_old_file(fitted, tmp_path, monkeypatch) -> None:
    path = tmp_path / "model"
    fitted.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(archive, "save_checkpoint", fail)
    with pytest.raises(OSError, match="disk full"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unusable_files_are_refused(fitted, tmp_path) -> None:
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError):
        DoPFNRegressor.load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="model: not a saved estimator"):
        DoPFNRegressor.load(path)
    path.unlink()
    fitted.save(path)
    whole = path.read_bytes()
    middle = whole.index(b"model.safetensors") + 10_000
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(CheckpointError, match="not a saved estimator"):
        DoPFNRegressor.load(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        description = json.loads(archive.read("estimator.json"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("estimator.json", json.dumps({**description, "format": 99}))
    with pytest.raises(CheckpointError, match="written by a later version"):
        DoPFNRegressor.load(path)
