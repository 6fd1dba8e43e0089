"""The scikit-learn-like face: tables in (NumPy, pandas, JAX arrays), effects out (NumPy).

Axes: B tables, N rows of the fitted table, M query rows, F covariates, Q buckets, S quantiles.
"""

import dataclasses
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from dopfn_jax.checkpoints import (
    CONFIG_FILE,
    DEFAULT_CHECKPOINT,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    from_pretrained,
    save_checkpoint,
)
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.predict import ate, encode, predict
from dopfn_jax.tables import Data, Schema, Table, TableError, read_treatment

# Compiled once per table size and shared by all estimators. Rows are padded to sizes from a short
# list, so that few table sizes are ever compiled.
_encode = jax.jit(encode)
_predict = jax.jit(predict)
_encode_each = jax.jit(jax.vmap(encode, in_axes=(None, 0, 0, 0, 0, None)))
_ate_each = jax.jit(jax.vmap(ate, in_axes=(None, 0, None, None)))
_mean = jax.jit(lambda answer: answer.mean)
_median = jax.jit(lambda answer: answer.median)
_mode = jax.jit(lambda answer: answer.mode)
_quantile = jax.jit(BarDistribution.quantile)

# Query rows are answered in chunks of at most this many,
_CHUNK_ROWS = 2048
# or fewer, so that attention scores, or keys and values, take at most so many floats (256 MB).
_CHUNK_FLOATS = 2**26
# The standard error of an average over more rows than this is that over so many random ones.
_INTERVAL_ROWS = 1024

# Parts of a saved estimator, a zip archive.
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

_Summary = Callable[[BarDistribution], jax.Array]


