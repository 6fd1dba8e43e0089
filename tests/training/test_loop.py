import dataclasses
import os
import signal
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.checkpoints import Checkpoint, CheckpointError
from dopfn_jax.config import Config, TableShape, TrainingConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training import loop
from dopfn_jax.training.flops import model_flops
from dopfn_jax.training.loop import MOST_SKIPPED_IN_A_ROW, TrainingError
from dopfn_jax.training.step import Metrics, Trainer, TrainState, shape_of_step

SHAPE = TableShape(rows=20, context=(6, 12), tasks=8)


def metrics(loss: float = 1.0, skipped: int = 0) -> Metrics:
    return Metrics(
        loss=jnp.float32(loss),
        gradient_norm=jnp.float32(0.5),
        learning_rate=jnp.float32(1e-3),
        masked_tasks=jnp.int32(3),
        skipped=jnp.int32(skipped),
    )


def test_a_line_holds_the_last_step_and_sums_and_means_since_the_line_before() -> None:
    window = loop._Window(Config())
    window.add(1, SHAPE, metrics(1.0))
    window.add(2, SHAPE, metrics(3.0, skipped=1))
    line = window.flush()
    assert line["tasks_per_second"] > 0
    assert {name: line[name] for name in ("step", "loss", "mean_loss", "masked_tasks")} == {
        "step": 2,
        "loss": 3.0,
        "mean_loss": 2.0,
        "masked_tasks": 6,
    }
    assert line["skipped"] == 1
    window.add(3, SHAPE, metrics(5.0))
    assert window.flush()["mean_loss"] == 5.0
    assert window.masked_tasks == 9  # of the whole run, for the progress bar


def test_rates_are_those_of_the_same_seconds() -> None:
    config = Config()
    window = loop._Window(config, peak=1e9)
    for step in (1, 2):
        window.add(step, SHAPE, metrics())
    line = window.flush()
    assert line["rows_per_second"] == pytest.approx(20 * line["tasks_per_second"])
    by_task = model_flops(config, SHAPE) / 8
    assert line["model_flops_per_second"] == pytest.approx(by_task * line["tasks_per_second"])
    assert line["utilisation"] == pytest.approx(line["model_flops_per_second"] / 1e9)
    assert line["seconds"] * line["tasks_per_second"] == pytest.approx(2 * SHAPE.tasks)


def test_what_is_left_out_of_the_rates_leaves_the_time_before_it_in() -> None:
    window = loop._Window(Config())
    window._clock -= 10  # the steps so far took ten seconds
    with window.left_out():
        pass
    window.add(1, SHAPE, metrics())
    assert 0 < window.flush()["tasks_per_second"] <= SHAPE.tasks / 10


def test_a_profile_shows_steps_that_do_not_compile() -> None:
    other = dataclasses.replace(SHAPE, rows=30)
    config = TrainingConfig(shapes=(SHAPE, other), seed=1)
    shapes = [shape_of_step(config.shapes, 1, step) for step in range(100)]
    for start in (0, 17):
        profiled = loop._steps_to_profile(config, start, 100)
        assert len(profiled) == loop.PROFILED_STEPS
        assert {shapes[step] for step in profiled} <= set(shapes[start : profiled.start])
    assert not loop._steps_to_profile(config, 0, 3)


def test_a_gradient_that_never_recovers_ends_the_run_with_the_steps() -> None:
    window = loop._Window(Config())
    for step in range(1, MOST_SKIPPED_IN_A_ROW):
        window.add(step, SHAPE, metrics(skipped=1))
    window.add(50, SHAPE, metrics())  # one good step is enough to go on
    for step in range(51, 50 + MOST_SKIPPED_IN_A_ROW):
        window.add(step, SHAPE, metrics(np.nan, skipped=1))
        window.flush()
    with pytest.raises(TrainingError, match=r"steps 51 to 100: .*learning_rate"):
        window.add(50 + MOST_SKIPPED_IN_A_ROW, SHAPE, metrics(skipped=1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_collected_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with loop._stop_signals() as stopping:
        os.kill(os.getpid(), number)
        assert stopping == [number]
        assert signal.getsignal(number) == before  # the second one acts as usual
    assert signal.getsignal(number) == before


def test_training_outside_the_main_thread_is_possible() -> None:
    seen: list[list[int]] = []

    def run() -> None:
        with loop._stop_signals() as stopping:
            seen.append(stopping)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[]]


@pytest.fixture(scope="module")
def checkpoint(trainer: Trainer, first_state: TrainState) -> Checkpoint:
    """Weights that no initialisation would give."""
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p) + 0.25), first_state.params)
    borders = jax.tree.map(lambda b: jnp.asarray(np.asarray(b) * 2.0), first_state.constants)
    return Checkpoint("there", nnx.merge(trainer.graphdef, params, borders), trainer.config, 7)


