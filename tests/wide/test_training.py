"""A mixture of both priors in one run."""

import dataclasses

import jax
import numpy as np

from dopfn_jax.config import Config, TableShape, WidePriorConfig
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.step import Trainer, sample_batch

WIDE = TableShape(rows=24, context=(8, 12), tasks=4, covariates=(2, 7))


def test_a_run_trains_on_both_priors_and_validates_on_each():
    config = Config.load("smoke", ["model.features_per_token=0"])
    plain = TableShape(rows=24, context=(8, 12), tasks=4)
    training = dataclasses.replace(
        config.training, shapes=(plain, WIDE), validation=dataclasses.replace(plain, tasks=8)
    )
    config = dataclasses.replace(
        config,
        training=training,
        # One of each, so that it compiles quickly.
        wide=WidePriorConfig(
            graphs=("erdos_renyi",),
            mechanisms=("linear",),
            noise_families=("gaussian",),
            column_kinds=("continuous",),
            assignments=("logistic",),
            effects=("constant",),
            links=("identity",),
            outcome_kinds=("continuous",),
        ),
    )
    assert config.covariates == max(7, config.prior.covariates)
    trainer = Trainer(config, make_mesh((1, 1)))
    state = trainer.init(np.linspace(-3.0, 3.0, config.model.buckets + 1, dtype=np.float32))
    before = jax.device_get(state.params)
    for _ in range(2):  # the first step of a warm-up has learning rate 0
        state, metrics = trainer.step(state, WIDE)
    assert np.isfinite(metrics.loss) and metrics.gradient_norm > 0 and metrics.skipped == 0
    after = jax.device_get(state.params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    held_out = trainer.validate(state)
    assert np.isfinite(held_out["validation_loss"])
    assert np.isfinite(held_out["wide_validation_loss"])
    assert held_out["validation_loss"] != held_out["wide_validation_loss"]
    losses = [held_out[f"{name}validation_average_effect_loss"] for name in ("", "wide_")]
    assert losses[0] != losses[1] and min(losses) > 0

    task = sample_batch(jax.random.key(0), config.prior_of(WIDE), WIDE, trainer.mesh)
    assert task.context_x.shape == (4, 12, 7)
