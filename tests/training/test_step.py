import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dopfn_jax.config import Config, ConfigError, TableShape, preset_names
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task
from dopfn_jax.sharding import MeshError
from dopfn_jax.training.optimizer import make_optimizer
from dopfn_jax.training.score import EFFECT_LIMIT, EFFECT_TOLERANCE, Score, ask_both_arms, score
from dopfn_jax.training.step import (
    Trainer,
    TrainState,
    _tasks_at_once,
    sample_batch,
    shape_of_step,
)


def same_bits(a: object, b: object) -> bool:
    def raw(leaf: jax.Array) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return all(
        raw(x).tobytes() == raw(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- The shape of a step ---------------------------------------------------------------------


SHAPES = (
    TableShape(rows=8, context=(2, 4), tasks=4, weight=1.0),
    TableShape(rows=9, context=(2, 4), tasks=4, weight=0.1),
    TableShape(rows=10, context=(2, 4), tasks=4, weight=3.0),
)


def test_shapes_come_as_often_as_their_weights_say() -> None:
    draws = [shape_of_step(SHAPES, 0, step) for step in range(4000)]
    shares = [draws.count(shape) / len(draws) for shape in SHAPES]
    expected = np.array([1.0, 0.1, 3.0]) / 4.1
    # Four standard errors of a share.
    assert np.all(np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_the_shape_is_a_function_of_seed_and_step_alone() -> None:
    forwards = [shape_of_step(SHAPES, 7, step) for step in range(50)]
    backwards = [shape_of_step(SHAPES, 7, step) for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [shape_of_step(SHAPES, 8, step) for step in range(50)]


def test_a_shape_waits_for_its_first_step() -> None:
    late = dataclasses.replace(SHAPES[2], first_step=30)
    draws = [shape_of_step((*SHAPES[:2], late), 0, step) for step in range(100)]
    assert late not in draws[:30]
    assert late in draws[30:]


# --- The fused step --------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_state(name: str) -> None:
    trainer = Trainer(Config.load(name), jax.make_mesh((1, 1), ("data", "model")))
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer.abstract_state.params)}
    model = trainer.config.model
    assert (model.layers, model.width, model.mlp_ratio * model.width) in shapes


def test_borders_suit_the_prior_that_a_run_draws_from(config: Config) -> None:
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    shape = TableShape(rows=24, context=(8, 16), tasks=2)
    wide = dataclasses.replace(shape, covariates=(1, 4))
    borders = []
    for shapes, noise in (
        ((wide,), 0.1),
        ((wide,), 50.0),
        ((shape, wide), 0.1),
        ((shape, wide), 50.0),
    ):
        prior = dataclasses.replace(config.wide, noise_ratio=(noise, noise))
        training = dataclasses.replace(config.training, shapes=shapes)
        changed = dataclasses.replace(config, wide=prior, training=training)
        borders.append(np.asarray(Trainer(changed, mesh)._fit_borders()))
    assert np.abs(borders[0] - borders[1]).max() > 0.1
    np.testing.assert_array_equal(borders[2], borders[3])


def test_steps_transfer_nothing_and_compile_once(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    shape = trainer.config.training.shapes[0]
    state, losses = fresh(), []
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event)
    )
    for k in range(6):
        if k == 1:
            compilations.clear()
        with jax.transfer_guard("disallow"):
            state, metrics = trainer.step(state, shape)
        losses.append(float(metrics.loss))
        assert 0 < float(metrics.gradient_norm) < np.inf
    assert int(state.step) == 6
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(losses)  # each step has its own data
    assert not [event for event in compilations if "/compile/" in event]


def test_a_step_is_a_function_of_its_state(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    shape = trainer.config.training.shapes[0]
    ends = [trainer.step(fresh(), shape) for _ in range(2)]
    assert same_bits(*ends)
    for other in ({"step": np.int32(1)}, {"key": jax.random.key(1)}):
        assert float(trainer.step(fresh(**other), shape)[1].loss) != float(ends[0][1].loss)


def test_a_batch_in_parts_gives_the_same_update(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    """Equal up to the order of sums: the same tasks, and a mean over all rows, not of means."""
    shape = trainer.config.training.shapes[0]
    training = dataclasses.replace(trainer.config.training, accumulate=4)
    in_parts = Trainer(dataclasses.replace(trainer.config, training=training), trainer.mesh)
    whole, parts = fresh(), fresh()
    for _ in range(3):
        whole, want = trainer.step(whole, shape)
        parts, have = in_parts.step(parts, shape)
        np.testing.assert_allclose(have.loss, want.loss, rtol=1e-4)
        np.testing.assert_allclose(have.gradient_norm, want.gradient_norm, rtol=1e-3)
        assert int(have.masked_tasks) == int(want.masked_tasks)
    changes = [
        np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((parts.params, whole.params), (whole.params, fresh().params))
    ]
    assert np.linalg.norm(changes[0]) < 0.01 * np.linalg.norm(changes[1])


def test_parts_must_divide_the_batch(trainer: Trainer) -> None:
    training = dataclasses.replace(trainer.config.training, accumulate=3)
    with pytest.raises(MeshError, match=r"8 tasks, .* times training.accumulate = 3 does not divi"):
        Trainer(dataclasses.replace(trainer.config, training=training), trainer.mesh)


def test_an_observational_model_has_no_effects_to_train_on(trainer: Trainer) -> None:
    config = Config.load("smoke", ["training.effect_weight=1", "prior.target=observational"])
    with pytest.raises(ConfigError, match=r"training.effect_weight = 1.0: .*set it to 0"):
        Trainer(config, trainer.mesh)


def test_the_average_follows_the_parameters(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    shape = trainer.config.training.shapes[0]
    trajectory = []
    state = fresh()
    for _ in range(3):
        trajectory.append(jax.device_get(jax.tree.leaves(state.params)))
        average = jax.device_get(jax.tree.leaves(state.average))
        state, _ = trainer.step(state, shape)
    # At first (1 + k) / (10 + k) is below the configured decay.
    for p0, p1, p2, have in zip(*trajectory, average, strict=True):
        want = 2 / 11 * (0.1 * p0 + 0.9 * p1) + 9 / 11 * p2
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(trajectory[2][0], average[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped(
    trainer: Trainer, first_state: TrainState, fresh: Callable[..., TrainState], poison: float
) -> None:
    params = jax.tree.map(np.array, first_state.params)
    for leaf in jax.tree.leaves(params):
        leaf.flat[0] = poison
    before = fresh(params=params)
    after, metrics = trainer.step(fresh(params=params), trainer.config.training.shapes[0])
    assert int(metrics.skipped) == 1
    assert int(after.step) == 1
    assert same_bits(
        (after.params, after.average, after.opt_state),
        (before.params, before.average, before.opt_state),
    )


def test_validation_is_of_the_averaged_weights_on_fixed_tasks(
    trainer: Trainer, first_state: TrainState, fresh: Callable[..., TrainState]
) -> None:
    values = jax.device_get(trainer.validate(fresh()))
    noise = jax.tree.map(lambda p: np.asarray(p) + 0.3, first_state.params)
    later = fresh(params=noise, step=np.int32(9), key=jax.random.key(9))
    assert jax.device_get(trainer.validate(later)) == values
    assert jax.device_get(trainer.validate(fresh(average=noise))) != values
    assert np.isfinite(list(values.values())).all()
    # Untrained weights find no effects: what they err by is noticed, and its Huber loss is limited.
    assert 0.01 < values["validation_average_effect_loss"] < 1e3


# --- Fixed batches ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(trainer: Trainer) -> Task:
    """Tables with 2 to 10 context rows: some have one arm only and are masked."""
    shape = TableShape(rows=28, context=(2, 10), tasks=8)
    task = sample_batch(jax.random.key(3), trainer.config.prior, shape, trainer.mesh)
    assert 0 < int(task.valid.sum()) < shape.tasks
    return task


LossAndGradient = Callable[[nnx.State, Task], tuple[jax.Array, nnx.State]]


@pytest.fixture(scope="module")
def loss_and_gradient(trainer: Trainer, first_state: TrainState) -> LossAndGradient:
    def loss(params: nnx.State, task: Task) -> jax.Array:
        return score(nnx.merge(trainer.graphdef, params, first_state.constants), task).loss

    return jax.jit(jax.value_and_grad(loss))


def test_masked_tasks_carry_no_loss(
    batch: Task, loss_and_gradient: LossAndGradient, trainer: Trainer, first_state: TrainState
) -> None:
    loss, gradient = loss_and_gradient(first_state.params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

    # The numbers of masked tasks and of rows beyond the masks do not matter.
    def garbage(values: jax.Array, mask: jax.Array) -> jax.Array:
        mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
        return jnp.where(
            mask,
            values,
            1.0 + jnp.arange(values.shape[1]).reshape((1, -1) + (1,) * (values.ndim - 2)),
        )

    context = batch.context_mask & batch.valid[:, None]
    query = batch.query_mask & batch.valid[:, None]
    other = dataclasses.replace(
        batch,
        context_y=garbage(batch.context_y, context),
        query_y=garbage(batch.query_y, query),
        query_x=garbage(batch.query_x, query),
    )
    other_loss, other_gradient = loss_and_gradient(first_state.params, other)
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    model = nnx.merge(trainer.graphdef, first_state.params, first_state.constants)
    scored = nnx.jit(score)(model, batch)
    counts = np.asarray(query)
    assert float(loss) == pytest.approx(-np.asarray(scored.log_likelihood)[counts].mean(), rel=1e-5)


def test_a_batch_of_masked_tasks_alone_has_no_loss_and_no_gradient(
    batch: Task, loss_and_gradient: LossAndGradient, first_state: TrainState
) -> None:
    nothing = dataclasses.replace(batch, valid=jnp.zeros_like(batch.valid))
    loss, gradient = loss_and_gradient(first_state.params, nothing)
    assert float(loss) == 0.0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_smoke_overfits_one_task(
    name: str,
    batch: Task,
    loss_and_gradient: LossAndGradient,
    trainer: Trainer,
    first_state: TrainState,
) -> None:
    one = int(np.argmax(batch.valid))
    only = dataclasses.replace(batch, valid=jnp.arange(len(batch.valid)) == one)
    steps = 80
    config = dataclasses.replace(trainer.config.training, optimizer=name, steps=steps)
    optimizer = make_optimizer(config)

    @jax.jit
    def update(
        params: nnx.State, opt_state: optax.OptState, gradient: nnx.State
    ) -> tuple[nnx.State, optax.OptState]:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, losses = first_state.params, []
    opt_state = jax.jit(optimizer.init)(params)
    for _ in range(steps):
        loss, gradient = loss_and_gradient(params, only)
        losses.append(float(loss))
        params, opt_state = update(params, opt_state, gradient)
    assert losses[-1] < losses[0] - 1.0


# --- Effects ---------------------------------------------------------------------------------


def test_both_arms_are_asked_about_the_same_units(trainer: Trainer) -> None:
    shape, rows = TableShape(rows=28, context=(8, 12), tasks=8), 7
    prior = trainer.config.prior
    task = sample_batch(jax.random.key(3), prior, shape, trainer.mesh, potential_outcomes=True)
    asked = ask_both_arms(task, rows)
    present = np.asarray(task.valid[:, None] & task.query_mask)[:, -rows:]
    assert present.any()
    np.testing.assert_array_equal(asked.query_x[:, :rows], task.query_x[:, -rows:])
    np.testing.assert_array_equal(asked.query_x[:, rows:], task.query_x[:, -rows:])
    np.testing.assert_array_equal(asked.query_t[:, :rows], task.query_t[:, -rows:])
    np.testing.assert_array_equal((asked.query_t[:, :rows] + asked.query_t[:, rows:])[present], 1)
    for half in (slice(rows), slice(rows, None)):
        potential = np.where(asked.query_t[:, half] > 0.5, task.y1[:, -rows:], task.y0[:, -rows:])
        np.testing.assert_array_equal(asked.query_y[:, half][present], potential[present])


def test_under_both_arms_draws_have_the_same_noise(trainer: Trainer) -> None:
    shape, rows = TableShape(rows=28, context=(8, 12), tasks=8, covariates=(1, 2)), 7
    task = sample_batch(
        jax.random.key(3),
        trainer.config.wide,
        shape,
        trainer.mesh,
        potential_outcomes=True,
        outcome_draws=3,
    )
    draws = np.asarray(ask_both_arms(task, rows).query_draws)
    assert draws.shape == (8, 2, 2 * rows)
    np.testing.assert_array_equal(draws[..., :rows], task.query_draws[..., -rows:])
    np.testing.assert_array_equal(draws[..., rows:], task.other_draws[..., -rows:])
    present = np.asarray(task.valid[:, None] & task.query_mask)[:, -rows:]
    assert (draws[:, 0, :rows] != draws[:, 0, rows:])[present].mean() > 0.5


def test_the_effect_loss_is_of_differences_in_predicted_standard_deviations() -> None:
    error = jnp.array([[0.5, 7.0, 3.0, 0.3, 7.0, 99.0]])
    variance = jnp.array([[0.01, 1.0, 1.0, 0.03, 1.0, 1.0]])
    weight = jnp.array([[1.0, 1.0, 0.0] * 2])
    query_t = jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    scored = Score(jnp.zeros((1, 6)), error, variance, weight, query_t, jnp.ones((1, 1)))
    np.testing.assert_allclose(scored.effect_error, [[0.2, 0.0, -96.0]], rtol=1e-6)
    # The first pair's distributions have a mean variance of 0.02; the second errs alike in both
    # arms; the third is masked. A pair stands for two rows.
    assert float(scored.effect_total) == pytest.approx(2 * 0.5 * 0.2**2 / 0.02)
    # Far out it grows linearly.
    steps = [
        float(dataclasses.replace(scored, error=error.at[0, 0].set(0.3 + by)).effect_total)
        for by in (1.0, 2.0, 3.0)
    ]
    slope = 2 * EFFECT_LIMIT / np.sqrt(0.02)
    np.testing.assert_allclose(np.diff(steps), slope, rtol=1e-4)


def test_the_likelihood_of_several_draws_is_their_mean(trainer: Trainer) -> None:
    shape = TableShape(rows=28, context=(8, 12), tasks=8, covariates=(1, 2))
    task = sample_batch(
        jax.random.key(3), trainer.config.wide, shape, trainer.mesh, outcome_draws=3
    )
    draws = [task.query_y, task.query_draws[:, 0], task.query_draws[:, 1]]
    assert not np.array_equal(draws[0], draws[1])
    model = DoPFN(trainer.config.model, rngs=nnx.Rngs(0))
    model.borders[...] = jnp.linspace(-3.0, 3.0, trainer.config.model.buckets + 1)
    together = nnx.jit(score)(model, task)
    alone = [
        nnx.jit(score)(model, dataclasses.replace(task, query_y=y, query_draws=None)) for y in draws
    ]
    np.testing.assert_allclose(
        together.log_likelihood, np.mean([s.log_likelihood for s in alone], axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        together.error, np.mean([s.error for s in alone], axis=0), rtol=1e-4, atol=1e-5
    )


def test_the_loss_of_average_effects_is_in_standard_errors() -> None:
    # Rows one and two, asked under treatment 1 and 0 first, err by 0.2 and 0.4; three is masked.
    error = jnp.array([[0.3, 0.1, 9.0, 0.1, 0.5, 0.0]])
    query_t = jnp.array([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    weight = jnp.array([[1.0, 1.0, 0.0] * 2])
    variance = jnp.array([[0.5, 0.9, 7.0, 0.7, 1.1, 7.0]])  # 0.8 on average
    scored = Score(jnp.zeros((1, 6)), error, variance, weight, query_t, jnp.array([[0.05]]))
    expected = 2 * 2 * 0.5 * 0.3**2 / (EFFECT_TOLERANCE**2 + 0.8 * 0.05)
    assert float(scored.average_effect_total) == pytest.approx(expected)
    # Errors that cancel are none.
    opposed = dataclasses.replace(scored, error=error.at[0, 1].set(0.7))
    assert float(opposed.average_effect_total) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("tasks", "values", "expected"),
    [(128, 7000, 32), (48, 576, None), (37, 7000, None), (7, 60_000, None), (128, 2**20, None)],
)
def test_groups_fit_the_cache_are_equal_and_never_single_tasks(
    tasks: int, values: int, expected: int | None
) -> None:
    assert _tasks_at_once(tasks, values) == expected


def test_the_noise_of_a_context_is_that_of_its_arms(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    shape, state = trainer.config.training.shapes[0], fresh()
    task = sample_batch(
        jax.random.key(3), trainer.config.prior, shape, trainer.mesh, potential_outcomes=True
    )
    scored = score(nnx.merge(trainer.graphdef, state.params, state.constants), task)
    mask, treated = np.asarray(task.context_mask), np.asarray(task.context_t) > 0.5
    for b in np.flatnonzero(task.valid):
        ones = int((mask[b] & treated[b]).sum())
        expected = 1 / ones + 1 / (int(mask[b].sum()) - ones)
        assert float(scored.per_noise[b, 0]) == pytest.approx(expected)
    np.testing.assert_array_equal(scored.query_t, task.query_t)


@pytest.mark.slow
def test_the_loss_of_effects_is_in_the_gradient_but_not_in_the_log(
    trainer: Trainer, fresh: Callable[..., TrainState]
) -> None:
    shape, found = trainer.config.training.shapes[0], []
    for weight, average in ((1.0, 0.0), (3.0, 0.0), (1.0, 3.0)):
        training = dataclasses.replace(
            trainer.config.training, effect_weight=weight, average_effect_weight=average
        )
        paired = Trainer(dataclasses.replace(trainer.config, training=training), trainer.mesh)
        found.append(paired.step(fresh(), shape)[1])
    before, prior = fresh(), trainer.config.prior
    key = jax.random.fold_in(before.key, 0)
    task = sample_batch(key, prior, shape, trainer.mesh, potential_outcomes=True)
    task = ask_both_arms(task, task.query_t.shape[1] // 2)
    model = nnx.merge(trainer.graphdef, before.params, before.constants)
    loss = float(nnx.jit(score)(model, task).loss)
    assert [float(metrics.loss) for metrics in found] == pytest.approx([loss] * 3, rel=1e-4)
    low, *others = (float(metrics.gradient_norm) for metrics in found)
    assert all(abs(other / low - 1) > 0.01 for other in others)
