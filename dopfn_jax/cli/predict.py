"""Answers a causal question from a CSV table: what does the treatment do to the outcome?

Prints the average treatment effect (ATE) with an interval, those in the treated (ATT) and in the
controls (ATC), and writes one line per row of the table to another CSV file: the row's effect
(cate), and mean and 5, 50 and 95 % quantiles of its outcome if the treatment were set to 0 (cid0)
and to 1 (cid1), all in the units of the outcome. If the outcome is 0 or 1, these are probabilities
and the quantiles are left out.

Treatment and outcome must be numeric columns without empty cells, the treatment 0 or 1. Covariates
must have been measured BEFORE the treatment; they may be text and may have empty cells. Dates, and
numbers with signs such as "$1,000", have to become plain numbers first. For 1;2,5 instead of 1,2.5
pass --separator ';' --decimal ,

The intervals say how much the estimates vary with the rows that happened to be sampled. They do not
cover confounders that the table lacks. Read the warnings, of arms that hardly overlap for example.

The first run compiles, which takes longer than the answer. Compiled programs are kept in the folder
~/.cache/dopfn_jax, or where JAX_COMPILATION_CACHE_DIR says, for later runs.

Examples:
    dopfn-jax predict examples/data/nhefs.csv --treatment qsmk --outcome wt82_71
    dopfn-jax predict trial.csv --treatment drug --outcome weight --covariates age,sex
    dopfn-jax predict trial.csv --treatment drug --outcome weight --exclude patient,side_effects
    dopfn-jax predict shop.csv --treatment sale --outcome profit --no-covariates
    dopfn-jax predict trial.csv --treatment drug --outcome weight --plot effects.png
    dopfn-jax predict trial.csv --treatment drug --outcome weight --json | jq .ate
"""

import argparse
import dataclasses
import json
import math
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopfn_jax.cli.csv_tables import add_dialect, check_column, read_table

if TYPE_CHECKING:
    import pandas as pd

    from dopfn_jax.estimators import DoPFNRegressor
    from dopfn_jax.estimators.diagnostics import Summary

# What files of effects begin with.
_FIRST_NAMES = b"row,cate,cid0"
_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
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
    which.add_argument(
        "--exclude",
        nargs="+",
        metavar="COL",
        help="columns to leave out, such as identifiers and what was measured after the treatment",
    )
    which.add_argument("--no-covariates", action="store_true", help="use no other column")
    add_dialect(parser)
    add("--checkpoint", help="weights: a name of `dopfn-jax info`, a folder, or hf:OWNER/NAME")
    add("--output", type=Path, help="CSV file to write (default: NAME_effects.csv, here)")
    add("--alpha", type=float, default=0.05, help="1 - level of the intervals (default: 0.05)")
    add("--n-estimators", type=int, metavar="K", help="members of an ensemble (default: 1)")
    add(
        "--max-context",
        type=int,
        metavar="N",
        help="most rows read at once (default: 10000); a longer table needs --n-estimators of 4 or "
        "more, each of which reads so many random rows",
    )
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--plot", type=Path, metavar="FILE", help="figure to write (extra: plot)")
    add("--plot-covariate", metavar="COL", help="covariate to show effects against")