def test_a_new_run_starts_from_given_weights(
    trainer: Trainer, fresh: Callable[..., TrainState], checkpoint: Checkpoint
) -> None:
    state = trainer.with_weights(checkpoint.model)
    wanted = nnx.state(checkpoint.model)
    shape = trainer.config.training.shapes[0]
    have = nnx.state(trainer.model(state))
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.average), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 0

    first = fresh(
        average=nnx.state(checkpoint.model, nnx.Param),
        constants=nnx.state(checkpoint.model, nnx.Not(nnx.Param)),
    )
    assert jax.device_get(trainer.validate(state)) == jax.device_get(trainer.validate(first))

    # The state is donated; the caller's weights are not.
    trainer.step(state, shape)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(checkpoint.model)))


def test_a_tilt_that_the_weights_lack_starts_at_nothing(
    config: Config, checkpoint: Checkpoint
) -> None:
    plain = dataclasses.replace(config.model, features_per_token=0, linear_fit=True)
    tilted = dataclasses.replace(plain, linear_tilt=True)
    model = DoPFN(plain, rngs=nnx.Rngs(3))
    before = dataclasses.replace(
        checkpoint, model=model, config=dataclasses.replace(config, model=plain)
    )
    after = dataclasses.replace(config, model=tilted)
    loop._require_same_model(before, after)
    with pytest.raises(CheckpointError, match="linear_tilt: True -> False"):
        loop._require_same_model(dataclasses.replace(before, config=after), before.config)

    trainer = Trainer(after, make_mesh())
    state = trainer.with_weights(model)
    for weights in (state.params, state.average):
        flat = dict(nnx.to_flat_state(weights))
        tilt = [np.asarray(flat.pop(path)[...]) for path in [*flat] if path[0] == "tilt"]
        assert len(tilt) == 2 and not any(leaf.any() for leaf in tilt)
        own = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        assert flat.keys() == own.keys()
        for path, leaf in flat.items():
            np.testing.assert_array_equal(leaf[...], own[path][...])


def test_no_seed_of_the_training_before_may_come_again(checkpoint: Checkpoint) -> None:
    before = dataclasses.replace(checkpoint, seeds=(5, 7))
    for seed in (5, 6, 7):
        training = dataclasses.replace(checkpoint.config.training, seed=seed)
        config = dataclasses.replace(checkpoint.config, training=training)
        if seed == 6:
            loop._require_other_tasks(before, config)
        else:
            with pytest.raises(CheckpointError, match=f"seed={seed} too, .* such as --seed 8"):
                loop._require_other_tasks(before, config)


def test_weights_of_another_model_are_refused_by_field(
    config: Config, checkpoint: Checkpoint
) -> None:
    wider = dataclasses.replace(
        config, model=dataclasses.replace(config.model, width=64, buckets=16)
    )
    with pytest.raises(CheckpointError) as error:
        loop._require_same_model(checkpoint, wider)
    assert "model.width: 32 -> 64; model.buckets: 32 -> 16" in str(error.value)


def test_weights_may_be_computed_with_in_another_way(
    config: Config, checkpoint: Checkpoint
) -> None:
    model = dataclasses.replace(config.model, compute_dtype="bfloat16", remat=True)
    loop._require_same_model(checkpoint, dataclasses.replace(config, model=model))
