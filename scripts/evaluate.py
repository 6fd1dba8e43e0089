"""Scores checkpoints beside baselines and exact answers, and draws tables and figures.

Examples:
    python scripts/evaluate.py --quick
    python scripts/evaluate.py --data DIR --processes 8 --report docs

Results are appended to OUTPUT/results.jsonl as they come; what it holds is not run again, so an
interrupted command goes on where it stopped. DIR holds files that may not be redistributed:
case_studies_dev/<case>/<number>.npz, nhefs.csv, amazon_sales.csv, law_school.csv; without it what
needs them is left out. Baselines of other packages need the extra `evaluation`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dopfn_jax.evaluation.methods import METHODS
from dopfn_jax.evaluation.report import write_report
from dopfn_jax.evaluation.runner import read_table, run
from dopfn_jax.evaluation.suites import NEED_DATA, SUITES, sources

QUICK_SUITES = ("generated", "simulated")
QUICK_DATASETS = 3
QUICK_METHODS = (
    "dopfn", "mean", "zero", "diff_in_means", "linear", "rf", "histgb", "t_histgb", "scm", "floor",
)  # fmt: skip
# Searching for parameters takes as long as all others together.
SLOW_METHODS = ("causal_forest_tuned",)
# Baselines that do not learn curves of interest are left out of the ablations.
ABLATION_METHODS = ("dopfn", "mean", "zero", "linear", "rf", "histgb", "t_histgb", "x_rf")
ABLATIONS = ("rows", "graphs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    output = options.output / "results.jsonl"
    # Workers share the cores; a library's own threads would only fight.
    if options.processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    try:
        absent: dict[str, str] = {}
        for suite in _suites(options):
            methods = options.methods or _methods(options.quick, suite)
            count = options.datasets or (QUICK_DATASETS if options.quick else 100)
            print(f"{suite}:", file=sys.stderr)
            todo = sources(suite, count, options.output / "datasets", options.data)
            absent |= run(todo, methods, output, options.seed, options.processes)
        for method, package in absent.items():
            print(f"{method}: absent, package {package!r} is not installed")
        print(summary(read_table(output)))
        if options.report:
            print(f"wrote {write_report(output, options.report)}")
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {output}", file=sys.stderr)
        return 130
    return 0


def summary(table: pd.DataFrame) -> str:
    """Medians over the datasets: of CID and CATE errors x 1000, else of the PEHE."""
    if table.empty:
        return "no results"
    parts = []
    for suite, rows in table.groupby("suite", sort=False):
        metrics = [name for name in ("cid", "cate", "pehe") if name in rows]
        for metric in metrics if suite != "simulated" else [m for m in metrics if m == "pehe"]:
            known = rows.dropna(subset=[metric])
            if known.empty:
                continue
            wide = known.pivot_table(
                index="case", columns="method", values=metric, aggfunc="median"
            )
            factor, unit = (1, "") if metric == "pehe" else (1000, " x 1000")
            text = (factor * wide).to_string(float_format=lambda value: f"{value:.3g}")
            parts.append(f"{suite}, median {metric.upper()}{unit}\n{text}")
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few datasets, fast methods: minutes")
    parser.add_argument("--data", type=Path, metavar="DIR", help="files of your own, see above")
    parser.add_argument("--suites", nargs="+", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"dopfn, dopfn:<checkpoint name or folder>, {', '.join(METHODS)}",
    )
    parser.add_argument("--datasets", type=int, metavar="N", help="datasets per case")
    parser.add_argument("--seed", type=int, default=0, help="of the methods")
    parser.add_argument("--processes", type=int, default=0, help="workers; 0: in this process")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write tables, figures, page")
    return parser


def _suites(options: argparse.Namespace) -> list[str]:
    if options.suites:
        return list(options.suites)
    suites = QUICK_SUITES if options.quick else tuple(SUITES)
    return [name for name in suites if options.data or name not in NEED_DATA]


def _methods(quick: bool, suite: str) -> list[str]:
    if quick:
        return list(QUICK_METHODS)
    if suite in ABLATIONS:
        return list(ABLATION_METHODS)
    return ["dopfn", *(name for name in METHODS if name not in SLOW_METHODS)]


if __name__ == "__main__":
    sys.exit(main())
