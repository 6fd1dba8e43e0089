"""CSV files that commands read: their dialect, and the errors that such files have."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def add_dialect(parser: argparse.ArgumentParser) -> None:
    """Declares the options by which files of other countries are read."""
    add = parser.add_argument
    add("--separator", default=",", metavar="CHAR", help="between cells (default: a comma)")
    add("--decimal", default=".", metavar="CHAR", help="decimal sign of numbers (default: a point)")


def read_table(path: Path, options: argparse.Namespace) -> "pd.DataFrame":
    """A CSV file with a line of column names, in the dialect of `add_dialect`.

    Raises:
        ValueError: the options or the file cannot be used.
        OSError: the file cannot be read.
    """
    import pandas as pd

    separator: str = options.separator
    decimal: str = options.decimal
    for option, sign in (("--separator", separator), ("--decimal", decimal)):
        if len(sign) != 1:
            raise ValueError(f"{option} {sign!r}: must be a single character.")
    if separator == decimal:
        raise ValueError(f"--decimal {decimal!r}: is the separator too; name another by either.")
    try:
        first = pd.read_csv(path, header=None, nrows=1, dtype=str, sep=separator).iloc[0]
        names = first.dropna()
        _check_separator(path, list(names), separator)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # Else pandas takes the first column as labels where rows are longer than the names.
            table = pd.read_csv(path, index_col=False, sep=separator, decimal=decimal)
    except pd.errors.ParserWarning as error:
        raise ValueError(
            f"{path}: its rows have more cells than the line of names: name the first column if it "
            "has none, or quote cells that hold a comma."
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no CSV table ({error}).") from error
    for name in names[names.duplicated()]:
        raise ValueError(f"{path}: has more than one column {name!r}: rename or drop one.")
    return table


def _check_separator(path: Path, names: list[str], separator: str) -> None:
    """Refuses a line of names that another separator would part."""
    others = {";": "--separator ';'", "\t": "--separator $'\\t'", "|": "--separator '|'"}
    if len(names) == 1 and separator not in others:
        for other, remedy in others.items():
            if other in names[0]:
                raise ValueError(f"{path}: has a single column, {names[0]!r}: add {remedy}.")


def check_column(table: "pd.DataFrame", name: str, option: str) -> None:
    """Refuses a name that is no column, given by an option.

    Raises:
        ValueError: there is no such column; the message lists those that are there.
    """
    if name not in table.columns:
        known = ", ".join(map(repr, table.columns))
        raise ValueError(f"{option} {name!r}: no such column; the columns are {known}.")
