"""Simulators of the literature with confounding, overlap and noise like real studies'.

Nie and Wager, Quasi-oracle estimation of heterogeneous treatment effects (Biometrika, 2021), setups
A to D; Louizos et al., Causal effect inference with deep latent-variable models (2017), as
causalml's fifth mode parametrises it; Oprescu et al., Orthogonal random forest (2019), in the
binary form of DoubleML. Each is written from its formulas; all units carry both potential outcomes.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from dopfn_jax.evaluation.datasets import Dataset

ROWS = 1000  # of the context, and as many queries
# Covariates, treatment, both potential outcomes, and the mean effect in units like each.
_Draw = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]


def simulate(name: str, number: int) -> Dataset:
    """Dataset `number` of the simulator `name`, a function of these alone.

    Raises:
        KeyError: no such simulator.
    """
    generator = np.random.default_rng([list(SIMULATORS).index(name), number])
    x, t, y0, y1, effect = SIMULATORS[name](generator, 2 * ROWS)
    context, query = slice(ROWS), slice(ROWS, None)
    y = np.where(t > 0.5, y1, y0)
    query_t = generator.integers(0, 2, ROWS).astype(float)
    return Dataset(
        suite="simulated",
        case=name,
        number=number,
        x=x[context],
        t=t[context],
        y=y[context],
        query_x=x[query],
        query_t=query_t,
        query_y=np.where(query_t > 0.5, y1[query], y0[query]),
        effect=effect[query],
        unit_t=t[query],
        unit_y=y[query],
        facts={"rows": float(2 * ROWS)},
    )


def _outcomes(
    generator: np.random.Generator, x: NDArray, share: NDArray, baseline: NDArray, effect: NDArray
) -> _Draw:
    """The form of Nie and Wager: y = b(x) + (t - 1/2) tau(x) + e."""
    t = generator.binomial(1, share).astype(float)
    middle = baseline + generator.standard_normal(len(x))
    return x, t, middle - effect / 2, middle + effect / 2, effect


def _difficult_nuisance(generator: np.random.Generator, rows: int) -> _Draw:
    x = generator.random((rows, 5))
    wave = np.sin(np.pi * x[:, 0] * x[:, 1])
    baseline = wave + 2 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.5 * x[:, 4]
    return _outcomes(generator, x, np.clip(wave, 0.1, 0.9), baseline, (x[:, 0] + x[:, 1]) / 2)


def _randomised_trial(generator: np.random.Generator, rows: int) -> _Draw:
    x = generator.standard_normal((rows, 5))
    baseline = np.maximum(np.maximum(x[:, 0] + x[:, 1], x[:, 2]), 0)
    baseline += np.maximum(x[:, 3] + x[:, 4], 0)
    effect = x[:, 0] + np.logaddexp(0, x[:, 1])
    return _outcomes(generator, x, np.full(rows, 0.5), baseline, effect)


def _easy_propensity(generator: np.random.Generator, rows: int) -> _Draw:
    x = generator.standard_normal((rows, 5))
    baseline = 2 * np.logaddexp(0, x[:, :3].sum(axis=1))
    return _outcomes(generator, x, expit(-x[:, 1] - x[:, 2]), baseline, np.ones(rows))


def _unrelated_arms(generator: np.random.Generator, rows: int) -> _Draw:
    x = generator.standard_normal((rows, 5))
    treated = np.maximum(x[:, :3].sum(axis=1), 0)
    control = np.maximum(x[:, 3] + x[:, 4], 0)
    share = 1 / (1 + np.exp(-x[:, 0]) + np.exp(-x[:, 1]))
    return _outcomes(generator, x, share, (treated + control) / 2, treated - control)


def _hidden_confounder(generator: np.random.Generator, rows: int) -> _Draw:
    """Binary outcomes, of which the effect is the difference of their probabilities."""
    z = generator.integers(0, 2, rows).astype(float)
    x = generator.normal(z[:, None], (5 * z + 3 * (1 - z))[:, None], (rows, 5))
    t = generator.binomial(1, 0.75 * z + 0.25 * (1 - z)).astype(float)
    draw = generator.random(rows)
    low, high = (expit(3 * (z + 2 * (2 * arm - 2))) for arm in (0, 1))
    return x, t, (draw < low).astype(float), (draw < high).astype(float), high - low


def _sparse_confounding(generator: np.random.Generator, rows: int) -> _Draw:
    covariates, support = 30, 5
    relevant = generator.choice(covariates, support, replace=False)
    on_y, on_t = generator.uniform(0, 1, support), generator.uniform(0, 0.3, support)
    x = generator.random((rows, covariates))
    noise, threshold = generator.uniform(-1, 1, (2, rows))
    t = (x[:, relevant] @ on_t >= threshold).astype(float)
    effect = np.exp(2 * x[:, 0]) + 3 * np.sin(4 * x[:, 0])
    y0 = x[:, relevant] @ on_y + noise
    return x, t, y0, y0 + effect, effect


SIMULATORS: dict[str, Callable[[np.random.Generator, int], _Draw]] = {
    "nie_wager_a": _difficult_nuisance,
    "nie_wager_b": _randomised_trial,
    "nie_wager_c": _easy_propensity,
    "nie_wager_d": _unrelated_arms,
    "hidden_confounder": _hidden_confounder,
    "doubleml_heterogeneous": _sparse_confounding,
}
