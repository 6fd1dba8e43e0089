"""Draws the curves of training runs: loss, validation, learning rate, throughput, case studies.

Needs matplotlib. Example:
    python scripts/plot_run.py runs/cpu runs/wide --output runs.png --csv runs.csv
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Panels: what they show, and the first of these columns that a run has.
PANELS = (
    ("training loss (nats)", ("mean_loss", "loss")),
    ("validation loss (nats)", ("validation_loss",)),
    ("learning rate", ("learning_rate",)),
    ("tasks per second", ("tasks_per_second",)),
)
# Points that a smoothed training loss averages over, at most.
SMOOTHING = 20
# Of runs in the panels of case studies, where colours are cases.
STYLES = ("-", "--", ":", "-.")


class RunLogError(ValueError):
    """A log that cannot be read; the message names it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="work directories, or metrics.jsonl")
    add("--output", type=Path, required=True, help="figure: .png, .pdf or .svg")
    add("--csv", type=Path, help="file for the numbers, one line a step and run")
    options = parser.parse_args(arguments)
    try:
        log = pd.concat([read_log(path) for path in options.runs], ignore_index=True)
        if options.csv:
            log.to_csv(options.csv, index=False)
        draw(log, options.output)
    except (OSError, ImportError, ValueError) as error:
        print(f"plot_run.py: {error}", file=sys.stderr)
        return 2
    return 0


def read_log(path: Path) -> pd.DataFrame:
    """The lines of a run's log, one row a step, and its name in the column `run`.

    Raises:
        RunLogError: there is no log, or no step in it.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise RunLogError(f"{path}: no such log; give the work directory of a run")
    lines = path.read_text().splitlines(keepends=True)
    complete = [json.loads(line) for line in lines if line.endswith("\n")]  # a run may be writing
    if not complete:
        raise RunLogError(f"{path}: the run has not logged a step yet")
    log = pd.DataFrame(complete)
    log.insert(0, "run", str(path.parent))
    return log


def draw(log: pd.DataFrame, output: Path) -> None:
    """One panel for each of PANELS, one line for each run of `read_log`.

    Runs that were scored as they went (--evaluate-every) get two more panels, one colour a case.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = any(str(name).startswith("cid/") for name in log)
    rows = 3 if scored else 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 3.5 * rows), sharex=True, layout="constrained"
    )
    for axis, (title, columns) in zip(axes.flat, PANELS, strict=False):
        for name, run in log.groupby("run", sort=False):
            present = [column for column in columns if column in run]
            if not present:
                continue
            points = run[["step", present[0]]].dropna()
            values = points[present[0]]
            if "training" in title:
                values = values.rolling(min(SMOOTHING, len(values)), min_periods=1).mean()
            _line(axis, points["step"], values, str(name))
        axis.set_title(title)
    for axis, task in zip(axes.flat[len(PANELS) :], ("cid", "cate"), strict=False):
        cases = [str(name) for name in log if str(name).startswith(f"{task}/")]
        runs = [
            run for _, run in log.groupby("run", sort=False) if run[cases].notna().any(axis=None)
        ]
        for style, run in zip(itertools.cycle(STYLES), runs, strict=False):
            for number, case in enumerate(cases):
                points = run[["step", case]].dropna()
                label = case.removeprefix(f"{task}/") if run is runs[0] else None
                _line(
                    axis, points["step"], points[case], label, color=f"C{number}", linestyle=style
                )
        axis.set_title(f"{task.upper()}: median error of each case study")
        axis.set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes.flat[0].legend()
    if scored:
        axes.flat[-1].legend(fontsize="x-small")
    figure.savefig(output, dpi=150)
    plt.close(figure)


def _line(
    axis: "Axes", steps: pd.Series, values: pd.Series, label: str | None, **style: Any
) -> None:
    marker = "." if len(values) < 2 else None
    axis.plot(steps, values, label=label, marker=marker, linewidth=1.2, **style)


if __name__ == "__main__":
    sys.exit(main())
