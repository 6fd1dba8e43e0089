"""The training loop: steps, progress, metrics, checkpoints; stops any time, resumes exactly."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dopfn_jax.checkpoints import (
    RUN_WEIGHTS,
    Checkpoint,
    CheckpointError,
    recorded,
    save_checkpoint,
)
from dopfn_jax.config import Config, TableShape, TrainingConfig
from dopfn_jax.training.flops import model_flops
from dopfn_jax.training.processes import Agreement, Wish, any_process, is_first_process
from dopfn_jax.training.run_directory import MetricsLog, RunDirectory
from dopfn_jax.training.step import Metrics, Trainer, TrainState, shape_of_step

# A run whose gradients are not finite for this many steps in a row will not recover.
MOST_SKIPPED_IN_A_ROW = 50
# Steps that a profile shows; enough to see that they are alike.
PROFILED_STEPS = 3


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the steps and the remedy."""


@dataclasses.dataclass(frozen=True)
class Observers:
    """What a run does besides training, none of which changes the training.

    Attributes:
        evaluate: gets the averaged weights, and returns numbers for the log by name. Called on the
            first process, which the others wait for.
        evaluate_every: steps between its calls; the last step is always one.
        peak: FLOP/s of all devices of the mesh, for the logged utilisation; None leaves it out.
        profile: write a `jax.profiler` trace of a few steps to `profile/`.
    """

    evaluate: Callable[[Checkpoint], Mapping[str, float]] | None = None
    evaluate_every: int = 1000
    peak: float | None = None
    profile: bool = False


def train(
    config: Config,
    workdir: str | Path,
    mesh: Mesh,
    *,
    resume: bool = False,
    init_from: Checkpoint | None = None,
    stop_after: int | None = None,
    observers: Observers = Observers(),
) -> TrainState:
    """Trains to step `config.training.steps`, or to `stop_after` if that is earlier.

    Writes to `workdir`: `metrics.jsonl`, TensorBoard events, `config.json`, `checkpoints/` (the
    whole state) and `weights/` (the averaged weights, for `from_pretrained`). SIGTERM and Ctrl-C
    finish the step and save first. On the same mesh, a run that stopped and resumed ends in the
    same state, bit by bit, as one that did not. With several processes, each calls this.

    Args:
        config: the run.
        workdir: its folder; a new one unless `resume`.
        mesh: devices to train on.
        resume: go on from the last checkpoint of `workdir`, or start if there is none.
        init_from: weights to start a new run from.
        stop_after: stop at this step without changing the schedule.
        observers: evaluation, utilisation, profile.

    Returns:
        The last state.

    Raises:
        MeshError: the mesh does not divide the tasks of a batch.
        RunDirectoryError: the folder cannot be written, holds another run, or is in use.
        CheckpointError: a checkpoint cannot be read or written, or `init_from` is another model or
            was trained with the same seed.
        TrainingError: the gradient stayed non-finite.
    """
    trainer = Trainer(config, mesh)
    if init_from is not None:
        _require_same_model(init_from, config)
        _require_other_tasks(init_from, config)
    seeds = (config.training.seed, *(init_from.seeds if init_from else ()))
    stop = min(config.training.steps, stop_after or config.training.steps)
    with _stop_signals() as stopping, closing(RunDirectory(workdir, config, resume)) as directory:
        if directory.latest_step() is not None:
            state = directory.restore(trainer.abstract_state)
        elif init_from is not None:
            state = trainer.with_weights(init_from.model)
        else:
            state = trainer.init()
        start = int(state.step)
        if start < stop and not any_process(bool(stopping)):
            with ExitStack() as stack:
                log = directory.open_log(start) if is_first_process() else None
                if log:
                    stack.enter_context(closing(log))
                run = _Run(trainer, directory, log, observers, seeds)
                return run.steps(state, start, stop, stopping)
        if start:
            # The weights may have been deleted, or be those of a later step that was not saved.
            run = _Run(trainer, directory, None, observers, seeds)
            run.export(state, start)
        return state


