"""Do-PFN as an estimator of DoWhy, by name or as an object. The extra "dowhy" installs it.

    estimate = model.estimate_effect(
        estimand, method_name="backdoor.dopfn_jax.interop.dowhy.DoPFNEstimator"
    )

DoWhy's refuters take the estimate. Its graph decides which columns the model reads; Do-PFN itself
needs none.

Axes: M query rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.effects import reach_of

try:
    from dowhy.causal_estimator import CausalEstimate, CausalEstimator
except ImportError:  # nothing but DoWhy has a use for the class
    CausalEstimator = object


# A column that a table has while effects are averaged by modifiers.
_EFFECTS = "__dopfn_jax_effects"
# How an estimand may have been identified.
_ADJUSTMENTS = ("backdoor", "general_adjustment")


class DoPFNEstimator(CausalEstimator):
    """Effects of a binary treatment, given the adjustment set of an estimand.

    Covariates are the variables of the adjustment set and the effect modifiers.

    Args:
        identified_estimand: what DoWhy has identified, by the backdoor criterion.
        init_params: settings of the `DoPFNRegressor`.
        **options: those of every DoWhy estimator.

    Attributes:
        model: the regressor, which `fit` fits.
    """

    def __init__(
        self,
        identified_estimand: Any,
        init_params: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(identified_estimand, **options)
        self.model = DoPFNRegressor(**(init_params or {}))

    def fit(self, data: pd.DataFrame, effect_modifier_names: Sequence[str] | None = None) -> Self:
        """Reads a table.

        Args:
            data: the columns that the estimand names.
            effect_modifier_names: columns that effects may vary with.

        Raises:
            TableError: more than one treatment or outcome, an estimand that is not identified by
                adjustment, or a table that cannot be used.
        """
        estimand = self._target_estimand
        names = {"treatment": estimand.treatment_variable, "outcome": estimand.outcome_variable}
        for role, found in names.items():
            if len(found) != 1:
                raise TableError(f"{role} is {found}, but must be a single column.")
        method = estimand.identifier_method
        if method is not None and not method.startswith(_ADJUSTMENTS):
            raise TableError(
                f"the estimand is identified by {method!r}, but Do-PFN reads an adjustment set: "
                "name the method 'backdoor.dopfn_jax.interop.dowhy.DoPFNEstimator'."
            )
        self._set_effect_modifiers(data, effect_modifier_names)
        covariates = [*estimand.get_adjustment_set(), *self._effect_modifier_names]
        self._covariates = list(dict.fromkeys(covariates))
        (self._treatment,), (self._outcome,) = names.values()
        self.symbolic_estimator = self.construct_symbolic_estimator(estimand)
        self.model.fit(data[self._covariates], data[self._treatment], data[self._outcome])
        return self

    def estimate_effect(
        self,
        data: pd.DataFrame,
        treatment_value: int = 1,
        control_value: int = 0,
        target_units: str | Callable | pd.DataFrame = "ate",
        **_: Any,
    ) -> "CausalEstimate":
        """The average effect over the target units.

        Args:
            data: rows to average over.
            treatment_value: 0 or 1.
            control_value: 0 or 1.
            target_units: "ate" (all rows), "att" (the treated), "atc" (the controls), a function of
                `data` that says which rows, or a frame of other rows. Of the treated and the
                controls it is the mean of effects given the covariates, as for
                `DoPFNRegressor.att`.

        Returns:
            Its `value` is the average; its `cate_estimates` are the effects of the rows, (M,).

        Raises:
            TableError: rows that do not fit the fitted table, or unknown `target_units`.
        """
        self.update_input(treatment_value, control_value, target_units)
        self._estimated = rows = self._rows(data)
        effects = self._effects(rows)
        by_modifiers = None
        if self.need_conditional_estimates:
            by_modifiers = self._estimate_conditional_effects(rows, self._estimate_effect_fn)
        estimate = CausalEstimate(
            data=data,
            treatment_name=self._target_estimand.treatment_variable,
            outcome_name=self._target_estimand.outcome_variable,
            estimate=float(effects.mean()),
            target_estimand=self._target_estimand,
            realized_estimand_expr=self.symbolic_estimator,
            control_value=control_value,
            treatment_value=treatment_value,
            conditional_estimates=by_modifiers,
            cate_estimates=effects,
        )
        estimate.add_estimator(self)
        return estimate

    def construct_symbolic_estimator(self, estimand: Any) -> str:
        """What is estimated, in words that DoWhy prints."""
        given = ", ".join([f"do({self._treatment})", *self._covariates])
        return f"p({self._outcome} | {given})"

    def _rows(self, data: pd.DataFrame) -> pd.DataFrame:
        """The target units."""
        units = self._target_units
        if isinstance(units, pd.DataFrame):
            return units
        if callable(units):
            return data.loc[units]
        if units == "ate":
            return data
        if units in ("att", "atc"):
            return data[data[self._treatment] == (units == "att")]
        raise TableError(
            f"target_units is {units!r}, but must be 'ate', 'att', 'atc', a function of the data, "
            "or a data frame of rows."
        )

    def _effects(self, rows: pd.DataFrame) -> NDArray[np.float64]:
        X = rows[self._covariates]
        return self.model.effect(X, self._control_value, self._treatment_value)

    def _estimate_conditional_effects(
        self,
        data: pd.DataFrame,
        estimate_effect_fn: Callable[[pd.DataFrame], float],
        effect_modifier_names: Sequence[str] | None = None,
        num_quantiles: int | None = None,
    ) -> pd.Series:
        """DoWhy's hook: average effects by modifiers, of effects that the rows bring along.

        The groups that DoWhy hands to `estimate_effect_fn` lack modifiers that are text.
        """
        return super()._estimate_conditional_effects(
            data.assign(**{_EFFECTS: self._effects(data)}),
            lambda group: float(group[_EFFECTS].mean()),
            effect_modifier_names,
            num_quantiles,
        )

    def _estimate_effect_fn(self, data_df: pd.DataFrame) -> float:
        """DoWhy's hook: the average effect in a subgroup."""
        return float(self._effects(data_df).mean())

    def _do(self, x: int, data_df: pd.DataFrame) -> float:
        """DoWhy's hook: the mean outcome were the treatment set."""
        return float(self.model.predict(data_df[self._covariates], x).mean())

    def _estimate_std_error(self, method: object = None) -> float:
        """DoWhy's hook: the standard error behind `DoPFNRegressor.ate_interval`."""
        low, high = self._estimate_confidence_intervals(0.95)
        return float(high - low) / (2 * reach_of(0.05))

    def _estimate_confidence_intervals(
        self, confidence_level: float, method: object = None
    ) -> NDArray[np.float64]:
        """DoWhy's hook: `DoPFNRegressor.ate_interval` of the target units of the last estimate."""
        direction = self._treatment_value - self._control_value
        X = self._estimated[self._covariates]
        return np.sort(direction * np.array(self.model.ate_interval(X, alpha=1 - confidence_level)))
