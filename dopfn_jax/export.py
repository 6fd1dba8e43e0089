"""A checkpoint as one self-contained file that runs without this package's model code, or Flax.

The file is a zip archive: `program.bin`, the compiled-for-everywhere StableHLO of one function
(`jax.export`) for CPU, CUDA and TPU, whose numbers of rows are symbolic; `weights.safetensors`, its
parameters in the order in which it takes them; `artefact.json`, its sizes. To run it, `load` needs
JAX, NumPy, safetensors and flatbuffers only; a program in any language that runs StableHLO can do
without `load`, too.

Axes: N context rows, M query rows, F covariates, Q buckets.
"""

import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export
from numpy.typing import ArrayLike
from safetensors import SafetensorError

from dopfn_jax.model.bar_distribution import BarDistribution

if TYPE_CHECKING:
    from dopfn_jax.checkpoints import Checkpoint

PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM_FILE, _WEIGHTS_FILE, _DESCRIPTION_FILE = (
    "program.bin",
    "weights.safetensors",
    "artefact.json",
)
_FORMAT_VERSION = 1
# A standard deviation below this share of the mean is rounding.
_ROUNDING = 8 * np.finfo(np.float64).eps
# What reading a file that is no artefact, or a damaged one, raises.
_DAMAGE = (zipfile.BadZipFile, zlib.error, LookupError, json.JSONDecodeError, SafetensorError)


class ExportError(ValueError):
    """An artefact that cannot be read or run; the message names the remedy."""


@dataclass(frozen=True, eq=False)
class ExportedPredictor:
    """The predict function of a checkpoint, read back from an artefact.

    Attributes:
        name: of the checkpoint.
        covariates: the most covariates that it takes.
        platforms: where it runs.
    """

    name: str
    covariates: int
    platforms: tuple[str, ...]
    _run: Callable[..., tuple[jax.Array, jax.Array]]
    _weights: tuple[jax.Array, ...]

    def __call__(
        self, x: ArrayLike, t: ArrayLike, y: ArrayLike, query_x: ArrayLike, query_t: ArrayLike
    ) -> BarDistribution:
        """The conditional interventional distribution p(y | do(t), x) of every query row.

        Every new pair of numbers of rows is compiled once.

        Args:
            x: (N, F) covariates from before the treatment, NaN where missing; F may be 0.
            t: (N,) observed treatment, 0 or 1.
            y: (N,) observed outcome.
            query_x: (M, F) covariates of the queries.
            query_t: (M,) treatment that is set, or one value for all rows.

        Returns:
            A distribution with batch shape (M,), float32, in the units of y.

        Raises:
            ExportError: shapes that do not fit together, too many covariates, values that are not
                finite (missing covariates apart) or treatments other than 0 and 1, or an outcome so
                far from zero, compared with its spread, that float32 cannot tell its values apart.
        """
        x, t, y, query_x = (np.asarray(a, np.float64) for a in (x, t, y, query_x))
        fits = x.ndim == query_x.ndim == 2 and x.shape[1] == query_x.shape[1]
        if not fits or not x.shape[:1] == t.shape == y.shape or not len(x) or not len(query_x):
            raise ExportError(
                f"x has shape {x.shape}, t {t.shape}, y {y.shape} and query_x {query_x.shape}, but "
                "they must be (N, F), (N,), (N,) and (M, F) with at least one row each."
            )
        covariates = x.shape[1]
        if covariates > self.covariates:
            raise ExportError(f"x has {covariates} covariates, but at most {self.covariates} fit.")
        query_t = np.asarray(query_t, np.float64)
        if query_t.shape not in ((), query_x.shape[:1]):
            raise ExportError(
                f"query_t has shape {query_t.shape}, but must be a scalar or {query_x.shape[:1]}."
            )
        for name, values in (("x", x), ("query_x", query_x), ("y", y)):
            if np.isinf(values).any() or (name == "y" and np.isnan(values).any()):
                raise ExportError(f"{name} holds values that are not finite: leave such rows out.")
        for name, values in (("t", t), ("query_t", query_t)):
            if not np.isin(values, (0, 1)).all():
                raise ExportError(f"{name} must hold 0 and 1: recode it.")
        # The program computes in float32: in units of the spread, around zero, no digits are lost.
        known = np.ma.masked_invalid(x)
        x_loc, x_scale = (np.ma.filled(f(axis=0), 0.0) for f in (known.mean, known.std))
        x_scale = np.where(x_scale > _ROUNDING * np.abs(x_loc), x_scale, 1.0)
        x, query_x = (x - x_loc) / x_scale, (query_x - x_loc) / x_scale
        y_loc, y_scale = y.mean(), y.std()
        y_scale = y_scale if y_scale > _ROUNDING * abs(y_loc) else 1.0
        widen = ((0, 0), (0, self.covariates - covariates))
        logits, borders = self._run(
            self._weights,
            np.pad(x, widen).astype(np.float32),
            t.astype(np.float32),
            ((y - y_loc) / y_scale).astype(np.float32),
            np.ones(len(x), bool),
            np.arange(self.covariates) < covariates,
            np.pad(query_x, widen).astype(np.float32),
            np.broadcast_to(query_t, query_x.shape[:1]).astype(np.float32),
        )
        borders = (y_loc + y_scale * np.asarray(borders, np.float64)).astype(np.float32)
        if not (np.diff(borders) > 0).all():
            raise ExportError(
                f"float32 cannot hold a distribution of an outcome with mean {y_loc:g} and "
                f"standard deviation {y_scale:g}: pass it minus its mean, over its deviation."
            )
        return BarDistribution(logits, jnp.asarray(borders))


