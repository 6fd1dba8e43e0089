"""A warning where a table is unlike those that the checkpoint was trained on."""

import dataclasses
import warnings

import numpy as np
import pytest

from dopfn_jax.checkpoints import from_pretrained, save_checkpoint
from dopfn_jax.diagnostics import table_statistics, unlike_usual
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.diagnostics import UnlikePriorWarning
from tests.estimators.small import table


@pytest.fixture
def remembering(checkpoint):
    """The checkpoint, trained on tables like the small one, as it were, but with more columns."""
    statistics = table_statistics(*map(np.asarray, table()))
    ranges = {name: (value - 0.05, value + 0.05) for name, value in statistics.items()}
    return dataclasses.replace(checkpoint, usual_tables={16: {**ranges, "covariates": (5.0, 9.0)}})


def test_fit_and_summary_say_what_is_unusual(remembering):
    columns = table()[0].shape[1]
    with pytest.warns(UnlikePriorWarning, match=f"covariates is {columns}, there 5 to 9") as found:
        model = DoPFNRegressor(remembering, n_resamples=2).fit(*table())
    assert len(found) == 1
    warned = [line for line in model.summary().warnings if "unlike the prior" in line]
    assert warned == [str(found[0].message)]


def test_usual_tables_and_checkpoints_without_a_record_are_silent(remembering, checkpoint):
    ranges = {**remembering.usual_tables[16], "covariates": (0.0, 9.0)}
    usual = dataclasses.replace(remembering, usual_tables={16: ranges})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DoPFNRegressor(usual).fit(*table())
        DoPFNRegressor(checkpoint).fit(*table())


@pytest.mark.parametrize("rows", [100, 300, 6000])
def test_a_binary_outcome_in_any_order_is_usual_for_the_shipped_weights(rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 4))
    t = (x[:, 0] + random.normal(size=rows) > 0).astype(float)
    latent = x[:, 1] + t + random.normal(size=rows)
    y = (latent > np.median(latent)).astype(float)
    usual_tables = from_pretrained().usual_tables
    assert usual_tables is not None
    for order in (np.arange(rows), np.argsort(t), np.argsort(y)):
        assert unlike_usual(x[order], t[order], y[order], usual_tables) == {}


def test_the_record_is_kept_in_checkpoints_and_saved_estimators(remembering, tmp_path):
    folder = tmp_path / "weights"
    save_checkpoint(
        folder, remembering.model, remembering.config, 0, usual_tables=remembering.usual_tables
    )
    assert from_pretrained(folder).usual_tables == remembering.usual_tables
    with pytest.warns(UnlikePriorWarning):
        model = DoPFNRegressor(remembering).fit(*table())
    model.save(tmp_path / "model.zip")
    loaded = DoPFNRegressor.load(tmp_path / "model.zip")
    assert loaded.checkpoint_.usual_tables == remembering.usual_tables
