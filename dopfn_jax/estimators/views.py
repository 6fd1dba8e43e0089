"""Random parts of a table, and the ways in which the members of an ensemble see it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dopfn_jax.estimators.transforms import TableTransform, Transform
from dopfn_jax.tables import Table


class View(NamedTuple):
    """How one member of an ensemble sees a table of N rows and F covariates.

    Attributes:
        rows: indices of the rows that it reads.
        transform: what is done to covariates and outcome.
        order: (F,) the columns in its order.
        signs: (F,) -1 for a covariate that it sees mirrored, else 1.
    """

    rows: NDArray[np.intp]
    transform: TableTransform
    order: NDArray[np.intp]
    signs: NDArray[np.float32]

    def table(self, table: Table) -> Table:
        """What the member reads."""
        x, t, y = (column[self.rows] for column in table)
        return Table(self.covariates(x), t, self.transform.outcome(y))

    def covariates(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Standardised covariates (M, F) as the member sees them."""
        return self.transform.covariates(x)[:, self.order] * self.signs


def draw_views(
    table: Table, count: int, most_rows: int, seed: int | None, transforms: Sequence[Transform]
) -> list[View]:
    """The views of an ensemble's members, which take the transforms in turn.

    The first sees the columns in their order. Where the table has more than `most_rows` rows, every
    member reads that many at random.
    """
    rows, covariates = table.x.shape
    generator = np.random.default_rng(seed)
    views = []
    for member in range(count):
        part = np.arange(rows)
        if rows > most_rows:
            part = random_part(table.t, context_share(rows, most_rows), generator)
        order, signs = np.arange(covariates), np.ones(covariates, np.float32)
        if member:
            order = generator.permutation(order)
            signs = generator.choice(np.array([-1, 1], np.float32), covariates)
        read = Table(*(column[part] for column in table))
        transform = TableTransform.fit(transforms[member % len(transforms)], read)
        views.append(View(part, transform, order, signs))
    return views


def context_share(rows: int, most_rows: int) -> float:
    """The share that `random_part` may draw without ever exceeding `most_rows`."""
    return min(1.0, (most_rows - 1) / rows)


def random_part(
    t: NDArray[np.float32], share: float, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Indices of a share of the rows of each arm, without replacement, at least one.

    A share that is no whole number of rows is rounded up or down at random, so that it is right on
    average.
    """
    arms = [np.flatnonzero(t == arm) for arm in (0, 1)]
    sizes = [max(1, int(share * len(arm) + generator.random())) for arm in arms]
    drawn = [generator.permutation(arm)[:size] for arm, size in zip(arms, sizes, strict=True)]
    return np.concatenate(drawn)
