"""From what users hold (NumPy, pandas, JAX arrays, lists) to the float32 arrays the model reads.

A `Schema` remembers what it was fitted on: names and order of the columns, their categories, a
location and a scale per column of numbers. Cells are centred and scaled in float64 and only
then cast to float32, so that 1.6e9 + 1 or 1e-30 keep their precision. The model standardises by the
context in any case, so this changes no answer.

What cannot be used is refused here, before any computation, with the column, the value and the
remedy.

Axes: N rows of the table, M rows of a query, F covariates as the model reads them, of which a
column of unordered categories makes several.
"""

import math
import sys
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.cells import Cells, Data, TableError, listed, read_array, read_cells
from dopfn_jax.columns import Column, Scale, rounding


class Table(NamedTuple):
    """An observational table as the model reads it, float32.

    Attributes:
        x: (N, F) covariates, standardised, NaN where missing.
        t: (N,) treatment, 0 or 1.
        y: (N,) outcome, standardised.
    """

    x: NDArray[np.float32]
    t: NDArray[np.float32]
    y: NDArray[np.float32]


@dataclass(frozen=True)
class Schema:
    """What a table's columns mean.

    Attributes:
        columns: the covariates, in the order in which the model sees them.
        named: the columns came with names, by which those of later data frames are matched.
        outcome: units of y.
        binary_outcome: y holds 0 and 1 only.
    """

    columns: tuple[Column, ...]
    named: bool
    outcome: Scale
    binary_outcome: bool

    @classmethod
    def fit(cls, X: Data | None, t: Data, y: Data, most: int | None = None) -> tuple[Self, Table]:
        """Checks an observational table and learns what its columns mean.

        Text and pandas categoricals become categories. Of three or more without an order the model
        reads an indicator each, as long as `most` columns suffice, those of few categories first;
        others it reads as the codes 0, 1, 2, ..., in the categorical's order or alphabetical. Text
        that is a number throughout is read as numbers, booleans as 0 and 1. NaN and None are
        missing cells.

        Args:
            X: the covariates, a row for each unit; None for a table without any.
            t: (N,) treatment: 0 and 1 or booleans, both present.
            y: (N,) outcome: numbers, not all equal.
            most: columns that the model takes; None for any number.

        Warns:
            UserWarning: unordered categories are read as codes.

        Returns:
            The schema, and the table in its terms.

        Raises:
            TableError: a shape, column or value that cannot be used.
        """
        check_order(X=X, t=t, y=y)
        treatment, outcome = read_treatment(t), read_outcome(y)
        covariates, named, length = _read_columns(X, len(treatment))
        rows = {"X": length, "t": len(treatment), "y": len(outcome)}
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{name} has {count}" for name, count in rows.items())
            raise TableError(f"X, t and y must have the same number of rows, but {found}.")
        if not len(treatment):
            raise TableError("the table is empty: it has no rows.")
        if treatment.min() == treatment.max():
            raise TableError(
                f"{_label('treatment t', t)} is {treatment[0]:g} in all {len(treatment)} rows: an "
                "effect needs rows with treatment 0 and rows with treatment 1."
            )
        if np.ptp(outcome) <= rounding(outcome):
            raise TableError(
                f"{_label('outcome y', y)} is {outcome[0]:g} in all {len(outcome)} rows: a "
                "constant outcome says nothing about an effect; check that it is the right column."
            )
        if named:
            _check_apart(covariates, "treatment t", t, treatment)
            _check_apart(covariates, "outcome y", y, outcome)
        read = {name: read_cells(given, f"column {name!r}") for name, given in covariates.items()}
        expanded = _expanded(covariates, {name: kinds for name, (_, kinds) in read.items()}, most)
        columns = [
            Column(name, categories, Scale.fit(values), name in expanded)
            for name, (values, categories) in read.items()
        ]
        cells = [c.encode(values) for c, (values, _) in zip(columns, read.values(), strict=True)]
        scale = Scale.fit(outcome)
        table = Table(_join(cells, length), treatment, scale.standardise(outcome))
        binary = bool(np.isin(outcome, (0, 1)).all())
        return cls(tuple(columns), named, scale, binary), table

    def read_covariates(self, X: Data | None, rows: int = 0) -> NDArray[np.float32]:
        """Covariates of query rows in the terms of the fitted table.

        Columns of a data frame are matched by name, those of an array by position.

        Args:
            X: (M, F) covariates; None for a table without any.
            rows: M, in case X is None.

        Returns:
            (M, F) standardised float32, NaN where missing.

        Raises:
            TableError: missing, additional or unreadable columns, or an unseen category.
        """
        known = [column.name for column in self.columns]
        if X is None and known:
            raise TableError(
                f"X is None, but the table was fitted with covariates: {listed(known)}."
            )
        given, named, length = _read_columns(X, rows)
        by_name = named and self.named
        if by_name:
            _check_names(known, [str(name) for name in given])
        elif len(given) != len(known):
            raise TableError(
                f"X has {len(given)} columns, but the table was fitted with {len(known)}."
            )
        elif known and named != self.named:
            now, before = ("names", "did not") if named else ("no names", "did")
            warnings.warn(
                f"the columns of X have {now}, but those that were fitted {before}: they are "
                "matched by position.",
                stacklevel=_level_outside(),
            )
        cells = [given[name] for name in (known if by_name else given)]
        read = [column.read(given) for column, given in zip(self.columns, cells, strict=True)]
        return _join(read, length)

    def decode(self, x: NDArray[np.float32], position: int) -> NDArray[np.object_]:
        """The cells of a column, None where missing, from covariates (N, F) as the model reads."""
        first = sum(column.width for column in self.columns[:position])
        column = self.columns[position]
        return column.decode(x[:, first : first + column.width])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Schema.from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The schema that `to_dict` described, also after a trip through JSON."""
        columns = tuple(
            Column(
                name=column["name"],
                categories=None if column["categories"] is None else tuple(column["categories"]),
                scale=Scale(**column["scale"]),
                indicators=column.get("indicators", False),
            )
            for column in values["columns"]
        )
        outcome = Scale(**values["outcome"])
        return cls(columns, values["named"], outcome, values["binary_outcome"])


def read_treatment(t: Data) -> NDArray[np.float32]:
    """Treatment values as (N,) float32.

    Raises:
        TableError: not one-dimensional, missing values, or others than 0, 1 and booleans.
    """
    label = _label("treatment t", t)
    values, categories = _read_vector(t, label)
    if categories is not None or not ((values == 0) | (values == 1)).all():
        if categories is None:
            found = [f"{value:g}" for value in np.unique(values)]
        else:
            found = [repr(category) for category in categories]
        example = f", for example as t == {found[1]}" if len(found) == 2 else ""
        raise TableError(
            f"{label} must hold 0 and 1 (or booleans), but holds {listed(found, str)}: recode "
            f"it{example}."
        )
    return values.astype(np.float32)


def read_outcome(y: Data) -> NDArray[np.float64]:
    """Outcomes as (N,) float64.

    Raises:
        TableError: not one-dimensional, missing values, or no finite numbers.
    """
    label = _label("outcome y", y)
    values, categories = _read_vector(y, label)
    if categories is not None:
        raise TableError(
            f"{label} must hold numbers, but holds {listed(categories)}: recode it as numbers."
        )
    return values


def _label(role: str, values: Data) -> str:
    """How messages call the treatment or the outcome: by its own name if it has one."""
    name = _own_name(values)
    return role if name is None else f"{role.split()[0]} {name!r}"


def _own_name(values: Data) -> Hashable | None:
    """The name of a series, or of the only column of a data frame."""
    if isinstance(values, pd.DataFrame) and values.shape[1] == 1:
        return values.columns[0]
    return getattr(values, "name", None)


def _read_vector(values: Data, label: str) -> tuple[NDArray[np.float64], tuple[str, ...] | None]:
    """As `read_cells`, for one value per row and none missing."""
    if isinstance(values, pd.DataFrame) and values.shape[1] == 1:
        values = values.iloc[:, 0]
    if isinstance(values, pd.Series):
        # Categories that are numbers count as these numbers here, not as codes.
        cells: Cells = (
            values.astype(object) if isinstance(values.dtype, pd.CategoricalDtype) else values
        )
    else:
        cells = read_array(values, label)
        if cells.ndim == 2 and cells.shape[1] == 1:
            cells = cells[:, 0]
        if cells.ndim != 1:
            raise TableError(f"{label} has shape {cells.shape}, but must hold one value per row.")
    numbers_, categories = read_cells(cells, label)
    missing = np.isnan(numbers_)
    if missing.any():
        raise TableError(
            f"{label} is missing in {missing.sum()} rows, the first being row {missing.argmax()}: "
            "leave such rows out."
        )
    return numbers_, categories


def _read_columns(X: Data | None, rows: int) -> tuple[dict[str | int, Cells], bool, int]:
    """The columns of X by name or position, whether they came with names, and their length."""
    if X is None:
        return {}, False, rows
    if not isinstance(X, pd.DataFrame | pd.Series) and hasattr(X, "to_pandas"):  # Polars, Arrow
        X = cast(Any, X).to_pandas()
    if isinstance(X, pd.DataFrame):
        columns: dict[str | int, Cells] = {}
        for name, cells in X.items():
            if str(name) in columns:
                raise TableError(f"X has more than one column {str(name)!r}: rename or drop one.")
            columns[str(name)] = cells
        return columns, True, len(X)
    array = read_array(X, "X")
    if array.ndim != 2:
        remedy = ""
        if isinstance(X, pd.Series):
            remedy = "; for one covariate use X.to_frame(), for one row X.to_frame().T"
        elif array.ndim == 1:
            remedy = "; for one covariate use X.reshape(-1, 1), for one row X.reshape(1, -1)"
        raise TableError(f"X has shape {array.shape}, but must be (rows, covariates){remedy}.")
    return dict(enumerate(array.T)), False, len(array)


def _check_apart(
    columns: Mapping[str | int, Cells], role: str, values: Data, read: NDArray
) -> None:
    """Refuses a covariate with the name of the treatment or the outcome that says the same.

    Also in other units, rounded to float32, or with two values coded in another way.
    """
    name = str(_own_name(values))
    if name not in columns:
        return
    cells, _ = read_cells(columns[name], f"column {name!r}")
    with np.errstate(invalid="ignore"):  # of a constant
        alike = abs(np.corrcoef(cells, read)[0, 1])
    if alike > 1 - 1e-9:
        raise TableError(
            f"X holds the {role} as its column {name!r}: leave it out, as by "
            f"X.drop(columns={name!r})."
        )


def check_order(**parts: object) -> None:
    """Refuses pandas objects whose indexes order the same rows in two ways; rows go by position.

    Args:
        **parts: what messages call them, and objects of any type.

    Raises:
        TableError: two of them have the same index in another order.
    """
    labelled = {
        name: values.index
        for name, values in parts.items()
        if isinstance(values, pd.DataFrame | pd.Series)
    }
    for name, index in labelled.items():
        first, expected = next(iter(labelled.items()))
        comparable = len(index) == len(expected) and index.nlevels == expected.nlevels
        same_labels = comparable and index.isin(expected).all()
        if same_labels and index.is_unique and not index.equals(expected):
            raise TableError(
                f"{first} and {name} have the same index in another order, but rows are matched by "
                f"position: pass {name}.loc[{first}.index] if the labels say which rows belong "
                f"together, or {name}.to_numpy() if they are side by side already."
            )


def _level_outside() -> int:
    """The stack level of the caller outside of this package, whom a warning is for."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("dopfn_jax"):
        level += 1
    return level