def export(
    checkpoint: "Checkpoint", path: str | Path, platforms: Sequence[str] = PLATFORMS
) -> None:
    """Writes a checkpoint's predict function as one file, which `load` reads.

    Args:
        checkpoint: from `from_pretrained`.
        path: the file; an older one is replaced once the new one is complete.
        platforms: where it shall run.

    Raises:
        ExportError: an unknown platform.
        ImportError: the package flatbuffers is not installed (extra "export").
    """
    from flax import nnx

    from dopfn_jax.model.attention import for_every_platform
    from dopfn_jax.predict import encode, predict

    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        raise ExportError(f"platforms are {list(platforms)!r}: choose from {', '.join(PLATFORMS)}.")
    graphdef, state = nnx.split(checkpoint.model)
    leaves, structure = jax.tree.flatten(state)

    def function(
        weights: tuple[jax.Array, ...],
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array,
        covariate_mask: jax.Array,
        query_x: jax.Array,
        query_t: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        answer = predict(model, encode(model, x, t, y, mask, covariate_mask), query_x, query_t)
        return answer.logits, answer.borders

    rows, queries = jax_export.symbolic_shape("n, m")
    columns = checkpoint.covariates

    def array(*shape: object, dtype: type = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    try:
        with for_every_platform():
            program = jax_export.export(jax.jit(function), platforms=list(platforms))(
                tuple(array(*leaf.shape, dtype=leaf.dtype) for leaf in leaves),
                array(rows, columns),
                array(rows),
                array(rows),
                array(rows, dtype=bool),
                array(columns, dtype=bool),
                array(queries, columns),
                array(queries),
            ).serialize()
    except ModuleNotFoundError as error:
        raise ImportError("export needs flatbuffers: pip install 'dopfn-jax[export]'") from error
    description = {
        "format": _FORMAT_VERSION,
        "name": checkpoint.name,
        "covariates": columns,
        "platforms": list(platforms),
        "arguments": "weights, x (n, F), t (n), y (n), mask (n), covariate_mask (F), "
        "query_x (m, F), query_t (m)",
        "results": "logits (m, Q), borders (Q + 1)",
    }
    weights = {f"{index:04d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        new = Path(temporary, "new")
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_DESCRIPTION_FILE, json.dumps(description, indent=2))
            archive.writestr(_PROGRAM_FILE, bytes(program))
            archive.writestr(_WEIGHTS_FILE, safetensors.numpy.save(weights))
        os.replace(new, path)


def load(path: str | Path) -> ExportedPredictor:
    """Reads an artefact that `export` wrote; Flax is not needed.

    Raises:
        FileNotFoundError: nothing there.
        ExportError: no artefact, a damaged one, one of a later version, or one that does not run
            on JAX's default platform here.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(Path(path).read_bytes())) as archive:
            description = json.loads(archive.read(_DESCRIPTION_FILE))
            if description["format"] > _FORMAT_VERSION:
                raise ExportError(f"{path}: written by a later version of dopfn-jax.")
            weights = safetensors.numpy.load(archive.read(_WEIGHTS_FILE))
            program = jax_export.deserialize(bytearray(archive.read(_PROGRAM_FILE)))
    except ModuleNotFoundError as error:
        raise ImportError("this needs flatbuffers: pip install 'dopfn-jax[export]'") from error
    except _DAMAGE as error:
        raise ExportError(f"{path}: not an exported checkpoint ({error}).") from error
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in description["platforms"]:
        raise ExportError(
            f"{path}: runs on {', '.join(description['platforms'])}, but JAX uses {here}: export "
            "it for that, too, or set JAX_PLATFORMS."
        )
    return ExportedPredictor(
        description["name"],
        description["covariates"],
        tuple(description["platforms"]),
        jax.jit(program.call),
        tuple(jnp.asarray(weights[name]) for name in sorted(weights)),
    )