def run(options: argparse.Namespace) -> None:
    """Answers, prints and writes.

    Raises:
        ValueError: options or a table that cannot be used.
        OSError: files that cannot be read or written.
        ImportError: --plot without matplotlib.
    """
    # After parsing, so that --help and typing errors do not wait for JAX.
    from dopfn_jax.cli.stages import say
    from dopfn_jax.estimators import DoPFNRegressor
    from dopfn_jax.estimators.diagnostics import UnlikePriorWarning
    from dopfn_jax.training.host import keep_compiled_programs

    output = options.output or Path(f"{options.data.stem}_effects.csv")
    _check_files(options, output)
    if not 0 < options.alpha < 1:
        raise ValueError(f"--alpha {options.alpha}: must lie between 0 and 1.")
    table = read_table(options.data, options)
    for option in ("treatment", "outcome"):
        check_column(table, getattr(options, option), f"--{option}")
    t, y = table[options.treatment], table[options.outcome]
    X = table[_covariates(options, table)]
    if options.plot_covariate is not None:
        check_column(X, options.plot_covariate, "--plot-covariate")

    keep_compiled_programs()
    say("reading the table into the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlikePriorWarning)  # the summary says the same
        model = DoPFNRegressor(**_settings(options), verbose=True).fit(X, t, y)
    say("estimating average effects and their intervals")
    summary = model.summary(alpha=options.alpha)
    warned = (*_unnamed_left_out(table, X), *summary.warnings)
    summary = dataclasses.replace(summary, warnings=warned)
    say("answering for every row")
    effects = _effects(model, X)
    _write(effects, output)
    files = {"effects_file": str(output), "plot": options.plot and str(options.plot)}
    # What took minutes is told before anything can go wrong with a figure.
    if options.json:
        print(json.dumps({**summary.to_dict(), **files}, indent=2))
    else:
        _print(summary, list(X.columns), options)
        print(
            *(f"{name.replace('_', ' ')}: {file}" for name, file in files.items() if file), sep="\n"
        )
    if options.plot is not None:
        from dopfn_jax.cli.figures import draw_effects

        say("drawing")
        figure = draw_effects(model, X, effects["cate"], y.name, options.plot_covariate)
        figure.savefig(options.plot, dpi=150)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the estimator that the user has chosen."""
    names = {"checkpoint": "checkpoint", "n_estimators": "n_estimators"}
    names |= {"max_context": "max_context", "seed": "random_state"}
    chosen = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in chosen.items() if value is not None}


def _print(summary: "Summary", covariates: list[str], options: argparse.Namespace) -> None:
    from dopfn_jax.cells import listed
    from dopfn_jax.estimators.diagnostics import number_format

    show = number_format(summary.ate_interval[1] - summary.ate_interval[0])
    control, treated = summary.arm_sizes
    name = options.treatment
    names = f" ({listed(covariates, str, most=12)})" if covariates else ""
    print(f"{options.data}: {summary.rows:,} rows, {len(covariates)} covariates{names}")
    print(f"arms: {treated:,} rows with {name} = 1, {control:,} with {name} = 0")
    print(f"difference in means of {options.outcome}: {show(summary.difference_in_means)}")
    level = f"{100 * (1 - options.alpha):g} %"
    labels = {
        "ate": "ATE",
        "att": "ATT",
        "atc": "ATC",
        "aipw_ate": "ATE if nothing hidden confounds",
    }
    for effect, label in labels.items():
        low, high = getattr(summary, f"{effect}_interval")
        estimate = show(getattr(summary, effect))
        print(f"{label}: {estimate} ({level} interval {show(low)} to {show(high)})")
    for warning in summary.warnings:
        print(f"warning: {warning}")
    print(
        "The interval says how much the estimate varies with the rows that were sampled, and\n"
        "reaches as far as the estimate without hidden confounding lies off. It does\n"
        "not cover confounders left out, or covariates that the treatment itself changed."
    )


def _check_files(options: argparse.Namespace, output: Path) -> None:
    if not options.data.is_file():
        raise FileNotFoundError(f"{options.data}: no such file.")
    if options.plot_covariate is not None and options.plot is None:
        raise ValueError("--plot-covariate: needs --plot FILE.")
    for option, path in (("--output", output), ("--plot", options.plot)):
        if path is None:
            continue
        if path.exists() and path.samefile(options.data):
            raise ValueError(f"{option} {path}: is the input itself; choose another name.")
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a folder; name a file in it.")
        if not path.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}.")
    if options.output is None and output.exists() and not _is_ours(output):
        raise ValueError(f"{output}: holds something else; name the file to write by --output.")
    if options.plot is not None:
        # Says now, not after minutes, what is missing.
        from dopfn_jax.cli.figures import check_format

        check_format(options.plot)


def _covariates(options: argparse.Namespace, table: "pd.DataFrame") -> list[str]:
    """Names of the covariates."""
    taken = (options.treatment, options.outcome)
    if options.treatment == options.outcome:
        raise ValueError(f"{options.outcome!r} cannot be both the treatment and the outcome.")
    if options.no_covariates:
        return []
    if options.covariates is None:
        left_out = {*taken, *_named(options.exclude or [], "--exclude", table, taken)}
        return [name for name in table.columns if name not in left_out and not _is_unnamed(name)]
    return _named(options.covariates, "--covariates", table, taken)


def _named(
    words: list[str], option: str, table: "pd.DataFrame", taken: tuple[str, str]
) -> list[str]:
    """The columns that an option names, separated by commas or spaces."""
    names: list[str] = []
    for word in words:
        # A comma may be part of a name.
        names += [word] if word in table.columns else filter(None, map(str.strip, word.split(",")))
    for name in names:
        check_column(table, name, option)
        if name in taken:
            raise ValueError(f"{option} {name!r}: is the treatment or the outcome already.")
    return list(dict.fromkeys(names))


def _is_unnamed(column: str) -> bool:
    """Whether pandas made the name up: such a column is mostly the index of a saved frame."""
    return re.fullmatch(r"Unnamed: \d+", column) is not None


def _unnamed_left_out(table: "pd.DataFrame", X: "pd.DataFrame") -> list[str]:
    """A sentence for each column without a name that is not used."""
    return [
        f"a column without a name ({name!r}) is left out, as it looks like an index; give it by "
        "--covariates to use it"
        for name in table.columns
        if _is_unnamed(name) and name not in X.columns
    ]


def _effects(model: "DoPFNRegressor", X: "pd.DataFrame") -> "pd.DataFrame":
    """One line per row: cate, and mean and quantiles of the outcome under do(0) and do(1)."""
    import pandas as pd

    means = [model.predict(X, arm) for arm in (0, 1)]
    # Seven digits of what varies, also where outcomes lie far from zero.
    digits = 6 - math.floor(math.log10(model.schema_.outcome.scale))
    effects = pd.DataFrame({"cate": means[1] - means[0]}, index=X.index)
    for arm in (0, 1):
        effects[f"cid{arm}"] = means[arm]
        if not model.schema_.binary_outcome:
            quantiles = model.predict(X, arm, "quantiles", list(_QUANTILES.values()))
            effects[[f"cid{arm}_{name}" for name in _QUANTILES]] = quantiles
    return effects.round(digits)


def _is_ours(path: Path) -> bool:
    """Whether a file begins as those that this command writes."""
    with path.open("rb") as file:
        return file.read(len(_FIRST_NAMES)) == _FIRST_NAMES


def _write(effects: "pd.DataFrame", output: Path) -> None:
    """Writes the file in one go, so that a failure leaves no half of it."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        new = Path(temporary, "new.csv")
        effects.to_csv(new, index_label="row")
        os.replace(new, output)
