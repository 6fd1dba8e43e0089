"""From what users hold (NumPy, pandas, JAX arrays, lists) to the float32 arrays the model reads.

A `Schema` remembers what it was fitted on: names and order of the columns, the categories that
codes stand for, a location and a scale per column. Cells are centred and scaled in float64 and only
then cast to float32, so that 1.6e9 + 1 or 1e-30 keep their precision. The model standardises by the
context in any case, so this changes no answer.

What cannot be used is refused here, before any computation, with the column, the value and the
remedy.

Axes: N rows of the table, M rows of a query, F covariates.
"""

import datetime
import decimal
import math
import numbers
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

# What covariates, treatment and outcome may come as.
Data = ArrayLike | pd.DataFrame | pd.Series

_LARGEST = float(np.finfo(np.float32).max)
# Standardised cells are clipped here: far beyond any use, yet safe to square in float32.
_FAR = 1e15

_DATES = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    np.datetime64,
    np.timedelta64,
    pd.Period,
)


class TableError(ValueError):
    """A table that cannot be used; the message names the column, the value and the remedy."""


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
class Scale:
    """Units of a column: value = loc + scale * standardised value."""

    loc: float
    scale: float

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Self:
        """Mean and standard deviation of the values that are not NaN; scale 1 if all are equal."""
        present = values[~np.isnan(values)]
        lowest, highest = (present.min(), present.max()) if present.size else (0.0, 0.0)
        spread = highest - lowest
        if not spread:
            return cls(float(lowest), 1.0)
        # In units of the spread, so that squares neither overflow nor vanish.
        deviation = spread * ((present - lowest) / spread).std()
        return cls(float(present.mean()), float(deviation))

    def standardise(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Values in their own units -> standardised float32."""
        return np.clip((values - self.loc) / self.scale, -_FAR, _FAR).astype(np.float32)

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
    """

    name: str | int
    categories: tuple[str, ...] | None
    scale: Scale

    def decode(self, cells: NDArray[np.float32]) -> NDArray[np.object_]:
        """Standardised cells -> categories or numbers to six digits; None where missing."""
        distinct, index = np.unique(cells, return_inverse=True)

        def value(cell: float) -> str | float | None:
            if math.isnan(cell):
                return None
            if self.categories is None:
                return float(f"{cell:.6g}")
            return self.categories[round(cell)]

        values = np.empty(len(distinct), object)
        values[:] = [value(cell) for cell in self.scale.restore(distinct)]
        return values[index]


@dataclass(frozen=True)
class Schema:
    """What a table's columns mean.

    Attributes:
        columns: the F covariates, in the order in which the model sees them.
        named: the columns came with names, by which those of later data frames are matched.
        outcome: units of y.
        binary_outcome: y holds 0 and 1 only.
    """

    columns: tuple[Column, ...]
    named: bool
    outcome: Scale
    binary_outcome: bool

    @classmethod
    def fit(cls, X: Data | None, t: Data, y: Data) -> tuple[Self, Table]:
        """Checks an observational table and learns what its columns mean.

        Text becomes categories in alphabetical order and a pandas categorical keeps its own order;
        the model reads both as the codes 0, 1, 2, ... Text that is a number throughout is read as
        numbers, booleans as 0 and 1. NaN and None are missing cells.

        Args:
            X: (N, F) covariates; None for a table without any.
            t: (N,) treatment: 0 and 1 or booleans, both present.
            y: (N,) outcome: numbers, not all equal.

        Returns:
            The schema, and the table in its terms.

        Raises:
            TableError: a shape, column or value that cannot be used.
        """
        treatment, outcome = read_treatment(t), read_outcome(y)
        frame, named = _read_frame(X, len(treatment))
        rows = {"X": len(frame), "t": len(treatment), "y": len(outcome)}
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
        if np.ptp(outcome) <= 8 * np.finfo(np.float64).eps * np.abs(outcome).max():
            raise TableError(
                f"{_label('outcome y', y)} is {outcome[0]:g} in all {len(outcome)} rows: a "
                "constant outcome says nothing about an effect; check that it is the right column."
            )
        columns, cells = [], []
        for name, series in frame.items():
            values, categories = _read_cells(series, f"column {name!r}")
            column = Column(cast("str | int", name), categories, Scale.fit(values))
            columns.append(column)
            cells.append(column.scale.standardise(values))
        scale = Scale.fit(outcome)
        table = Table(_stack(cells, len(frame)), treatment, scale.standardise(outcome))
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
                f"X is None, but the table was fitted with covariates: {_list(known)}."
            )
        frame, named = _read_frame(X, rows)
        by_name = named and self.named
        if by_name:
            _check_names(known, list(frame.columns))
        elif frame.shape[1] != len(known):
            raise TableError(
                f"X has {frame.shape[1]} columns, but the table was fitted with {len(known)}."
            )
        elif known and named != self.named:
            now, before = ("names", "did not") if named else ("no names", "did")
            warnings.warn(
                f"the columns of X have {now}, but those that were fitted {before}: they are "
                "matched by position.",
                stacklevel=_level_outside(),
            )
        cells = [
            _read_known_cells(frame[column.name] if by_name else frame.iloc[:, position], column)
            for position, column in enumerate(self.columns)
        ]
        return _stack(cells, len(frame))

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
    if categories is None:
        found = [f"{value:g}" for value in np.unique(values)]
    else:
        found = [repr(category) for category in categories]
    if categories is not None or not np.isin(values, (0, 1)).all():
        example = f", for example as t == {found[1]}" if len(found) == 2 else ""
        raise TableError(
            f"{label} must hold 0 and 1 (or booleans), but holds {_list(found, str)}: recode "
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
            f"{label} must hold numbers, but holds {_list(categories)}: recode it as numbers."
        )
    return values


