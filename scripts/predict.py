"""Answers a causal question from a CSV table: what does the treatment do to the outcome?

Prints the average treatment effect (ATE) with an interval, and writes one line per row of the table
to another CSV file: the row's effect (cate), and mean and 5, 50 and 95 % quantiles of its outcome
if the treatment were set to 0 (cid0) and to 1 (cid1), all in the units of the outcome.

Treatment and outcome must be numeric columns without empty cells, the treatment 0 or 1. Covariates
must have been measured BEFORE the treatment; they may be text and may have empty cells.

Examples:
    python scripts/predict.py examples/data/nhefs.csv --treatment qsmk --outcome wt82_71
    python scripts/predict.py trial.csv --treatment drug --outcome weight --covariates age,sex
    python scripts/predict.py shop.csv --treatment sale --outcome profit --no-covariates
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import pandas as pd

    from dopfn_jax.estimators import DoPFNRegressor

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        _answer(options)
    except (ValueError, OSError) as error:
        # Our own errors derive from these and say what to do; a traceback would hide it.
        print(f"predict.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data", type=Path, help="CSV file with a line of column names")
    add("--treatment", required=True, metavar="COL", help="column of the treatment, 0 or 1")
    add("--outcome", required=True, metavar="COL", help="column of the outcome")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--covariates",
        nargs="+",
        metavar="COL",
        help="columns measured before the treatment, separated by commas or spaces "
        "(default: all the others)",
    )
    which.add_argument("--no-covariates", action="store_true", help="use no other column")
    add("--checkpoint", help="weights: a shipped name or a folder (default: the shipped ones)")
    add("--output", type=Path, help="CSV file to write (default: NAME_effects.csv, here)")
    add("--alpha", type=float, default=0.05, help="1 - level of the interval (default: 0.05)")
    return parser.parse_args(arguments)


def _answer(options: argparse.Namespace) -> None:
    # After parsing, so that --help and typing errors do not wait for JAX.
    import pandas as pd

    from dopfn_jax.estimators import DoPFNRegressor

    output = options.output or Path(f"{options.data.stem}_effects.csv")
    _check_files(options.data, output)
    if not 0 < options.alpha < 1:
        raise ValueError(f"--alpha {options.alpha}: must lie between 0 and 1.")
    table = pd.read_csv(options.data)
    for option in ("treatment", "outcome"):
        _check_column(table, getattr(options, option), f"--{option}")
    t, y = table[options.treatment], table[options.outcome]
    X = table[_covariates(options, table)]

    settings = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    model = DoPFNRegressor(**settings).fit(X, t, y)
    print(f"{options.data}: {len(table):,} rows, {model.n_features_in_} covariates")
    print(f"arms: {(t == 1).sum():,} rows with {t.name} = 1, {(t == 0).sum():,} with {t.name} = 0")
    difference = y[t == 1].mean() - y[t == 0].mean()
    ate, (low, high) = model.ate(), model.ate_interval(alpha=options.alpha)
    show = _formatter(high - low)
    print(f"difference in means of {y.name}: {show(difference)}")
    level = f"{100 * (1 - options.alpha):g} %"
    print(f"ATE: {show(ate)} ({level} interval {show(low)} to {show(high)})")
    print(
        "The interval says how much the estimate varies with the rows that were sampled. It does\n"
        "not cover confounders left out, or covariates that the treatment itself changed."
    )
    _write(_effects(model, X), output)
    print(f"effects of every row: {output}")


def _check_files(data: Path, output: Path) -> None:
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such file.")
    if output.exists() and output.samefile(data):
        raise ValueError(f"--output {output}: is the input itself; choose another name.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}.")


def _check_column(table: "pd.DataFrame", name: str, option: str) -> None:
    if name not in table.columns:
        known = ", ".join(map(repr, table.columns))
        raise ValueError(f"{option} {name!r}: no such column; the columns are {known}.")


def _covariates(options: argparse.Namespace, table: "pd.DataFrame") -> list[str]:
    """Names of the covariates."""
    taken = (options.treatment, options.outcome)
    if options.treatment == options.outcome:
        raise ValueError(f"{options.outcome!r} cannot be both the treatment and the outcome.")
    if options.no_covariates:
        return []
    if options.covariates is None:
        return [name for name in table.columns if name not in taken]
    names: list[str] = []
    for word in options.covariates:
        # A comma may be part of a name.
        names += [word] if word in table.columns else filter(None, map(str.strip, word.split(",")))
    for name in names:
        _check_column(table, name, "--covariates")
        if name in taken:
            raise ValueError(f"--covariates {name!r}: is the treatment or the outcome already.")
    return list(dict.fromkeys(names))


def _formatter(width: float) -> Callable[[float], str]:
    """Shows numbers with the digits that an interval of this width leaves meaningful."""
    decimals = 1 - math.floor(math.log10(width)) if width > 0 else 3
    return lambda value: f"{round(value, decimals):,.{max(0, decimals)}f}"


def _effects(model: "DoPFNRegressor", X: "pd.DataFrame") -> "pd.DataFrame":
    """One line per row: cate, and mean and quantiles of the outcome under do(0) and do(1)."""
    import pandas as pd

    effects = pd.DataFrame({"cate": model.cate(X)}, index=X.index)
    for arm in (0, 1):
        effects[f"cid{arm}"] = model.predict(X, arm)
        quantiles = model.predict(X, arm, "quantiles", list(QUANTILES.values()))
        effects[[f"cid{arm}_{name}" for name in QUANTILES]] = quantiles
    return effects


def _write(effects: "pd.DataFrame", output: Path) -> None:
    """Writes the file in one go, so that a failure leaves no half of it."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        new = Path(temporary, "new.csv")
        effects.to_csv(new, index_label="row", float_format="%.7g")
        os.replace(new, output)


if __name__ == "__main__":
    sys.exit(main())
