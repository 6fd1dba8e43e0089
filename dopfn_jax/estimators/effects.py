"""The effect vocabulary: conditional, average and subgroup effects, each with its interval.

Axes: R resamples, N rows of the fitted table, M query rows, F covariates, G groups.
"""

from collections.abc import Iterator
from statistics import NormalDist
from typing import overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from dopfn_jax.cells import Data, TableError
from dopfn_jax.estimators.diagnostics import estimate_overlap, least_propensity
from dopfn_jax.estimators.fitting import InContextEstimator
from dopfn_jax.estimators.subgroups import By, group_rows, index_of
from dopfn_jax.tables import check_order, read_treatment

# Which of the fitted rows an average is over: indices of a subgroup, an arm, or None for all.
Part = NDArray[np.intp] | int | None

# The standard error of an average over more rows than this is that over so many random ones.
INTERVAL_ROWS = 1024
# Standard errors by which an arm's answers may miss its outcomes before `summary` says so.
_MISSED_LEVEL = 2.5
# Levels at which the bounds of an individual effect are looked for.
_LEVELS = 64


class EffectEstimator(InContextEstimator):
    """Effects of the treatment, in the vocabulary of EconML.

    Every `_interval` method but `individual_effect_interval` and `aipw_ate_interval`, which say
    what they are, is the estimate plus and minus the normal quantile of 1 - alpha / 2 times a
    standard error: the spread of the same estimate over `n_resamples` random halves of the fitted
    table, drawn without replacement within each arm. (An estimate from half of the rows varies
    around that from all of them as that one varies around the truth: the delete-half jackknife of
    Shao and Wu, 1989. Unlike a bootstrap it shows the model no row twice.) With the default seed
    the halves are always the same.

    Estimates that are drawn towards what the prior deems likely spread less than they err. So the
    standard error of an average is never taken to be smaller than that of `aipw_ate`, which no
    estimator without a prior undercuts in large tables (Hahn, 1998), nor than the distance between
    `ate` and `aipw_ate`; for a subgroup or an arm of the fitted table, also not smaller than the
    same of its own rows. Of other rows no outcomes are known that could show as much.

    What such an interval covers: how much the estimate would change had other units of the same
    population been observed. The rows asked about are held fixed. What it does not cover:
    confounders that were not measured, covariates that the treatment changed, and a population
    unlike everything in the prior of the checkpoint. It is about a mean, never about one
    individual. With fewer than about ten rows in an arm it is rough.
    """

    def effect(self, X: Data | None = None, T0: Data = 0, T1: Data = 1) -> NDArray[np.float64]:
        """E[y | do(T1), x] - E[y | do(T0), x] of every row: the mean effect in units like it.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            T0: treatment of the comparison, 0 or 1, one for all rows or (M,).
            T1: treatment of interest, likewise.

        Returns:
            (M,), in the units of y; a difference of probabilities for a 0/1 outcome.

        Raises:
            TableError: X, T0 or T1 do not fit the fitted table.
        """
        check_order(X=X, T0=T0, T1=T1)
        x = self._read_rows(X)
        direction = read_direction(T0, T1, len(x))
        # A row that is compared with itself or backwards needs no answer of its own.
        return direction * self._member_effects(x).mean(axis=0)

    def effect_interval(
        self, X: Data | None = None, T0: Data = 0, T1: Data = 1, *, alpha: float = 0.05
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """An interval for `effect` of every row; the class says what it covers.

        It is about the mean effect in units like this one. An individual's effect spreads more
        widely, and by how much the data cannot tell: see `individual_effect_interval`.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            T0: treatment of the comparison, 0 or 1, one for all rows or (M,).
            T1: treatment of interest, likewise.
            alpha: one minus the confidence level, for each row on its own.

        Returns:
            Lower and upper ends, (M,) each, in the units of y.

        Raises:
            TableError: X, T0 or T1 do not fit the fitted table, or an arm of it has a single row.
            ValueError: alpha is outside (0, 1).
        """
        reach = reach_of(alpha)
        check_order(X=X, T0=T0, T1=T1)
        x = self._read_rows(X)
        direction = read_direction(T0, T1, len(x))
        estimate = direction * self._member_effects(x).mean(axis=0)
        effects, factor = self._resampled_effects(x)
        error = np.abs(direction) * np.sqrt(factor) * effects.std(axis=0, ddof=1)
        return estimate - reach * error, estimate + reach * error

    def cate(self, X: Data | None = None) -> NDArray[np.float64]:
        """Conditional average treatment effect E[y | do(1), x] - E[y | do(0), x]: `effect(X)`.

        Args:
            X: (M, F) covariates; None means the fitted rows.

        Returns:
            (M,), in the units of y.

        Raises:
            TableError: X does not fit the fitted table.
        """
        return self.effect(X)

    def cate_interval(
        self, X: Data | None = None, *, alpha: float = 0.05
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """An interval for `cate` of every row: `effect_interval(X, alpha=alpha)`."""
        return self.effect_interval(X, alpha=alpha)

    def individual_effect_interval(
        self, X: Data | None = None, *, alpha: float = 0.05
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds that hold a unit's own effect y(1) - y(0) with probability 1 - alpha or more.

        No data show both outcomes of a unit, so the two distributions that the model gives do not
        determine how their difference is spread. These are the tightest bounds on its quantiles
        alpha / 2 and 1 - alpha / 2 that hold however the two outcomes depend on each other
        (Makarov, 1981; Fan and Park, 2010). They are valid as far as the model's two distributions
        are, and usually wide: that is what the data allow to be said.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            alpha: one minus the probability.

        Returns:
            Lower and upper ends, (M,) each, in the units of y.

        Raises:
            TableError: X does not fit the fitted table.
            ValueError: alpha is outside (0, 1).
        """
        reach_of(alpha)
        x = self._read_rows(X)
        if self.schema_.binary_outcome:
            return self._binary_effect_interval(x, alpha)
        low = alpha / 2 * (np.arange(_LEVELS, dtype=np.float32) + 0.5) / _LEVELS
        levels = np.concatenate([low, 1 - alpha / 2 + low])

        control, treated = (
            self._answer(x, np.full(len(x), arm, np.float32), "quantiles", levels) for arm in (0, 1)
        )
        lower = (treated[:, :_LEVELS] - control[:, _LEVELS:]).max(axis=1)
        upper = (treated[:, _LEVELS:] - control[:, :_LEVELS]).min(axis=1)
        scale = self.schema_.outcome.scale
        return scale * lower, scale * upper

    @overload
    def ate(self, X: Data | None = None, *, by: None = None) -> float: ...
    @overload
    def ate(self, X: Data | None = None, *, by: By) -> pd.Series: ...
    def ate(self, X: Data | None = None, *, by: By | None = None) -> float | pd.Series:
        """Average treatment effect: the mean of `cate` over the rows of X, or over subgroups.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            by: subgroups: the name of a covariate (in an array its position), or (M,) labels, for
                example a mask or the result of `pandas.cut`. Labels of the fitted rows go by
                position, whatever their index.

        Returns:
            In the units of y: a number, or with `by` a series with one per subgroup.

        Raises:
            TableError: X or `by` do not fit the fitted table or each other, or X has no rows.
        """
        check_order(X=X, by=by)
        x = self._read_rows(X)
        if by is None:
            return self._average(x)
        groups = group_rows(by, x, self.schema_)
        effects = self._member_effects(x).mean(axis=0)
        averages = [effects[rows].mean() for rows in groups.values()]
        return pd.Series(averages, index=index_of(groups, by), name="ate", dtype=float)

    @overload
    def ate_interval(
        self, X: Data | None = None, *, alpha: float = 0.05, by: None = None
    ) -> tuple[float, float]: ...
    @overload
    def ate_interval(
        self, X: Data | None = None, *, alpha: float = 0.05, by: By
    ) -> pd.DataFrame: ...
    def ate_interval(
        self, X: Data | None = None, *, alpha: float = 0.05, by: By | None = None
    ) -> tuple[float, float] | pd.DataFrame:
        """An interval for `ate`; the class says what it covers.

        Of more than 1,024 rows to average over, so many random ones give the standard error, which
        hardly changes it.

        Args:
            X: (M, F) covariates; None means the fitted rows.
            by: subgroups, as for `ate`.
            alpha: one minus the confidence level, for each subgroup on its own.

        Returns:
            The lower and the upper end, in the units of y; with `by` a frame with columns lower and
            upper and a row per subgroup.

        Raises:
            TableError: X or `by` do not fit the fitted table or each other, X has no rows, or an
                arm of the fitted table has only one row.
            ValueError: alpha is outside (0, 1).
        """
        reach = reach_of(alpha)
        check_order(X=X, by=by)
        x = self._read_rows(X)
        if by is None:
            return self._interval_of_average(x, alpha, None)
        groups = group_rows(by, x, self.schema_)
        effects = self._member_effects(x).mean(axis=0)
        estimates = np.array([effects[rows].mean() for rows in groups.values()])
        parts = list(groups.values())
        least = self._least_errors(*(parts if X is None else [None] * len(parts)))
        errors = reach * self._errors_of_averages(x, parts, least)
        ends = {"lower": estimates - errors, "upper": estimates + errors}
        return pd.DataFrame(ends, index=index_of(groups, by))

    def att(self) -> float:
        """Average effect in the treated: the mean of `cate` over the fitted rows with t = 1.

        That is the effect in the treated where the mean effect given x is the same in both arms,
        which a hidden cause of the treatment that modifies the effect would break.
        """
        return self._average(self._arm(1))

    def att_interval(self, *, alpha: float = 0.05) -> tuple[float, float]:
        """An interval for `att`; arguments, answer and errors as for `ate_interval`."""
        return self._interval_of_average(self._arm(1), alpha, 1)

    def atc(self) -> float:
        """Average effect in the controls: the mean of `cate` over the fitted rows with t = 0.

        That is the effect in the controls on the same condition as for `att`.
        """
        return self._average(self._arm(0))

    def atc_interval(self, *, alpha: float = 0.05) -> tuple[float, float]:
        """An interval for `atc`; arguments, answer and errors as for `ate_interval`."""
        return self._interval_of_average(self._arm(0), alpha, 0)

    def _arm(self, arm: int) -> NDArray[np.float32]:
        """Standardised covariates of the fitted rows of an arm."""
        return self._read_rows(None)[self.table_.t == arm]

    def _average(self, x: NDArray[np.float32]) -> float:
        if not len(x):
            raise TableError("X has no rows to average over.")
        return float(self._member_effects(x).mean())

    def _interval_of_average(
        self, x: NDArray[np.float32], alpha: float, part: Part
    ) -> tuple[float, float]:
        reach, estimate = reach_of(alpha), self._average(x)
        (error,) = self._errors_of_averages(x, [np.arange(len(x))], self._least_errors(part))
        return estimate - reach * float(error), estimate + reach * float(error)

    def _errors_of_averages(
        self, x: NDArray[np.float32], groups: list[NDArray[np.intp]], least: list[float]
    ) -> NDArray[np.float64]:
        """Standard errors of average effects over groups of rows, (G,), `least` or more each."""
        # Each as if it were asked about alone.
        parts = [
            np.random.default_rng(self.random_state).permutation(rows)[:INTERVAL_ROWS]
            for rows in groups
        ]
        rows = np.unique(np.concatenate(parts))
        effects, factor = self._resampled_effects(x[rows])
        averages = [effects[:, np.searchsorted(rows, part)].mean(axis=1) for part in parts]
        error = np.sqrt(factor) * np.std(averages, axis=1, ddof=1)
        return np.maximum(error, least)

    def _least_errors(self, *parts: Part) -> list[float]:
        """Numbers below which no standard errors of averages are believed, in units of y.

        A part is a subgroup of the fitted rows, an arm, or None for all of them.
        """
        residuals, propensity = self._weighted_residuals()

        def of(corrections: NDArray[np.float64]) -> float:
            error = _standard_error(corrections) if len(corrections) > 1 else 0.0
            return max(error, abs(float(corrections.mean())))

        def own(part: Part) -> float:
            if part is None:
                return 0.0
            if isinstance(part, int):  # as AIPW corrects an average over an arm
                share = propensity if part else 1 - propensity
                return of(residuals * share / share.mean())
            return of(residuals[part])

        return [max(of(residuals), own(part)) for part in parts]

    def aipw_ate(self) -> float:
        """The ATE of the fitted rows if nothing but the covariates confounds, as in a trial.

        Augmented inverse probability weighting (Robins, Rotnitzky and Zhao, 1994): `ate`, corrected
        by the network's residuals and the propensities of `overlap`. It trusts the table where
        `ate` also weighs what the prior deems likely, hidden confounders among it. So it is the
        better answer in large tables without hidden confounders, whatever the prior, and the
        noisier one in small tables or with poor overlap (propensities are kept 0.05 away from 0
        and 1, or half the share of the rarer arm if that is less).

        Returns:
            A number in the units of y.

        Raises:
            TableError: an arm of the fitted table has only one row.
        """
        return self._aipw()[0]

    def aipw_ate_interval(self, *, alpha: float = 0.05) -> tuple[float, float]:
        """An interval for `aipw_ate`, by the spread of the weighted residuals.

        Args:
            alpha: one minus the confidence level.

        Returns:
            The lower and the upper end, in the units of y.

        Raises:
            TableError: an arm of the fitted table has only one row.
            ValueError: alpha is outside (0, 1).
        """
        reach, (estimate, error) = reach_of(alpha), self._aipw()
        return estimate - reach * error, estimate + reach * error

    def _aipw(self) -> tuple[float, float]:
        """`aipw_ate` and its standard error."""
        residuals, _ = self._weighted_residuals()
        estimate = self._average(self.table_.x) + float(residuals.mean())
        return estimate, _standard_error(residuals)

    def _weighted_residuals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Residuals of the fitted rows over the probability of their treatment, and propensities.

        Both (N,), residuals in units of y. Those of controls have the other sign, so that the mean
        is what AIPW adds to the ATE.
        """
        check_is_fitted(self)
        self._require_two_rows_per_arm("a doubly robust estimate")
        table = self.table_
        overlap = estimate_overlap(table)
        least = least_propensity(overlap.arm_sizes)
        propensity = overlap.propensity.clip(least, 1 - least)
        weight = np.where(table.t == 1, 1 / propensity, -1 / (1 - propensity))
        return weight * self._residuals(), propensity

    def _residuals(self) -> NDArray[np.float64]:
        """Outcomes of the fitted rows less what is predicted for them, (N,), in units of y.

        Rows are predicted from a context that holds them, which makes residuals too small where
        there are few rows for a column; predictions from other folds err more in small tables.
        """
        expected = self._means(self.table_.x, self.table_.t, self._contexts).mean(axis=0)
        return self.schema_.outcome.scale * (self.table_.y - expected)

    def _missed_levels(self) -> Iterator[str]:
        """Warnings for arms whose outcomes are on average not what is predicted for them."""
        residuals = self._residuals()
        for arm in (0, 1):
            own = residuals[self.table_.t == arm]
            mean, error = float(own.mean()), _standard_error(own)
            if abs(mean) > _MISSED_LEVEL * error > 0:
                where = "below" if mean > 0 else "above"
                yield (
                    f"the answers under treatment {arm} lie {abs(mean):.3g} {where} the outcomes "
                    f"of the rows that had it, {abs(mean) / error:.1f} standard errors: something "
                    "hidden confounds, or the weights do not know such outcomes; compare aipw_ate"
                )

    def _binary_effect_interval(
        self, x: NDArray[np.float32], alpha: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds on the quantiles of a difference of two outcomes that are 0 or 1.

        P(y(1) - y(0) = -1) is at most min(P(y(0) = 1), P(y(1) = 0)), and likewise for 1.
        """
        contexts = self._contexts
        p0, p1 = (
            self.schema_.outcome.restore(
                self._means(x, np.full(len(x), arm, np.float32), contexts).mean(axis=0)
            ).clip(0, 1)
            for arm in (0, 1)
        )
        harmed_at_most, helped_at_most = np.minimum(p0, 1 - p1), np.minimum(p1, 1 - p0)
        helped_at_least, harmed_at_least = np.maximum(p1 - p0, 0), np.maximum(p0 - p1, 0)
        tail = alpha / 2
        lower = np.where(harmed_at_most > tail, -1.0, np.where(helped_at_least >= 1 - tail, 1, 0))
        upper = np.where(helped_at_most > tail, 1.0, np.where(harmed_at_least >= 1 - tail, -1, 0))
        return lower, upper


def _standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of independent values."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def read_direction(T0: Data, T1: Data, rows: int) -> NDArray[np.float64]:
    """T1 - T0 of every row: 1, 0 or -1."""
    ends = []
    for name, values in (("T0", T0), ("T1", T1)):
        try:
            treatment = read_treatment(np.atleast_1d(values) if np.ndim(values) == 0 else values)
        except TableError as error:
            raise TableError(f"{name}: {error}") from error
        if np.ndim(values) != 0 and len(treatment) != rows:
            raise TableError(f"{name} has {len(treatment)} values, but X has {rows} rows.")
        ends.append(np.broadcast_to(treatment, (rows,)).astype(np.float64))
    return ends[1] - ends[0]


def reach_of(alpha: float) -> float:
    """The normal quantile of 1 - alpha / 2."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha!r}, but must lie between 0 and 1.")
    return NormalDist().inv_cdf(1 - alpha / 2)
