"""How fast the fused step trains, where its time goes, and what it is faster than."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dopfn_jax.benchmarks import numpy_prior
from dopfn_jax.benchmarks.timing import Absent, Contender, Laps, Measurement, Spread, race, rates
from dopfn_jax.config import Config, TableShape
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training import step as step_module
from dopfn_jax.training.flops import measured_peak, model_flops
from dopfn_jax.training.score import answer, score
from dopfn_jax.training.step import Metrics, Trainer, TrainState

FUSED, AS_CONFIGURED = "dopfn_jax, fused", "dopfn_jax, fused, as configured"
CONSTANT, UNFUSED = "dopfn_jax, constant batch", "dopfn_jax, NumPy prior on the host"
PEER = "PyTorch, constant batch"
PARTS = ("prior", "forward", "backward", "update")
# Passes of the same network on the same batch, of which the time split is made.
_FORWARD, _GRADIENT = "forward", "forward and backward"
# Largest difference of logits between the two frameworks.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """What to train.

    Attributes:
        config: a preset.
        shapes: which of its shapes.
        as_configured: whether the preset's own optimiser and inputs take part too.
        overrides: changes to the preset.
    """

    config: str
    shapes: tuple[int, ...]
    as_configured: bool
    overrides: tuple[str, ...] = ()


FULL = Sizes("cpu", shapes=(3, 6), as_configured=True)
QUICK = Sizes("cpu", shapes=(3,), as_configured=False)
SMALLEST = Sizes("smoke", shapes=(0,), as_configured=False)


def measure(sizes: Sizes, repetitions: int) -> Iterator[Measurement | Absent]:
    """Throughput, utilisation and time split for every shape.

    Everybody updates with AdamW and leaves out the regressions of `linear_fit`, which the peer does
    not know; one more contender shows what the preset's own choice costs.
    """
    config = Config.load(sizes.config, sizes.overrides)
    mesh = make_mesh()
    peak = measured_peak(config, mesh)
    for index in sizes.shapes:
        shape = config.training.shapes[index]
        bench = _Bench(_comparable(config), shape, mesh)
        contenders = bench.contenders()
        absent = _why_no_peer(config)
        if absent:
            yield Absent("PyTorch", absent)
        else:
            contenders.append(bench.peer())
        if sizes.as_configured:
            step = _Bench(config, shape, mesh).fused_step()
            contenders.append(Contender(AS_CONFIGURED, step, shape.tasks))
        laps = race(contenders, repetitions)
        # Whoever disturbs the machine may have done so during the first look at its peak.
        peak = max(peak, measured_peak(config, mesh))
        low, high = shape.context
        setting = {
            "config": sizes.config,
            "rows": shape.rows,
            "context": f"{low} to {high}",
            "tasks": shape.tasks,
        }
        whole = {name: own for name, own in laps.items() if name not in (_FORWARD, _GRADIENT)}
        quantities = {"tasks": 1.0, "rows": float(shape.rows)}
        yield from rates("training", setting, whole, quantities)
        yield from _utilisation(setting, whole, model_flops(config, shape) / shape.tasks, peak)
        yield from _time_split(setting, laps, shape.tasks)


def with_one_shape(config: Config, shape: TableShape) -> Config:
    """The config with this shape alone, from the first step on, and no accumulation."""
    shape = dataclasses.replace(shape, first_step=0)
    training = dataclasses.replace(config.training, shapes=(shape,), validation=shape, accumulate=1)
    return dataclasses.replace(config, training=training)


def _comparable(config: Config) -> Config:
    """With what the peer has too."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, linear_fit=False, linear_tilt=False),
        training=dataclasses.replace(config.training, optimizer="adamw"),
    )


def _why_no_peer(config: Config) -> str:
    if importlib.util.find_spec("torch") is None:
        return "not installed (extra `benchmark`)"
    import torch

    if torch.cuda.is_available() != (jax.default_backend() == "gpu"):
        return "would run on another kind of device: install both for the same"
    if config.model.compute_dtype != "float32":
        return "races in float32 only: add model.compute_dtype=float32"
    return ""


