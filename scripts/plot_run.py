"""Draws the curves of training runs: loss, validation, learning rate, throughput, case studies.

Needs matplotlib. Example:
    python scripts/plot_run.py runs/cpu runs/wide --output runs.png --csv runs.csv
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Panels: what they show, and the first of these columns that a run has. Panels of what no run has
# logged are left out.
PANELS = (
    ("training loss (nats)", ("mean_loss", "loss")),
    ("validation loss (nats)", ("validation_loss",)),
    ("validation loss on the wide prior (nats)", ("wide_validation_loss",)),
    ("validation: median squared error of effects", ("validation_median_effect_mse",)),
    ("the same on the wide prior", ("wide_validation_median_effect_mse",)),
    ("validation: loss of average effects", ("validation_average_effect_loss",)),
    ("that loss on the wide prior", ("wide_validation_average_effect_loss",)),
    ("learning rate", ("learning_rate",)),
    ("tasks per second", ("tasks_per_second",)),
)
# Points that a smoothed training loss averages over, at most.
SMOOTHING = 20
# Lines that share a colour, and, in the panels of case studies, where colours are cases, runs.
STYLES = ("-", "--", ":", "-.")
COLOURS = 10


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
    """One panel for each of PANELS that a run of `read_log` has, one line for each run that has it.

    Runs that were scored as they went (--evaluate-every) get two more panels, one colour a case.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(title, columns) for title, columns in PANELS if set(columns) & set(log)]
    tasks = [task for task in ("cid", "cate") if _cases(log, task)]
    count = len(panels) + len(tasks)
    rows = math.ceil(count / 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(12, 3.5 * rows), sharex=True, layout="constrained", squeeze=False
    )
    for axis, (title, columns) in zip(axes.flat, panels, strict=False):
        for number, (name, run) in enumerate(log.groupby("run", sort=False)):
            logged = [run[column] for column in columns if column in run and run[column].count()]
            if not logged:
                continue
            values = logged[0]
            if "training" in title:
                values = values.rolling(min(SMOOTHING, len(values)), min_periods=1).mean()
            style = STYLES[number // COLOURS % len(STYLES)]
            _line(axis, run["step"], values, str(name), color=f"C{number}", linestyle=style)
        axis.set_title(title)
    for axis, task in zip(axes.flat[len(panels) :], tasks, strict=False):
        _draw_cases(axis, log, task)
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    for axis in axes.flat[max(count - 2, 0) : count]:
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[count:]:
        axis.remove()
    # Beside the panels: inside one of them many runs would squeeze all the others.
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _cases(log: pd.DataFrame, task: str) -> list[str]:
    return [str(name) for name in log if str(name).startswith(f"{task}/")]


def _draw_cases(axis: "Axes", log: pd.DataFrame, task: str) -> None:
    cases = _cases(log, task)
    runs = [run for _, run in log.groupby("run", sort=False) if run[cases].notna().any(axis=None)]
    for style, run in zip(itertools.cycle(STYLES), runs, strict=False):
        for number, case in enumerate(cases):
            label = case.removeprefix(f"{task}/") if run is runs[0] else None
            _line(axis, run["step"], run[case], label, color=f"C{number}", linestyle=style)
    axis.set_title(f"{task.upper()}: median error of each case study")
    axis.set_yscale("log")
    axis.legend(fontsize="x-small")


def _line(
    axis: "Axes", steps: pd.Series, values: pd.Series, label: str | None, **style: Any
) -> None:
    steps, values = steps[values.notna()], values.dropna()
    marker = "." if len(values) < 2 else None
    axis.plot(steps, values, label=label, marker=marker, linewidth=1.2, **style)


if __name__ == "__main__":
    sys.exit(main())
