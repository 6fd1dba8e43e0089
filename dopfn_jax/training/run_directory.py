"""A run's work directory: lock, config, metrics log and training checkpoints."""

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import orbax.checkpoint as ocp
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from dopfn_jax.checkpoints import RUN_WEIGHTS, WEIGHTS_FILE, CheckpointError
from dopfn_jax.config import Config, ConfigError
from dopfn_jax.training.processes import succeeds_on_first


class RunDirectoryError(ValueError):
    """A work directory that this run cannot use; the message names the remedy."""


class RunDirectory:
    """The folder of one run, used by one run at a time.

    It holds `config.json`, `metrics.jsonl`, TensorBoard `events/`, `checkpoints/` (the whole
    state) and `weights/` (the averaged weights). The processes of a run share it: all of them
    write checkpoints, the first one writes everything else.

    Raises:
        RunDirectoryError: the folder cannot be written, another run uses it, it holds a run and
            `resume` is False, its run has another configuration, or it holds weights or parts of a
            run that this one would overwrite.
    """

    def __init__(self, folder: str | Path, config: Config, resume: bool):
        self.folder = Path(folder).absolute()
        self._lock: IO[str] | None = None
        if not succeeds_on_first(lambda: self._open(config, resume)):
            raise RunDirectoryError(f"{self.folder}: the first process cannot use it; see there")
        if not (self.folder / "config.json").exists():
            raise RunDirectoryError(
                f"{self.folder}: this process does not see what the first one wrote; choose a "
                "--workdir on a file system that all of them share"
            )
        with self._naming_errors():
            self._checkpoints = ocp.CheckpointManager(
                self.folder / "checkpoints",
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2,
                    create=True,
                    cleanup_tmp_directories=True,
                    # Donated buffers have to wait for the save in any case; and after a save that
                    # failed, Orbax's background threads would hold up the end of the process.
                    enable_async_checkpointing=False,
                ),
            )

    def latest_step(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        return self._checkpoints.latest_step()

    def restore(self, abstract_state: Any) -> Any:
        """The last complete checkpoint, in the shapes and shardings of `abstract_state`.

        Raises:
            CheckpointError: it cannot be read or does not fit.
        """
        step = self.latest_step()
        leaves, structure = _flatten(abstract_state)
        try:
            restored = self._checkpoints.restore(step, args=ocp.args.StandardRestore(leaves))
        except Exception as error:  # orbax raises many kinds
            raise CheckpointError(
                f"{self.folder / 'checkpoints' / str(step)} cannot be restored ({error}): delete "
                "that folder to go on from the one before"
            ) from error
        return jax.tree.unflatten(structure, [restored[name] for name in leaves])

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint and returns once it is complete.

        Raises:
            CheckpointError: it cannot be written; the one before is intact.
        """
        try:
            self._checkpoints.save(step, args=ocp.args.StandardSave(_flatten(state)[0]), force=True)
        except Exception as error:  # orbax raises many kinds
            raise CheckpointError(
                f"{self.folder / 'checkpoints' / str(step)} cannot be written ({error}): make room "
                "or give access, then go on from the checkpoint before with --resume"
            ) from error

    def open_log(self, last_step: int) -> "MetricsLog":
        """The metrics log, without the lines later than `last_step`."""
        return MetricsLog(self.folder, last_step)

    def close(self) -> None:
        """Releases the folder."""
        self._checkpoints.close()
        if self._lock:
            self._lock.close()

    def _open(self, config: Config, resume: bool) -> None:
        """Takes the lock and the folder, and clears what a killed run left."""
        try:
            with self._naming_errors():
                self.folder.mkdir(parents=True, exist_ok=True)
                # Held by the kernel: a killed run leaves no lock behind.
                self._lock = (self.folder / ".lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._claim(config, resume)
                for leftover in self.folder.glob(f".{RUN_WEIGHTS}-*"):  # killed while saving
                    shutil.rmtree(leftover)
        except BaseException:
            if self._lock:
                self._lock.close()
            raise

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"{self.folder}: another run is using it; wait for it or choose another --workdir"
            ) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(f"--workdir {self.folder}: a file is in the way") from error
        except OSError as error:
            raise RunDirectoryError(
                f"--workdir {self.folder} cannot be written ({error}): make room, give access or "
                "choose another"
            ) from error

    def _claim(self, config: Config, resume: bool) -> None:
        """Writes the run's configuration, or compares it with the one that is there."""
        path = self.folder / "config.json"
        if (self.folder / WEIGHTS_FILE).exists():
            raise RunDirectoryError(
                f"{self.folder} holds weights, not a run: choose another --workdir, with "
                "--init-from this one to start from them"
            )
        if not has_checkpoint(self.folder) and (self.folder / RUN_WEIGHTS).exists():
            raise RunDirectoryError(
                f"{self.folder} holds a run without its checkpoints: choose another --workdir, "
                "with --init-from this one to start from its weights"
            )
        if has_checkpoint(self.folder) and not path.exists():
            raise RunDirectoryError(
                f"{self.folder} holds checkpoints without their {path.name}: choose another "
                "--workdir"
            )
        if not has_checkpoint(self.folder):  # it never came to save anything
            temporary = path.with_suffix(".tmp")
            temporary.write_text(config.to_json() + "\n")
            temporary.replace(path)
        elif not resume:
            raise RunDirectoryError(
                f"{self.folder} holds a run: add --resume or choose another --workdir"
            )
        else:
            self._require_same(config, path)

    def _require_same(self, config: Config, path: Path) -> None:
        try:
            theirs = Config.from_dict(json.loads(path.read_text()))
        except (json.JSONDecodeError, ConfigError) as error:
            raise RunDirectoryError(
                f"{path} cannot be read ({error}): choose another --workdir"
            ) from error
        before, now = _flat_fields(theirs.to_dict()), _flat_fields(config.to_dict())
        changed = [
            f"{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name]
        ]
        if changed:
            raise RunDirectoryError(
                f"{self.folder} holds a run with another configuration ({'; '.join(changed)}): "
                "resume it with its own, or start a new --workdir with --init-from this one"
            )


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run's folder holds a complete checkpoint."""
    return any(path.name.isdecimal() for path in Path(folder, "checkpoints").glob("*"))


class MetricsLog:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard event files.

    Raises:
        RunDirectoryError: they cannot be written.
    """

    def __init__(self, folder: Path, last_step: int):
        self._folder = folder
        with self._naming_errors():
            self._file = _without_later_lines(folder / "metrics.jsonl", last_step).open("a")
            # Not tensorboardX's SummaryWriter: its thread dies on a full disk, and then it hangs.
            (folder / "events").mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events" / "events"), f".{os.getpid()}")
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._write_event(last_step + 1, session_log=start)  # hides later events

    def write(self, metrics: Mapping[str, float]) -> None:
        """Logs one step; `metrics` holds its number under "step". JSON has no NaN: null stands."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self._naming_errors():
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            for name, value in finite.items():
                if name != "step" and value is not None:
                    self._write_event(int(metrics["step"]), summary=scalar(name, value))
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        with self._naming_errors():
            self._file.close()
            self._events.close()

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"{self._folder}: metrics cannot be written ({error}): make room or give access, "
                "then go on from the last checkpoint with --resume"
            ) from error


def _without_later_lines(path: Path, last_step: int) -> Path:
    """Drops lines later than `last_step`, and half a line that a killed run may leave."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(line for line in complete if json.loads(line)["step"] <= last_step)
    )
    temporary.replace(path)
    return path


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path, and the structure to put them back into.

    On disk this gives readable names and no Python classes.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    return leaves, structure


def _flat_fields(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted path."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in _flat_fields(value, f"{prefix}.{key}" if prefix else key).items()
    }
