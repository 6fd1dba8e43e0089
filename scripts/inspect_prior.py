r"""Draws tables from a config's prior and shows what they look like, beside a table of your own.

Prints statistics of the tables (median and central 99 %) and, with --csv, those of as many rows of
your table, drawn at random, with a mark where it is unlike the prior: there a network trained on
this prior is a guess. Writes the statistics of every table to a CSV file, and a figure of their
distributions.

Examples:
    python scripts/inspect_prior.py --config cpu_wide
    python scripts/inspect_prior.py --config cpu_wide --csv examples/data/nhefs.csv \
        --treatment qsmk --outcome wt82_71
    python scripts/inspect_prior.py --config cpu_wide wide.mechanisms='["tree"]'
    python scripts/inspect_prior.py --record runs/cpu_wide/weights

With --record, writes into a checkpoint folder what the tables of its own prior look like, so that
DoPFNRegressor warns about others.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dopfn_jax.cli.csv_tables import add_dialect, check_column, read_table
from dopfn_jax.config import Config, preset_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        if options.record:
            _record(options)
        else:
            _inspect(options)
    except (ValueError, OSError) as error:
        print(f"inspect_prior.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="inspect_prior.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    prior = parser.add_mutually_exclusive_group(required=True)
    prior.add_argument("--config", help=f"a preset ({', '.join(preset_names())}) or a TOML file")
    prior.add_argument("--record", metavar="FOLDER", type=Path, help="a checkpoint to complete")
    add("--tables", type=int, default=200, help="tables to draw per prior (default: 200)")
    add("--rows", type=int, default=500, help="rows of a table, --csv permitting (default: 500)")
    add("--seed", type=int, default=0)
    add("--csv", type=Path, help="a table of your own, with a line of column names")
    add("--treatment", metavar="COL", help="its column of the treatment, 0 or 1")
    add("--outcome", metavar="COL", help="its column of the outcome")
    add_dialect(parser)
    add("--output", type=Path, default=Path("prior"), help="folder to write to (default: prior)")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    options = parser.parse_intermixed_args(arguments)
    others = ("rows", "csv", "treatment", "outcome", "separator", "decimal", "output")
    given = [f"--{name}" for name in others if getattr(options, name) != parser.get_default(name)]
    if options.record and (given or options.overrides):
        parser.error(
            f"--record FOLDER: takes no {', '.join(given + options.overrides)}; it describes the "
            "checkpoint's own prior"
        )
    if options.csv and not (options.treatment and options.outcome):
        parser.error("--csv: name also its --treatment and --outcome")
    if options.tables < 10 or options.rows < 10:
        parser.error("--tables and --rows: need 10 or more")
    return options


def _inspect(options: argparse.Namespace) -> None:
    # After parsing, so that --help and typing errors do not wait for JAX.
    import pandas as pd

    from dopfn_jax.diagnostics import (
        kinds_of_tables,
        prior_statistics,
        table_statistics,
        unlike,
        usual,
    )

    config = Config.load(options.config, options.overrides)
    rows: int = options.rows
    own: dict[str, float] = {}
    if options.csv:
        table = _read(options, config.covariates)
        rows = min(rows, len(table.t))
        own = table_statistics(table.x, table.t, table.y, rows)
    priors = {}
    for name, shape in kinds_of_tables(config, rows).items():
        priors[name] = prior_statistics(config, shape, options.tables, options.seed)
        ranges = usual(priors[name])
        unusual = unlike(own, ranges)
        print(f"{name}: {len(priors[name]['covariates'])} tables of {rows} rows")
        for statistic, values in priors[name].items():
            low, high = ranges[statistic]
            line = f"  {statistic:20} {np.median(values):8.3f}   ({low:.3f} to {high:.3f})"
            if own:
                mark = "  <- unlike this prior" if statistic in unusual else ""
                line = f"{line:50} yours {own[statistic]:8.3f}{mark}"
            print(line)
    options.output.mkdir(parents=True, exist_ok=True)
    frames = [pd.DataFrame(values).assign(prior=name) for name, values in priors.items()]
    if own:
        frames.append(pd.DataFrame([own]).assign(prior=options.csv.name))
    pd.concat(frames).to_csv(options.output / "statistics.csv", index=False)
    _draw(priors, own, options)
    print(f"written: {options.output}/statistics.csv, {options.output}/statistics.png")


def _record(options: argparse.Namespace) -> None:
    from dopfn_jax.checkpoints import CONFIG_FILE, from_pretrained, save_checkpoint
    from dopfn_jax.diagnostics import usual_tables

    # Absolute, so that it is no name of shipped weights, which are read from elsewhere.
    folder = options.record.resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"--record {options.record}: holds no {CONFIG_FILE}; name the folder of the weights "
            "itself, such as RUN/weights"
        )
    checkpoint = from_pretrained(folder)
    usual = usual_tables(checkpoint.config, options.tables, options.seed)
    save_checkpoint(
        folder, checkpoint.model, checkpoint.config, checkpoint.steps, usual, checkpoint.seeds
    )
    print(f"written: what is usual for tables of {', '.join(map(str, usual))} rows")


def _read(options: argparse.Namespace, most: int) -> Any:
    from dopfn_jax.tables import Schema

    table = read_table(options.csv, options)
    for option in ("treatment", "outcome"):
        check_column(table, getattr(options, option), f"--{option}")
    covariates = table.drop(columns=[options.treatment, options.outcome])
    return Schema.fit(covariates, table[options.treatment], table[options.outcome], most)[1]


def _draw(priors: Any, own: dict[str, float], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(priors.values())))
    columns = 4
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(12, 8), layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.concatenate([prior[name] for prior in priors.values()])
        low, high = np.quantile(values, [0.005, 0.995])
        if low == high:
            low, high = low - 0.5, high + 0.5
        bins = np.linspace(low, high, 30)
        for prior, statistics in priors.items():
            axis.hist(
                np.clip(statistics[name], low, high),
                bins,
                density=True,
                alpha=0.5,
                label=prior,
            )
        if own:
            axis.axvline(own[name], color="black", label=options.csv.name)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_yticks([])
    axes.flat[0].legend(fontsize=8)
    figure.savefig(options.output / "statistics.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
