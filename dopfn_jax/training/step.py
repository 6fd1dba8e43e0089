"""The fused train step: sample tasks, loss, gradient and update in one jitted function."""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dopfn_jax.config import Config, ConfigError, PriorConfig, TableShape, WidePriorConfig
from dopfn_jax.model.bar_distribution import fit_borders
from dopfn_jax.model.standardise import Scaler
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task, sample_tasks
from dopfn_jax.sharding import MeshError, state_shardings
from dopfn_jax.training.optimizer import Schedule, make_optimizer, make_schedule
from dopfn_jax.training.score import TARGET_LIMIT, Score, ask_both_arms, score
from dopfn_jax.wide.task import sample_wide_tasks

# Streams of the run's key that are not training steps.
_INIT_STREAM, _BORDER_STREAM = 2**31 - 1, 2**31 - 2
_BORDER_TASKS = 1024
# Node values of the tasks that a processor draws at once: 1 MB of float32, about its cache.
_CACHED_VALUES = 2**18
# Held-out tasks are the same for every run of a prior, whatever its seed.
_VALIDATION_SEED = 20_250_606


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to go on; saved whole in every checkpoint.

    Attributes:
        params: trained parameters of the model.
        constants: what the model holds and nobody trains (bucket borders).
        average: exponential moving average of `params`.
        opt_state: the optimiser's state.
        step: () int32, steps taken.
        key: the run's PRNG key; step k draws its tasks from fold_in(key, k).
    """

    params: nnx.State
    constants: nnx.State
    average: nnx.State
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


@flax.struct.dataclass
class Metrics:
    """Scalars of one step, on the device.

    Attributes:
        loss: mean negative log-likelihood of the query rows of valid tasks, in nats of
            standardised y.
        gradient_norm: global norm before clipping.
        learning_rate: of this step.
        masked_tasks: degenerate tasks of the batch, which carried no loss.
        skipped: 1 where loss, gradient or new parameters were not finite and the update was left
            out.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    masked_tasks: jax.Array
    skipped: jax.Array