class _Run:
    """A run with its folder: the steps, and what happens between them."""

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        log: MetricsLog | None,
        observers: Observers,
        seeds: tuple[int, ...],
    ):
        self._seeds = seeds
        self._trainer, self._directory, self._log = trainer, directory, log
        self._observers = observers
        self._config = trainer.config.training
        self._window = _Window(trainer.config, observers.peak)

    def steps(self, state: TrainState, start: int, stop: int, stopping: list[int]) -> TrainState:
        """Trains from step `start` to `stop`, or until `stopping` holds a signal."""
        config, window = self._config, self._window
        agreement, last_save = Agreement(self._trainer.mesh), time.monotonic()
        profiled = _steps_to_profile(config, start, stop) if self._observers.profile else range(0)
        pending: tuple[int, TableShape, Metrics] | None = None
        # Silent where nobody watches: a log file gets the metrics, not the bar.
        bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            smoothing=0.02,
            mininterval=1,
            disable=None if self._log else True,
        )
        with bar:
            for step in range(start, stop):
                if step in profiled and step == profiled.start:
                    jax.block_until_ready(state)
                    jax.profiler.start_trace(self._directory.folder / "profile")
                shape = shape_of_step(config.shapes, config.seed, step)
                with jax.transfer_guard("disallow"):
                    state, metrics = self._trainer.step(state, shape)
                # Reading the step before keeps the device busy: this one is already on its way.
                if pending:
                    window.add(*pending)
                done = step + 1
                pending = (done, shape, metrics)
                bar.update()

                save_is_due = time.monotonic() - last_save > 60 * config.checkpoint_minutes
                wish = Wish.STOP if stopping else Wish.SAVE if save_is_due else Wish.GO_ON
                agreed = agreement.of(wish)
                last = done == stop or agreed is Wish.STOP
                if step in profiled and (last or done == profiled.stop):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                validate = done == stop or _is_due(config.validate_every, done)
                evaluate = self._observers.evaluate is not None and (
                    done == stop or _is_due(self._observers.evaluate_every, done)
                )
                if last or validate or evaluate or _is_due(config.log_every, done):
                    window.add(*pending)
                    pending = None
                    line = window.flush()
                    with window.left_out():
                        line |= self._validation(state) if validate else {}
                        line |= self._evaluation(state, done) if evaluate else {}
                    if self._log:
                        self._log.write(line)
                    bar.set_postfix(
                        loss=f"{line['mean_loss']:.3f}",
                        tasks_per_s=f"{line['tasks_per_second']:.0f}",
                        masked=window.masked_tasks,
                        refresh=False,
                    )
                if last or agreed is Wish.SAVE:
                    if pending:
                        window.add(*pending)
                        pending = None
                    with window.left_out():
                        # Weights first: they record the seeds behind them, and a run that is
                        # resumed from a checkpoint has nowhere else to look these up.
                        self.export(state, done)
                        self._directory.save(done, state)
                    last_save = time.monotonic()
                if last:
                    break
        return state

    def export(self, state: TrainState, step: int) -> None:
        """Writes the averaged weights, for `from_pretrained`."""
        model = self._trainer.whole_model(state)
        if is_first_process():
            folder = self._directory.folder / RUN_WEIGHTS
            # Of the same prior, and of what the run started from before it was resumed.
            usual_tables, seeds = recorded(folder)
            seeds = (*seeds, *self._seeds)
            save_checkpoint(folder, model, self._trainer.config, step, usual_tables, seeds)

    def _validation(self, state: TrainState) -> dict[str, float]:
        values = jax.device_get(self._trainer.validate(state))
        return {name: float(value) for name, value in values.items()}

    def _evaluation(self, state: TrainState, step: int) -> Mapping[str, float]:
        model = self._trainer.whole_model(state)  # on every process, because all hold parts of it
        evaluate = self._observers.evaluate
        if evaluate is None or not is_first_process():
            return {}
        name = f"{self._directory.folder} at step {step}"
        return evaluate(Checkpoint(name, model, self._trainer.config, step))


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _steps_to_profile(config: TrainingConfig, start: int, stop: int) -> range:
    """The first few steps in a row whose shapes have all been compiled before; may be empty."""
    compiled = {shape_of_step(config.shapes, config.seed, start)}
    run = 0
    for step in range(start + 1, stop):
        shape = shape_of_step(config.shapes, config.seed, step)
        run = run + 1 if shape in compiled else 0
        compiled.add(shape)
        if run == PROFILED_STEPS:
            return range(step + 1 - PROFILED_STEPS, step + 1)
    return range(0)


class _Window:
    """Metrics of the steps since the last logged line."""

    def __init__(self, config: Config, peak: float | None = None):
        self.masked_tasks = 0
        self._config, self._peak = config, peak
        self._skipped_in_a_row = 0
        self._clear()

    def add(self, step: int, shape: TableShape, metrics: Metrics) -> None:
        """Fetches one step's metrics. Raises TrainingError after too many skips in a row."""
        values = {
            name: np.asarray(value).item()
            for name, value in dataclasses.asdict(jax.device_get(metrics)).items()
        }
        self._last = {"step": step, **values}
        self._losses.append(values["loss"])
        self._tasks += shape.tasks
        self._rows += shape.tasks * shape.rows
        self._flops += model_flops(self._config, shape)
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
        """The line to log: the last step's values, and sums, means and rates over the window."""
        seconds = time.monotonic() - self._clock
        line = self._last | {
            "mean_loss": float(np.mean(self._losses)),
            "masked_tasks": self._masked,
            "skipped": self._skipped,
            "seconds": seconds,
            "tasks_per_second": self._tasks / seconds,
            "rows_per_second": self._rows / seconds,
            "model_flops_per_second": self._flops / seconds,
        }
        if self._peak:
            line["utilisation"] = self._flops / seconds / self._peak
        self._clear()
        return line

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """For validation and saving, which do not count towards the rates."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._tasks = self._rows = self._masked = self._skipped = 0
        self._flops = 0.0
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


def _require_other_tasks(checkpoint: Checkpoint, config: Config) -> None:
    """The tasks of step k depend on seed and k alone, so the same seed would draw them again."""
    seed = config.training.seed
    if seed in checkpoint.seeds:
        raise CheckpointError(
            f"--init-from {checkpoint.name}: it was trained with training.seed={seed} too, so the "
            "run would draw the tasks that it has seen; give another, such as --seed "
            f"{max(checkpoint.seeds) + 1}"
        )


def _require_same_model(checkpoint: Checkpoint, config: Config) -> None:
    theirs, ours = (dataclasses.asdict(c.model) for c in (checkpoint.config, config))
    # How the layers are computed is free to change, and a tilt may be added; what they are is not.
    free = {"compute_dtype", "remat"} | ({"linear_tilt"} if ours["linear_tilt"] else set())
    fields = [name for name in ours if name not in free]
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
