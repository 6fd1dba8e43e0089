"""What to look at beside an estimate: overlap of the arms, a placebo treatment, a summary.

Axes: N rows of the fitted table, F covariates, P permutations.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.diagnostics import unlike_usual
from dopfn_jax.tables import Table

# An arm whose weighted rows are worth fewer than this share of its rows overlaps poorly.
_POOR_OVERLAP = 0.3
_FEW_ROWS = 10

CONFOUNDING_NOTE = (
    "The interval covers sampling and the distance to the AIPW estimate, not hidden confounding: "
    "if something unmeasured moves both treatment and outcome, the model averages over the worlds "
    "that its prior deems possible; and ATT and ATC average effects given the covariates, which "
    "may then differ between the arms."
)


class UnlikePriorWarning(UserWarning):
    """A fitted table does not look like those that the checkpoint was trained on."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """How comparable the two arms are.

    Attributes:
        propensity: (N,) estimated P(t = 1 | x) of the fitted rows, each by a model that has not
            seen the row.
        arm_sizes: rows with t = 0 and with t = 1.
        effective_sizes: what the rows of each arm are worth when weighted by the inverse
            probability of their treatment: (sum w)^2 / sum w^2 (Kish, 1965).
        extreme_share: share of rows with a propensity nearer to 0 or 1 than `least_propensity`.
    """

    propensity: NDArray[np.float64]
    arm_sizes: tuple[int, int]
    effective_sizes: tuple[float, float]
    extreme_share: float

    @property
    def warnings(self) -> list[str]:
        """What a reader should worry about; empty if nothing."""
        found = []
        for arm, (rows, effective) in enumerate(
            zip(self.arm_sizes, self.effective_sizes, strict=True)
        ):
            if rows < _FEW_ROWS:
                found.append(f"only {rows} rows with treatment {arm}: intervals are rough")
            if effective < _POOR_OVERLAP * rows:
                found.append(
                    f"poor overlap: the {rows:,} rows with treatment {arm} are worth "
                    f"{effective:,.0f} when weighted to the whole table"
                )
        if self.extreme_share > 0.1:
            found.append(
                f"{self.extreme_share:.0%} of the rows could almost be told to be treated or not "
                "from their covariates: effects there rest on the prior"
            )
        return found


@dataclass(frozen=True, eq=False)
class Placebo:
    """Average effects of treatments that were shuffled, and so have none.

    Attributes:
        ate: the effect of the treatment as it was.
        placebo_ates: (P,) effects of shuffled treatments, in the units of y; these should
            scatter around 0.
        p_value: share of the P + 1 effects at least as far from 0 as `ate`, itself included. A
            large one means that the table shows no association for an effect to explain. A small
            one does not mean that the effect is causal: shuffling breaks confounding too.
    """

    ate: float
    placebo_ates: NDArray[np.float64]
    p_value: float


@dataclass(frozen=True, eq=False)
class Summary:
    """The answer to "what does the treatment do", with what to know before believing it.

    Attributes:
        ate, att, atc: average effects over all fitted rows, the treated, the controls.
        aipw_ate: the ATE if nothing but the covariates confounds (`DoPFNRegressor.aipw_ate`).
        ate_interval, att_interval, atc_interval, aipw_ate_interval: their lower and upper ends.
        alpha: one minus the confidence level.
        difference_in_means: of the outcome between the arms, without any adjustment.
        rows, covariates: size of the fitted table.
        arm_sizes, effective_sizes, extreme_share: from `overlap()`.
        binary_outcome: effects are differences of probabilities.
        member_spread: standard deviation of the ATE over the members of the ensemble; None for one.
        cache_bytes: memory of the kept context.
        checkpoint: its name.
        warnings: what to worry about; empty if nothing.
    """

    ate: float
    ate_interval: tuple[float, float]
    att: float
    att_interval: tuple[float, float]
    atc: float
    atc_interval: tuple[float, float]
    aipw_ate: float
    aipw_ate_interval: tuple[float, float]
    alpha: float
    difference_in_means: float
    rows: int
    covariates: int
    arm_sizes: tuple[int, int]
    effective_sizes: tuple[float, float]
    extreme_share: float
    binary_outcome: bool
    member_spread: float | None
    cache_bytes: int
    checkpoint: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        show = number_format(self.ate_interval[1] - self.ate_interval[0])
        level = f"{100 * (1 - self.alpha):g} % interval"
        unit = " (difference of probabilities)" if self.binary_outcome else ""
        lines = [
            f"{self.rows:,} rows, {self.covariates} covariates, checkpoint {self.checkpoint}",
            f"{'effect' + unit:<42}{'estimate':>12}{level:>24}",
        ]
        for name, label in (
            ("ate", "ATE, all rows"),
            ("att", "ATT, the treated"),
            ("atc", "ATC, the controls"),
            ("aipw_ate", "ATE if nothing hidden confounds (AIPW)"),
        ):
            low, high = getattr(self, f"{name}_interval")
            between = f"{show(low)} to {show(high)}"
            lines.append(f"{label:<42}{show(getattr(self, name)):>12}{between:>24}")
        lines.append(f"{'difference in means':<42}{show(self.difference_in_means):>12}")
        if self.member_spread is not None:
            lines.append(f"{'spread over ensemble members':<42}{show(self.member_spread):>12}")
        lines.append(f"{'arm':<18}{'rows':>12}{'effective rows':>24}")
        for arm, (rows, effective) in enumerate(
            zip(self.arm_sizes, self.effective_sizes, strict=True)
        ):
            lines.append(f"{f'treatment {arm}':<18}{rows:>12,}{effective:>24,.0f}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, f"note: {CONFOUNDING_NOTE}"])

    __repr__ = __str__


def estimate_overlap(table: Table) -> Overlap:
    """Overlap by a logistic regression of the treatment on covariates and missing cells.

    Cross-fitted in up to five folds; regularised, so it errs on the side of more overlap.

    Args:
        table: standardised rows with at least two in each arm.
    """
    treated = table.t == 1
    sizes = (int((~treated).sum()), int(treated.sum()))
    propensity = np.full(len(treated), treated.mean())
    if table.x.shape[1]:
        missing = np.isnan(table.x)
        # Far outliers would otherwise decide the fit.
        values = np.clip(np.where(missing, 0, table.x), -10, 10)
        features = np.hstack([values, missing])
        folds = StratifiedKFold(min(5, *sizes), shuffle=True, random_state=0)
        model = LogisticRegression(max_iter=1000)
        propensity = cross_val_predict(model, features, treated, cv=folds, method="predict_proba")[
            :, 1
        ]
    propensity = np.clip(propensity, 1e-6, 1 - 1e-6)
    effective = [
        weights.sum() ** 2 / np.square(weights).sum()
        for weights in (1 / (1 - propensity[~treated]), 1 / propensity[treated])
    ]
    extreme = np.minimum(propensity, 1 - propensity) < least_propensity(sizes)
    effective_sizes = (float(effective[0]), float(effective[1]))
    return Overlap(propensity, sizes, effective_sizes, float(extreme.mean()))


def least_propensity(arm_sizes: tuple[int, int]) -> float:
    """A propensity nearer than this to 0 or 1 leaves hardly any unit to compare with.

    0.05, or half the share of the rarer arm if that is less: in a trial that treats few, all rows
    are alike.
    """
    return min(0.05, min(arm_sizes) / sum(arm_sizes) / 2)


def observational(checkpoint: Checkpoint) -> list[str]:
    """A sentence where the weights predict p(y | t, x), not p(y | do(t), x); else nothing."""
    if checkpoint.config.prior.target == "interventional":
        return []
    return [f"{checkpoint.name} predicts outcomes as observed: these are associations, not effects"]


def unlike_prior(table: Table, checkpoint: Checkpoint) -> list[str]:
    """In what a table is unlike those that the checkpoint was trained on, a sentence for each.

    Empty where the checkpoint has no record of them, and for tables that are too short to tell.
    """
    if checkpoint.usual_tables is None:
        return []
    unusual = unlike_usual(table.x, table.t, table.y, checkpoint.usual_tables)
    return [
        f"unlike the prior of {checkpoint.name}: {name.replace('_', ' ')} is {value:.3g}, there "
        f"{low:.3g} to {high:.3g}; answers rest on extrapolation"
        for name, (value, low, high) in unusual.items()
    ]


def number_format(width: float) -> Callable[[float], str]:
    """Shows numbers with the digits that an interval of this width leaves meaningful."""
    decimals = 1 - math.floor(math.log10(width)) if width > 0 else 3
    # Adding 0 makes -0.0 positive.
    return lambda value: f"{round(value, decimals) + 0.0:,.{max(0, decimals)}f}"
