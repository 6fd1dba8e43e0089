"""Errors and scores of one answer, and their summaries over datasets."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.estimators.inference import pad, padded_rows
from dopfn_jax.evaluation.datasets import Dataset
from dopfn_jax.model.bar_distribution import BarDistribution

# Central intervals whose coverage is counted (PICP).
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SCORED_ROWS = 1024
# Effects that spread less than this share of the outcome count as constant.
_CONSTANT = 1e-4


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says about the query rows of a dataset; None where it says nothing.

    Attributes:
        cid: (m,) E[y | do(query_t), x].
        cate: (m,) E[y | do(1), x] - E[y | do(0), x].
        observational: (m,) E[y | t, x] at the units' own treatment.
        distribution: p(y | do(query_t), x), batch shape (m,).
        ate_interval: 95 % interval of the average effect.
    """

    cid: NDArray | None = None
    cate: NDArray | None = None
    observational: NDArray | None = None
    distribution: BarDistribution | None = None
    ate_interval: tuple[float, float] | None = None


def normalised_mse(error: NDArray, y: NDArray) -> float:
    """Mean squared error over the squared range of the queries' outcomes (Do-PFN, equation 10)."""
    return float(np.mean(np.square(error, dtype=np.float64)) / np.ptp(y) ** 2)


def score(data: Dataset, answer: Answer) -> dict[str, float]:
    """Every metric that the dataset's truth and the answer allow.

    - `cid`, `cate`, `observational`: normalised MSE against the unit's outcome or effect, over the
      range of the queries' outcomes; `cate_own_range` divides by the range of the effect, where it
      varies.
    - `pehe`: root mean squared error of the CATE in units of y, against the exact CATE where it is
      known, else against the units' effects. `pehe_relative`: over the outcome's range.
    - `ate`, `ate_true`, `ate_error`: estimate over the query rows, the truth, and the absolute
      error, in units of y; `ate_error_relative`: over the outcome's range.
    - `spread`: that range.
    - `bias_0`, `bias_1`: mean of prediction minus outcome under do(0) and do(1), over the range.
    - `nll` (nats), `crps`, `entropy` (nats), `picp_<level>`: of the distribution. Scores in nats
      are those of the outcome over its range, so that datasets compare.

    Raises:
        ValueError: an answer that is not finite.
    """
    for name in ("cid", "cate", "observational"):
        values = getattr(answer, name)
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite in {np.sum(~np.isfinite(values))} rows")
    scores: dict[str, float] = {}
    if answer.cid is not None and data.query_y is not None:
        error = answer.cid - data.query_y
        spread = np.ptp(data.query_y)
        scores["cid"] = normalised_mse(error, data.query_y)
        for arm in (0, 1):
            rows = data.query_t == arm
            if rows.any():
                scores[f"bias_{arm}"] = float(error[rows].mean() / spread)
    if answer.observational is not None and data.unit_y is not None:
        scores["observational"] = normalised_mse(answer.observational - data.unit_y, data.unit_y)
    if answer.cate is not None:
        scores |= _score_effects(data, answer.cate)
    if answer.ate_interval is not None:
        scores["ate_low"], scores["ate_high"] = answer.ate_interval
    if answer.distribution is not None and data.query_y is not None:
        scores |= _score_distribution(data, answer.distribution)
    return scores


def _score_effects(data: Dataset, cate: NDArray) -> dict[str, float]:
    scores = {"ate": float(np.mean(cate))}
    truth = data.effect
    if data.cid0 is not None and data.cid1 is not None:
        truth = data.cid1 - data.cid0
    if data.effect is not None and data.query_y is not None:
        scores["cate"] = normalised_mse(cate - data.effect, data.query_y)
        if np.ptp(data.effect) > _CONSTANT * np.ptp(data.query_y):
            scores["cate_own_range"] = normalised_mse(cate - data.effect, data.effect)
    if truth is not None:
        scores["pehe"] = float(np.sqrt(np.mean(np.square(cate - truth, dtype=np.float64))))
    true_ate = data.ate if truth is None else float(np.mean(truth))
    if true_ate is not None:
        scores["ate_true"] = float(true_ate)
        scores["ate_error"] = abs(scores["ate"] - true_ate)
    spread = scores["spread"] = float(np.ptp(data.y if data.query_y is None else data.query_y))
    for name in ("pehe", "ate_error"):
        if name in scores:
            scores[f"{name}_relative"] = float(scores[name] / spread)
    return scores


