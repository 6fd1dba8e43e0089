"""A run's work directory: lock, config, metrics log, training checkpoints and exported weights."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from dopfn_jax.checkpoints import CheckpointError
from dopfn_jax.config import Config


class RunDirectoryError(ValueError):
    """A work directory that this run cannot use; the message names the remedy."""


class RunDirectory:
    """`config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/` under one folder, used by one process.

    Raises:
        RunDirectoryError: another process uses the folder, it holds a run and `resume` is False, or its run has
            another configuration.
    """

    def __init__(self, folder: str | Path, config: Config, resume: bool):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            # Held by the kernel: a killed run leaves nothing behind.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"{self.folder}: another run is using it; wait for it or choose another --workdir"
            ) from error
        config_path = self.folder / "config.json"
        if config_path.exists():
            if not resume:
                raise RunDirectoryError(f"{self.folder} holds a run: add --resume or choose another --workdir")
            self._require_same(config, config_path)
        config_path.write_text(config.to_json() + "\n")
        self._checkpoints = ocp.CheckpointManager(
            self.folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def latest_step(self) -> int | None:
        """Step of the last complete checkpoint, or None."""
        return self._checkpoints.latest_step()

    def restore(self, abstract_state: Any) -> Any:
        """The state of the last complete checkpoint, in the shapes and shardings of `abstract_state`.

        Raises:
            CheckpointError: it cannot be read or does not fit.
        """
        step = self.latest_step()
        leaves, structure = _flatten(abstract_state)
        try:
            restored = self._checkpoints.restore(step, args=ocp.args.StandardRestore(leaves))
        except Exception as error:  # orbax raises many kinds
            raise CheckpointError(
                f"{self.folder / 'checkpoints' / str(step)} cannot be restored ({error}): delete that folder to go on "
                "from the one before"
            ) from error
        return jax.tree.unflatten(structure, [restored[name] for name in leaves])

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint and returns once it is complete."""
        # Waiting keeps donated buffers alive until they are copied; on a CPU device they are not copied before.
        self._checkpoints.save(step, args=ocp.args.StandardSave(_flatten(state)[0]), force=True)
        self._checkpoints.wait_until_finished()
        self._checkpoints.check_for_errors()

    def open_log(self, last_step: int) -> "MetricsLog":
        """The metrics log, without the lines later than `last_step`."""
        return MetricsLog(self.folder, last_step)

    def close(self) -> None:
        """Releases the folder."""
        self._checkpoints.close()
        self._lock.close()

    def _require_same(self, config: Config, path: Path) -> None:
        before, now = (_flat_fields(json.loads(text)) for text in (path.read_text(), config.to_json()))
        changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now[name]]
        if changed:
            raise RunDirectoryError(
                f"{self.folder} holds a run with another configuration ({'; '.join(changed)}): resume it with its own, "
                "or start a new --workdir with --init-from"
            )


class MetricsLog:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard event files."""

    def __init__(self, folder: Path, last_step: int):
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # A killed run may leave half a line.
                if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                    kept.append(line)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "events"), purge_step=last_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Logs one step; `metrics` holds its number under "step"."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._events.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._events.close()


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path, and the structure to put them back into: readable names, and no Python classes on disk."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}, structure


def _flat_fields(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in _flat_fields(value, f"{prefix}.{key}" if prefix else key).items()
    }
