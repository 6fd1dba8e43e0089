"""A run's work directory: lock, config, metrics log and training checkpoints."""

import fcntl
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from dopfn_jax.checkpoints import RUN_WEIGHTS, CheckpointError
from dopfn_jax.config import Config, ConfigError


class RunDirectoryError(ValueError):
    """A work directory that this run cannot use; the message names the remedy."""


class RunDirectory:
    """The folder of one run, used by one process at a time.

    It holds `config.json`, `metrics.jsonl`, TensorBoard `events/`, `checkpoints/` (the whole
    state) and `weights/` (the averaged weights).

    Raises:
        RunDirectoryError: another process uses the folder, it holds a run and `resume` is False, or
            its run has another configuration.
    """

    def __init__(self, folder: str | Path, config: Config, resume: bool):
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(f"--workdir {folder}: a file is in the way") from error
        # Held by the kernel: a killed run leaves no lock behind.
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._claim(config, resume)
        except BlockingIOError as error:
            self._lock.close()
            raise RunDirectoryError(
                f"{self.folder}: another run is using it; wait for it or choose another --workdir"
            ) from error
        except BaseException:
            self._lock.close()
            raise
        for leftover in self.folder.glob(f".{RUN_WEIGHTS}-*"):  # of a run killed while saving
            shutil.rmtree(leftover)
        self._checkpoints = ocp.CheckpointManager(
            self.folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, cleanup_tmp_directories=True
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
            # Waiting keeps donated buffers alive until they are copied; on a CPU device they are
            # not copied before.
            self._checkpoints.wait_until_finished()
            self._checkpoints.check_for_errors()
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
        self._lock.close()

    def _claim(self, config: Config, resume: bool) -> None:
        """Writes the run's configuration, or compares it with the one that is there."""
        path = self.folder / "config.json"
        if not path.exists():
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


class MetricsLog:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard event files."""

    def __init__(self, folder: Path, last_step: int):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A killed run may leave half a line at the end.
        complete = [line for line in lines if line.endswith("\n")]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            "".join(line for line in complete if json.loads(line)["step"] <= last_step)
        )
        temporary.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "events"), purge_step=last_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Logs one step; `metrics` holds its number under "step". JSON has no NaN: null stands."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._events.close()


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
