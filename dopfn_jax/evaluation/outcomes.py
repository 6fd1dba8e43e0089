"""Average effects on outcomes that are no smooth number, in trials whose covariates tell nothing.

Outcomes of 0 and 1, counts, amounts with many zeros: nothing but the two arms' means matters, so
that any error beyond that of their difference is the network's own.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import trange

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.estimators.diagnostics import UnlikePriorWarning

ROWS = 1500
_CONTINUOUS = 2


class Kind(NamedTuple):
    """Outcomes to look at.

    Attributes:
        name: what they are.
        means: expected outcome under control and treatment.
        draw: outcomes of rows with these expectations.
    """

    name: str
    means: tuple[float, float]
    draw: Callable[[np.random.Generator, NDArray], NDArray]


def _binary(generator: np.random.Generator, mean: NDArray) -> NDArray:
    return (generator.random(mean.shape) < mean).astype(float)


def _count(generator: np.random.Generator, mean: NDArray) -> NDArray:
    return generator.poisson(mean).astype(float)


def _amount(generator: np.random.Generator, mean: NDArray) -> NDArray:
    """Zero, or log-normal around e."""
    paid = generator.random(mean.shape) < mean / math.exp(1.5)
    return np.where(paid, generator.lognormal(1.0, 1.0, mean.shape), 0.0)


KINDS = (
    Kind("0 or 1", (0.02, 0.05), _binary),
    Kind("0 or 1", (0.10, 0.15), _binary),
    Kind("0 or 1", (0.40, 0.45), _binary),
    Kind("count", (0.5, 0.7), _count),
    Kind("count", (4.0, 4.5), _count),
    Kind("zero or log-normal", (0.9, 1.35), _amount),
)


def effects_by_outcome(checkpoint: Checkpoint, trials: int = 20, seed: int = 0) -> pd.DataFrame:
    """Average effects in randomised trials of 1,500 rows and four covariates that tell nothing.

    Args:
        checkpoint: the weights.
        trials: of each of `KINDS`.
        seed: of the trials.

    Returns:
        A row per kind: outcome, control and treated (expected outcomes), true_effect, mean_ate and
        mean_difference (of means), and root mean square errors over the standard deviation of y:
        rms_ate, rms_aipw, rms_difference, and rms_level of the mean answer under control.
    """
    found = []
    for number, kind in enumerate(KINDS):
        effect = kind.means[1] - kind.means[0]
        estimates, errors = [], []
        for trial in trange(trials, desc=f"{kind.name}, {kind.means[0]:g}", delay=2, disable=None):
            x, t, y = draw(kind, np.random.default_rng([seed, number, trial]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnlikePriorWarning)
                model = DoPFNRegressor(checkpoint).fit(x, t, y)
            difference = y[t == 1].mean() - y[t == 0].mean()
            three = np.array([model.ate(), model.aipw_ate(), difference])
            level = model.predict(x, 0).mean() - kind.means[0]
            estimates.append(three)
            errors.append(np.append(three - effect, level) / y.std())
        mean_ate, _, mean_difference = np.mean(estimates, axis=0)
        rms = np.sqrt(np.mean(np.square(errors), axis=0))
        names = ("rms_ate", "rms_aipw", "rms_difference", "rms_level")
        found.append(
            {
                "outcome": kind.name,
                "control": kind.means[0],
                "treated": kind.means[1],
                "true_effect": effect,
                "mean_ate": mean_ate,
                "mean_difference": mean_difference,
                **dict(zip(names, rms, strict=True)),
            }
        )
    return pd.DataFrame(found)


def draw(kind: Kind, generator: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
    """A trial: covariates (N, 4), two of them 0 or 1, treatment, outcome."""
    x = generator.normal(size=(ROWS, 4))
    x[:, _CONTINUOUS:] = x[:, _CONTINUOUS:] > 0
    t = (generator.random(ROWS) < 0.5).astype(float)
    return x, t, kind.draw(generator, np.where(t == 1, kind.means[1], kind.means[0]))
