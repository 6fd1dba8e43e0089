import dataclasses
import runpy

import numpy as np
import pytest
from flax import nnx

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.config import Config, ModelConfig, PriorConfig, TableShape, TrainingConfig
from dopfn_jax.evaluation.held_out import (
    TRIAL_ROWS,
    _wilson,
    calibration,
    context_growth,
    draw_trial,
    trial_coverage,
)
from dopfn_jax.model.transformer import DoPFN


@pytest.fixture(scope="module")
def ignorant() -> Checkpoint:
    """Answers every query alike: uniform between -1 and 1, but for thin tails."""
    config = Config(
        prior=PriorConfig(max_nodes=5),
        model=ModelConfig(width=16, layers=1, heads=2, features_per_token=0, buckets=16),
        training=TrainingConfig(shapes=(TableShape(rows=24, context=(16, 16), tasks=1),)),
    )
    model = nnx.jit(lambda: DoPFN(config.model, rngs=nnx.Rngs(0)))()
    model.head.kernel[...] *= 0
    model.head.bias[...] = np.where(np.arange(16) % 15 == 0, -9.0, 0.0)
    model.borders[...] = np.concatenate([[-1.01], np.linspace(-1, 1, 15), [1.01]])
    return Checkpoint("ignorant", model, config, 0)


def test_trials_are_randomised_and_their_truth_is_the_effect() -> None:
    errors, dependence, sizes = [], [], set()
    for number in range(300):
        x, t, y, effect = draw_trial(np.random.default_rng([7, number]), number)
        sizes.add(len(y))
        standard_error = np.sqrt(y[t == 1].var() / t.sum() + y[t == 0].var() / (1 - t).sum())
        errors.append((y[t == 1].mean() - y[t == 0].mean() - effect.mean()) / standard_error)
        dependence.append(np.corrcoef(x[:, 0] + 1e-9 * y, t)[0, 1] * np.sqrt(len(y)))
    assert sizes == set(TRIAL_ROWS)
    assert abs(np.mean(errors)) < 0.2 and 0.8 < np.std(errors) < 1.1
    assert abs(np.mean(dependence)) < 0.2 and 0.8 < np.std(dependence) < 1.2


def test_wilson_interval_as_published() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert _wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert _wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.slow
def test_coverage_counts_outcomes_inside_the_interval(ignorant: Checkpoint) -> None:
    table = calibration(ignorant, tasks=40, context_rows=(16,))
    (row,) = table.to_dict("records")
    assert row["prior"] == "paper's prior" and 20 < row["tasks"] <= 40
    # Half and nine tenths of the line from -1 to 1; standardised outcomes spread more widely.
    assert 0.1 < row["coverage_0.5"] < row["coverage_0.9"] < 0.9


@pytest.mark.slow
def test_an_ignorant_model_does_not_gain_from_rows(ignorant: Checkpoint, tmp_path) -> None:
    table = context_growth(ignorant, tmp_path, tables=3, cases=["observed_confounder"])
    assert list(table.task) == ["cid", "cate"]
    cid = table.iloc[0]
    assert cid.ratio_low <= cid.ratio <= cid.ratio_high and 0.7 < cid.ratio < 1.4
    assert sorted(p.name for p in (tmp_path / "observed_confounder").iterdir()) == [
        "001.npz",
        "002.npz",
        "003.npz",
    ]


@pytest.mark.slow
def test_residuals_tell_of_effects_that_an_ignorant_model_misses(ignorant: Checkpoint) -> None:
    wide_enough = dataclasses.replace(ignorant.config, prior=PriorConfig(max_nodes=12))
    table = trial_coverage(dataclasses.replace(ignorant, config=wide_enough), trials=60)
    effects = []
    for number in range(60):
        _, _, y, effect = draw_trial(np.random.default_rng([0, number]), number)
        effects.append(effect.mean() / y.std())
    aipw, ate = (group.set_index("rows") for _, group in table.groupby("estimate"))
    assert list(ate.index) == list(aipw.index) == [0, *TRIAL_ROWS]
    assert ate.rms[0] == pytest.approx(np.sqrt(np.mean(np.square(effects))), rel=1e-4)
    assert aipw.rms[0] < 0.6 * ate.rms[0]
    assert 0.75 < aipw.coverage[0] <= ate.coverage[0]


def test_the_script_names_a_wrong_option(capsys) -> None:
    main = runpy.run_path("scripts/check_weights.py")["main"]
    with pytest.raises(SystemExit):
        main(["--scale", "2"])
    assert "--scale 2: must be above 0, and at most 1" in capsys.readouterr().err
    assert main(["--checkpoint", "nothing", "--checks", "trials"]) == 2
    assert "check_weights.py: checkpoint 'nothing'" in capsys.readouterr().err
