import dataclasses

import numpy as np
import pytest
from flax import nnx

import dopfn_jax.evaluation.outcomes as module
from dopfn_jax.checkpoints import from_pretrained
from dopfn_jax.evaluation.outcomes import KINDS, draw, effects_by_outcome


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.means[0]:g}")
def test_trials_have_the_means_they_name_and_covariates_tell_nothing(kind) -> None:
    trials = [draw(kind, np.random.default_rng([1, number])) for number in range(40)]
    x, t, y = (np.concatenate(columns) for columns in zip(*trials, strict=True))
    for arm in (0, 1):
        own = y[t == arm]
        assert abs(own.mean() - kind.means[arm]) < 4 * own.std() / np.sqrt(len(own))
    for column in x.T:
        for values in (t, y):
            assert abs(np.corrcoef(column, values)[0, 1]) < 4 / np.sqrt(len(y))
    assert kind.name != "zero or log-normal" or 0.5 < (y == 0).mean() < 0.9


def test_errors_are_those_of_the_answers(monkeypatch) -> None:
    monkeypatch.setattr(module, "ROWS", 120)
    certain = KINDS[3]._replace(means=(1.0, 5.0), draw=lambda generator, mean: mean)
    monkeypatch.setattr(module, "KINDS", (certain,))
    checkpoint = from_pretrained("do_pfn_cpu")
    (row,) = effects_by_outcome(checkpoint, trials=2).to_dict("records")
    assert row["true_effect"] == row["mean_difference"] == 4
    assert row["rms_difference"] == 0
    assert row["mean_ate"] == pytest.approx(4, abs=0.4)
    assert row["rms_ate"] == pytest.approx(abs(row["mean_ate"] - 4) / 2, abs=0.05)
    assert 0 < row["rms_level"] < 0.2

    silent = dataclasses.replace(checkpoint, model=_silent(checkpoint))
    (without,) = effects_by_outcome(silent, trials=2).to_dict("records")
    assert abs(without["mean_ate"]) < 0.01 and without["rms_ate"] == pytest.approx(2, abs=0.05)


def _silent(checkpoint):
    """The model without an answer: the same for every row and arm."""
    model = nnx.clone(checkpoint.model)
    model.head.kernel[...] *= 0
    model.tilt.kernel[...] *= 0
    model.tilt.bias[...] *= 0
    return model
