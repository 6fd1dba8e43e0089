"""The training loop: steps, progress, metrics, checkpoints; stops any time, resumes exactly."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
    """Trains to step `config.training.steps`, or to `stop_after` if that is earlier.

    Writes to `workdir`: `metrics.jsonl`, TensorBoard events, `config.json`, `checkpoints/` (the
    whole state) and `weights/` (the averaged weights, for `from_pretrained`). SIGTERM and Ctrl-C
    finish the step and save first. On the same mesh, a run that stopped and resumed ends in the
    same state, bit by bit, as one that did not.

    Args:
        config: the run.
        workdir: its folder; a new one unless `resume`.
        mesh: devices to train on.
        resume: go on from the last checkpoint of `workdir`, or start if there is none.
        init_from: weights to start a new run from.
        stop_after: stop at this step without changing the schedule.

    Returns:
        The last state.

    Raises:
        MeshError: the mesh does not divide the tasks of a batch.
        RunDirectoryError: the folder holds another run, or is in use.
        CheckpointError: a checkpoint cannot be read or written, or `init_from` is another model.
        TrainingError: the gradient stayed non-finite.
    """
    trainer = Trainer(config, mesh)
    if init_from is not None:
        _require_same_model(init_from, config)
    stop = min(config.training.steps, stop_after or config.training.steps)
    with _stop_signals() as stopping, closing(RunDirectory(workdir, config, resume)) as directory:
        if directory.latest_step() is not None:
            state = directory.restore(trainer.abstract_state)
        elif init_from is not None:
            state = _with_weights(trainer, init_from)
        else:
            state = trainer.init()
        start = int(state.step)
        if start < stop and not stopping:
            with closing(directory.open_log(start)) as log:
                return _run(trainer, directory, log, state, start, stop, stopping)
        if start:
            # A run killed between its two kinds of saving has older weights than checkpoints.
            _export(trainer, directory, state, start)
        return state


def _run(
    trainer: Trainer,
    directory: RunDirectory,
    log: MetricsLog,
    state: TrainState,
    start: int,
    stop: int,
    stopping: list[int],
) -> TrainState:
    config = trainer.config.training
    window = _Window()
    last_save = time.monotonic()
    pending: tuple[int, int, Metrics] | None = None
    # Silent where nobody watches: a log file gets the metrics, not the bar.
    bar = tqdm(
        total=config.steps, initial=start, unit="step", smoothing=0.02, mininterval=1, disable=None
    )
    with bar:
        for step in range(start, stop):
            shape = shape_of_step(config.shapes, config.seed, step)
            with jax.transfer_guard("disallow"):
                state, metrics = trainer.step(state, shape)
            # Reading the step before keeps the device busy: this one is already on its way.
            if pending:
                window.add(*pending)
            done = step + 1
            pending = (done, shape.tasks, metrics)
            bar.update()

            last = done == stop or bool(stopping)
            validate = done == stop or bool(
                config.validate_every and done % config.validate_every == 0
            )
            if last or validate or done % config.log_every == 0:
                window.add(*pending)
                pending = None
                line = window.flush()
                if validate:
                    values = jax.device_get(trainer.validate(state))
                    line |= {name: float(value) for name, value in values.items()}
                    window.restart_clock()
                log.write(line)
                bar.set_postfix(
                    loss=f"{line['mean_loss']:.3f}",
                    tasks_per_s=f"{line['tasks_per_second']:.0f}",
                    masked=window.masked_tasks,
                    refresh=False,
                )
            if last or time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                directory.save(done, state)
                _export(trainer, directory, state, done)
                last_save = time.monotonic()
                window.restart_clock()
            if last:
                break
    return state


def _export(trainer: Trainer, directory: RunDirectory, state: TrainState, step: int) -> None:
    save_checkpoint(directory.folder / RUN_WEIGHTS, trainer.model(state), trainer.config, step)


class _Window:
    """Metrics of the steps since the last logged line."""

    def __init__(self) -> None:
        self.masked_tasks = 0
        self._skipped_in_a_row = 0
        self._clear()

    def add(self, step: int, tasks: int, metrics: Metrics) -> None:
        """Fetches one step's metrics. Raises TrainingError after too many skips in a row."""
        values = {
            name: np.asarray(value).item()
            for name, value in dataclasses.asdict(jax.device_get(metrics)).items()
        }
        self._last = {"step": step, **values}
        self._losses.append(values["loss"])
        self._tasks += tasks
        self._masked += values["masked_tasks"]
        self._skipped += values["skipped"]
        self.masked_tasks += values["masked_tasks"]
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"steps {step - MOST_SKIPPED_IN_A_ROW + 1} to {step}: the gradient was never "
                "finite; start a new run with a lower training.learning_rate, from this one's "
                "weights with --init-from if they are good"
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
    """Collects SIGINT and SIGTERM in the list that it yields; a second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only it can handle signals
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])
        # A handler may interrupt a print, so it must not call one.
        os.write(2, b"\nStopping after this step; the same signal again stops at once.\n")

    for number in before:
        signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _require_same_model(checkpoint: Checkpoint, config: Config) -> None:
    theirs, ours = (dataclasses.asdict(c.model) for c in (checkpoint.config, config))
    # How the layers are computed is free to change; what they are is not.
    fields = [name for name in ours if name not in ("compute_dtype", "remat")]
    changed = [
        f"model.{name}: {theirs[name]} -> {ours[name]}"
        for name in fields
        if theirs[name] != ours[name]
    ]
    if changed:
        raise CheckpointError(
            f"--init-from {checkpoint.name}: it holds another model ({'; '.join(changed)}); use "
            "the same model.* values"
        )


def _with_weights(trainer: Trainer, checkpoint: Checkpoint) -> TrainState:
    """A fresh state with the checkpoint's weights and bucket borders."""
    state = trainer.init(checkpoint.model.borders[...])
    params = nnx.state(checkpoint.model, nnx.Param)
    # Copies, because the state is donated and the checkpoint is the caller's.
    return dataclasses.replace(
        state,
        params=jax.device_put(jax.tree.map(jnp.copy, params), trainer.shardings.params),
        average=jax.device_put(jax.tree.map(jnp.copy, params), trainer.shardings.average),
    )
