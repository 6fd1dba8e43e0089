"""Scores a checkpoint on the released case studies, beside baselines and the exact floor.

Example:
    python scripts/evaluate.py --data path/to/data

DIR holds case_studies_dev/<case>/<number>.npz and baselines_dev.csv (case, dataset, task, method,
nmse). Neither may be redistributed, so neither is in this repository.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dopfn_jax import DoPFNRegressor
from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT
from dopfn_jax.evaluation.released import evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or folder")
    parser.add_argument("--output", type=Path, help="CSV file for the errors of every dataset")
    options = parser.parse_args(arguments)
    try:
        errors = evaluate(
            DoPFNRegressor(checkpoint=options.checkpoint), options.data / "case_studies_dev"
        )
        baselines = pd.read_csv(options.data / "baselines_dev.csv")
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    if options.output:
        errors.to_csv(options.output, index=False)
    print("Median normalised MSE x 1000 over the datasets of each case study")
    for task in ("cid", "cate"):
        table = compare(errors, baselines, task)
        wins = int((table["dopfn"] < table["best baseline"]).sum())
        print(f"\n{task.upper()}: better than the best baseline on {wins} of {len(table)}")
        print(table.to_string(float_format=lambda value: f"{value:.3g}"))
    return 0


def compare(errors: pd.DataFrame, baselines: pd.DataFrame, task: str) -> pd.DataFrame:
    """Medians x 1000 by case study, on the datasets that have an answer.

    Args:
        errors: from `evaluate`.
        baselines: the same columns; methods that start with "floor" are not baselines.
        task: "cid" or "cate".

    Returns:
        A row per case study; columns dopfn, floor, best baseline, method, ratio (dopfn / best).
    """
    index = ["case", "dataset"]
    ours = errors[errors.task == task].pivot(index=index, columns="method", values="nmse")
    peers = baselines[(baselines.task == task) & ~baselines.method.str.startswith("floor")]
    # The same datasets for every method.
    peers = peers.pivot(index=index, columns="method", values="nmse").reindex(ours.index)
    table = 1e3 * ours.groupby("case").median()
    medians = 1e3 * peers.groupby("case").median()
    table["best baseline"] = medians.min(axis=1)
    table["method"] = medians.idxmin(axis=1)
    table["ratio"] = table["dopfn"] / table["best baseline"]
    return table


if __name__ == "__main__":
    sys.exit(main())