@jax.jit
def _at_outcomes(answer: BarDistribution, y: jax.Array) -> tuple[jax.Array, ...]:
    """P(Y <= y), log-density, CRPS and entropy, each (M,)."""
    return answer.cdf(y), answer.log_prob(y), answer.crps(y), answer.entropy


def _score_distribution(data: Dataset, answer: BarDistribution) -> dict[str, float]:
    y = np.asarray(data.query_y, np.float32)
    spread = float(np.ptp(y))
    # Padded, so that hardly more than one size is compiled.
    rows = padded_rows(max(len(y), _SCORED_ROWS))
    logits = pad(np.asarray(answer.logits), rows, answer.logits.shape[1])
    padded = BarDistribution(jnp.asarray(logits), answer.borders)
    at_outcomes = _at_outcomes(padded, pad(y, rows))
    cdf, log_density, crps, entropy = (np.asarray(v, np.float64)[: len(y)] for v in at_outcomes)
    scores = {
        "nll": float(np.mean(-log_density)) - np.log(spread),
        "crps": float(np.mean(crps)) / spread,
        "entropy": float(np.mean(entropy)) - np.log(spread),
    }
    for level in LEVELS:
        inside = np.abs(cdf - 0.5) <= level / 2
        scores[f"picp_{level:g}"] = float(np.mean(inside))
    return scores


def median_interval(
    values: NDArray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median over datasets; NaN are left out."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    medians = _median(values[_draws(len(values), resamples, seed)])
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def compare_methods(
    errors: pd.DataFrame,
    reference: str,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Medians of every method and their ratios to a reference, by a paired bootstrap.

    Each resample draws datasets among those that a method has an answer for; those of a ratio among
    the ones that both it and the reference have an answer for, the same for both.

    Args:
        errors: a row per dataset, a column per method; NaN where a method has no answer.
        reference: the column that the others are compared with.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row per method: median, low, high, datasets, ratio, ratio_low, ratio_high. A ratio above
        one says that the method errs more than the reference.
    """
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    base = errors[reference].to_numpy(np.float64)
    rows = {}
    for method in errors:
        own = errors[method].to_numpy(np.float64)
        both = ~np.isnan(own) & ~np.isnan(base)
        answered = own[~np.isnan(own)]
        with np.errstate(all="ignore"):  # a reference may err by nothing
            ratio = _median(own[both]) / _median(base[both])
            drawn = _draws(int(both.sum()), resamples, seed)
            ratios = _median(own[both][drawn]) / _median(base[both][drawn])
        medians = _median(answered[_draws(len(answered), resamples, seed)])
        rows[method] = {
            "median": float(_median(answered)),
            **_interval(medians, quantiles, ""),
            "datasets": len(answered),
            "ratio": float(ratio),
            **_interval(ratios, quantiles, "ratio_"),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def rank_methods(errors: pd.DataFrame, alpha: float = 0.05) -> Any:
    """Friedman test, average ranks and the Nemenyi test's critical difference (Demsar, 2006).

    Args:
        errors: a row per dataset, a column per method; datasets with NaN are left out.
        alpha: level of the tests.

    Returns:
        autorank's result: `rankdf["meanrank"]` (1 = smallest error), `cd`, `pvalue`; its
        `plot_stats` draws the critical-difference diagram.

    Raises:
        ValueError: fewer than five complete datasets or three methods.
    """
    complete = errors.dropna()
    if len(complete) < 5 or complete.shape[1] < 3:
        raise ValueError(
            f"{complete.shape[1]} methods on {len(complete)} complete datasets: ranks need at "
            "least 3 methods on 5 datasets"
        )
    from autorank import autorank

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its result
        return autorank(
            complete.reset_index(drop=True),
            alpha=alpha,
            order="ascending",
            force_mode="nonparametric",
        )


def _draws(number: int, resamples: int, seed: int) -> NDArray:
    """Resampled indices, (resamples, number)."""
    return np.random.default_rng(seed).integers(0, max(number, 1), (resamples, number))


def _median(values: NDArray) -> NDArray:
    """Over the last axis; NaN where that is empty."""
    return np.median(values, axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _interval(draws: NDArray, quantiles: list[float], prefix: str) -> Mapping[str, float]:
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, quantiles) if len(draws) else (np.nan, np.nan)
    return {f"{prefix}low": float(low), f"{prefix}high": float(high)}
