"""Do predicted distributions mean what they say? Checked on rows whose outcomes are known.

Axes: M query rows, A levels.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.cells import Data, TableError
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.tables import check_order, read_outcome

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@jax.jit
def _score(answer: BarDistribution, y: jax.Array, ends: jax.Array) -> tuple[jax.Array, ...]:
    """P(Y <= y), log-density and CRPS at y, each (M,), and quantiles (M, levels) at `ends`."""
    return answer.cdf(y), answer.log_prob(y), answer.crps(y), answer.quantile(ends)


@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """How well predicted distributions fit outcomes that came true.

    Attributes:
        levels: (A,) nominal probabilities of central intervals.
        coverage: (A,) share of outcomes inside (PICP, prediction interval coverage probability);
            equal to the levels for calibrated distributions, above them for too wide ones.
        widths: (A,) mean widths of the intervals, in the units of y.
        crps: mean continuous ranked probability score, in the units of y; lower is better.
        nll: mean negative log-density, in nats, of y in its own units; lower is better.
        pit: (M,) probability integral transform P(Y <= y), uniform for calibrated distributions.
    """

    levels: NDArray[np.float64]
    coverage: NDArray[np.float64]
    widths: NDArray[np.float64]
    crps: float
    nll: float
    pit: NDArray[np.float64]

    @property
    def calibration_error(self) -> float:
        """Mean distance between coverage and level."""
        return float(np.abs(self.coverage - self.levels).mean())

    def to_frame(self) -> pd.DataFrame:
        """The PICP curve: columns level, coverage, width."""
        columns = {"level": self.levels, "coverage": self.coverage, "width": self.widths}
        return pd.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": len(self.pit),
            "crps": self.crps,
            "nll": self.nll,
            "calibration_error": self.calibration_error,
            "picp": self.to_frame().to_dict("list"),
        }

    def __str__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format=lambda value: f"{value:.3g}")
        return (
            f"{len(self.pit):,} rows; CRPS {self.crps:.4g}, negative log-density {self.nll:.4g}, "
            f"mean distance of coverage from level {self.calibration_error:.3f}\n{table}"
        )

    __repr__ = __str__


def calibration_report(
    model: DoPFNRegressor,
    X: Data | None,
    t: Data,
    y: Data,
    levels: tuple[float, ...] = LEVELS,
) -> CalibrationReport:
    """Compares p(y | do(t), x) with outcomes of an experiment or a simulation.

    The outcomes must have come about with the treatment *set* to t. Rows of an observational table
    do not qualify unless nothing confounds them: there p(y | do(t), x) is not p(y | t, x).

    Args:
        model: a fitted estimator.
        X: (M, F) covariates; None if the table has none.
        t: (M,) treatment that was set.
        y: (M,) outcome that followed.
        levels: probabilities of central intervals.

    Raises:
        TableError: columns that do not fit the fitted table, no rows, or a 0/1 outcome.
        ValueError: a level outside (0, 1).
    """
    nominal = np.asarray(levels, np.float64)
    if nominal.ndim != 1 or not nominal.size or not ((nominal > 0) & (nominal < 1)).all():
        raise ValueError(f"levels are {levels!r}, but must lie between 0 and 1.")
    check_order(X=X, t=t, y=y)
    x, treatment = model._read_query(X, t)
    outcome = model.schema_.outcome
    if model.schema_.binary_outcome:
        raise TableError(
            "a 0/1 outcome has no density: compare predict(X, t) with the outcomes by "
            "sklearn.metrics.brier_score_loss and sklearn.calibration.calibration_curve."
        )
    truth = outcome.standardise(read_outcome(y))
    if len(truth) != len(x) or not len(x):
        raise TableError(f"y has {len(truth)} rows and X {len(x)}: both need the same, and some.")
    ends = np.concatenate([(1 - nominal) / 2, (1 + nominal) / 2]).astype(np.float32)
    scores, widths = [], np.zeros(len(nominal))
    for answer, rows in model._distributions(x, treatment):
        count = rows.stop - rows.start
        padded = np.zeros(len(answer.logits), np.float32)
        padded[:count] = truth[rows]
        *found, quantiles = (np.asarray(part)[:count] for part in _score(answer, padded, ends))
        scores.append(found)
        lower, upper = np.split(quantiles, 2, axis=1)
        widths += (upper - lower).sum(axis=0)
    pit, log_density, crps = (
        np.concatenate(score).astype(np.float64) for score in zip(*scores, strict=True)
    )
    # The central interval of level a holds the outcome if its PIT is within a / 2 of one half.
    coverage = (np.abs(pit[:, None] - 0.5) <= nominal / 2).mean(axis=0)
    return CalibrationReport(
        levels=nominal,
        coverage=coverage,
        widths=outcome.scale * widths / len(x),
        crps=float(outcome.scale * crps.mean()),
        nll=float(np.log(outcome.scale) - log_density.mean()),
        pit=pit,
    )
