"""Monotone transforms of covariates and outcome, fitted to a table, and the way back.

Axes: N rows of a table, M query rows, F covariates, Q buckets.
"""

from typing import Literal, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.tables import Table

# How a member of an ensemble sees a table.
Transform = Literal["none", "quantile_x", "quantile_y", "log_y"]
TRANSFORMS: tuple[Transform, ...] = ("none", "quantile_x", "quantile_y", "log_y")

_LOG_KNOTS = 256
# Neighbouring borders are at least so far apart, in shares of an equal width.
_LEAST_WIDTH = 1e-4


class Monotone(NamedTuple):
    """A strictly increasing, piecewise linear map.

    Beyond its ends it goes on with its average slope: a steep end would throw what lies a little
    outside of the table far away.

    Attributes:
        values: (K,) knots, strictly increasing.
        images: (K,) where they go, strictly increasing.
    """

    values: NDArray[np.float64]
    images: NDArray[np.float64]

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Values of any shape -> their images; NaN stays."""
        values = np.asarray(values, np.float64)
        lowest, highest = self.values[[0, -1]]
        slope = np.ptp(self.images) / np.ptp(self.values) if len(self.values) > 1 else 1.0
        beyond = values - np.clip(values, lowest, highest)
        return np.interp(values, self.values, self.images) + slope * beyond

    @property
    def inverse(self) -> "Monotone":
        """The map that leads back."""
        return Monotone(self.images, self.values)

    @classmethod
    def normal_scores(cls, values: ArrayLike) -> Self:
        """Takes a sample to the normal quantiles of its ranks; equal values share a rank."""
        values = np.asarray(values, np.float64)
        distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        if not distinct.size:
            return cls(np.zeros(1), np.zeros(1))
        ranks = (np.cumsum(counts) - counts / 2) / counts.sum()
        return cls(distinct, ndtri(ranks))

    @classmethod
    def signed_log(cls, values: ArrayLike) -> Self:
        """Takes values to arcsinh((value - median) / spread): linear inside, logarithmic outside.

        The spread is half of the distance between the quartiles, or the standard deviation where
        half of the values are equal.
        """
        values = np.asarray(values, np.float64)
        low_end, low, centre, high, high_end = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        spread = (high - low) / 2 or values.std()
        lowest, highest = (np.arcsinh((end - centre) / spread) for end in (low_end, high_end))
        images = np.linspace(lowest, highest, _LOG_KNOTS)
        return cls(centre + spread * np.sinh(images), images)


class TableTransform(NamedTuple):
    """What is done to a table before it is read, and to the answers after.

    Attributes:
        x: a map for each of the F covariates; empty if they stay as they are.
        y: a map of the outcome; None if it stays.
    """

    x: tuple[Monotone, ...] = ()
    y: Monotone | None = None

    @classmethod
    def fit(cls, name: Transform, table: Table) -> Self:
        """The transform of that name, fitted to a table."""
        if name == "quantile_x":
            return cls(x=tuple(map(Monotone.normal_scores, table.x.T)))
        # Two values, of a 0/1 outcome for example, have no shape to change.
        if name in ("quantile_y", "log_y") and len(np.unique(table.y)) > 2:
            fit = Monotone.normal_scores if name == "quantile_y" else Monotone.signed_log
            return cls(y=fit(table.y))
        return cls()

    def covariates(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Covariates (M, F), transformed."""
        if not self.x:
            return x
        columns = [image(column) for image, column in zip(self.x, x.T, strict=True)]
        return np.stack(columns, axis=1).astype(np.float32)

    def outcome(self, y: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outcomes (N,), transformed."""
        return y if self.y is None else self.y(y).astype(np.float32)

    def restore(self, answer: BarDistribution) -> BarDistribution:
        """Distributions of the transformed outcome -> distributions of the outcome.

        Every bucket keeps its mass, which is spread evenly between its borders' places.
        """
        if self.y is None:
            return answer
        borders = self.y.inverse(answer.borders)
        # Where many outcomes are nearly equal, so are borders: too near for float32.
        steps = _LEAST_WIDTH * np.ptp(borders) / len(borders) * np.arange(len(borders))
        borders = np.maximum.accumulate(borders - steps) + steps
        return BarDistribution(answer.logits, jnp.asarray(borders, jnp.float32))
