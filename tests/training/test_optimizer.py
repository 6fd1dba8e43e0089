import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dopfn_jax.config import Config, TrainingConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.optimizer import ADAM_SHARE, make_optimizer, make_schedule
from dopfn_jax.training.step import Trainer


def test_schedule_warms_up_peaks_and_ends_at_its_share() -> None:
    config = TrainingConfig(
        steps=1000, warmup_steps=100, learning_rate=2e-3, final_learning_rate_share=0.05
    )
    schedule = make_schedule(config)
    values = [float(schedule(step)) for step in (0, 50, 100, 550, 1000, 2000)]
    middle = (2e-3 + 1e-4) / 2  # a cosine is half-way down in the middle
    np.testing.assert_allclose(values, [0, 1e-3, 2e-3, middle, 1e-4, 1e-4], rtol=1e-5)


def test_a_short_run_warms_up_over_half_of_it() -> None:
    config = TrainingConfig(steps=10, warmup_steps=1000, learning_rate=1e-3)
    assert float(make_schedule(config)(5)) == pytest.approx(1e-3)


def test_one_compiled_step_serves_every_schedule() -> None:
    smoke = Config.load("smoke")
    other = {"steps": 7, "learning_rate": 1e-5, "warmup_steps": 3, "final_learning_rate_share": 0.5}
    changed = dataclasses.replace(
        smoke, training=dataclasses.replace(smoke.training, seed=9, **other)
    )
    shape, mesh = smoke.training.shapes[0], make_mesh((1, 1))
    first, second = (Trainer(config, mesh).lower_step(shape) for config in (smoke, changed))
    assert first.as_text() == second.as_text()


def names(tree: object) -> set[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths}


@pytest.mark.parametrize("features_per_token", [0, 1])
def test_muon_gets_the_matrices_of_the_layers_and_adam_the_rest(features_per_token: int) -> None:
    model_config = dataclasses.replace(
        Config.load("smoke").model, features_per_token=features_per_token
    )
    params = nnx.state(nnx.eval_shape(lambda: DoPFN(model_config, rngs=nnx.Rngs(0))), nnx.Param)
    optimizer = make_optimizer(TrainingConfig(optimizer="muon"))
    state = jax.eval_shape(optimizer.init, params)
    by_label = optax.tree_utils.tree_get(state, "inner_states")
    muon = names(by_label["muon"].inner_state[0].mu)
    adam = names(optax.tree_utils.tree_get(by_label["adam"], "mu"))

    everything = names(params)
    kernels = {name for name in everything if name.startswith("layers") and "kernel" in name}
    attentions = 2 if features_per_token else 1
    assert len(kernels) == 4 * attentions + 2
    assert muon == kernels
    assert adam == everything - kernels


def test_the_optimizers_step_as_far_as_their_rates_say() -> None:
    """Muon's update of a matrix is near orthogonal; Adam's first update has size one."""
    rate = 1e-2
    config = TrainingConfig(
        optimizer="muon", learning_rate=rate, warmup_steps=0, weight_decay=0.0, steps=10
    )
    rng = np.random.default_rng(0)
    params = {
        "layers": {"up": rng.normal(size=(2, 16, 16)).astype(np.float32)},
        "head": rng.normal(size=(16, 16)).astype(np.float32),
    }
    gradient = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    optimizer = make_optimizer(config)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["layers"]["up"]), compute_uv=False) / rate
    assert singular.min() > 0.3 and singular.max() < 1.4
    # Nesterov momentum makes the first step a little longer than the rate.
    np.testing.assert_allclose(np.abs(updates["head"]) / rate, ADAM_SHARE, rtol=0.5)
