"""Weights on disk: safetensors and a JSON config in a folder; named ones ship with the package."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dopfn_jax.config import Config
from dopfn_jax.diagnostics import UsualTables
from dopfn_jax.model.transformer import DoPFN

DEFAULT_CHECKPOINT = "do_pfn_wide_cpu"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# Where a training run keeps its latest weights inside its work directory.
RUN_WEIGHTS = "weights"
# Of names that stand for a repository of the Hugging Face hub.
HUB_PREFIX = "hf:"
_FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message names the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with the configuration that it was trained under.

    Attributes:
        name: the shipped name or the folder that it came from.
        model: the model with its weights.
        config: prior, model and training of the run that made it.
        steps: of the run that made it, not of what it started from; of a mean, of its runs.
        usual_tables: what tables of its prior look like, if that has been recorded (see
            `scripts/inspect_prior.py`); estimators warn about others.
        seeds: of all training behind the weights, as far as it is known; a run from them with one
            of these would draw tasks that they have seen.
    """

    name: str
    model: DoPFN
    config: Config
    steps: int
    usual_tables: UsualTables | None = None
    seeds: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """Without the weights: estimators show this as one of their settings."""
        return f"Checkpoint({self.name!r}, steps={self.steps})"

    @property
    def covariates(self) -> int:
        """The most covariates that the model has been trained on."""
        return self.config.covariates


def checkpoint_names() -> list[str]:
    """Names that `from_pretrained` finds inside the package."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{CONFIG_FILE}"))


def from_pretrained(name_or_path: str | Path = DEFAULT_CHECKPOINT) -> Checkpoint:
    """Loads weights by a shipped name, from a folder, or from a training run's work directory.

    Only a name that starts with "hf:" touches the network: "hf:owner/name", or
    "hf:owner/name@revision", is a repository of the Hugging Face hub with the two files of a
    checkpoint folder (extra "hub").

    Raises:
        CheckpointError: nothing there, damaged files, or weights that do not fit the config, with
            every offender.
    """
    folder = _folder_of(name_or_path)
    described = _describe(folder)
    path = folder / WEIGHTS_FILE
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != described.sha256:
            raise CheckpointError(
                f"{path}: its checksum is not the one in {CONFIG_FILE}: damaged, or copied without "
                "it; copy both again"
            )
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: weights cannot be read ({error})") from error
    model = _build_model(described.config, weights, path)
    return Checkpoint(
        str(name_or_path),
        model,
        described.config,
        described.steps,
        described.usual_tables,
        described.seeds,
    )


def weights_checksum(name_or_path: str | Path) -> str:
    """SHA-256 of the weights that `from_pretrained` would load, without loading them.

    Raises:
        CheckpointError: nothing there, or damaged files.
    """
    return _describe(_folder_of(name_or_path)).sha256


def save_checkpoint(
    folder: str | Path,
    model: DoPFN,
    config: Config,
    steps: int,
    usual_tables: UsualTables | None = None,
    seeds: Sequence[int] | None = None,
) -> None:
    """Writes a checkpoint folder; an older one is replaced only once the new one is complete.

    Args:
        folder: where `from_pretrained` will find it.
        model: the model to save.
        config: the configuration that it was trained under.
        steps: of the run that made it.
        usual_tables: from `dopfn_jax.diagnostics.usual_tables`.
        seeds: of all training behind the weights; by default the one of `config`.

    Raises:
        CheckpointError: it cannot be written, or holds something else than a checkpoint; what was
            there is intact.
    """
    folder = Path(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds files, but no checkpoint to replace; choose a new folder"
        )
    flat = nnx.to_flat_state(nnx.state(model))
    weights = {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}
    seeds = _own_seeds(config, steps) if seeds is None else sorted(set(seeds))
    description = {"format": _FORMAT_VERSION, "steps": steps, "seeds": list(seeds)}
    description["config"] = config.to_dict()
    if usual_tables is not None:
        description["usual_tables"] = usual_tables
    try:
        _write(folder, weights, description)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: weights cannot be written ({error})") from error


def recorded(folder: Path) -> tuple[UsualTables | None, tuple[int, ...]]:
    """The `usual_tables` and `seeds` of a checkpoint folder; neither where there is none."""
    try:
        described = _describe(folder)
    except CheckpointError:
        return None, ()
    return described.usual_tables, described.seeds


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of weights trained on from common ones (model soups: Wortsman et al. 2022).

    Runs with different seeds err differently around what they have in common, so their mean is
    often better than each; that of runs from different starts is not. One that is listed twice
    counts twice.

    Args:
        checkpoints: one or more, of one architecture and with the same bucket borders.

    Returns:
        The mean, with the first one's name and config, and the steps and seeds of all of them.

    Raises:
        CheckpointError: none is given, or two of them do not fit together.
    """
    if not checkpoints:
        raise CheckpointError("checkpoints is empty: name one or more to average")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.config.model != first.config.model:
            raise CheckpointError(
                f"{other.name} has another architecture than {first.name}: only weights that were "
                "trained on from common ones can be averaged"
            )
        if not np.array_equal(other.model.borders[...], first.model.borders[...]):
            raise CheckpointError(
                f"{other.name} has other bucket borders than {first.name}: only weights that were "
                "trained on from common ones can be averaged"
            )
    graphdef = nnx.graphdef(first.model)
    states = [nnx.state(checkpoint.model) for checkpoint in checkpoints]
    mean = jax.tree.map(
        lambda *leaves: jnp.asarray(np.mean(leaves, axis=0, dtype=np.float64), leaves[0].dtype),
        *states,
    )
    steps = sum({checkpoint.name: checkpoint.steps for checkpoint in checkpoints}.values())
    seeds = tuple(sorted({seed for checkpoint in checkpoints for seed in checkpoint.seeds}))
    model = nnx.merge(graphdef, mean)
    return Checkpoint(first.name, model, first.config, steps, seeds=seeds)