def _label(role: str, values: Data) -> str:
    """How messages call the treatment or the outcome: by its own name if it has one."""
    name = getattr(values, "name", None)
    if isinstance(values, pd.DataFrame) and values.shape[1] == 1:
        name = values.columns[0]
    return role if name is None else f"{role.split()[0]} {name!r}"


def _read_vector(values: Data, label: str) -> tuple[NDArray[np.float64], tuple[str, ...] | None]:
    """As `_read_cells`, for one value per row and none missing."""
    if isinstance(values, pd.DataFrame) and values.shape[1] == 1:
        values = values.iloc[:, 0]
    if isinstance(values, pd.Series):
        # Categories that are numbers count as these numbers here, not as codes.
        series = values.astype(object) if isinstance(values.dtype, pd.CategoricalDtype) else values
    else:
        array = _read_array(values, label)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise TableError(f"{label} has shape {array.shape}, but must hold one value per row.")
        series = pd.Series(array)
    numbers_, categories = _read_cells(series, label)
    missing = np.isnan(numbers_)
    if missing.any():
        raise TableError(
            f"{label} is missing in {missing.sum()} rows, the first being row {missing.argmax()}: "
            "leave such rows out."
        )
    return numbers_, categories


def _read_frame(X: Data | None, rows: int) -> tuple[pd.DataFrame, bool]:
    """X as a data frame, and whether its columns came with names."""
    if X is None:
        return pd.DataFrame(index=range(rows)), False
    if isinstance(X, pd.DataFrame):
        frame = X.set_axis([str(name) for name in X.columns], axis=1)
        repeated = frame.columns[frame.columns.duplicated()]
        if len(repeated):
            raise TableError(f"X has more than one column {repeated[0]!r}: rename or drop one.")
        return frame, True
    array = _read_array(X, "X")
    if array.ndim != 2:
        remedy = "; for one covariate use X.reshape(-1, 1)" if array.ndim == 1 else ""
        raise TableError(f"X has shape {array.shape}, but must be (rows, covariates){remedy}.")
    return pd.DataFrame(array), False


