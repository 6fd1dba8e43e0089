"""How far average effects are drawn towards zero among noise, by what a table may hide.

Tables of the wide prior with continuous outcomes and no missing cells. If answers are calibrated,
the regression of true average effects on them has slope 1; above 1, answers are too small. That
holds of tables as often as the prior has them: where those that hide nothing look like some that
do, calibrated answers are too small for the former and too large for the latter.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.config import WidePriorConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.training.score import answer, ask_both_arms
from dopfn_jax.wide.task import sample_wide_tasks

COVARIATES = (4, 12)
# True effects below this many standard deviations of y are also looked at alone.
SMALL = 0.5
# So many that differences among effects hardly move their average.
_QUERIES = 512
_BATCH = 8
_SOME, _MUCH = (0.7, 1.5), (2.0, 4.0)
_RANDOMISED: dict[str, Any] = {"assignments": ("coin",), "treated_rate": (0.3, 0.7)}


class Kind(NamedTuple):
    """Tables to look at.

    Attributes:
        name: what is special about them.
        noise: noise over signal, an interval.
        rows: of the context.
        changes: of the wide prior.
    """

    name: str
    noise: tuple[float, float]
    rows: int
    changes: dict[str, Any]


_OPEN: dict[str, Any] = {"hidden_share": 0.0, "post_treatment_share": 0.0}
KINDS = (
    Kind("a coin decides, nothing is hidden", _MUCH, 1200, _OPEN | _RANDOMISED),
    Kind("a coin decides, nothing is hidden", _SOME, 1200, _OPEN | _RANDOMISED),
    Kind("a coin decides, nothing is hidden", _MUCH, 300, _OPEN | _RANDOMISED),
    Kind("nothing is hidden", _MUCH, 1200, _OPEN),
    Kind("all hide something", _MUCH, 1200, _OPEN | {"hidden_share": 1.0}),
    Kind("all have columns from after it", _MUCH, 1200, _OPEN | {"post_treatment_share": 1.0}),
    Kind("of every kind, as often as in the prior", _MUCH, 1200, {}),
)


def shrinkage(checkpoint: Checkpoint, tables: int = 192, seed: int = 7) -> pd.DataFrame:
    """Errors of average effects and the slope of true ones on answers.

    Args:
        checkpoint: the weights, for tables of 12 covariates or more.
        tables: of each of `KINDS`.
        seed: of the tables.

    Returns:
        A row per kind: tables, noise, rows, count (tables that were not degenerate); slope of the
        true effects on the answers, and small_slope, of those with |answer| below SMALL; rms, root
        mean square error over the standard deviation of y; and rms_linear, of least squares.
    """
    found = []
    for kind in KINDS:
        prior = dataclasses.replace(
            checkpoint.config.wide,
            noise_ratio=kind.noise,
            links=("identity",),
            outcome_kinds=("continuous",),
            duplicate_share=0.0,
            missing_share=0.0,
            **kind.changes,
        )
        effects = partial(_effects, prior=prior, rows=kind.rows)
        keys = jax.random.split(jax.random.key(seed), -(-tables // _BATCH))
        batches = [effects(checkpoint.model, key) for key in keys]
        ours, linear, true, valid = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        ours, linear, true = ours[valid], linear[valid], true[valid]
        small = np.abs(ours) < SMALL
        found.append(
            {
                "tables": kind.name,
                "noise": "{:g} to {:g}".format(*kind.noise),
                "rows": kind.rows,
                "count": len(true),
                "slope": _slope(true, ours),
                "small_slope": _slope(true[small], ours[small]),
                "rms": _rms(ours - true),
                "rms_linear": _rms(linear - true),
            }
        )
    return pd.DataFrame(found)


@partial(jax.jit, static_argnames=("prior", "rows"))
def _effects(
    model: DoPFN, key: jax.Array, *, prior: WidePriorConfig, rows: int
) -> tuple[jax.Array, ...]:
    """Average effects on the query rows, (B,): ours, by least squares, true; which tasks count."""
    keys = jax.random.split(key, _BATCH)
    size, context = rows + _QUERIES, (rows, rows)
    task = sample_wide_tasks(keys, prior, size, context, COVARIATES, potential_outcomes=True)
    both = ask_both_arms(task, _QUERIES)
    assert task.y0 is not None and task.y1 is not None  # as asked for
    logits, scaler = answer(model, both)
    means = model.distribution(logits).mean
    sign = jnp.where(both.query_t[:, :_QUERIES] > 0.5, 1.0, -1.0)
    ours = (sign * (means[:, :_QUERIES] - means[:, _QUERIES:])).mean(1)
    true = ((task.y1 - task.y0) / scaler.y_scale).mean(1)
    y = (task.context_y - scaler.y_loc) / scaler.y_scale
    x = jnp.where(task.covariate_mask[:, None], task.context_x, 0.0)
    return ours, jax.vmap(_least_squares)(x, task.context_t, y), true, task.valid


def _least_squares(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    """The coefficient of t, (), in the regression of y on t and x."""
    design = jnp.concatenate([jnp.ones_like(t)[:, None], t[:, None], x], axis=1)
    gram = design.T @ design + 1e-4 * jnp.eye(design.shape[1])  # columns that are not shown are 0
    return jnp.linalg.solve(gram, design.T @ y)[1]


def _slope(true: NDArray, answers: NDArray) -> float:
    return float(true @ answers / (answers @ answers)) if len(answers) else float("nan")


def _rms(errors: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
