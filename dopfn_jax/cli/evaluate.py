"""Scores checkpoints beside baselines and exact answers, and draws tables and figures.

Suites: generated (case studies with exact truths), released (those of DIR), simulated (published
simulators), real (studies), rows and graphs (ablations: context rows, random graphs).

Methods: dopfn or dopfn:<checkpoint name or folder>; mean, zero, diff_in_means; learners on the
treatment as a covariate (linear, rf, histgb), one per arm (t_linear, t_rf, t_histgb), x_rf;
linear_dml, causal_forest, causal_forest_tuned; tabpfn, tabicl, causalpfn. With the true graph:
standardisation, ipw, scm, scm_counterfactual, dowhy, dowhy_counterfactual. The exact answer: floor.

Results are appended to OUTPUT/results.jsonl as they come; what it holds is not run again, so an
interrupted command goes on where it stopped. DIR holds files that may not be redistributed:
case_studies_dev/<case>/<number>.npz, nhefs.csv, amazon_sales.csv, law_school.csv; without it what
needs them is left out. Baselines of other packages need the extra `evaluation`.

Examples:
    dopfn-jax evaluate --quick
    dopfn-jax evaluate --data DIR --processes 8 --report docs
    dopfn-jax evaluate --suites generated --methods dopfn dopfn:runs/cpu linear floor
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    add = parser.add_argument
    add("--quick", action="store_true", help="few datasets, fast methods: minutes")
    add("--data", type=Path, metavar="DIR", help="files of your own, see above")
    add("--suites", nargs="+", metavar="SUITE", help="see above (default: all that can be read)")
    add("--methods", nargs="+", metavar="METHOD", help="see above (default: all that are there)")
    add("--datasets", type=int, metavar="N", help="datasets per case")
    add("--seed", type=int, default=0, help="of the methods")
    add("--processes", type=int, default=0, help="workers; 0: in this process")
    add("--output", type=Path, default=Path("runs/evaluation"), metavar="DIR")
    add("--report", type=Path, metavar="DIR", help="write tables, figures, page")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> None:
    """Scores, and prints medians.

    Raises:
        ValueError: an unknown suite, method or checkpoint.
        OSError: files that cannot be read or written.
        KeyboardInterrupt: stopped; the message says what goes on.
    """
    # After parsing, so that --help and typing errors do not wait for JAX.
    from dopfn_jax.evaluation import runner
    from dopfn_jax.evaluation.report import write_report
    from dopfn_jax.evaluation.suites import sources

    results = options.output / "results.jsonl"
    # Workers share the cores; a library's own threads would only fight.
    if options.processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    absent: dict[str, str] = {}
    try:
        for suite in _suites(options):
            methods = options.methods or _methods(options.quick, suite)
            count = options.datasets or (QUICK_DATASETS if options.quick else 100)
            todo = sources(suite, count, options.output / "datasets", options.data)
            print(f"{suite}:", file=sys.stderr)
            absent |= runner.run(todo, methods, results, options.seed, options.processes)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command goes on from {results}") from stop
    table = runner.read_table(results)
    if options.json:
        facts = {"results": str(results), "absent": absent, "medians": _as_dict(table)}
        print(json.dumps(facts, indent=2))
    else:
        for method, package in absent.items():
            print(f"{method}: absent, package {package!r} is not installed")
        print(summary(table))
    if options.report:
        print(f"wrote {write_report(results, options.report)}", file=sys.stderr)


def summary(table: "pd.DataFrame") -> str:
    """Medians over the datasets: of CID and CATE errors x 1000, else of the PEHE."""
    parts = []
    for suite, metric, medians in _medians(table):
        factor, unit = (1, "") if metric == "pehe" else (1000, " x 1000")
        text = (factor * medians).to_string(float_format=lambda value: f"{value:.3g}")
        parts.append(f"{suite}, median {metric.upper()}{unit}\n{text}")
    return "\n\n".join(parts) or "no results"


def _as_dict(table: "pd.DataFrame") -> dict[str, dict[str, Any]]:
    """Medians by suite, metric, case and method."""
    found: dict[str, dict[str, Any]] = {}
    for suite, metric, medians in _medians(table):
        by_case = {str(case): row.dropna().to_dict() for case, row in medians.iterrows()}
        found.setdefault(suite, {})[metric] = by_case
    return found


def _medians(table: "pd.DataFrame") -> "Iterator[tuple[str, str, pd.DataFrame]]":
    """Suite, metric, and medians over the datasets: a row for each case, a column for each method.

    Simulated studies have their own measure, the PEHE.
    """
    if table.empty:
        return
    for suite, rows in table.groupby("suite", sort=False):
        for metric in ("pehe",) if suite == "simulated" else ("cid", "cate", "pehe"):
            known = rows.dropna(subset=[metric]) if metric in rows else rows[:0]
            if not known.empty:
                yield (
                    str(suite),
                    metric,
                    known.pivot_table(
                        index="case", columns="method", values=metric, aggfunc="median"
                    ),
                )


def _suites(options: argparse.Namespace) -> list[str]:
    from dopfn_jax.evaluation.suites import NEED_DATA, SUITES

    if options.suites:
        return list(options.suites)
    suites = QUICK_SUITES if options.quick else tuple(SUITES)
    return [name for name in suites if options.data or name not in NEED_DATA]


def _methods(quick: bool, suite: str) -> list[str]:
    from dopfn_jax.evaluation.methods import METHODS

    if quick:
        return list(QUICK_METHODS)
    if suite in ABLATIONS:
        return list(ABLATION_METHODS)
    return ["dopfn", *(name for name in METHODS if name not in SLOW_METHODS)]
