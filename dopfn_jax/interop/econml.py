"""Do-PFN where EconML takes a CATE estimator: RScorer, DRTester, its ensembles.

Works without EconML, too; the extra "econml" installs it.

Axes: N rows of the fitted table, M query rows, F covariates.
"""

import contextlib
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from dopfn_jax.cells import Data, TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.effects import read_direction
from dopfn_jax.tables import check_order


class DoPFNCateEstimator(BaseEstimator):
    """An EconML estimator that asks a `DoPFNRegressor`.

    EconML tells effect modifiers X from controls W. Do-PFN conditions on both, so `fit` takes them
    side by side. Without X, methods ask about the fitted rows with their W. Rows of an X that is
    given are asked about with their W missing: fit with X alone, where effects are to be compared
    with those of other estimators.

    Args:
        model: the regressor; its settings count, and fitting fits a copy of it.

    Attributes:
        model_: the fitted copy.
        X_: the fitted X.
        controls_: the columns of W; None without.

    Of EconML's interface the `_inference` methods are absent, and intervals of marginal effects
    but those of `const_marginal_effect`.
    """

    def __init__(self, model: DoPFNRegressor | None = None):
        self.model = model

    def fit(
        self, Y: Data, T: Data, X: Data | None = None, W: Data | None = None, **options: Any
    ) -> Self:
        """Reads a table.

        Args:
            Y: (N,) outcome.
            T: (N,) treatment, 0 or 1.
            X: (N, F) covariates that effects may vary with.
            W: (N, F') further covariates.
            **options: EconML passes `inference` and `cache_values`, which change nothing here, and
                others that are None.

        Raises:
            TableError: an option that would be ignored, or a table that cannot be used.
        """
        given = {name for name, value in options.items() if value is not None}
        unknown = given - {"inference", "cache_values"}
        if unknown:
            raise TableError(f"fit cannot use {', '.join(sorted(unknown))}: leave it out.")
        check_order(X=X, W=W, T=T, Y=Y)
        model = DoPFNRegressor() if self.model is None else self.model
        table = (X, T, Y) if W is None else (_beside(X, W), _unlabelled(T), _unlabelled(Y))
        self.model_ = DoPFNRegressor(**model.get_params(deep=False)).fit(*table)
        # EconML's interpreters look these up.
        self._d_y, self._d_t = np.shape(Y)[1:], (1,)
        self.X_, self.controls_ = X, None if W is None else _frame(W).columns
        return self

    def effect(self, X: Data | None = None, *, T0: Data = 0, T1: Data = 1) -> NDArray[np.float64]:
        """E[y | do(T1), x] - E[y | do(T0), x] of every row, (M,); (M, 1) if Y was a column."""
        return self.model_.effect(*self._query(X, T0, T1)).reshape(-1, *self._d_y)

    def marginal_effect(self, T: Data, X: Data | None = None) -> NDArray[np.float64]:
        """`const_marginal_effect`: a binary treatment has one step to take."""
        return self.const_marginal_effect(X)

    def const_marginal_effect(self, X: Data | None = None) -> NDArray[np.float64]:
        """The effect of treatment 1 against 0, (M, 1); (M, 1, 1) if Y was fitted as a column."""
        return self.effect(X).reshape(-1, *self._d_y, *self._d_t)

    def const_marginal_effect_interval(
        self, X: Data | None = None, *, alpha: float = 0.05
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`effect_interval` of treatment 1 against 0, shaped as `const_marginal_effect`."""
        low, high = self.effect_interval(X, alpha=alpha)
        shape = (-1, *self._d_y, *self._d_t)
        return low.reshape(shape), high.reshape(shape)

    def effect_interval(
        self, X: Data | None = None, *, T0: Data = 0, T1: Data = 1, alpha: float = 0.05
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`DoPFNRegressor.effect_interval`, shaped as `effect`."""
        low, high = self.model_.effect_interval(*self._query(X, T0, T1), alpha=alpha)
        return low.reshape(-1, *self._d_y), high.reshape(-1, *self._d_y)

    def ate(self, X: Data | None = None, *, T0: Data = 0, T1: Data = 1) -> float:
        """The mean of `effect` over the rows of X."""
        return float(self.effect(X, T0=T0, T1=T1).mean())

    def ate_interval(
        self, X: Data | None = None, *, T0: int = 0, T1: int = 1, alpha: float = 0.05
    ) -> tuple[float, float]:
        """`DoPFNRegressor.ate_interval`, over the rows of X; T0 and T1 are the same for all."""
        if np.ndim(T0) or np.ndim(T1):
            raise TableError("T0 and T1 must be single numbers: an average has one direction.")
        low, high = self.model_.ate_interval(self._query(X)[0], alpha=alpha)
        (direction,) = read_direction(T0, T1, 1)
        low, high = np.sort(direction * np.array([low, high])).tolist()
        return low, high

    def marginal_ate(self, T: Data, X: Data | None = None) -> NDArray[np.float64]:
        """The mean of `marginal_effect` over the rows of X."""
        return self.const_marginal_ate(X)

    def const_marginal_ate(self, X: Data | None = None) -> NDArray[np.float64]:
        """The mean of `const_marginal_effect` over the rows of X."""
        return self.const_marginal_effect(X).mean(axis=0)

    def _query(self, X: Data | None, *arms: Data) -> tuple[Any, ...]:
        """X beside controls that are missing, and treatments.

        None, the fitted rows with their own controls, stays None.
        """
        if self.controls_ is None or X is None:
            return X, *arms
        check_order(X=X, **dict(zip(("T0", "T1"), arms, strict=False)))
        if isinstance(self.X_, pd.DataFrame) and not isinstance(X, pd.DataFrame):
            # EconML's scorers pass arrays; the columns are matched by position.
            X = pd.DataFrame(np.asarray(X), columns=self.X_.columns)
        rows = range(np.shape(X)[0])
        missing = pd.DataFrame(np.nan, index=rows, columns=self.controls_)
        return _beside(X, missing), *map(_unlabelled, arms)


def _beside(X: Data | None, W: Data | None) -> Data | None:
    """X and W as one table; columns become "X ..." and "W ..." where a name is in both."""
    if W is None:
        return X
    controls = _frame(W)
    if X is None:
        return controls
    modifiers = _frame(X)
    if set(map(str, modifiers.columns)) & set(map(str, controls.columns)):
        modifiers, controls = modifiers.add_prefix("X "), controls.add_prefix("W ")
    if len(modifiers) != len(controls):
        raise TableError(f"X has {len(modifiers)} rows, but W has {len(controls)}.")
    return pd.concat([part.reset_index(drop=True) for part in (modifiers, controls)], axis=1)


def _unlabelled(values: Data) -> Data:
    """Without the index, as the tables of `_beside` are; names of columns stay."""
    if isinstance(values, pd.DataFrame | pd.Series):
        return values.reset_index(drop=True)
    return values


def _frame(values: Data) -> pd.DataFrame:
    return values if isinstance(values, pd.DataFrame) else pd.DataFrame(np.asarray(values))


# EconML's ensembles ask for an instance; nothing of its base class is needed.
with contextlib.suppress(ImportError):
    from econml._cate_estimator import BaseCateEstimator

    BaseCateEstimator.register(DoPFNCateEstimator)
