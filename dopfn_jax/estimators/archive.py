"""A fitted estimator in one file: a zip archive of JSON and safetensors, without pickled code."""

import dataclasses
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy
from safetensors import SafetensorError

from dopfn_jax.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    from_pretrained,
    save_checkpoint,
)
from dopfn_jax.tables import Schema, Table

_ESTIMATOR_FILE, _TABLE_FILE = "estimator.json", "table.safetensors"
_CHECKPOINT_FILES = [f"checkpoint/{name}" for name in (WEIGHTS_FILE, CONFIG_FILE)]
_FORMAT_VERSION = 1
# What reading a file that is no saved estimator, or a damaged one, raises.
_DAMAGE = (
    zipfile.BadZipFile,
    SafetensorError,
    json.JSONDecodeError,
    LookupError,
    TypeError,
)


class Saved(NamedTuple):
    """What defines a fitted estimator: constructor arguments, weights, fitted table, and seed."""

    settings: dict[str, Any]
    checkpoint: Checkpoint
    schema: Schema
    table: Table
    seed: int


def write(path: Path, saved: Saved) -> None:
    """Writes the file; an older saved estimator is replaced once the new one is complete.

    Raises:
        FileExistsError: the path is something other than a saved estimator.
    """
    if path.exists() and not _is_saved_estimator(path):
        raise FileExistsError(f"{path} exists and is no saved estimator: choose another name.")
    checkpoint = saved.checkpoint
    given = saved.settings["checkpoint"]
    description = {
        "format": _FORMAT_VERSION,
        "settings": {
            **saved.settings,
            "checkpoint": None if isinstance(given, Checkpoint) else str(given),
        },
        "checkpoint_name": checkpoint.name,
        "schema": saved.schema.to_dict(),
        "seed": saved.seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        new = Path(temporary, "new")
        folder = Path(temporary, "checkpoint")
        save_checkpoint(
            folder,
            checkpoint.model,
            checkpoint.config,
            checkpoint.steps,
            checkpoint.usual_tables,
            checkpoint.seeds,
        )
        with zipfile.ZipFile(new, "w") as archive:
            archive.writestr(_ESTIMATOR_FILE, json.dumps(description, indent=2, default=int))
            archive.writestr(_TABLE_FILE, safetensors.numpy.save(saved.table._asdict()))
            for name in _CHECKPOINT_FILES:
                archive.write(Path(temporary, name), name)
        os.replace(new, path)


def read(path: str | Path) -> Saved:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: not a saved estimator, a damaged one, or one of a later version.
    """
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(path) as archive:
                description = json.loads(archive.read(_ESTIMATOR_FILE))
                if description["format"] > _FORMAT_VERSION:
                    raise CheckpointError(f"{path}: written by a later version of dopfn-jax.")
                table = Table(**safetensors.numpy.load(archive.read(_TABLE_FILE)))
                for name in _CHECKPOINT_FILES:
                    archive.extract(name, temporary)
            schema = Schema.from_dict(description["schema"])
            settings, name = description["settings"], description["checkpoint_name"]
            seed = int(description["seed"])
        except _DAMAGE as error:
            raise CheckpointError(f"{path}: not a saved estimator ({error}).") from error
        checkpoint = from_pretrained(Path(temporary, "checkpoint"))
    checkpoint = dataclasses.replace(checkpoint, name=name)
    settings["checkpoint"] = settings["checkpoint"] or checkpoint
    # JSON knows no tuples.
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return Saved(settings, checkpoint, schema, table, seed)


def _is_saved_estimator(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _ESTIMATOR_FILE in archive.namelist()