def _read_array(values: Data, label: str) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(object), np.nan)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TableError(f"{label} cannot be read as an array: {error}") from error
    # JAX's short floats, such as bfloat16, are no NumPy numbers.
    return array.astype(np.float32) if array.dtype.kind == "V" and not array.dtype.names else array


def _level_outside() -> int:
    """The stack level of the caller outside of this package, whom a warning is for."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("dopfn_jax"):
        level += 1
    return level


def _check_names(known: Sequence[str | int], given: Sequence[str]) -> None:
    missing = [name for name in known if name not in given]
    unknown = [name for name in given if name not in known]
    problems = [f"lacks {_list(missing)}"] if missing else []
    problems += [f"has {_list(unknown)} in addition"] if unknown else []
    if problems:
        raise TableError(
            f"X {' and '.join(problems)}: its columns must be those that were fitted, "
            f"{_list(known, most=20)}, in any order."
        )


def _read_cells(cells: pd.Series, label: str) -> tuple[NDArray[np.float64], tuple[str, ...] | None]:
    """Numbers or codes, NaN where missing, and the categories that codes stand for."""
    dtype = cells.dtype
    if dtype.kind in "mM":
        raise _date_error(label, cells.iloc[0] if len(cells) else dtype)
    if dtype.kind == "c":
        raise TableError(f"{label} holds complex numbers: use real ones.")
    if isinstance(dtype, pd.CategoricalDtype):
        return _read_categories(cells, list(dtype.categories), label)
    if dtype.kind in "biuf":
        values = cells.to_numpy(np.float64, na_value=np.nan)
        return _check_finite(values, label), None

    codes, distinct = _factorise(cells, label)
    values = np.array([_as_number(value, label) for value in distinct], np.float64)
    text = [value for value, number in zip(distinct, values, strict=True) if np.isnan(number)]
    text = [value for value in text if not _is_missing(value)]
    if not text:
        return _check_finite(np.append(values, np.nan)[codes], label), None
    if not np.isnan(values).all():
        raise TableError(
            f"{label} mixes numbers with text ({text[0]!r}): make such cells NaN or, if they are "
            "categories, pass the column as a pandas categorical."
        )
    dates = [value for value in text if _DATE_TEXT.fullmatch(value.strip())]
    if 2 * len(dates) >= len(text):
        raise _date_error(label, dates[0])
    return _read_categories(cells, sorted(text), label)


def _read_known_cells(cells: pd.Series, column: Column) -> NDArray[np.float32]:
    """Standardised cells of a column that has been fitted."""
    label = f"column {column.name!r}"
    if column.categories is not None:
        return column.scale.standardise(_encode(cells, column.categories, label))
    values, categories = _read_cells(cells, label)
    if categories is not None:
        raise TableError(
            f"{label} held numbers in the fitted table, but now holds {_list(categories)}."
        )
    return column.scale.standardise(values)


def _read_categories(
    cells: pd.Series, categories: Sequence[Any], label: str
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    dates = [category for category in categories if isinstance(category, _DATES)]
    if dates:
        raise _date_error(label, dates[0])
    known = (_category(category) for category in categories if not _is_missing(category))
    names = tuple(dict.fromkeys(known))
    return _encode(cells, names, label), names


def _encode(cells: pd.Series, categories: Sequence[str], label: str) -> NDArray[np.float64]:
    """Positions of the cells among the categories, NaN where missing."""
    codes, distinct = _factorise(cells, label)
    position = {category: float(index) for index, category in enumerate(categories)}
    present = [value for value in distinct if not _is_missing(value)]
    unseen = [value for value in present if _category(value) not in position]
    if unseen:
        raise TableError(
            f"{label} holds {_list(unseen)}, unseen in the fitted table, which had "
            f"{_list(categories)}: use NaN for an unknown category."
        )
    values = [np.nan if _is_missing(value) else position[_category(value)] for value in distinct]
    return np.append(values, np.nan)[codes]


def _factorise(cells: pd.Series, label: str) -> tuple[NDArray[np.intp], list[Any]]:
    """For each cell its index into the list of distinct values, -1 where missing."""
    try:
        codes, distinct = pd.factorize(cells)
    except TypeError as error:  # values that cannot be hashed
        raise TableError(f"{label} holds values that are no numbers or text: {error}") from error
    return codes, list(distinct)


def _as_number(value: Any, label: str) -> float:
    """A cell as a number; NaN for text that is none."""
    if isinstance(value, _DATES):
        raise _date_error(label, value)
    if not isinstance(value, (str, numbers.Real, np.bool_, decimal.Decimal)):
        kind = type(value).__name__
        raise TableError(f"{label} holds a value of type {kind}: use numbers or text.")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan


def _is_missing(value: Any) -> bool:
    """Whether a distinct value stands for a missing cell."""
    return isinstance(value, str) and value.strip().lower() in ("", "nan")


def _category(value: Any) -> str:
    """Name of a category: the same for "1", 1 and 1.0."""
    is_number = isinstance(value, numbers.Real) and value is not True and value is not False
    return f"{float(value):.17g}" if is_number else str(value).strip()


def _check_finite(values: NDArray[np.float64], label: str) -> NDArray[np.float64]:
    bad = np.abs(values) > _LARGEST
    if bad.any():
        row = bad.argmax()
        raise TableError(
            f"{label} holds {values[row]:g} in row {row}, but numbers must be finite and within "
            f"the float32 range ({_LARGEST:.1e}): use NaN for a missing cell, or rescale."
        )
    return values


def _date_error(label: str, example: Any) -> TableError:
    return TableError(
        f"{label} holds dates or times ({str(example)!r}), which are not covariates: leave it out, "
        "or replace it by a number, such as the days since a fixed day."
    )


def _stack(cells: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.float32]:
    return np.stack(cells, axis=1) if cells else np.zeros((rows, 0), np.float32)


def _list(values: Sequence[Any], show: Any = repr, most: int = 5) -> str:
    """The first values, separated by commas, for a message."""
    shown = ", ".join(show(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def _date_text() -> re.Pattern[str]:
    """Matches text that is a date, a time of day, or both."""
    day, month = "(0?[1-9]|[12][0-9]|3[01])", "(0?[1-9]|1[0-2])"
    name = (
        "(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?"
        "|oct(ober)?|nov(ember)?|dec(ember)?)"
    )
    dates = [
        rf"[0-9]{{4}}[-/.]{month}([-/.]{day})?",  # 2021-01-31, 2021/01
        rf"{day}[-/.]{day}[-/.]([0-9]{{4}}|[0-9]{{2}})",  # 31.01.2021, 1/31/21
        rf"{day}[-. ]*{name}[-., ]*([0-9]{{4}}|[0-9]{{2}})?",  # 31 Jan 2021, 31-Jan
        rf"{name}[-. ]*{day}(,? *[0-9]{{4}})?",  # January 31, 2021
        rf"{name}[-., ]*[0-9]{{4}}",  # Jan 2021
        r"[0-9]{4}[- ]?q[1-4]",  # 2021Q1
    ]
    weekday = "((mon|tues?|wed(nes)?|thu(rs)?|fri|sat(ur)?|sun)(day)?[., ]+)?"
    clock = r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?( ?[ap]\.?m\.?)?"
    zone = "( ?(z|utc|gmt|[-+][0-9]{2}:?[0-9]{2}))?"
    pattern = rf"{weekday}({'|'.join(dates)})([t, ]+{clock}{zone})?|{clock}{zone}"
    return re.compile(pattern, re.IGNORECASE)


_DATE_TEXT = _date_text()
