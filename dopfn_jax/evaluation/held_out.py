"""What weights must hold on fresh draws, where the truth is known: calibration, growth, trials.

Nothing here is one of the datasets that weights are compared on: tasks come from the prior of the
checkpoint, tables from our own case studies, trials from a simulation of their own.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.diagnostics import kinds_of_tables
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.evaluation.datasets import load_dataset
from dopfn_jax.evaluation.generated import STUDIES, write_dataset
from dopfn_jax.evaluation.metrics import Answer, compare_methods, score
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import sample_tasks
from dopfn_jax.training.score import answer
from dopfn_jax.wide.task import sample_wide_tasks

CONTEXT_ROWS = (16, 64, 256, 1024)
LEVELS = (0.5, 0.9)
FEW_ROWS, MANY_ROWS = 250, 1000
_QUERIES = 64
_TABLE_ROWS = 2200  # half of them context
# Rows of a batch of tasks, which bound memory.
_BATCH_ROWS = 16_384


def calibration(
    checkpoint: Checkpoint,
    tasks: int = 2000,
    context_rows: Iterable[int] = CONTEXT_ROWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Coverage of central intervals of y_in on tasks of the checkpoint's own prior.

    Args:
        checkpoint: the weights.
        tasks: of each kind of table and each size of context, 64 queries each.
        context_rows: sizes of the context.
        seed: of the tasks, a stream that training does not draw from.

    Returns:
        A row per kind of table and size: prior, rows, tasks (those that were not degenerate),
        and by level coverage_<level>.
    """
    found = []
    for rows in context_rows:
        for prior, kind in kinds_of_tables(checkpoint.config, rows).items():
            shape = dataclasses.replace(kind, rows=rows + _QUERIES)
            batch = min(tasks, max(1, _BATCH_ROWS // shape.rows))
            inside = partial(
                _inside, config=checkpoint.config.prior_of(shape), shape=shape, tasks=batch
            )
            key = jax.random.fold_in(jax.random.key(seed), rows)
            counts = np.zeros(len(LEVELS) + 2)
            for first in _progress(range(0, tasks, batch), f"{prior}, {rows} rows"):
                counts += np.asarray(inside(checkpoint.model, jax.random.fold_in(key, first)))
            valid, queries, *hits = counts
            coverage = {
                f"coverage_{level:g}": hit / queries
                for level, hit in zip(LEVELS, hits, strict=True)
            }
            found.append({"prior": prior, "rows": rows, "tasks": int(valid), **coverage})
    return pd.DataFrame(found)


@partial(jax.jit, static_argnames=("config", "shape", "tasks"))
def _inside(model: DoPFN, key: jax.Array, *, config, shape, tasks: int) -> jax.Array:  # type: ignore[no-untyped-def]
    """Valid tasks, their queries, and how many of these lie in the interval of each level."""
    keys = jax.random.split(key, tasks)
    if shape.wide:
        task = sample_wide_tasks(keys, config, shape.rows, shape.context, shape.covariates)
    else:
        task = sample_tasks(keys, config, shape.rows, shape.context)
    logits, scaler = answer(model, task)
    quantile = model.distribution(logits).cdf(scaler.outcome(task.query_y))
    counts = task.query_mask & task.valid[:, None]
    hits = [(counts & (jnp.abs(quantile - 0.5) <= level / 2)).sum() for level in LEVELS]
    return jnp.stack([task.valid.sum(), counts.sum(), *hits])


def context_growth(
    checkpoint: Checkpoint, cache: Path, tables: int = 200, cases: Iterable[str] | None = None
) -> pd.DataFrame:
    """Error at 1,000 context rows over that at 250, on the same queries of our own case studies.

    Args:
        checkpoint: the weights.
        cache: folder for the tables, which are drawn once.
        tables: of each case study, 2,200 rows each.
        cases: case studies; all but the small one by default.

    Returns:
        A row per case and task (cid, cate): few and many (median normalised MSE at 250 and at
        1,000 rows), ratio of the two with ratio_low and ratio_high, a paired bootstrap's 95 %
        interval over tables.
    """
    found = []
    for case in cases or [name for name in STUDIES if name != "small"]:
        study = dataclasses.replace(STUDIES[case], rows=(_TABLE_ROWS, _TABLE_ROWS))
        errors: dict[str, list[dict[str, float]]] = {"cid": [], "cate": []}
        for number in _progress(range(1, tables + 1), case):
            path = cache / case / f"{number:03d}.npz"
            if not path.exists():
                write_dataset(path, study, case, number, exact=False)
            data = load_dataset(path, "growth")
            scores = {}
            for rows in (FEW_ROWS, MANY_ROWS):
                if np.ptp(data.t[:rows]) == 0 or np.ptp(data.y[:rows]) == 0:
                    break
                model = DoPFNRegressor(checkpoint).fit(data.x[:rows], data.t[:rows], data.y[:rows])
                cid = model.predict(data.query_x, data.query_t)
                scores[rows] = score(data, Answer(cid=cid, cate=model.cate(data.query_x)))
            else:
                for task, lines in errors.items():
                    lines.append({"few": scores[FEW_ROWS][task], "many": scores[MANY_ROWS][task]})
        for task, lines in errors.items():
            table = compare_methods(pd.DataFrame(lines), "few")
            many = table.loc["many"]
            found.append(
                {
                    "case": case,
                    "task": task,
                    "tables": len(lines),
                    "few": table.loc["few", "median"],
                    **many[["median", "ratio", "ratio_low", "ratio_high"]],
                }
            )
    return pd.DataFrame(found).rename(columns={"median": "many"})


def trial_coverage(
    checkpoint: Checkpoint, trials: int = 1000, alpha: float = 0.1, seed: int = 0
) -> pd.DataFrame:
    """How often intervals of the ATE hold the truth, over simulated randomised trials.

    Args:
        checkpoint: the weights.
        trials: how many, of the three sizes of `draw_trial` in turn.
        alpha: one minus the level of the intervals.
        seed: of the trials.

    Returns:
        A row per estimate ("ate", "aipw_ate") and size, and one for all sizes (rows 0): trials,
        coverage with low and high (a 95 % Wilson interval); and over the standard deviation of y,
        width (mean width of the intervals), bias (mean error) and rms (root mean square error).
    """
    lines = []
    for number in _progress(range(trials), "trials"):
        x, t, y, effect = draw_trial(np.random.default_rng([seed, number]), number)
        model = DoPFNRegressor(checkpoint).fit(x, t, y)
        truth, spread = float(effect.mean()), float(y.std())
        for estimate in ("ate", "aipw_ate"):
            low, high = getattr(model, f"{estimate}_interval")(alpha=alpha)
            lines.append(
                {
                    "estimate": estimate,
                    "rows": len(y),
                    "inside": low <= truth <= high,
                    "width": (high - low) / spread,
                    "error": ((low + high) / 2 - truth) / spread,
                }
            )
    table, found = pd.DataFrame(lines), []
    whole = table.assign(rows=0)
    for kind, group in pd.concat([whole, table]).groupby(["estimate", "rows"]):
        low, high = _wilson(int(group.inside.sum()), len(group))
        found.append(
            {
                **dict(zip(("estimate", "rows"), kind, strict=True)),
                "trials": len(group),
                "coverage": group.inside.mean(),
                "low": low,
                "high": high,
                "width": group.width.mean(),
                "bias": group.error.mean(),
                "rms": math.sqrt(np.square(group.error).mean()),
            }
        )
    return pd.DataFrame(found)


TRIAL_ROWS = (100, 250, 500)


def draw_trial(
    generator: np.random.Generator, number: int
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """A randomised trial: covariates (N, F), treatment, outcome, each unit's mean effect (N,).

    Two to eight covariates, continuous and binary; a baseline that is linear, curved or stepped;
    an effect that is zero, constant, or varies with a covariate; noise from a third of the signal
    to twice as much, normal or heavy-tailed. Sizes take turns.
    """
    rows, columns = TRIAL_ROWS[number % len(TRIAL_ROWS)], int(generator.integers(2, 9))
    x = generator.normal(size=(rows, columns))
    binary = generator.random(columns) < 0.3
    x = np.where(binary, x > generator.normal(scale=0.5, size=columns), x)
    t = (generator.random(rows) < generator.choice([0.5, 0.5, 0.3])).astype(float)
    score = x @ generator.normal(size=columns) / math.sqrt(columns)
    baseline = [score, np.tanh(2 * score) + score**2 / 2, np.floor(2 * score) / 2][
        generator.integers(3)
    ]
    size = generator.normal()
    effect = [0 * score, size + 0 * score, size * (1 + x[:, 0])][generator.integers(3)]
    noise = [generator.normal(size=rows), generator.standard_t(4, rows)][generator.integers(2)]
    y = baseline + t * effect + np.exp(generator.uniform(np.log(1 / 3), np.log(2))) * noise
    unit = 10 ** generator.uniform(-2, 3)
    return x, t, unit * y, unit * effect


def _progress(numbers: range, label: str) -> Iterable[int]:
    """The numbers, with a bar on a terminal once they have taken two seconds."""
    return tqdm(numbers, desc=label, delay=2, leave=False, disable=None)


def _wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """A 95 % interval of a probability (Wilson, 1927)."""
    share, extra = hits / trials, z**2 / trials
    centre = (share + extra / 2) / (1 + extra)
    reach = z * math.sqrt(share * (1 - share) / trials + extra / trials / 4) / (1 + extra)
    return centre - reach, centre + reach
