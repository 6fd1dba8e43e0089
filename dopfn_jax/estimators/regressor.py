"""`DoPFNRegressor`: predictions and checks on top of the effects, and its life on disk.

Axes: N rows of the fitted table, M query rows, F covariates, Q buckets, S quantiles or samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from dopfn_jax.cells import Data, TableError
from dopfn_jax.estimators import archive
from dopfn_jax.estimators.batch import Question, answer_all
from dopfn_jax.estimators.diagnostics import (
    Overlap,
    Placebo,
    Summary,
    estimate_overlap,
    observational,
    unlike_prior,
)
from dopfn_jax.estimators.effects import INTERVAL_ROWS, EffectEstimator, reach_of
from dopfn_jax.estimators.fitting import check_covariates, find_device, read_query
from dopfn_jax.estimators.inference import Output
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.tables import Schema

_OUTPUTS = ("mean", "median", "mode", "quantiles", "distribution")


@jax.jit
def _draw(answer: BarDistribution, levels: jax.Array) -> jax.Array:
    """Quantiles of M distributions at levels (M, S) of their own."""

    def quantiles(logits: jax.Array, levels: jax.Array) -> jax.Array:
        return BarDistribution(logits, answer.borders).quantile(levels)

    return jax.vmap(quantiles)(answer.logits, levels)


class DoPFNRegressor(EffectEstimator):
    """Effects of a binary treatment on a numeric or 0/1 outcome, by in-context learning (Do-PFN).

    `fit` reads an observational table into a pre-trained transformer; nothing is trained. Queries
    are then answered with the distribution of the outcome under an intervention, p(y | do(t), x),
    averaged over all the causal structures that the table leaves possible, as far as the prior of
    the checkpoint knows them. Covariates must have been measured before the treatment.

    X may be a NumPy or JAX array, a list of rows, a pandas data frame, whose columns are matched by
    name, or None for a table without covariates; `dopfn_jax.tables.Schema.fit` says how text,
    categories, booleans and missing cells are read. All answers are in the units of y; those about
    an outcome that is 0 or 1 are probabilities.

    Effects: `cate`, `effect`, `ate`, `att`, `atc`, each with `_interval`; what an interval covers
    is said at `EffectEstimator`, and `individual_effect_interval` bounds one unit's own effect.

    Args:
        checkpoint: name of a shipped checkpoint, a folder, a hub repository ("hf:owner/name"), or a
            loaded `Checkpoint`.
        n_estimators: members of an ensemble, averaged in probability. Each but the first sees the
            columns in another order and random ones mirrored; of a table longer than `max_context`
            each reads other rows.
        transforms: what the members do to the table in turn: "none" leaves it as it is,
            "quantile_x" and "quantile_y" take covariates or the outcome to normal quantiles of
            their ranks, "log_y" takes the logarithm of outcomes far from the median. Their
            distributions are mapped back before they are averaged. Intervals, `placebo` and
            `predict_batch` read the table as it is.
        n_resamples: random halves of the table that intervals look at.
        max_context: the most rows that are read at once. The time of `fit` grows with their square.
            A longer table needs n_estimators > 1.
        cache: keep the encoded context between calls; `cache_bytes_` says what it takes. False
            encodes anew in every call.
        device: where to compute, such as "cpu" or "gpu:1"; None for JAX's default.
        random_state: seed of everything random; None draws anew each time.
        verbose: show progress bars, on a terminal, for what takes more than two seconds.

    Attributes:
        checkpoint_: the loaded Checkpoint.
        schema_: names, categories and units of the columns.
        table_: the fitted rows, standardised.
        seed_: what the views were drawn with: `random_state`, or a fresh one for None.
        views_: what each member of the ensemble sees.
        contexts_: the encoded rows of each member, which all queries share; empty without cache.
        cache_bytes_: their size: with L layers, C tokens per row and width D about 8 L C N D bytes
            for each member.
        n_features_in_: how many covariates there are, before categories become indicators.
        feature_names_in_: (F,) names of the columns, if X was a data frame.
    """

    @overload
    def predict(
        self,
        X: Data | None,
        t: Data,
        output_type: Output = "mean",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> NDArray[np.float64]: ...
    @overload
    def predict(
        self, X: Data | None, t: Data, output_type: Literal["distribution"]
    ) -> BarDistribution: ...
    def predict(
        self,
        X: Data | None,
        t: Data,
        output_type: Output | Literal["distribution"] = "mean",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> NDArray[np.float64] | BarDistribution:
        """Summaries of p(y | do(t), x), in the units of y.

        For a 0/1 outcome the mean is the probability of 1, and the others are 0 or 1.

        Args:
            X: (M, F) covariates; None if the table has none.
            t: (M,) treatment that is set, 0 or 1, or one value for all rows.
            output_type: which summary; the mean is E[y | do(t), x].
            quantiles: S probabilities between 0 and 1, for output_type "quantiles".

        Returns:
            (M,), or (M, S) for quantiles, or what `predict_distribution` gives.

        Raises:
            TableError: X or t do not fit the fitted table.
            ValueError: unknown output_type, or a probability outside (0, 1).
        """
        if output_type == "distribution":
            return self.predict_distribution(X, t)
        levels = _check_output(output_type, quantiles)
        x, treatment = self._read_query(X, t)
        outcome = self.schema_.outcome
        if output_type == "mean" or self.schema_.binary_outcome:
            mean = outcome.restore(self._means(x, treatment, self._contexts).mean(axis=0))
            if self.schema_.binary_outcome:
                # A mean within the bounds may be restored to a bit outside of them.
                return _of_binary(mean.clip(0, 1), output_type, levels)
            return mean
        return outcome.restore(self._answer(x, treatment, output_type, levels))

    def predict_distribution(self, X: Data | None, t: Data) -> BarDistribution:
        """The full distribution p(y | do(t), x) of every query row; arguments as for `predict`.

        The model knows no discrete outcomes: of a 0/1 outcome this is its density around 0 and 1.

        Returns:
            A BarDistribution with batch shape (M,), float32, in the units of y.

        Raises:
            TableError: X or t do not fit the fitted table, or the outcome lies so far from zero,
                compared with its spread, that float32 cannot tell its values apart; `predict` has
                no such limit.
        """
        answers = list(self._distributions(*self._read_query(X, t)))
        logits = np.concatenate(
            [np.asarray(answer.logits)[: rows.stop - rows.start] for answer, rows in answers]
        )
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

    def sample(
        self, X: Data | None, t: Data, n: int, key: jax.Array | int | None = None
    ) -> NDArray[np.float64]:
        """Draws from p(y | do(t), x); of a 0/1 outcome, zeros and ones.

        Draws are independent, also those of one row under its two treatments: these are draws of
        the two marginals, so the spread of their differences is not that of individual effects,
        which no data show. See `individual_effect_interval`.

        Args:
            X: (M, F) covariates; None if the table has none.
            t: (M,) treatment that is set, 0 or 1, or one value for all rows.
            n: draws for each row.
            key: a JAX random key, or a seed; None means `random_state`.

        Returns:
            (n, M), in the units of y.

        Raises:
            TableError: X or t do not fit the fitted table.
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(f"n is {n!r}, but must be 1 or more.")
        x, treatment = self._read_query(X, t)
        if key is None:
            key = int(np.random.default_rng(self.random_state).integers(2**31))
        key = jax.random.key(key) if isinstance(key, int | np.integer) else key
        # Levels of their own for each arm: shared ones would pair the ranks of the two outcomes.
        # Off zero, so that no draw is infinite.
        control, treated = (
            np.asarray(jax.random.uniform(arm, (len(x), n), minval=2.0**-24))
            for arm in jax.random.split(key)
        )
        levels = np.where(treatment[:, None] == 1, treated, control)
        if self.schema_.binary_outcome:
            return (self.predict(X, t) > levels.T).astype(np.float64)
        draws = np.zeros((n, len(x)))
        for answer, rows in self._distributions(x, treatment):
            padding = np.full((len(answer.logits) - (rows.stop - rows.start), n), 0.5, np.float32)
            drawn = np.asarray(_draw(answer, np.concatenate([levels[rows], padding])))
            draws[:, rows] = drawn[: rows.stop - rows.start].T
        return self.schema_.outcome.restore(draws)

    def overlap(self) -> Overlap:
        """How comparable the fitted arms are: propensities and effective sample sizes.

        A cross-fitted logistic regression, so nothing of the transformer: a check from outside.

        Raises:
            TableError: an arm of the fitted table has only one row.
        """
        check_is_fitted(self)
        self._require_two_rows_per_arm("overlap")
        return estimate_overlap(self.table_)

    def placebo(self, n: int = 19) -> Placebo:
        """Effects of the treatment shuffled among the rows, which should scatter around 0.

        Of more than 1,024 rows, so many random ones are averaged over.

        Args:
            n: how often to shuffle.

        Raises:
            ValueError: n is below 1.
            TableError: the fitted table is longer than `max_context`.
        """
        check_is_fitted(self)
        if n < 1:
            raise ValueError(f"n is {n!r}, but must be 1 or more.")
        if self._is_subsampled:
            raise TableError("placebo reads whole tables: fit a sample of max_context rows for it.")
        generator = np.random.default_rng(self.random_state)
        x = self.table_.x[generator.permutation(len(self.table_.x))[:INTERVAL_ROWS]]
        shuffled = [self.table_._replace(t=generator.permutation(self.table_.t)) for _ in range(n)]
        effects = self._effects_by_tables([self.table_, *shuffled], x)
        ate, *placebos = effects.mean(axis=1)
        p_value = (1 + np.count_nonzero(np.abs(placebos) >= abs(ate))) / (n + 1)
        return Placebo(float(ate), np.array(placebos), float(p_value))

    def summary(self, *, alpha: float = 0.05) -> Summary:
        """Average effects with intervals, arm sizes, overlap and warnings; print it to read it.

        Args:
            alpha: one minus the level of the intervals.

        Raises:
            TableError: an arm of the fitted table has only one row.
            ValueError: alpha is outside (0, 1).
        """
        reach = reach_of(alpha)
        overlap = self.overlap()
        treated = self.table_.t == 1
        effects = self._member_effects(self.table_.x)
        groups = [np.arange(len(treated)), np.flatnonzero(treated), np.flatnonzero(~treated)]
        estimates = [float(effects[:, rows].mean()) for rows in groups]
        least = self._least_errors(None, 1, 0)
        errors = reach * self._errors_of_averages(self.table_.x, groups, least)
        ate, att, atc = (
            (estimate, (estimate - error, estimate + error))
            for estimate, error in zip(estimates, errors.tolist(), strict=True)
        )
        aipw, aipw_error = self._aipw()
        y = self.table_.y.astype(np.float64)
        several = len(self.views_) > 1
        return Summary(
            ate=ate[0],
            ate_interval=ate[1],
            att=att[0],
            att_interval=att[1],
            atc=atc[0],
            atc_interval=atc[1],
            aipw_ate=aipw,
            aipw_ate_interval=(aipw - reach * aipw_error, aipw + reach * aipw_error),
            alpha=alpha,
            difference_in_means=float(
                self.schema_.outcome.scale * (y[treated].mean() - y[~treated].mean())
            ),
            rows=len(treated),
            covariates=self.n_features_in_,
            arm_sizes=overlap.arm_sizes,
            effective_sizes=overlap.effective_sizes,
            extreme_share=overlap.extreme_share,
            binary_outcome=self.schema_.binary_outcome,
            member_spread=float(effects.mean(axis=1).std(ddof=1)) if several else None,
            cache_bytes=self.cache_bytes_,
            checkpoint=self.checkpoint_.name,
            warnings=(
                *observational(self.checkpoint_),
                *overlap.warnings,
                *self._missed_levels(),
                *unlike_prior(self.table_, self.checkpoint_),
            ),
        )

    def predict_batch(
        self,
        tables: Sequence[tuple[Data | None, Data, Data, Data | None, Data]],
        output_type: Output = "mean",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        mesh: Mesh | None = None,
    ) -> list[NDArray[np.float64]]:
        """Answers for many tables at once: each as if `fit(X, t, y).predict(query_X, query_t)`.

        Tables of similar size share a call of the model, so this is for many small ones, with few
        queries each: all queries of a table are answered in one piece. It uses the settings of this
        estimator with one member, and neither needs nor changes what it is fitted on. Unlike `fit`
        it does not warn of tables that are unlike the prior.

        Args:
            tables: tuples (X, t, y, query_X, query_t).
            output_type: which summary, as for `predict`.
            quantiles: S probabilities, for output_type "quantiles".
            mesh: devices to spread the tables over, for example `dopfn_jax.sharding.make_mesh()`.

        Returns:
            For each table (M,), or (M, S) for quantiles.

        Raises:
            TableError: a table that cannot be used; the message says which.
            ValueError: an output_type that is unknown or "distribution", or a probability outside
                (0, 1).
        """
        levels = _check_output(output_type, quantiles)
        if output_type == "distribution":
            raise ValueError(
                "output_type is 'distribution', which predict_batch does not give: ask for "
                "quantiles, or fit each table on its own."
            )
        checkpoint = self._load_checkpoint()
        schemas, questions = [], []
        for index, (X, t, y, query_X, query_t) in enumerate(tables):
            try:
                schema, table = Schema.fit(X, t, y, checkpoint.covariates)
                check_covariates(checkpoint, table.x.shape[1])
                if len(table.t) > self.max_context:
                    raise TableError(
                        f"has {len(table.t):,} rows, more than max_context = {self.max_context:,}: "
                        "fit it on its own."
                    )
                questions.append(Question(table, *read_query(schema, query_X, query_t)))
            except TableError as error:
                raise TableError(f"table {index}: {error}") from error
            schemas.append(schema)
        network = self._network(checkpoint, checkpoint.covariates)
        answers: list[NDArray[np.float64]] = [np.empty(0)] * len(questions)
        for binary in (False, True):
            chosen = [i for i, schema in enumerate(schemas) if schema.binary_outcome == binary]
            output = "mean" if binary else output_type
            found = answer_all(network, [questions[i] for i in chosen], mesh, output, levels)
            for i, answer in zip(chosen, found, strict=True):
                restored = schemas[i].outcome.restore(answer)
                answers[i] = (
                    _of_binary(restored.clip(0, 1), output_type, levels) if binary else restored
                )
        return answers

    def save(self, path: str | Path) -> None:
        """Writes the fitted estimator to one file, for `load`.

        A zip archive of JSON and safetensors, without pickled code: the fitted rows (standardised),
        the settings, and the weights, so that it loads on any machine. An earlier saved estimator
        of that name is replaced once the new file is complete; any other file is left alone.

        Raises:
            FileExistsError: the path is something other than a saved estimator.
        """
        check_is_fitted(self)
        # What members read was decided by `fit`, whatever has been set since.
        settings = {**self.get_params(deep=False), **self._settings_of_views}
        saved = archive.Saved(settings, self.checkpoint_, self.schema_, self.table_, self.seed_)
        archive.write(Path(path), saved)

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Reads an estimator that `save` wrote; it gives the same answers.

        Args:
            path: the file.
            device: where to compute from now on; the file does not say.

        Raises:
            FileNotFoundError: nothing there.
            CheckpointError: not a saved estimator, a damaged one, or one of a later version.
        """
        saved = archive.read(path)
        find_device(device)
        model = cls(**{**saved.settings, "device": device})
        return model._remember(saved.checkpoint, saved.schema, saved.table, saved.seed)


def _check_output(output_type: str, quantiles: Sequence[float]) -> NDArray[np.float32]:
    """The levels of the quantiles, checked."""
    if output_type not in _OUTPUTS:
        known = ", ".join(map(repr, _OUTPUTS))
        raise ValueError(f"output_type is {output_type!r}, but must be one of {known}.")
    levels = np.asarray(quantiles, np.float32)
    if levels.ndim != 1:
        raise ValueError(f"quantiles are {quantiles!r}, but must be a list, such as [0.05, 0.95].")
    if not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"quantiles are {quantiles!r}, but must lie between 0 and 1.")
    return levels


def _of_binary(
    probability: NDArray[np.float64], output_type: str, levels: NDArray[np.float32]
) -> NDArray[np.float64]:
    """A summary of outcomes that are 1 with this probability and else 0."""
    if output_type == "mean":
        return probability
    if output_type == "quantiles":
        return (levels > 1 - probability[:, None]).astype(np.float64)
    return (probability > 0.5).astype(np.float64)