def _check_names(known: Sequence[str | int], given: Sequence[str]) -> None:
    missing = [name for name in known if name not in given]
    unknown = [name for name in given if name not in known]
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"has {listed(unknown)} in addition"] if unknown else []
    if problems:
        raise TableError(
            f"X {' and '.join(problems)}: its columns must be those that were fitted, "
            f"{listed(known, most=20)}, in any order."
        )


def _expanded(
    columns: Mapping[str | int, Cells],
    categories: Mapping[str | int, tuple[str, ...] | None],
    most: int | None,
) -> set[str | int]:
    """The columns whose categories get indicators: unordered, as many as there is room for."""
    unordered = {
        name: len(names)
        for name, names in categories.items()
        if names and len(names) > 2 and not getattr(columns[name].dtype, "ordered", False)
    }
    room = math.inf if most is None else most - len(columns)
    expanded = set()
    for name, count in sorted(unordered.items(), key=lambda item: item[1]):
        if count - 1 <= room:
            expanded.add(name)
            room -= count - 1
    coded = [name for name in unordered if name not in expanded]
    if coded:
        warnings.warn(
            f"there is no room for an indicator of every category of {listed(coded)}: read as "
            "codes in alphabetical order, which hardly adjusts for them; merge rare categories, or "
            "give them an order (pandas.Categorical(..., ordered=True)).",
            stacklevel=_level_outside(),
        )
    return expanded


def _join(cells: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.float32]:
    return np.concatenate(cells, axis=1) if cells else np.zeros((rows, 0), np.float32)