class DoPFNRegressor(BaseEstimator):
    """Effects of a binary treatment on a numeric outcome, by in-context learning (Do-PFN).

    `fit` reads an observational table into a pre-trained transformer; nothing is trained. Queries
    are then answered with the distribution of the outcome under an intervention, p(y | do(t), x),
    averaged over all the causal structures that the table leaves possible, as far as the prior of
    the checkpoint knows them. Covariates must have been measured before the treatment.

    X may be a NumPy or JAX array, a list of rows, a pandas data frame, whose columns are matched by
    name, or None for a table without covariates; `dopfn_jax.tables.Schema.fit` says how text,
    categories, booleans and missing cells are read. All answers are in the units of y.

    Args:
        checkpoint: name of a shipped checkpoint, a folder, or a loaded `Checkpoint`.
        n_resamples: random halves of the table that `ate_interval` looks at.
        max_context: the most rows that `fit` accepts. Time and memory of `fit` grow with their
            square.
        random_state: seed of the random halves; None draws other halves each time.

    Attributes:
        checkpoint_: the loaded Checkpoint.
        schema_: names, categories and units of the columns.
        table_: the fitted rows, standardised.
        context_: the encoded rows, which all queries share: with L layers, C tokens per row and
            width D it takes 8 L C N D bytes.
        n_features_in_: F.
        feature_names_in_: (F,) names of the columns, if X was a data frame.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint = DEFAULT_CHECKPOINT,
        *,
        n_resamples: int = 32,
        max_context: int = 10_000,
        random_state: int | None = 0,
    ):
        self.checkpoint = checkpoint
        self.n_resamples = n_resamples
        self.max_context = max_context
        self.random_state = random_state

    def fit(self, X: Data | None, t: Data, y: Data) -> Self:
        """Reads an observational table.

        Args:
            X: (N, F) covariates from before the treatment; None for none.
            t: (N,) observed treatment, 0 and 1 or booleans.
            y: (N,) observed outcome.

        Returns:
            Itself.

        Raises:
            TableError: a shape, column or value that cannot be used (a constant outcome and a
                single treatment arm among them), more covariates than the checkpoint has been
                trained for, or more rows than `max_context`.
            CheckpointError: no such checkpoint, or a damaged one.
        """
        for name, value in (("n_resamples", self.n_resamples), ("max_context", self.max_context)):
            if value < 2:
                raise ValueError(f"{name} is {value!r}, but must be 2 or more.")
        checkpoint = self.checkpoint
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = from_pretrained(checkpoint)
        schema, table = Schema.fit(X, t, y)
        rows, covariates = table.x.shape
        if covariates > checkpoint.covariates:
            raise TableError(
                f"X has {covariates} covariates, but checkpoint {checkpoint.name!r} has been "
                f"trained for at most {checkpoint.covariates}: choose the most relevant ones."
            )
        if rows > self.max_context:
            raise TableError(
                f"the table has {rows:,} rows, more than max_context = {self.max_context:,}: fit a "
                "random sample of them, or raise max_context where memory allows."
            )
        return self._remember(checkpoint, schema, table)

    def predict(
        self,
        X: Data | None,
        t: Data,
        output_type: Literal["mean", "median", "mode", "quantiles"] = "mean",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> NDArray[np.float64]:
        """Summaries of p(y | do(t), x), in the units of y.

        Args:
            X: (M, F) covariates; None if the table has none.
            t: (M,) treatment that is set, 0 or 1, or one value for all rows.
            output_type: which summary; the mean is E[y | do(t), x].
            quantiles: S probabilities between 0 and 1, for output_type "quantiles".

        Returns:
            (M,), or (M, S) for quantiles.

        Raises:
            TableError: X or t do not fit the fitted table.
            ValueError: unknown output_type, or a probability outside (0, 1).
        """
        check_is_fitted(self)
        x, treatment = self._read_query(X, t)
        levels = np.asarray(quantiles, np.float32)
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"quantiles are {quantiles!r}, but must lie between 0 and 1.")
        summaries: dict[str, _Summary] = {
            "mean": _mean,
            "median": _median,
            "mode": _mode,
            "quantiles": lambda answer: _quantile(answer, levels),
        }
        if output_type not in summaries:
            known = ", ".join(map(repr, summaries))
            raise ValueError(f"output_type is {output_type!r}, but must be one of {known}.")
        answers = self._answer(x, treatment, summaries[output_type])
        return self.schema_.outcome.restore(answers)

    def predict_distribution(self, X: Data | None, t: Data) -> BarDistribution:
        """The full distribution p(y | do(t), x) of every query row; arguments as for `predict`.

        Returns:
            A BarDistribution with batch shape (M,), float32, in the units of y.

        Raises:
            TableError: X or t do not fit the fitted table, or the outcome lies so far from zero,
                compared with its spread, that float32 cannot tell its values apart; `predict` has
                no such limit.
        """
        check_is_fitted(self)
        answers = list(self._stream(*self._read_query(X, t)))
        logits = np.concatenate([np.asarray(answer.logits)[:rows] for answer, rows in answers])
        outcome = self.schema_.outcome
        with np.errstate(over="ignore"):
            borders = outcome.restore(answers[0][0].borders).astype(np.float32)
        if not np.isfinite(borders).all() or not (np.diff(borders) > 0).all():
            raise TableError(
                f"float32 cannot hold a distribution of an outcome with mean {outcome.loc:g} and "
                f"standard deviation {outcome.scale:g}: fit the outcome minus its mean, over its "
                "standard deviation, or use predict."
            )
        return BarDistribution(jnp.asarray(logits), jnp.asarray(borders))

    def cate(self, X: Data | None = None) -> NDArray[np.float64]:
        """Conditional average treatment effect E[y | do(1), x] - E[y | do(0), x] of every row.

        Args:
            X: (M, F) covariates; None means the fitted rows.

        Returns:
            (M,), in the units of y.

        Raises:
            TableError: X does not fit the fitted table.
        """
        check_is_fitted(self)
        return self._cate(self._read_rows(X))

    def ate(self, X: Data | None = None) -> float:
        """Average treatment effect: the mean of `cate` over the rows of X.

        Args:
            X: (M, F) covariates; None means the fitted rows.

        Raises:
            TableError: X does not fit the fitted table, or has no rows.
        """
        check_is_fitted(self)
        return self._ate(self._read_rows(X))

    def ate_interval(self, X: Data | None = None, alpha: float = 0.05) -> tuple[float, float]:
        """An interval for the average treatment effect over the rows of X.

        It is `ate(X)` plus and minus the normal quantile of 1 - alpha / 2 times a standard error.
        The standard error is the standard deviation of the same estimate from `n_resamples`
        random halves of the fitted table, each drawn without replacement within each treatment
        arm. (An estimate from half of the rows varies around the estimate from all of them as
        that one varies around the truth: the delete-half jackknife of Shao and Wu, 1989. Unlike a
        bootstrap it shows the model no row twice.) Of more than 1,024 rows to average over it uses
        so many at random for the standard error, which hardly changes it.

        What it covers: how much the estimate would change had other units of the same population
        been observed. The rows averaged over are held fixed. What it does not cover: confounders
        that were not measured, covariates that the treatment changed, and a population unlike
        everything in the prior of the checkpoint. With fewer than about ten rows in an arm it is
        rough.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            alpha: one minus the confidence level.

        Returns:
            The lower and the upper end, in the units of y.

        Raises:
            TableError: X does not fit the fitted table or has no rows, or an arm of the fitted
                table has only one row.
            ValueError: alpha is outside (0, 1).
        """
        check_is_fitted(self)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is {alpha!r}, but must lie between 0 and 1.")
        for arm in (0, 1):
            if np.count_nonzero(self.table_.t == arm) < 2:
                raise TableError(
                    f"the fitted table has a single row with treatment {arm}: an interval needs "
                    "at least 2 rows in each arm."
                )
        x = self._read_rows(X)
        estimate = self._ate(x)
        error = self.schema_.outcome.scale * self._ate_of_halves(x).std(ddof=1)
        reach = NormalDist().inv_cdf(1 - alpha / 2) * float(error)
        return estimate - reach, estimate + reach

    def save(self, path: str | Path) -> None:
        """Writes the fitted estimator to one file, for `load`.

        A zip archive of JSON and safetensors, without pickled code: the fitted rows (standardised),
        the settings, and the weights, so that it loads on any machine. An earlier saved estimator
        of that name is replaced once the new file is complete; any other file is left alone.

        Raises:
            FileExistsError: the path is something other than a saved estimator.
        """
        check_is_fitted(self)
        path = Path(path)
        if path.exists() and not _is_saved_estimator(path):
            raise FileExistsError(f"{path} exists and is no saved estimator: choose another name.")
        checkpoint = self.checkpoint_
        description = {
            "format": _FORMAT_VERSION,
            "settings": {
                **self.get_params(deep=False),
                "checkpoint": None if self.checkpoint is checkpoint else str(self.checkpoint),
            },
            "checkpoint_name": checkpoint.name,
            "schema": self.schema_.to_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            new = Path(temporary, "new")
            folder = Path(temporary, "checkpoint")
            save_checkpoint(folder, checkpoint.model, checkpoint.config, checkpoint.steps)
            with zipfile.ZipFile(new, "w") as archive:
                archive.writestr(_ESTIMATOR_FILE, json.dumps(description, indent=2, default=int))
                archive.writestr(_TABLE_FILE, safetensors.numpy.save(self.table_._asdict()))
                for name in _CHECKPOINT_FILES:
                    archive.write(Path(temporary, name), name)
            os.replace(new, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads an estimator that `save` wrote; it gives the same answers.

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
            except _DAMAGE as error:
                raise CheckpointError(f"{path}: not a saved estimator ({error}).") from error
            checkpoint = from_pretrained(Path(temporary, "checkpoint"))
        checkpoint = dataclasses.replace(checkpoint, name=name)
        settings["checkpoint"] = settings["checkpoint"] or checkpoint
        return cls(**settings)._remember(checkpoint, schema, table)

    def _remember(self, checkpoint: Checkpoint, schema: Schema, table: Table) -> Self:
        """Sets the fitted attributes."""
        rows, covariates = table.x.shape
        columns = min(-(-max(covariates, 1) // 4) * 4, max(checkpoint.covariates, 1))
        self._columns_exist = np.arange(columns) < covariates
        size = _padded_rows(rows)
        self.context_ = _encode(
            checkpoint.model, *_pad_table(table, size, columns), self._columns_exist
        )
        self.checkpoint_, self.schema_, self.table_ = checkpoint, schema, table
        self.n_features_in_ = covariates
        if schema.named:
            names = [column.name for column in schema.columns]
            self.feature_names_in_ = np.array(names, object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def _read_query(
        self, X: Data | None, t: Data
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Standardised covariates (M, F) and treatments (M,)."""
        treatment = read_treatment(np.atleast_1d(t) if np.ndim(t) == 0 else t)
        x = self.schema_.read_covariates(X, rows=len(treatment))
        if np.ndim(t) == 0:
            treatment = np.repeat(treatment, len(x))
        if len(treatment) != len(x):
            raise TableError(f"X has {len(x)} rows, but t has {len(treatment)}.")
        return x, treatment

    def _read_rows(self, X: Data | None) -> NDArray[np.float32]:
        """Standardised covariates (M, F); the fitted rows by default."""
        return self.table_.x if X is None else self.schema_.read_covariates(X)

    def _stream(
        self, x: NDArray[np.float32], t: NDArray[np.float32]
    ) -> Iterator[tuple[BarDistribution, int]]:
        """Answers about the standardised outcome, in chunks that are padded, and their lengths."""
        model, columns = self.checkpoint_.model, len(self._columns_exist)
        for rows in self._chunks(len(x), self.context_.mask.shape[-1]):
            part = x[rows]
            size = _padded_rows(len(part))
            answer = _predict(model, self.context_, _pad(part, size, columns), _pad(t[rows], size))
            yield answer, len(part)

    def _chunks(self, rows: int, context_rows: int) -> Iterator[slice]:
        """Slices of query rows within the memory budget; at least one, if it is empty."""
        tokens = self.context_.columns.token_mask.shape[-1]
        per_row = self.checkpoint_.config.model.heads * tokens * context_rows
        size = _power_of_two(_CHUNK_FLOATS / per_row, 16, _CHUNK_ROWS)
        for start in range(0, max(rows, 1), size):
            yield slice(start, min(start + size, rows))

    def _answer(
        self, x: NDArray[np.float32], t: NDArray[np.float32], summary: _Summary
    ) -> NDArray[np.float64]:
        """A summary of every row, standardised."""
        parts = [np.asarray(summary(answer))[:rows] for answer, rows in self._stream(x, t)]
        return np.concatenate(parts).astype(np.float64)

    def _cate(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        control, treated = (
            self._answer(x, np.full(len(x), arm, np.float32), _mean) for arm in (0, 1)
        )
        return self.schema_.outcome.scale * (treated - control)

    def _ate(self, x: NDArray[np.float32]) -> float:
        if not len(x):
            raise TableError("X has no rows to average over.")
        return float(self._cate(x).mean())

    def _ate_of_halves(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """The average effect by each of the random halves, (n_resamples,), standardised."""
        generator = np.random.default_rng(self.random_state)
        halves = [_random_half(self.table_.t, generator) for _ in range(self.n_resamples)]
        x = x[generator.permutation(len(x))[:_INTERVAL_ROWS]]

        model, columns = self.checkpoint_.model, len(self._columns_exist)
        size, queries = _padded_rows(max(map(len, halves))), _padded_rows(len(x))
        query, exists = _pad(x, queries, columns), np.arange(queries) < len(x)
        tokens = size * self.context_.columns.token_mask.shape[-1]
        config = model.config
        per_token = config.heads * max(size, queries) + 2 * config.layers * config.width
        batch = _power_of_two(_CHUNK_FLOATS / (tokens * per_token), 1, self.n_resamples)

        estimates = []
        for start in range(0, self.n_resamples, batch):
            # The last batch is filled up to the size that has been compiled.
            indices = [halves[i % self.n_resamples] for i in range(start, start + batch)]
            tables = [Table(*(part[rows] for part in self.table_)) for rows in indices]
            padded = zip(*(_pad_table(table, size, columns) for table in tables), strict=True)
            contexts = _encode_each(model, *map(np.stack, padded), self._columns_exist)
            estimates.append(np.asarray(_ate_each(model, contexts, query, exists)))
        return np.concatenate(estimates)[: self.n_resamples].astype(np.float64)


def _is_saved_estimator(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _ESTIMATOR_FILE in archive.namelist()


def _random_half(t: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.intp]:
    """Indices of half of the rows of each arm; of an odd number, half a row more or less."""
    arms = [np.flatnonzero(t == arm) for arm in (0, 1)]
    sizes = [max(1, (len(arm) + generator.integers(2)) // 2) for arm in arms]
    drawn = [generator.permutation(arm)[:size] for arm, size in zip(arms, sizes, strict=True)]
    return np.concatenate(drawn)


def _padded_rows(rows: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is at least `rows`."""
    power = 1 << max(4, (rows - 1).bit_length())
    return 3 * power // 4 if power > 16 and rows <= 3 * power // 4 else power


def _power_of_two(limit: float, lowest: int, highest: int) -> int:
    """The largest power of two within the limit, clipped to lowest and highest."""
    power = 1 << max(0, math.frexp(limit)[1] - 1)
    return max(lowest, min(power, 1 << (highest.bit_length() - 1)))


def _pad(values: NDArray, *shape: int) -> NDArray:
    """Zeros appended to every axis, up to the shape."""
    fill = [(0, size - length) for size, length in zip(shape, values.shape, strict=True)]
    return np.pad(values, fill)


def _pad_table(table: Table, rows: int, columns: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Covariates, treatment and outcome padded, and the mask of the rows that exist."""
    exists = np.arange(rows) < len(table.t)
    return _pad(table.x, rows, columns), _pad(table.t, rows), _pad(table.y, rows), exists
