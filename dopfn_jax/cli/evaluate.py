"""Scores checkpoints beside baselines and exact answers, and draws tables and figures.

Suites: generated (case studies with exact truths), released (those of DIR), simulated (published
simulators), real (studies), rows and graphs (ablations: context rows, random graphs).

Methods: dopfn or dopfn:<checkpoint name or folder>, which takes settings of DoPFNRegressor, as in
dopfn:runs/cpu,n_estimators=4,transforms=none+quantile_y; mean, zero, diff_in_means; learners on the
treatment as a covariate (linear, rf, histgb), one per arm (t_linear, t_rf, t_histgb), x_rf;
linear_dml, linear_dml_tuned, causal_forest, causal_forest_tuned; standardisation, ipw; tabpfn,
tabicl, causalpfn. With the true graph: scm, scm_counterfactual, dowhy, dowhy_counterfactual. The
exact answer: floor.

Results are appended to OUTPUT/results.jsonl as they come; what it holds is not run again, so an
interrupted command goes on where it stopped. A report is about all that it holds of each method's
latest weights. DIR holds files that may not be redistributed: case_studies_dev/<case>/<number>.npz,
law_school.csv; without it what needs them is left out. Baselines of other packages, their data and
ranks need the extra `evaluation`; what is not installed is said to be absent.

Examples:
    dopfn-jax evaluate --quick --report docs
    dopfn-jax evaluate --data DIR --processes 8 --report docs
    dopfn-jax evaluate --suites generated --methods dopfn dopfn:runs/cpu linear floor
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Datasets per case of the quick version: minutes on two cores, and every figure.
QUICK_DATASETS = {"generated": 10, "simulated": 2, "real": 1, "rows": 2, "graphs": 12}
QUICK_METHODS = (
    "dopfn", "mean", "zero", "diff_in_means", "linear", "rf", "histgb", "t_linear", "t_histgb",
    "standardisation", "ipw", "dowhy", "floor",
)  # fmt: skip
QUICK_ABLATION_METHODS = ("dopfn", "mean", "zero", "linear", "rf", "histgb")
# Searching for parameters takes as long as all others together.
SLOW_METHODS = ("linear_dml_tuned", "causal_forest_tuned")
# Baselines that do not learn curves of interest are left out of the ablations.
ABLATION_METHODS = ("dopfn", "mean", "zero", "linear", "rf", "histgb", "t_histgb", "x_rf")
ABLATIONS = ("rows", "graphs")
CASE_STUDIES = ("generated", "released")
DATASETS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    add = parser.add_argument
    add("--quick", action="store_true", help="few datasets, fast methods: minutes")
    add("--data", type=Path, metavar="DIR", help="files of your own, see above")
    add("--suites", nargs="+", metavar="SUITE", help="see above (default: all that can be read)")
    methods_help = "see above (default: all that are there but the tuned ones; few in ablations)"
    add("--methods", nargs="+", metavar="METHOD", help=methods_help)
    add("--datasets", type=int, metavar="N", help=f"datasets per case (default: {DATASETS})")
    add("--seed", type=int, default=0, help="of the methods")
    add("--processes", type=int, help="workers; 0: in this process (default: 0; --quick on CPU: 2)")
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
    if options.report and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("figures need matplotlib: pip install 'dopfn-jax[evaluation]'")
    # After parsing, so that --help and typing errors do not wait for JAX.
    import jax

    from dopfn_jax.evaluation import runner
    from dopfn_jax.evaluation.report import write_report
    from dopfn_jax.evaluation.suites import sources
    from dopfn_jax.training.host import keep_compiled_programs

    keep_compiled_programs()
    results = options.output / "results.jsonl"
    processes = options.processes
    if processes is None:
        processes = 2 if options.quick and jax.default_backend() == "cpu" else 0
    # Workers share the cores; a library's own threads would only fight.
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    methods, todo = {}, []
    for suite in _suites(options):
        methods[suite] = options.methods or _methods(options.quick, suite)
        count = options.datasets or (QUICK_DATASETS.get(suite, 5) if options.quick else DATASETS)
        todo += sources(suite, count, options.output / "datasets", options.data)
    try:
        absent = runner.run(todo, methods, results, options.seed, processes)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command goes on from {results}") from stop
    asked = runner.answers_of(
        {name for chosen in methods.values() for name in chosen}, options.seed
    )
    table = runner.latest(runner.read_table(results), asked)
    if options.json:
        facts = {"results": str(results), "absent": absent, "medians": _as_dict(table)}
        print(json.dumps(facts, indent=2))
    else:
        for method, package in absent.items():
            print(f"{method}: absent, package {package!r} is not installed")
        print(summary(table))
    commands = _remember(options.output / "commands.txt", _command(options))
    if options.report:
        page = write_report(results, options.report, commands, asked=asked)
        print(f"wrote {page}", file=sys.stderr)


def _remember(file: Path, command: str) -> str:
    """All commands that have written to these results, of which this is the last."""
    known = file.read_text().splitlines() if file.exists() else []
    commands = [line for line in known if line != command] + [command]
    file.write_text("".join(f"{line}\n" for line in commands))
    return "\n".join(commands)


def _command(options: argparse.Namespace) -> str:
    """The command without what leaves the numbers as they are."""
    words = ["python scripts/evaluate.py", *(["--quick"] if options.quick else [])]
    words += ["--data DIR"] if options.data else []
    for name in ("suites", "methods"):
        words += [f"--{name}", *getattr(options, name)] if getattr(options, name) else []
    for name in ("datasets", "seed"):
        words += [f"--{name} {getattr(options, name)}"] if getattr(options, name) else []
    words += ["--report", options.report.name] if options.report else []
    return " ".join(words)


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
    suites = tuple(QUICK_DATASETS if options.quick else SUITES)
    return [name for name in suites if options.data or name not in NEED_DATA]


def _methods(quick: bool, suite: str) -> list[str]:
    from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, checkpoint_names
    from dopfn_jax.evaluation.methods import METHODS

    if suite in ABLATIONS:
        return list(QUICK_ABLATION_METHODS if quick else ABLATION_METHODS)
    # The other shipped weights are of the paper's prior, as are the case studies.
    others = [f"dopfn:{name}" for name in checkpoint_names() if name != DEFAULT_CHECKPOINT]
    others = others if suite in CASE_STUDIES else []
    if quick:
        return [*QUICK_METHODS, *others]
    return ["dopfn", *others, *(name for name in METHODS if name not in SLOW_METHODS)]