class Trainer:
    """The compiled functions of one configuration on one mesh; no state of its own.

    Raises:
        MeshError: a number of tasks that the mesh's data axis does not divide.
        ConfigError: effects, or tables of the wide prior, asked of a model of observational
            outcomes.
    """

    def __init__(self, config: Config, mesh: Mesh):
        data, parts = mesh.shape["data"], config.training.accumulate
        for shape in config.training.shapes:
            _require_divisible("shapes", shape.tasks, data, parts)
        _require_divisible("validation", config.training.validation.tasks, data, 1)
        if config.training.effect_weight and config.prior.target == "observational":
            raise ConfigError(
                f"training.effect_weight = {config.training.effect_weight}: an observational model "
                "has no effects; set it to 0, or prior.target to interventional"
            )
        shapes = (*config.training.shapes, config.training.validation)
        if config.prior.target == "observational" and any(shape.wide for shape in shapes):
            raise ConfigError(
                "prior.target = 'observational': the wide prior asks for interventional outcomes "
                "only; leave `covariates` out of all training.shapes and training.validation"
            )
        self.config, self.mesh = config, mesh
        self._optimizer = make_optimizer(config.training)
        abstract_model = nnx.eval_shape(lambda: DoPFN(config.model, rngs=nnx.Rngs(0)))
        self.graphdef = nnx.graphdef(abstract_model)
        abstract_state = jax.eval_shape(
            self._init, jax.ShapeDtypeStruct((config.model.buckets + 1,), jnp.float32)
        )
        self.shardings = state_shardings(abstract_state, mesh, config.model.heads)
        self.abstract_state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract_state,
            self.shardings,
        )
        self._gathered = jax.tree.map(_without_data_axis, self.shardings.params)
        # What every process can read; not only its own shards.
        self._replicated = NamedSharding(mesh, P())
        self._schedule = jax.device_put(make_schedule(config.training), self._replicated)
        self._steps: dict[TableShape, Any] = {}
        self._validate = jax.jit(self._validation_metrics, out_shardings=self._replicated)

    def init(self, borders: jax.Array | None = None) -> TrainState:
        """A fresh state, created already sharded.

        Args:
            borders: (Q + 1,) bucket borders; by default fitted to outcomes drawn from the prior.
        """
        with jax.set_mesh(self.mesh):
            borders = self._fit_borders() if borders is None else borders
            return jax.jit(self._init, out_shardings=self.shardings)(borders)

    def with_weights(self, model: DoPFN) -> TrainState:
        """A fresh state with a model's weights and bucket borders.

        A tilt that the model lacks starts at zero, where it changes no answer.
        """
        state = self.init(model.borders[...])
        own = dict(nnx.to_flat_state(jax.tree.map(np.asarray, nnx.state(model, nnx.Param))))
        # Copies, because the state is donated and the model is the caller's.
        copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=self.shardings.params)

        def filled(fresh: nnx.State) -> nnx.State:
            flat = nnx.to_flat_state(fresh)
            return copy(nnx.from_flat_state([(path, own.get(path, leaf)) for path, leaf in flat]))

        return dataclasses.replace(
            state, params=filled(state.params), average=filled(state.average)
        )

    def step(self, state: TrainState, shape: TableShape) -> tuple[TrainState, Metrics]:
        """One update on a fresh batch; the given state is donated. Compiles once per shape."""
        if shape not in self._steps:
            self._steps[shape] = self._jitted_step(shape)
        with jax.set_mesh(self.mesh):
            return self._steps[shape](state, self._schedule)

    def lower_step(self, shape: TableShape) -> jax.stages.Lowered:
        """The step's program, from shapes alone: to compile and to look at."""
        with jax.set_mesh(self.mesh):
            return self._jitted_step(shape).lower(self.abstract_state, self._schedule)

    def _jitted_step(self, shape: TableShape) -> Any:
        return jax.jit(
            partial(self._train_step, shape),
            donate_argnums=0,
            out_shardings=(self.shardings, self._replicated),
        )

    def validate(self, state: TrainState) -> dict[str, jax.Array]:
        """Mean loss and errors on fixed held-out tasks, by the averaged weights.

        Of standardised y, the average effect's loss in squared standard errors.
        """
        with jax.set_mesh(self.mesh):
            return self._validate(state)

    def model(self, state: TrainState) -> DoPFN:
        """The model with the averaged weights, split over the mesh as they are."""
        return nnx.merge(self.graphdef, state.average, state.constants)

    def whole_model(self, state: TrainState) -> DoPFN:
        """The same on this process's first device: the one to evaluate and to export.

        With several processes, all of them have to call it.
        """
        weights = multihost_utils.process_allgather((state.average, state.constants), tiled=True)
        return nnx.merge(self.graphdef, *jax.tree.map(jnp.asarray, weights))

    def _fit_borders(self) -> jax.Array:
        config, data = self.config, self.mesh.shape["data"]
        # As many as the mesh can split; the surplus is cut off, so that no mesh sees others.
        tasks = -(-_BORDER_TASKS // data) * data
        kinds = [shape.covariates for shape in config.training.shapes]
        # Of the paper's prior, unless the run never draws from it.
        covariates = (0, 0) if (0, 0) in kinds else kinds[0]
        shape = TableShape(rows=256, context=(128, 128), tasks=tasks, covariates=covariates)

        @partial(jax.jit, out_shardings=self._replicated)
        def targets(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            task = sample_batch(key, config.prior_of(shape), shape, self.mesh)
            scaler = Scaler.fit(task.context_x, task.context_y, task.context_mask)
            return scaler.outcome(task.query_y), task.query_mask & task.valid[:, None]

        key = jax.random.fold_in(jax.random.key(config.training.seed), _BORDER_STREAM)
        y, present = (np.asarray(array) for array in targets(key))
        y = y[:_BORDER_TASKS][present[:_BORDER_TASKS]]
        y = np.clip(y, -TARGET_LIMIT, TARGET_LIMIT)
        return fit_borders(y, config.model.buckets, config.model.uniform_border_share)

    def _init(self, borders: jax.Array) -> TrainState:
        key = jax.random.key(self.config.training.seed)
        model = DoPFN(self.config.model, rngs=nnx.Rngs(jax.random.fold_in(key, _INIT_STREAM)))
        model.borders[...] = borders
        params, constants = nnx.state(model, nnx.Param, ...)
        return TrainState(
            params=params,
            constants=constants,
            average=jax.tree.map(jnp.copy, params),
            opt_state=self._optimizer.init(params),
            step=jnp.int32(0),
            key=key,
        )

    def _train_step(
        self, shape: TableShape, state: TrainState, schedule: Schedule
    ) -> tuple[TrainState, Metrics]:
        config = self.config.training
        # Of the run's step: the optimiser's own count stands still where an update is skipped.
        optimizer = make_optimizer(config, lambda _: schedule(state.step))
        sums = self._sums(shape, state)
        rows = jnp.maximum(sums.rows, 1.0)
        loss = sums.loss / rows
        gradient = jax.tree.map(lambda g: g / rows, sums.gradient)
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # At first the average forgets faster than its decay says: early evaluations are not stale.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(params, state.average, 1.0 - decay)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        params, average, opt_state = jax.tree.map(
            partial(jnp.where, finite),
            (params, average, opt_state),
            (state.params, state.average, state.opt_state),
        )
        metrics = Metrics(
            loss=loss,
            gradient_norm=norm,
            learning_rate=schedule(state.step),
            masked_tasks=sums.masked_tasks,
            skipped=(~finite).astype(jnp.int32),
        )
        state = dataclasses.replace(
            state, params=params, average=average, opt_state=opt_state, step=state.step + 1
        )
        return state, metrics

    def _sums(self, shape: TableShape, state: TrainState) -> "_Sums":
        """Loss and gradient of a whole batch, computed in `accumulate` parts one after another."""
        key, parts = jax.random.fold_in(state.key, state.step), self.config.training.accumulate
        part = dataclasses.replace(shape, tasks=shape.tasks // parts)

        def of_part(first: jax.Array | int) -> _Sums:
            training, prior = self.config.training, self.config.prior_of(part)
            both, draws = training.effect_weight > 0, training.outcome_draws
            task = sample_batch(key, prior, part, self.mesh, first, both, draws)
            if both:
                task = ask_both_arms(task, task.query_t.shape[1] // 2)

            def loss_of(params: nnx.State) -> tuple[jax.Array, Score]:
                # Left to itself, the compiler would rather gather activations, which are larger.
                params = jax.lax.with_sharding_constraint(params, self._gathered)
                scored = score(nnx.merge(self.graphdef, params, state.constants), task)
                total = scored.total
                if both:
                    total += training.effect_weight * scored.effect_total
                if training.average_effect_weight:
                    total += training.average_effect_weight * scored.average_effect_total
                return total, scored

            (_, scored), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            gradient = jax.lax.with_sharding_constraint(gradient, self.shardings.params)
            return _Sums(scored.total, scored.weight.sum(), (~task.valid).sum(), gradient)

        if parts == 1:
            return of_part(0)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, 0))
        sums, _ = jax.lax.scan(
            lambda sums, first: (jax.tree.map(jnp.add, sums, of_part(first)), None),
            zeros,
            part.tasks * jnp.arange(parts),
        )
        return sums

    def _validation_metrics(self, state: TrainState) -> dict[str, jax.Array]:
        shape = self.config.training.validation
        metrics = self._held_out(state, shape, "validation")
        most = max(shape.covariates[1] for shape in self.config.training.shapes)
        if most and not shape.wide:
            wide = dataclasses.replace(shape, covariates=(1, most))
            metrics |= self._held_out(state, wide, "wide_validation")
        return metrics

    def _held_out(self, state: TrainState, shape: TableShape, name: str) -> dict[str, jax.Array]:
        key, prior = jax.random.key(_VALIDATION_SEED), self.config.prior_of(shape)
        observational = isinstance(prior, PriorConfig) and prior.target == "observational"
        task = sample_batch(key, prior, shape, self.mesh, potential_outcomes=not observational)
        rows = task.query_t.shape[1]
        scored = score(self.model(state), task if observational else ask_both_arms(task, rows))

        def median(errors: jax.Array) -> jax.Array:
            weight = scored.weight[:, :rows]
            by_task = (errors * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
            return jnp.nanmedian(jnp.where(task.valid, by_task, jnp.nan))

        asked = jax.tree.map(lambda values: values[:, :rows], scored)
        metrics = {
            f"{name}_loss": asked.loss,
            f"{name}_median_mse": median(jnp.square(asked.error)),
        }
        if not observational:
            metrics[f"{name}_median_effect_mse"] = median(jnp.square(scored.effect_error))
            asked_rows = jnp.maximum(asked.weight.sum(), 1.0)
            metrics[f"{name}_average_effect_loss"] = scored.average_effect_total / asked_rows
        return metrics


@flax.struct.dataclass
class _Sums:
    """Sums over the query rows of a batch: of the loss (), the rows (), masked tasks, gradient."""

    loss: jax.Array
    rows: jax.Array
    masked_tasks: jax.Array
    gradient: nnx.State


def _without_data_axis(sharding: NamedSharding) -> NamedSharding:
    spec = [None if axis == "data" else axis for axis in sharding.spec]
    return NamedSharding(sharding.mesh, P(*spec))


def _require_divisible(name: str, tasks: int, data: int, parts: int) -> None:
    if tasks % (data * parts):
        accumulate = f" times training.accumulate = {parts}" if parts > 1 else ""
        raise MeshError(
            f"training.{name} has {tasks} tasks, which a data axis of {data} devices{accumulate} "
            "does not divide: give it a multiple, or choose another --mesh"
        )


def sample_batch(
    key: jax.Array,
    prior: PriorConfig | WidePriorConfig,
    shape: TableShape,
    mesh: Mesh,
    first: jax.Array | int = 0,
    potential_outcomes: bool = False,
    outcome_draws: int = 1,
) -> Task:
    """Tasks `first`, `first` + 1, ... of a batch, split over the mesh's data axis.

    They are sampled where they are used. Task i depends on (key, i) alone, so the data is the same
    on any mesh, in any number of processes, and in however many parts a batch is taken: bitwise for
    the paper's prior, up to rounding for the wide one.
    Inside `shard_map` the rejection loops of random samplers stay local to each device. Only the
    wide prior has more than one of `outcome_draws`.
    """
    local = shape.tasks // mesh.shape["data"]
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def sample_local(key: jax.Array, first: jax.Array) -> Task:
        index = first + jax.lax.axis_index("data") * local + jnp.arange(local)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        rows, context = shape.rows, shape.context
        if isinstance(prior, WidePriorConfig):
            return sample_wide_tasks(
                keys, prior, rows, context, shape.covariates, potential_outcomes, outcome_draws
            )
        at_once = _tasks_at_once(local, prior.nodes * rows) if on_cpu else None
        return sample_tasks(keys, prior, rows, context, potential_outcomes, at_once)

    sample = jax.shard_map(sample_local, mesh=mesh, in_specs=P(), out_specs=P("data"))
    return jax.jit(sample)(key, jnp.asarray(first))


def _tasks_at_once(tasks: int, values: int) -> int | None:
    """Into groups of how many to part tasks of so many node values each; None for a single group.

    All groups are equal, and none is of one task, whose rounding is another one.
    """
    most = _CACHED_VALUES // values
    groups = (size for size in range(2, most + 1) if tasks % size == 0)
    return None if tasks <= most else max(groups, default=None)


def shape_of_step(shapes: tuple[TableShape, ...], seed: int, step: int) -> TableShape:
    """The shape of step k: a draw by weight that depends on (seed, k) alone."""
    weights = np.array([shape.weight * (shape.first_step <= step) for shape in shapes])
    draw = np.random.default_rng((seed, step)).random()
    return shapes[int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], draw, side="right"))]
