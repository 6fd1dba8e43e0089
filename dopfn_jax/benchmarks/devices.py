"""What more devices change: nothing in the result, and how much in the time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dopfn_jax.benchmarks.timing import Contender, Measurement, Spread, race, rates
from dopfn_jax.benchmarks.training import with_one_shape
from dopfn_jax.config import Config, TableShape
from dopfn_jax.sharding import make_mesh, parse_mesh
from dopfn_jax.training.step import Metrics, Trainer

# Steps whose losses are compared between meshes.
_COMPARED_STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """A preset, which of its shapes, and meshes, of which those that the devices allow are tried.

    The first mesh is what the others are compared with.
    """

    config: str
    shape: int
    meshes: tuple[str, ...]

    @property
    def devices(self) -> int:
        """How many the largest mesh has."""
        return max(int(np.prod(parse_mesh(mesh))) for mesh in self.meshes)


FULL = Sizes("cpu", shape=2, meshes=("1", "2", "4", "8", "4x2"))
QUICK = SMALLEST = Sizes("smoke", shape=0, meshes=("1", "2"))


def measure(sizes: Sizes, repetitions: int) -> Iterator[Measurement]:
    """Steps on the same batches over more and more devices.

    Simulated devices share one processor: what they lose against a single one is overhead.
    """
    config, available = Config.load(sizes.config), len(jax.devices())
    shape = config.training.shapes[sizes.shape]
    meshes = [mesh for mesh in sizes.meshes if np.prod(parse_mesh(mesh)) <= available]
    platform = jax.devices()[0].platform
    setting = {
        "devices": "simulated on the CPU" if platform == "cpu" else platform,
        "config": sizes.config,
        "rows": shape.rows,
        "tasks": shape.tasks,
    }
    steps = {mesh: _steps(config, shape, mesh) for mesh in meshes}
    losses = {
        mesh: np.array([float(step().loss) for _ in range(_COMPARED_STEPS)])
        for mesh, step in steps.items()
    }
    contenders = [Contender(f"mesh {mesh}", step, shape.tasks) for mesh, step in steps.items()]
    laps = race(contenders, repetitions)
    yield from rates("devices", setting, laps, {"tasks": 1.0})
    for mesh in meshes[1:]:
        difference = np.abs(losses[mesh] / losses[meshes[0]] - 1).max()
        yield Measurement(
            "devices",
            setting,
            f"mesh {mesh}",
            "loss",
            "largest relative difference",
            Spread.exactly(difference),
            _COMPARED_STEPS,
        )


def _steps(config: Config, shape: TableShape, mesh: str) -> Callable[[], Metrics]:
    trainer = Trainer(with_one_shape(config, shape), make_mesh(parse_mesh(mesh)))
    state = trainer.init(jnp.linspace(-3, 3, config.model.buckets + 1))

    def run() -> Metrics:
        nonlocal state
        state, metrics = trainer.step(state, shape)
        return metrics

    return run