class _Description(NamedTuple):
    """What stands beside the weights."""

    sha256: str
    config: Config
    steps: int
    usual_tables: UsualTables | None
    seeds: tuple[int, ...]


def _describe(folder: Path) -> _Description:
    try:
        description = json.loads((folder / CONFIG_FILE).read_text())
        if description["format"] != _FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: has format {description['format']!r}, but this version "
                f"of dopfn_jax reads {_FORMAT_VERSION}; install the version that wrote it"
            )
        config, steps = Config.from_dict(description["config"]), description["steps"]
        return _Description(
            description["sha256"],
            config,
            steps,
            _read_usual_tables(description.get("usual_tables")),
            tuple(description.get("seeds", _own_seeds(config, steps))),
        )
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: not a readable checkpoint description ({error})"
        ) from error


def _own_seeds(config: Config, steps: int) -> tuple[int, ...]:
    """Of a run that started from nothing."""
    return (config.training.seed,) if steps else ()


def _write(folder: Path, weights: dict[str, np.ndarray], description: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        content = save(weights)
        checksum = hashlib.sha256(content).hexdigest()
        (new / WEIGHTS_FILE).write_bytes(content)  # save_file would keep it from other users
        text = json.dumps({"sha256": checksum, **description}, indent=2)
        (new / CONFIG_FILE).write_text(text + "\n")
        if not folder.exists():
            os.replace(new, folder)
            return
        for extra in folder.iterdir():  # a model card, say, stays
            if extra.is_dir():
                shutil.copytree(extra, new / extra.name)
            elif extra.name not in (WEIGHTS_FILE, CONFIG_FILE):
                shutil.copy2(extra, new / extra.name)
        try:
            os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:  # an interrupt, too
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise


def _read_usual_tables(
    written: dict[str, dict[str, tuple[float, float]]] | None,
) -> UsualTables | None:
    """Keys of JSON objects are text."""
    if written is None:
        return None
    return {
        int(rows): {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        for rows, ranges in written.items()
    }


def _download(name: str) -> Path:
    """The local copy of a hub repository."""
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"{name}: needs pip install 'dopfn-jax[hub]'") from error
    try:
        files = [WEIGHTS_FILE, CONFIG_FILE]
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=files)
    except Exception as error:  # the hub's, of HTTP, and of the names it refuses
        raise CheckpointError(f"{name}: cannot be had from the hub ({error})") from error
    return Path(folder)


def _folder_of(name_or_path: str | Path) -> Path:
    """Where the two files of a checkpoint are, fetched from the hub if need be."""
    name = str(name_or_path)
    return _download(name) if name.startswith(HUB_PREFIX) else _find(name_or_path)


def _find(name_or_path: str | Path) -> Path:
    shipped = Path(__file__).parent / str(name_or_path)
    for folder in (shipped, Path(name_or_path), Path(name_or_path) / RUN_WEIGHTS):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    shipped_names = ", ".join(checkpoint_names()) or "none is"
    raise CheckpointError(
        f"checkpoint {str(name_or_path)!r}: neither shipped ({shipped_names}) nor a folder with "
        f"{WEIGHTS_FILE} and {CONFIG_FILE}"
    )


def _build_model(config: Config, weights: dict[str, np.ndarray], path: Path) -> DoPFN:
    model = nnx.eval_shape(lambda: DoPFN(config.model, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = {".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(state)}
    problems = [f"{name} is missing" for name in sorted(flat.keys() - weights.keys())]
    problems += [f"{name} is unknown" for name in sorted(weights.keys() - flat.keys())]
    for name in sorted(flat.keys() & weights.keys()):
        have, want = (f"{a.dtype} {a.shape}" for a in (weights[name], flat[name][1]))
        problems += [f"{name} is {have}, the config asks for {want}"] if have != want else []
    if problems:
        raise CheckpointError(f"{path} does not fit its config: {'; '.join(problems)}")
    filled = [
        (key, variable.replace(jnp.asarray(weights[name])))
        for name, (key, variable) in flat.items()
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
