"""Settings, fit, and expected outcomes of queries: what every answer of the estimator rests on.

Axes: K members of the ensemble, R resamples, N rows of the fitted table, M query rows, F
covariates.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, cast

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from dopfn_jax.cells import Data, TableError
from dopfn_jax.checkpoints import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    checkpoint_names,
    from_pretrained,
)
from dopfn_jax.estimators.diagnostics import UnlikePriorWarning, unlike_prior
from dopfn_jax.estimators.inference import (
    Network,
    Output,
    encoding_bytes,
    mixture,
    padded_columns,
    summarise,
)
from dopfn_jax.estimators.transforms import TRANSFORMS, Transform
from dopfn_jax.estimators.views import View, context_share, draw_views, random_part
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.model.transformer import EncodedContext
from dopfn_jax.tables import Schema, Table, check_order, read_treatment


class InContextEstimator(BaseEstimator):
    """Reads a table, keeps its encoded context, and knows the expected outcome of query rows.

    The arguments and attributes are those of `DoPFNRegressor`.
    """

    checkpoint_: Checkpoint
    schema_: Schema
    table_: Table
    seed_: int
    views_: list[View]
    contexts_: list[EncodedContext]
    n_features_in_: int

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint = DEFAULT_CHECKPOINT,
        *,
        n_estimators: int = 1,
        transforms: Sequence[Transform] = ("none",),
        n_resamples: int = 32,
        max_context: int = 10_000,
        cache: bool = True,
        device: str | None = None,
        random_state: int | None = 0,
        verbose: bool = False,
    ):
        self.checkpoint = checkpoint
        self.n_estimators = n_estimators
        self.transforms = transforms
        self.n_resamples = n_resamples
        self.max_context = max_context
        self.cache = cache
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Data | None, t: Data, y: Data) -> Self:
        """Reads an observational table.

        Args:
            X: (N, F) covariates from before the treatment; None for none.
            t: (N,) observed treatment, 0 and 1 or booleans.
            y: (N,) observed outcome; if it holds 0 and 1 only, answers are probabilities of 1.

        Returns:
            Itself.

        Warns:
            UnlikePriorWarning: the table does not look like those that the checkpoint was trained
                on; the message says in what.

        Raises:
            TableError: a shape, column or value that cannot be used (a constant outcome and a
                single treatment arm among them), more covariates than the checkpoint has been
                trained for, or more rows than `max_context` with `n_estimators=1`.
            CheckpointError: no such checkpoint, or a damaged one.
            ValueError: a setting that makes no sense, or a device that is not there.
        """
        checkpoint = self._load_checkpoint()
        schema, table = Schema.fit(X, t, y, checkpoint.covariates)
        rows, covariates = table.x.shape
        check_covariates(checkpoint, covariates)
        if rows > self.max_context and self.n_estimators < 2:
            columns = padded_columns(covariates, checkpoint.covariates)
            memory = encoding_bytes(checkpoint.config.model, rows, columns) / 1e9
            raise TableError(
                f"the table has {rows:,} rows, more than max_context = {self.max_context:,}: set "
                "n_estimators to 4 or more, to average over random subsamples of that size, or "
                f"raise max_context where about {memory:.1f} GB of memory can be had for {rows:,} "
                "rows."
            )
        for message in unlike_prior(table, checkpoint):
            warnings.warn(message, UnlikePriorWarning, stacklevel=2)
        # A seed of its own where none was given, so that a saved estimator draws the same views.
        seed = cast(int, np.random.SeedSequence(self.random_state).entropy)
        return self._remember(checkpoint, schema, table, seed)

    def __sklearn_is_fitted__(self) -> bool:
        """Whether a fit has come to its end; the contexts are set last."""
        return hasattr(self, "contexts_")

    @property
    def cache_bytes_(self) -> int:
        """Memory that the encoded contexts take between calls; 0 with `cache=False`."""
        check_is_fitted(self)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.contexts_))

    def _load_checkpoint(self) -> Checkpoint:
        """Checks the settings, and loads the checkpoint."""
        self._require_settings(n_estimators=1, n_resamples=2, max_context=2)
        seed = self.random_state
        if seed is not None and not (isinstance(seed, int | np.integer) and seed >= 0):
            raise ValueError(
                f"random_state is {seed!r}, but must be an integer of 0 or more, or None."
            )
        _check_transforms(self.transforms, self.n_estimators)
        find_device(self.device)
        if isinstance(self.checkpoint, Checkpoint):
            return self.checkpoint
        if self.checkpoint in checkpoint_names():
            return _load_shipped(str(self.checkpoint))
        return from_pretrained(self.checkpoint)

    def _require_settings(self, **least: int) -> None:
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but must be {lowest} or more."
                )

    def _remember(self, checkpoint: Checkpoint, schema: Schema, table: Table, seed: int) -> Self:
        """Sets the fitted attributes.

        The old contexts go first: should encoding fail, nothing answers from another table.
        """
        if hasattr(self, "contexts_"):
            del self.contexts_
        self.checkpoint_, self.schema_, self.table_ = checkpoint, schema, table
        self.seed_ = seed
        self.n_features_in_ = len(schema.columns)
        if schema.named:
            names = [column.name for column in schema.columns]
            self.feature_names_in_ = np.array(names, object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.network_ = self._network(checkpoint, table.x.shape[1])
        decided = ("n_estimators", "max_context", "transforms")
        self._settings_of_views = {setting: getattr(self, setting) for setting in decided}
        self.views_ = draw_views(table, self.n_estimators, self.max_context, seed, self.transforms)
        self.contexts_ = list(self._encode()) if self.cache else []
        return self

    def _network(self, checkpoint: Checkpoint, covariates: int) -> Network:
        model = checkpoint.model
        if self.device is not None:
            model = jax.device_put(model, find_device(self.device))
        return Network(model, covariates, checkpoint.covariates, self.verbose)

    def _encode(self) -> Iterator[EncodedContext]:
        """The context of every member."""
        for view in self.network_.progress(self.views_, "contexts"):
            yield self.network_.encode(view.table(self.table_))

    @property
    def _contexts(self) -> Sequence[EncodedContext]:
        """The kept contexts, or new ones for this call."""
        return self.contexts_ or list(self._encode())

    @property
    def _is_subsampled(self) -> bool:
        """Whether members read different rows of a table that is longer than `max_context`."""
        return len(self.views_[0].rows) < len(self.table_.t)

    def _read_query(
        self, X: Data | None, t: Data
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Standardised covariates (M, F) and treatments (M,)."""
        check_is_fitted(self)
        return read_query(self.schema_, X, t)

    def _read_rows(self, X: Data | None) -> NDArray[np.float32]:
        """Standardised covariates (M, F); the fitted rows by default."""
        check_is_fitted(self)
        return self.table_.x if X is None else self.schema_.read_covariates(X)

    def _distributions(
        self, x: NDArray[np.float32], t: NDArray[np.float32]
    ) -> Iterator[tuple[BarDistribution, slice]]:
        """Distributions of the standardised outcome, averaged over members, as `answers` yields."""
        contexts = self._contexts
        # Members that read a few rows more or less have contexts of other lengths, and still cut
        # the queries in the same places.
        longest = max(context.mask.shape[-1] for context in contexts)
        streams = [
            self._member_distributions(context, view, x, t, longest)
            for context, view in zip(contexts, self.views_, strict=True)
        ]
        if len(streams) == 1:
            yield from streams[0]
            return
        # Members that read different rows, or transform y, answer between borders of their own.
        transformed = any(view.transform.y is not None for view in self.views_)
        common = self._is_subsampled or transformed
        borders = self.network_.model.borders[...] if common else None
        for members in zip(*streams, strict=True):
            yield mixture([answer for answer, _ in members], borders), members[0][1]

    def _member_distributions(
        self,
        context: EncodedContext,
        view: View,
        x: NDArray[np.float32],
        t: NDArray[np.float32],
        context_rows: int = 0,
    ) -> Iterator[tuple[BarDistribution, slice]]:
        """Distributions of the standardised outcome by one member, in chunks as `answers` cuts."""
        for answer, rows in self.network_.answers(context, view.covariates(x), t, context_rows):
            yield view.transform.restore(answer), rows

    def _answer(
        self,
        x: NDArray[np.float32],
        t: NDArray[np.float32],
        output: Output,
        levels: ArrayLike = (),
    ) -> NDArray[np.float64]:
        """A summary of every row's distribution, standardised."""
        parts = [
            np.asarray(summarise(answer, output, np.asarray(levels, np.float32)))[
                : rows.stop - rows.start
            ]
            for answer, rows in self._distributions(x, t)
        ]
        return np.concatenate(parts).astype(np.float64)

    def _means(
        self, x: NDArray[np.float32], t: NDArray[np.float32], contexts: Sequence[EncodedContext]
    ) -> NDArray[np.float64]:
        """E[y | do(t), x] by every member, (K, M), standardised; of a 0/1 outcome within 0 and 1.

        A mean of means, unlike the mixture's mean, does not depend on how buckets line up.
        """
        means = np.zeros((len(contexts), len(x)))
        for member, (context, view) in enumerate(zip(contexts, self.views_, strict=True)):
            for answer, rows in self._member_distributions(context, view, x, t):
                mean = np.asarray(summarise(answer, "mean", np.zeros(0, np.float32)))
                means[member, rows] = mean[: rows.stop - rows.start]
        return np.clip(means, *self._bounds)

    def _member_effects(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """CATE by every member, (K, M), in the units of y."""
        contexts = self._contexts
        control, treated = (
            self._means(x, np.full(len(x), arm, np.float32), contexts) for arm in (0, 1)
        )
        return self.schema_.outcome.scale * (treated - control)

    def _resampled_effects(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        """CATE by each random part of the table, and what turns its variance into an error's.

        A part is half of the rows of each arm, or `max_context` rows if these are fewer. An
        estimate from m of N rows varies around that from all of them with variance v (1/m - 1/N),
        where the estimate from all of them has variance v / N: the factor m / (N - m), 1 for
        halves. An average over K subsamples adds the first of these over K.

        Returns:
            (R, M) effects, in the units of y, and the factor.

        Raises:
            TableError: an arm of the fitted table has only one row.
        """
        self._require_two_rows_per_arm("an interval")
        self._require_settings(n_resamples=2)  # which may have been set since `fit`
        rows = len(self.table_.t)
        share = min(0.5, context_share(rows, self.max_context))
        generator = np.random.default_rng(self.random_state)
        parts = [random_part(self.table_.t, share, generator) for _ in range(self.n_resamples)]
        tables = [Table(*(column[part] for column in self.table_)) for part in parts]
        factor = share / (1 - share)
        if self._is_subsampled:
            factor += 1 / len(self.views_)
        return self._effects_by_tables(tables, x), factor

    def _effects_by_tables(
        self, tables: Sequence[Table], x: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """CATE of x by each of other tables in the terms of the fitted one, in the units of y."""
        effects = self.network_.effects_by_tables(tables, x, self._bounds)
        return self.schema_.outcome.scale * effects

    def _require_two_rows_per_arm(self, purpose: str) -> None:
        for arm in (0, 1):
            if np.count_nonzero(self.table_.t == arm) < 2:
                raise TableError(
                    f"the fitted table has a single row with treatment {arm}: {purpose} needs "
                    "at least 2 rows in each arm."
                )

    @property
    def _bounds(self) -> tuple[float, float]:
        """Between which expected outcomes lie, standardised."""
        if not self.schema_.binary_outcome:
            return -np.inf, np.inf
        outcome = self.schema_.outcome
        return -outcome.loc / outcome.scale, (1 - outcome.loc) / outcome.scale


@functools.lru_cache
def _load_shipped(name: str) -> Checkpoint:
    """Weights inside the package do not change; a folder may, so every fit reads it anew."""
    return from_pretrained(name)


def read_query(
    schema: Schema, X: Data | None, t: Data
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Standardised covariates (M, F) and treatments (M,), of which a scalar stands for all rows.

    Raises:
        TableError: X or t do not fit the schema or each other.
    """
    check_order(X=X, t=t)
    treatment = read_treatment(np.atleast_1d(t) if np.ndim(t) == 0 else t)
    x = schema.read_covariates(X, rows=len(treatment))
    if np.ndim(t) == 0:
        treatment = np.repeat(treatment, len(x))
    if len(treatment) != len(x):
        raise TableError(f"X has {len(x)} rows, but t has {len(treatment)}.")
    return x, treatment


def _check_transforms(transforms: Sequence[Transform], members: int) -> None:
    if not transforms or not set(transforms) <= set(TRANSFORMS):
        known = ", ".join(map(repr, TRANSFORMS))
        raise ValueError(f"transforms are {transforms!r}, but must be a tuple of some of {known}.")
    if len(transforms) > members:
        raise ValueError(
            f"transforms has {len(transforms)} entries, but n_estimators is {members}: every one "
            "needs a member of its own."
        )


def check_covariates(checkpoint: Checkpoint, covariates: int) -> None:
    """Raises TableError where a table is wider than the checkpoint has been trained for."""
    if covariates > checkpoint.covariates:
        raise TableError(
            f"X has {covariates} covariates, but checkpoint {checkpoint.name!r} has been "
            f"trained for at most {checkpoint.covariates}: choose the most relevant ones."
        )


def find_device(name: str | None) -> jax.Device | None:
    """The device that "cpu", "gpu" or "gpu:1" names.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return None
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        known = ", ".join(f"{d.platform}:{i}" for i, d in enumerate(jax.devices()))
        raise ValueError(f"device is {name!r}, but there are only {known}.") from error
