"""Columns of a table: their units, categories, and what a model reads of their cells."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopfn_jax.cells import Cells, TableError, encode, listed, read_cells

# Standardised cells are clipped here: far beyond any use, yet safe to square in float32.
_FAR = 1e15
# Numbers that differ by less than this share of the largest are equal but for rounding.
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Scale:
    """Units of a column: value = loc + scale * standardised value."""

    loc: float
    scale: float

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Self:
        """Mean and standard deviation of what is not NaN; scale 1 if only rounding differs."""
        present = values[~np.isnan(values)]
        lowest, highest = (present.min(), present.max()) if present.size else (0.0, 0.0)
        spread = highest - lowest
        if spread <= rounding(present):
            return cls(float(lowest), 1.0)
        # In units of the spread, so that squares neither overflow nor vanish.
        deviation = spread * ((present - lowest) / spread).std()
        return cls(float(present.mean()), float(deviation))

    def standardise(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Values in their own units -> standardised float32."""
        offset = values - self.loc
        offset[np.abs(offset) <= _ROUNDING * abs(self.loc)] = 0.0
        return (offset / self.scale).clip(-_FAR, _FAR).astype(np.float32)

    def restore(self, values: ArrayLike) -> NDArray[np.float64]:
        """Standardised values -> float64 in the column's own units."""
        return self.loc + self.scale * np.asarray(values, np.float64)


@dataclass(frozen=True)
class Column:
    """A covariate.

    Attributes:
        name: its name in the data frame, or its position in an array.
        categories: what the codes 0, 1, ... stand for; None for a column of numbers.
        scale: units of the numbers or codes.
        indicators: the model reads a column of 0 and 1 for each category, not the codes.
    """

    name: str | int
    categories: tuple[str, ...] | None
    scale: Scale
    indicators: bool = False

    @property
    def width(self) -> int:
        """How many columns the model reads."""
        return len(self.categories or ()) if self.indicators else 1

    def encode(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Numbers or codes, NaN where missing -> what the model reads, (N, width)."""
        if not self.indicators:
            return self.scale.standardise(values)[:, None]
        hot = (values[:, None] == np.arange(self.width)).astype(np.float32)
        return np.where(np.isnan(values)[:, None], np.float32(np.nan), hot)

    def read(self, cells: Cells) -> NDArray[np.float32]:
        """What the model reads of other cells of this column, (M, width).

        Raises:
            TableError: text where numbers were fitted, or a category that was not.
        """
        label = f"column {self.name!r}"
        if self.categories is not None:
            return self.encode(encode(cells, self.categories, label))
        values, categories = read_cells(cells, label)
        if categories is not None:
            raise TableError(
                f"{label} held numbers in the fitted table, but now holds {listed(categories)}."
            )
        return self.encode(values)

    def decode(self, block: NDArray[np.float32]) -> NDArray[np.object_]:
        """What the model reads, (N, width) -> categories or numbers; None where missing.

        Numbers have as few digits as lead back to the same float32, which is all that was kept.
        """
        cells = block[:, 0]
        if self.indicators:
            codes = np.where(np.isnan(cells), np.nan, block.argmax(axis=1))
            cells = self.scale.standardise(codes)
        distinct, index = np.unique(cells, return_inverse=True)
        numbers = self.scale.restore(distinct).tolist()
        present = [number for number in numbers if not math.isnan(number)]
        labels: list[str | float]
        if self.categories is None:
            labels = present
            fewest = 4 - math.floor(math.log10(self.scale.scale))
            for digits in range(fewest, fewest + 5):
                rounded = [round(number, digits) + 0.0 for number in present]  # no -0.0
                if np.array_equal(
                    self.scale.standardise(np.array(rounded)), distinct[: len(rounded)]
                ):
                    labels = rounded
                    break
        else:
            labels = [self.categories[round(number)] for number in present]
        values = np.full(len(distinct), None, object)
        values[: len(labels)] = labels  # missing cells sort last
        return values[index]


def rounding(values: ArrayLike) -> float:
    """By how much values may differ that would be equal but for rounding; 0 for none."""
    return _ROUNDING * float(np.max(np.abs(values), initial=0.0))