class _Bench:
    """One configuration with one shape: its compiled steps, and a batch that stays the same."""

    def __init__(self, config: Config, shape: TableShape, mesh: Mesh):
        self._config = with_one_shape(config, shape)
        (self._shape,), self._mesh = self._config.training.shapes, mesh
        self._trainer = Trainer(self._config, mesh)
        self._first = self._trainer.init(jnp.linspace(-3, 3, config.model.buckets + 1))

    def contenders(self) -> list[Contender]:
        """The fused step, its variants, and passes without an update."""
        prior, state, tasks = self._config.prior, self._first, self._shape.tasks
        generator = np.random.default_rng(0)

        def host_batch() -> Task:
            task = numpy_prior.sample_tasks(generator, prior, self._shape)
            return jax.device_put(task, NamedSharding(self._mesh, P("data")))

        batch = host_batch()
        constant = self._constant_step(batch)

        def unfused() -> Metrics:
            jax.block_until_ready(host_batch())
            return constant()  # on its own batch: as much work as on this one

        def loss(params: nnx.State, task: Task) -> jax.Array:
            return score(nnx.merge(self._trainer.graphdef, params, state.constants), task).loss

        forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
        return [
            Contender(FUSED, self.fused_step(), tasks),
            Contender(CONSTANT, constant, tasks),
            Contender(UNFUSED, unfused, tasks),
            Contender(_FORWARD, lambda: forward(state.params, batch), tasks),
            Contender(_GRADIENT, lambda: gradient(state.params, batch), tasks),
        ]

    def fused_step(self) -> Callable[[], Metrics]:
        """The step as `train.py` takes it, on fresh tasks every time."""
        return self._steps(self._trainer)

    def peer(self) -> Contender:
        """PyTorch on a constant batch of its own device, after a check that it computes the same.

        Raises:
            RuntimeError: its logits differ from ours.
        """
        import torch

        from dopfn_jax.benchmarks.torch_model import Trainer as TorchTrainer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = nnx.merge(self._trainer.graphdef, self._first.params, self._first.constants)
        flat = nnx.to_flat_state(nnx.state(model))
        weights = {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}
        peer = TorchTrainer(self._config, weights, device)
        task = numpy_prior.sample_tasks(np.random.default_rng(1), self._config.prior, self._shape)
        batch = peer.load(task)
        with torch.no_grad(), jax.default_matmul_precision("highest"):
            theirs, ours = peer.model(batch)[0].cpu().numpy(), np.asarray(logits_of(model, task))
        difference = np.abs(ours - theirs).max()
        if not difference < TOLERANCE:
            raise RuntimeError(
                f"PyTorch's logits differ by {difference:.2g} from ours, more than {TOLERANCE}: "
                "the two networks are not the same, and there is nothing to compare"
            )
        if device == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as JAX does by default
        return Contender(PEER, lambda: peer.step(batch), self._shape.tasks)

    def _constant_step(self, batch: Task) -> Callable[[], Metrics]:
        """The very step of `Trainer`, with a constant in the place of the sampled batch."""
        # The barrier keeps the compiler from computing on a constant ahead of time.
        constant = mock.patch.object(
            step_module, "sample_batch", lambda *_: jax.lax.optimization_barrier(batch)
        )
        step = self._steps(Trainer(self._config, self._mesh))
        with constant:
            step()  # Traces; later calls run the program that was made of it.
        return step

    def _steps(self, trainer: Trainer) -> Callable[[], Metrics]:
        """Steps one after another, from the first state on."""
        state = _copy(self._first)  # A step deletes the state that it is given.

        def run() -> Metrics:
            nonlocal state
            state, metrics = trainer.step(state, self._shape)
            return metrics

        return run


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def logits_of(model: DoPFN, task: Task) -> jax.Array:
    """(B, M, Q) of the queries of a batch."""
    return answer(model, task)[0]


def _utilisation(
    setting: dict[str, Any], laps: dict[str, Laps], flops: float, peak: float
) -> Iterator[Measurement]:
    """FLOP/s of the model, and as a share of the measured peak of a matrix product."""
    yield Measurement(
        "training", setting, "matrix product", "peak", "GFLOP/s", Spread.exactly(peak / 1e9)
    )
    for name, own in laps.items():
        speed = flops / own.wall
        for unit, values in (("GFLOP/s", speed / 1e9), ("% of peak", 100 * speed / peak)):
            yield Measurement(
                "training", setting, name, "model FLOPs", unit, Spread.of(values), len(speed)
            )


def _time_split(
    setting: dict[str, Any], laps: dict[str, Laps], tasks: int
) -> Iterator[Measurement]:
    """Milliseconds and shares of the fused step's parts, by differences of laps in turns."""
    whole, constant = laps[FUSED].wall, laps[CONSTANT].wall
    forward, gradient = laps[_FORWARD].wall, laps[_GRADIENT].wall
    seconds_of = (whole - constant, forward, gradient - forward, constant - gradient)
    for name, seconds in zip(PARTS, seconds_of, strict=True):
        for unit, values in (("ms", 1e3 * tasks * seconds), ("% of step", 100 * seconds / whole)):
            yield Measurement("training", setting, FUSED, name, unit, Spread.of(values), len(whole))
