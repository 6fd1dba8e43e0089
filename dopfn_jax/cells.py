"""From cells as users hold them (numbers, text, categories, dates) to float64 numbers or codes.

What cannot be used is refused with the column, the value and the remedy.
"""

import datetime
import decimal
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

# What covariates, treatment and outcome may come as.
Data = ArrayLike | pd.DataFrame | pd.Series
# One column of them.
Cells = NDArray | pd.Series

_LARGEST = float(np.finfo(np.float32).max)

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


def read_array(values: Data, label: str) -> np.ndarray:
    """Anything but pandas as an array of numbers or objects, masked entries as NaN."""
    if isinstance(values, Mapping):
        raise TableError(f"{label} is a {type(values).__name__}: pass it as a pandas DataFrame.")
    if hasattr(values, "toarray"):
        raise TableError(f"{label} is a sparse matrix: make it dense by its method toarray().")
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(object), np.nan)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TableError(f"{label} cannot be read as an array: {error}") from error
    if array.dtype.names:
        raise TableError(f"{label} is a structured array: pass it as a pandas DataFrame.")
    # JAX's short floats, such as bfloat16, are no NumPy numbers.
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def read_cells(cells: Cells, label: str) -> tuple[NDArray[np.float64], tuple[str, ...] | None]:
    """Numbers or codes, NaN where missing, and the categories that codes stand for."""
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind in "biuf":
            return _check_finite(cells.astype(np.float64), label), None
        cells = pd.Series(cells)
    dtype = cells.dtype
    if dtype.kind in "mM":
        raise _date_error(label, cells.iloc[0] if len(cells) else dtype)
    if dtype.kind == "c":
        raise TableError(f"{label} holds complex numbers: use real ones.")
    if isinstance(dtype, pd.CategoricalDtype):
        # Levels of an order stay where they are; of others, those that no row has say nothing.
        known = cells.cat if dtype.ordered else cells.cat.remove_unused_categories().cat
        return _read_categories(cells, list(known.categories), label)
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
    if all(_NUMBER_TEXT.fullmatch(value.strip()) for value in text):
        raise TableError(
            f"{label} holds numbers with signs that are none ({text[0]!r}): turn them into plain "
            "numbers or, if they are categories, pass the column as a pandas categorical."
        )
    return _read_categories(cells, sorted(text), label)


def _read_categories(
    cells: Cells, categories: Sequence[Any], label: str
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    dates = [category for category in categories if isinstance(category, _DATES)]
    if dates:
        raise _date_error(label, dates[0])
    known = (_category(category) for category in categories if not _is_missing(category))
    names = tuple(dict.fromkeys(known))
    return encode(cells, names, label), names


def encode(cells: Cells, categories: Sequence[str], label: str) -> NDArray[np.float64]:
    """Positions of the cells among the categories, NaN where missing."""
    codes, distinct = _factorise(cells, label)
    position = {category: float(index) for index, category in enumerate(categories)}
    present = [value for value in distinct if not _is_missing(value)]
    unseen = [value for value in present if _category(value) not in position]
    if unseen:
        raise TableError(
            f"{label} holds {listed(unseen)}, unseen in the fitted table, which had "
            f"{listed(categories)}: use NaN for an unknown category."
        )
    values = [np.nan if _is_missing(value) else position[_category(value)] for value in distinct]
    return np.append(values, np.nan)[codes]


def _factorise(cells: Cells, label: str) -> tuple[NDArray[np.intp], list[Any]]:
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
    if isinstance(value, str) and "_" in value:  # which Python's numbers may have: "10_14"
        return math.nan
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
    return repr(float(value)).removesuffix(".0") if is_number else str(value).strip()


def _check_finite(values: NDArray[np.float64], label: str) -> NDArray[np.float64]:
    bad = np.abs(values) > _LARGEST
    if bad.any():
        row = bad.argmax()
        raise TableError(
            f"{label} holds {values[row]:g} in row {row}, but numbers must be finite and within "
            f"the float32 range ({_LARGEST:.1e}): rescale, use NaN for the missing cell of a "
            "covariate, or leave the row out."
        )
    return values


def _date_error(label: str, example: Any) -> TableError:
    return TableError(
        f"{label} holds dates or times ({str(example)!r}), which are not covariates: leave it out, "
        "or replace it by a number, such as the days since a fixed day."
    )


def listed(values: Sequence[Any], show: Any = repr, most: int = 5) -> str:
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
# A number with a currency, thousands separators or a percent sign.
_NUMBER_TEXT = re.compile(r"[-+]?[$€£¥]? ?[-+]?[0-9][0-9,' ]*([.][0-9]*)? ?[%$€£¥]?")
