"""What a table looks like, in numbers, and whether tables of a prior look like that.

A network that was trained on a prior answers for tables like those of the prior. These statistics
need no model and no truth, so that any table can be laid beside any prior.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopfn_jax.config import Config, TableShape
from dopfn_jax.prior import sample_tasks
from dopfn_jax.wide.task import sample_wide_tasks

# Rows that the statistics of a table are computed from, at most: they do not need more.
MOST_ROWS = 5000
FOLDS = 2
# The central share of a prior's tables that counts as usual.
USUAL = (0.005, 0.995)
# Statistics whose low values are plain, not unusual: a balanced binary outcome has neither tail nor
# skewness; in a trial the score of a short table's other half ranks worse than chance.
MAGNITUDES = (
    "overlap_auc",
    "difference",
    "adjusted_difference",
    "outcome_tail",
    "outcome_skewness",
    "column_correlation",
    "column_tail",
    "missing_cells",
)
# Lengths of tables at which a checkpoint remembers what is usual.
REMEMBERED_ROWS = (64, 256, 1024)
# Lengths that differ by less than this factor, the one between those above, are near each other.
NEAR = 4

Floats = NDArray[np.float64]
# Statistic -> (low, high).
Ranges = Mapping[str, tuple[float, float]]
# Rows of a table -> ranges of its statistics.
UsualTables = Mapping[int, Ranges]


def table_statistics(
    x: ArrayLike, t: ArrayLike, y: ArrayLike, rows: int = MOST_ROWS
) -> dict[str, float]:
    """Statistics of one observational table, all but the first two free of units.

    Some depend on the number of rows, so compare only tables of one length.

    Args:
        x: (N, F) covariates, NaN where missing; F = 0 is legal.
        t: (N,) treatment, 0 or 1, both of which occur.
        y: (N,) outcome, not all equal.
        rows: of a longer table, so many rows are drawn at random, always the same ones.

    Returns:
        By name:
        covariates: number of columns F.
        treated_share: share of rows with t = 1.
        overlap_auc: how well a linear score of x, fitted to the other half of the rows, tells
            treated from untreated; 0.5: not at all (as in a trial), 1: no overlap.
        outcome_r2: share of the variance of y that a linear fit to (x, t) predicts in the other
            half of the rows; below 0 where it predicts worse than the mean.
        difference: of the arms' mean outcomes, absolute, in standard deviations of y.
        adjusted_difference: the coefficient of t in the linear fit, likewise.
        outcome_levels: distinct values of y as a share of its rows.
        outcome_tail: largest |y - mean|, in standard deviations.
        outcome_skewness: third standardised moment of y, absolute.
        discrete_columns: share of columns with at most 10 distinct values.
        column_correlation: mean absolute correlation of two columns (0 for fewer).
        column_tail: largest |x - mean| of the columns in standard deviations, their median.
        missing_cells: share of cells that are missing.
    """
    x, t, y = np.asarray(x, float), np.asarray(t, float), np.asarray(y, float)
    drawn = _shuffled(t, y)[:rows]
    x, t, y = x[drawn], t[drawn], y[drawn]
    missing = np.isnan(x)
    with np.errstate(all="ignore"):
        centre = np.nan_to_num(np.nanmean(np.where(missing.all(axis=0), 0.0, x), axis=0))
    z = _standardise(np.where(missing, centre, x))
    outcome = _standardise(y[:, None])[:, 0]
    propensity = _out_of_fold(z, t)
    prediction = _out_of_fold(np.column_stack([z, t]), outcome)
    coefficients = _ridge(np.column_stack([z, t]), outcome)
    levels = [len(np.unique(column[~np.isnan(column)])) for column in x.T]
    correlation = np.abs(z.T @ z / len(z))[np.triu_indices(x.shape[1], 1)]
    return {
        "covariates": float(x.shape[1]),
        "treated_share": float(t.mean()),
        "overlap_auc": _auc(propensity, t > 0.5),
        "outcome_r2": float(1.0 - np.mean((outcome - prediction) ** 2)),
        "difference": float(abs(outcome[t > 0.5].mean() - outcome[t <= 0.5].mean())),
        "adjusted_difference": float(abs(coefficients[-1])),
        "outcome_levels": len(np.unique(y)) / len(y),
        "outcome_tail": float(np.abs(outcome).max()),
        "outcome_skewness": float(abs(np.mean(outcome**3))),
        "discrete_columns": float(np.mean(np.array(levels) <= 10)) if levels else 0.0,
        "column_correlation": float(correlation.mean()) if correlation.size else 0.0,
        "column_tail": float(np.median(np.abs(z).max(axis=0))) if z.size else 0.0,
        "missing_cells": float(missing.mean()) if missing.size else 0.0,
    }


def prior_statistics(
    config: Config, shape: TableShape, tables: int = 200, seed: int = 0
) -> dict[str, Floats]:
    """Statistics of tables drawn from the prior of a config: by name, one value per valid table.

    Args:
        config: its `prior`, or `wide` where the shape gives covariates.
        shape: rows and columns of the tables; its `tasks` is not used.
        tables: how many to draw.
        seed: of the draw.

    Raises:
        ValueError: no table is valid.
    """
    keys = jax.random.split(jax.random.key(seed), tables)
    if shape.wide:
        tasks = sample_wide_tasks(keys, config.wide, shape.rows, shape.context, shape.covariates)
    else:
        tasks = sample_tasks(keys, config.prior, shape.rows, shape.context)
    tasks = jax.device_get(tasks)
    rows = [
        table_statistics(
            tasks.context_x[i][tasks.context_mask[i]][:, tasks.covariate_mask[i]],
            tasks.context_t[i][tasks.context_mask[i]],
            tasks.context_y[i][tasks.context_mask[i]],
        )
        for i in np.flatnonzero(tasks.valid)
    ]
    if not rows:
        raise ValueError(
            f"0 of {tables} tables are valid: does a new part return values that are not finite?"
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def usual(prior: Mapping[str, Sequence[float] | Floats]) -> Ranges:
    """The central 99 % of each statistic of `prior_statistics`."""
    ranges = {}
    for name, values in prior.items():
        low, high = np.quantile(values, USUAL)
        ranges[name] = (float(low), float(high))
    return ranges


def kinds_of_tables(config: Config, rows: int) -> dict[str, TableShape]:
    """The kinds of tables that a run of this config sees, each with `rows` context rows.

    A kind has the columns of those of its shapes whose contexts are near `rows`, or the nearest.
    """

    def factor(shape: TableShape) -> float:
        context = float(np.clip(rows, *shape.context))
        return max(rows / context, context / rows)

    shapes: dict[str, list[TableShape]] = {}
    for shape in config.training.shapes:
        shapes.setdefault("wide prior" if shape.wide else "paper's prior", []).append(shape)
    kinds = {}
    for name, alike in shapes.items():
        near = [shape for shape in alike if factor(shape) < NEAR] or [min(alike, key=factor)]
        fewest, most = zip(*(shape.covariates for shape in near), strict=True)
        columns = (min(fewest), max(most))
        kinds[name] = TableShape(rows + 1, (rows, rows), 1, covariates=columns)
    return kinds


def usual_tables(config: Config, tables: int = 400, seed: int = 0) -> UsualTables:
    """What is usual for the tables that a run of this config sees, at several lengths.

    Args:
        config: of a training run; what is usual for one of its kinds of tables counts.
        tables: how many to draw of each kind at each length.
        seed: of the draw.
    """
    found = {}
    for rows in REMEMBERED_ROWS:
        kinds = [
            usual(prior_statistics(config, shape, tables, seed))
            for shape in kinds_of_tables(config, rows).values()
        ]
        found[rows] = {
            name: (min(kind[name][0] for kind in kinds), max(kind[name][1] for kind in kinds))
            for name in kinds[0]
        }
    return found


def unlike(
    statistics: Mapping[str, float], ranges: Ranges
) -> dict[str, tuple[float, float, float]]:
    """The statistics of a table that are unusual: name -> (value, low, high)."""
    return {
        name: (value, *ranges[name])
        for name, value in statistics.items()
        if value > ranges[name][1] or (value < ranges[name][0] and name not in MAGNITUDES)
    }


def unlike_usual(
    x: ArrayLike, t: ArrayLike, y: ArrayLike, usual_tables: UsualTables
) -> dict[str, tuple[float, float, float]]:
    """The same for a table, beside shorter ones, by as many of its rows as these have.

    Returns {} for a table that is shorter than any remembered length: too short to tell.

    Args:
        x: (N, F) covariates, NaN where missing.
        t: (N,) treatment, 0 or 1, both of which occur.
        y: (N,) outcome.
        usual_tables: from `usual_tables`.
    """
    rows = len(np.asarray(t))
    longest = max((length for length in usual_tables if length <= rows), default=None)
    if longest is None:
        return {}
    return unlike(table_statistics(x, t, y, longest), usual_tables[longest])


def _shuffled(t: Floats, y: Floats) -> NDArray[np.intp]:
    """Rows in random order, but at the top both arms and two outcomes, as in tables of a prior."""
    order = np.random.default_rng(0).permutation(len(t))
    rank = np.arange(len(t))
    for values in (t[order], y[order]):
        rank[np.argmax(values != values[0])] = 0
    return order[np.argsort(rank, kind="stable")]


def _standardise(values: Floats) -> Floats:
    deviation = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


def _ridge(x: Floats, y: Floats) -> Floats:
    """Coefficients of a slightly penalised least squares on centred columns."""
    centred = x - x.mean(axis=0)
    gram = centred.T @ centred + 1e-3 * len(x) * np.eye(x.shape[1])
    return np.linalg.solve(gram, centred.T @ (y - y.mean()))


def _out_of_fold(x: Floats, y: Floats) -> Floats:
    """Linear predictions of y by fits to the other folds; rows alternate between the folds."""
    fold = np.arange(len(y)) % FOLDS
    prediction = np.zeros(len(y))
    for i in range(FOLDS):
        train, test = fold != i, fold == i
        offset = x[test] - x[train].mean(axis=0)
        prediction[test] = y[train].mean() + offset @ _ridge(x[train], y[train])
    return prediction


def _auc(score: Floats, positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores higher than another; ties count half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))
