"""The training loop: steps, progress, metrics, checkpoints; stops at any moment and resumes exactly."""

import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from dopfn_jax.checkpoints import RUN_WEIGHTS, Checkpoint, CheckpointError, save_checkpoint
from dopfn_jax.config import Config
from dopfn_jax.training.run_directory import MetricsLog, RunDirectory
from dopfn_jax.training.step import Metrics, Trainer, TrainState, shape_of_step

# A run whose gradients are not finite for this many steps in a row will not recover.
MOST_SKIPPED_IN_A_ROW = 50


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the steps and the remedy."""


def train(
    config: Config,
    workdir: str | Path,
    mesh: Mesh,
    *,
    resume: bool = False,
    init_from: Checkpoint | None = None,
    stop_after: int | None = None,
) -> TrainState:
    """Trains to step `config.training.steps`, or to `stop_after` if that is earlier, and returns the last state.

    Writes to `workdir`: `metrics.jsonl`, TensorBoard events, `config.json`, `checkpoints/` (the whole state) and
    `weights/` (the averaged weights, for `from_pretrained`). SIGTERM and Ctrl-C finish the step and save first.

    Args:
        config: the run.
        workdir: its folder; a new one unless `resume`.
        mesh: devices to train on.
        resume: go on from the last checkpoint of `workdir`, or start if there is none.
        init_from: weights to start a new run from.
        stop_after: stop at this step without changing the schedule.

    Raises:
        RunDirectoryError: the folder holds another run, or is in use.
        CheckpointError: a checkpoint cannot be read, or `init_from` is another model.
        TrainingError: the gradient stayed non-finite.
    """
    trainer = Trainer(config, mesh)
    directory = RunDirectory(workdir, config, resume)
    try:
        if directory.latest_step() is not None:
            state = directory.restore(trainer.abstract_state)
        elif init_from is not None:
            state = _with_weights(trainer, trainer.init(), init_from)
        else:
            state = trainer.init()
        start = int(state.step)
        stop = min(config.training.steps, stop_after or config.training.steps)
        if start >= stop:
            return state
        log = directory.open_log(start)
        try:
            return _run(trainer, directory, log, state, start, stop)
        finally:
            log.close()
    finally:
        directory.close()


def _run(
    trainer: Trainer, directory: RunDirectory, log: MetricsLog, state: TrainState, start: int, stop: int
) -> TrainState:
    config = trainer.config.training

    def save(step: int) -> None:
        directory.save(step, state)
        save_checkpoint(directory.folder / RUN_WEIGHTS, trainer.model(state), trainer.config, step)

    window = _Window(config.steps, start)
    last_save = time.monotonic()
    pending: tuple[int, int, Metrics] | None = None
    with _stop_signals() as stopping, tqdm(total=config.steps, initial=start, unit="step", smoothing=0.02) as bar:
        for step in range(start, stop):
            shape = shape_of_step(config.shapes, config.seed, step)
            with jax.transfer_guard("disallow"):
                state, metrics = trainer.step(state, shape)
            # Reading the step before keeps the device busy: this one is already on its way.
            if pending:
                window.add(*pending)
            pending = (step + 1, shape.tasks, metrics)
            bar.update()

            done = step + 1
            last = done == stop or bool(stopping)
            validate = last or (config.validate_every and done % config.validate_every == 0)
            if last or validate or done % config.log_every == 0:
                window.add(*pending)
                pending = None
                line = window.flush()
                if validate:
                    line |= {name: float(value) for name, value in jax.device_get(trainer.validate(state)).items()}
                    window.restart_clock()
                log.write(line)
                bar.set_postfix(
                    loss=f"{line['mean_loss']:.3f}",
                    tasks_per_s=f"{line['tasks_per_second']:.0f}",
                    masked=window.masked_tasks,
                    refresh=False,
                )
            if last or time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                save(done)
                last_save = time.monotonic()
                window.restart_clock()
            if stopping:
                break
    return state


class _Window:
    """Metrics of the steps since the last logged line."""

    def __init__(self, steps: int, start: int):
        self.masked_tasks = 0
        self._skipped_in_a_row = 0
        self._clear()

    def add(self, step: int, tasks: int, metrics: Metrics) -> None:
        """Fetches one step's metrics. Raises TrainingError after too many skipped updates in a row."""
        values = {name: np.asarray(v).item() for name, v in dataclasses.asdict(jax.device_get(metrics)).items()}
        self._last = {"step": step, **values}
        self._losses.append(values["loss"])
        self._tasks += tasks
        self._masked += values["masked_tasks"]
        self._skipped += values["skipped"]
        self.masked_tasks += values["masked_tasks"]
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"steps {step - MOST_SKIPPED_IN_A_ROW + 1} to {step}: the gradient was never finite; resume from the "
                "last checkpoint with a lower training.learning_rate"
            )

    def flush(self) -> dict[str, float]:
        """The line to log: the last step's values, and sums and means over the window."""
        line = self._last | {
            "mean_loss": float(np.mean(self._losses)),
            "masked_tasks": self._masked,
            "skipped": self._skipped,
            "tasks_per_second": self._tasks / (time.monotonic() - self._clock),
        }
        self._clear()
        return line

    def restart_clock(self) -> None:
        """Leaves validation and saving out of the rate."""
        self._clock = time.monotonic()

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._tasks = self._masked = self._skipped = 0
        self._clock = time.monotonic()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list that it yields; a second Ctrl-C interrupts as usual."""
    received: list[int] = []
    before: dict[int, object] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])  # type: ignore[arg-type]

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)  # type: ignore[arg-type]


def _with_weights(trainer: Trainer, state: TrainState, checkpoint: Checkpoint) -> TrainState:
    """`state` with the checkpoint's weights and borders, on the state's own shardings."""
    if checkpoint.config.model != trainer.config.model:
        raise CheckpointError(
            f"--init-from {checkpoint.name}: its model is {checkpoint.config.model}, this run's is "
            f"{trainer.config.model}; use the same model.* values"
        )
    _, params, constants = nnx.split(checkpoint.model, nnx.Param, ...)
    shardings = trainer.shardings
    return dataclasses.replace(
        state,
        params=jax.device_put(jax.tree.map(jnp.copy, params), shardings.params),
        average=jax.device_put(jax.tree.map(jnp.copy, params), shardings.average),
        constants=jax.device_put(jax.tree.map(jnp.copy, constants), shardings.constants),
    )
