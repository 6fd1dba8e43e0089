"""Exact E[y | do(t), x] of the prior's own SCMs, by integrating what the covariates hide.

The covariates x are values from before the treatment, so they say something about the unit's
noise. Given the noise of the hidden nodes and the unit's natural treatment, the noise of every
shown node follows from its value. So only these are integrated over: the natural treatment by
enumeration, hidden noise by a trapezoidal rule (one hidden node) or by a scrambled Sobol sequence
(several); each point weighs as much as it makes x likely. Nothing is rejected, and the outcome's
own noise, which has mean zero, is not sampled.

Axes: M rows, S points, V natural treatments (two, or one where x does not depend on it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import qmc

from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.scm.structure import SCM

Array = NDArray[np.float64]

# Beyond so many standard deviations the Gaussian density is below 1e-16 of its peak.
_REACH = 8.6
_GRID_POINTS = 4001
_SOBOL_POINTS = 4096
# Rows answered at once bound the memory at about this many numbers per node.
_NUMBERS_AT_ONCE = 4_000_000
_GAUSSIAN = NOISE_FAMILIES.index("gaussian")
_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "square": np.square,
    "relu": lambda z: np.maximum(z, 0.0),
    "tanh": np.tanh,
}


@dataclass(frozen=True)
class Exact:
    """Answers of the rows.

    Attributes:
        cid0, cid1: (M,) E[y | do(0), x] and E[y | do(1), x].
        error: (M,) numerical error of the larger of the two: half the difference between the
            answers of the two halves of the points.
        effective_points: (M,) points that the weights leave, inf where nothing is integrated.
    """

    cid0: Array
    cid1: Array
    error: Array
    effective_points: Array


def exact_cid(
    scm: SCM, treatment: int, outcome: int, covariates: list[int], x: NDArray, seed: int = 0
) -> Exact:
    """Exact E[y | do(t), x] for every row.

    Args:
        scm: over K nodes, without batch axes; its only thresholded node is the treatment.
        treatment: its node index.
        outcome: its node index.
        covariates: (F,) node indices of the columns of x.
        x: (M, F) values from before the treatment.
        seed: of the Sobol sequence.

    Raises:
        ValueError: noise that is integrated or weighed is not Gaussian.
    """
    model = _Model(scm, treatment, outcome, covariates)
    points, weights = model.points(seed)
    chunk = max(1, _NUMBERS_AT_ONCE // (2 * len(weights)))
    parts = [
        model.answer(np.asarray(x[start : start + chunk], np.float64), points, weights)
        for start in range(0, len(x), chunk)
    ]
    cid0, cid1, error, effective = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if len(weights) == 1 and not model.depends_on_natural:
        effective = np.full(len(x), np.inf)
    return Exact(cid0, cid1, error, effective)


class _Model:
    def __init__(self, scm: SCM, treatment: int, outcome: int, covariates: list[int]) -> None:
        self.treatment, self.outcome = treatment, outcome
        self.columns = {int(node): column for column, node in enumerate(covariates)}
        self.weights = np.asarray(scm.weights, np.float64)
        self.adjacency = np.asarray(scm.adjacency)
        self.scale = np.asarray(scm.noise_scale, np.float64)
        self.threshold = float(np.asarray(scm.threshold)[treatment])
        self.functions = [_FUNCTIONS[MECHANISM_NAMES[i]] for i in np.asarray(scm.mechanism)]
        active = np.flatnonzero(np.asarray(scm.active))
        # What comes before the outcome decides about it; shown nodes that come later tell about it.
        self.nodes = [int(node) for node in active]
        self.hidden = [
            k for k in self.nodes if k not in (treatment, outcome) and k not in self.columns
        ]
        families = np.asarray(scm.noise_family)
        # A shown root has a constant density; the outcome is integrated only where x follows it.
        descendants = self._descendants(outcome)
        self.integrates_outcome = bool(descendants & set(self.columns))
        if self.integrates_outcome:
            self.hidden.append(outcome)
            self.hidden.sort()
        self.depends_on_natural = bool(self._descendants(treatment) & set(self.columns))
        weighed = [k for k in self.columns if self.adjacency[k].any()]
        weighed += [treatment] if self.depends_on_natural else []
        for k in (*self.hidden, *weighed):
            if families[k] != _GAUSSIAN:
                raise ValueError(
                    f"node {k} has {NOISE_FAMILIES[families[k]]} noise, but what is hidden, "
                    "covariates with parents, and a treatment with shown descendants need Gaussian "
                    "noise to be integrated exactly."
                )

    def _descendants(self, node: int) -> set[int]:
        found: set[int] = set()
        frontier = [node]
        while frontier:
            children = set(np.flatnonzero(self.adjacency[:, frontier.pop()]).tolist()) - found
            found |= children
            frontier += children
        return found

    def points(self, seed: int) -> tuple[Array, Array]:
        """Standard normal points (S, hidden) and their weights (S,)."""
        dimensions = len(self.hidden)
        if dimensions == 0:
            return np.zeros((1, 0)), np.ones(1)
        if dimensions == 1:
            grid = np.linspace(-_REACH, _REACH, _GRID_POINTS)
            density = np.exp(-0.5 * grid**2)
            return grid[:, None], density / density.sum()
        draws = qmc.Sobol(dimensions, rng=np.random.default_rng(seed)).random(_SOBOL_POINTS)
        normal = np.vectorize(NormalDist().inv_cdf)(np.clip(draws, 1e-12, 1 - 1e-12))
        return normal, np.full(len(normal), 1 / len(normal))

    def answer(self, x: Array, points: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
        noise, log_weight = self._natural_world(x, points)
        log_weight = log_weight + np.log(weights)[:, None]
        log_weight -= log_weight.max(axis=(1, 2), keepdims=True)
        weight = np.exp(log_weight)
        effective = weight.sum(axis=(1, 2)) ** 2 / np.square(weight).sum(axis=(1, 2))
        means, errors = [], []
        for arm in (0.0, 1.0):
            y = self._outcome_under(arm, x, noise, weight.shape)
            means.append(_average(y, weight))
            if len(weights) == 1:
                errors.append(np.zeros(len(x)))
                continue
            parts = [_average(y[:, half::2], weight[:, half::2]) for half in (0, 1)]
            errors.append(np.abs(parts[0] - parts[1]) / 2)
        return means[0], means[1], np.maximum(*errors), effective

    def _natural_world(self, x: Array, points: Array) -> tuple[dict[int, Array], Array]:
        """Noise of every node but the treatment, and log-weights (M, S, V)."""
        values: dict[int, Array] = {}
        noise: dict[int, Array] = {}
        naturals = np.arange(2.0 if self.depends_on_natural else 1.0)
        log_weight = np.zeros((len(x), len(points), len(naturals)))
        for k in self.nodes:
            mean = self._mechanism(k, values)
            if k == self.treatment:
                values[k] = naturals[None, None, :]
                if self.depends_on_natural:
                    treated = _upper_tail(self.threshold - mean, self.scale[k])
                    share = np.where(values[k] > 0.5, treated, 1 - treated)
                    log_weight = log_weight + np.log(np.maximum(share, 1e-300))
            elif k in self.columns:
                values[k] = x[:, self.columns[k], None, None]
                noise[k] = values[k] - mean
                if self.adjacency[k].any():
                    log_weight = log_weight - 0.5 * np.square(noise[k] / self.scale[k])
            elif k in self.hidden:
                noise[k] = self.scale[k] * points[:, self.hidden.index(k)][None, :, None]
                values[k] = mean + noise[k]
            else:  # the outcome, when nothing shown depends on it
                noise[k] = np.zeros((1, 1, 1))
                values[k] = mean
        return noise, log_weight

    def _outcome_under(
        self, arm: float, x: Array, noise: dict[int, Array], shape: tuple[int, ...]
    ) -> Array:
        values: dict[int, Array] = {}
        for k in self.nodes:
            values[k] = (
                np.full((1, 1, 1), arm)
                if k == self.treatment
                else self._mechanism(k, values) + noise[k]
            )
            if k == self.outcome:
                break
        return np.broadcast_to(values[self.outcome], shape)

    def _mechanism(self, k: int, values: dict[int, Array]) -> Array:
        total = np.zeros((1, 1, 1))
        for parent in np.flatnonzero(self.adjacency[k]):
            total = total + self.weights[k, parent] * values[int(parent)]
        return self.functions[k](total)


def _average(y: Array, weight: Array) -> Array:
    return (weight * y).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))


def _upper_tail(distance: Array, scale: float) -> Array:
    return ndtr(-distance / scale) if scale > 0 else (distance <= 0).astype(np.float64)
