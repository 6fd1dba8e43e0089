"""Checks weights on fresh draws: calibration, longer contexts, trials, shrinkage, outcomes.

Calibration: coverage of central intervals on tasks of the checkpoint's own prior, by size of
context. Growth: error at 1,000 context rows over that at 250. Trials: how often the interval of the
average effect holds the truth. Shrinkage: how far average effects are drawn towards zero among
noise. Outcomes: average effects on 0/1 outcomes, counts and amounts in trials. Prints tables; with
--output, writes them as CSV files.

Examples:
    python scripts/check_weights.py
    python scripts/check_weights.py --checkpoint runs/cpu --checks trials --scale 0.1
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKS = ("calibration", "growth", "trials", "shrinkage", "outcomes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        _check(options)
    except (ValueError, OSError) as error:
        print(f"check_weights.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_weights.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="a shipped name or a folder (default: the shipped ones' default)")
    add(
        "--checks",
        nargs="+",
        choices=CHECKS,
        default=CHECKS,
        metavar="CHECK",
        help=f"of {', '.join(CHECKS)} (default: all)",
    )
    add("--scale", type=float, default=1.0, help="share of the tasks, tables and trials to draw")
    add("--cache", type=Path, default=Path("runs/growth"), help="folder for the drawn tables")
    add("--output", type=Path, metavar="DIR", help="folder for CSV files")
    options = parser.parse_args(arguments)
    if not 0 < options.scale <= 1:
        parser.error(f"--scale {options.scale:g}: must be above 0, and at most 1")
    return options


def _check(options: argparse.Namespace) -> None:
    # After parsing, so that --help and typing errors do not wait for JAX.
    from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, from_pretrained
    from dopfn_jax.evaluation.held_out import calibration, context_growth, trial_coverage
    from dopfn_jax.evaluation.outcomes import effects_by_outcome
    from dopfn_jax.evaluation.shrinkage import shrinkage

    checkpoint = from_pretrained(options.checkpoint or DEFAULT_CHECKPOINT)

    def number(most: int) -> int:
        return max(2, round(options.scale * most))

    tables = {
        "calibration": lambda: calibration(checkpoint, number(2000)),
        "growth": lambda: context_growth(checkpoint, options.cache, number(200)),
        "trials": lambda: trial_coverage(checkpoint, number(1000)),
        "shrinkage": lambda: shrinkage(checkpoint, number(192)),
        "outcomes": lambda: effects_by_outcome(checkpoint, number(20)),
    }
    for name in options.checks:
        table = tables[name]()
        print(f"{name}\n{table.to_string(index=False, float_format=lambda v: f'{v:.3g}')}\n")
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.output / f"{name}.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    sys.exit(main())
