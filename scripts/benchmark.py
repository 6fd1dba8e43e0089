"""Measures throughput, against what people would use instead, and reports it.

Examples:
    python scripts/benchmark.py --quick
    python scripts/benchmark.py --json figures.json --report docs
    python scripts/benchmark.py prior training
    python scripts/benchmark.py --read figures.json --report docs

Questions: prior (tasks a second), training (the fused step), inference (latency, memory, growth),
devices (equality and overhead of meshes). Peers of other packages need the extra `benchmark`; those
that are absent are said to be. docs/benchmarks.md tells how figures come about.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dopfn_jax.benchmarks.machine import Load, cores

if TYPE_CHECKING:
    from dopfn_jax.benchmarks.report import Results
    from dopfn_jax.benchmarks.timing import Absent, Measurement

QUESTIONS = ("prior", "training", "inference", "devices")
# Laps of every contender.
REPETITIONS = {"full": 5, "quick": 3, "smallest": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.measure:
        measured = [(type(m).__name__, asdict(m)) for m in _measure(options.questions[0], options)]
        options.measure.write_text(json.dumps({"machine": _machine(), "measured": measured}))
        return 0

    from dopfn_jax.benchmarks.report import Results, tables, write_report

    try:
        results = Results.read(options.read) if options.read else _run(options)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"benchmark.py: {shlex.join(error.cmd[1:])} failed, see above", file=sys.stderr)
        return 1
    for name, table in tables(results).items():
        if table:
            print(f"{name}:\n{table}\n")
    for absent in results.absent:
        print(f"{absent.peer}: absent, {absent.reason}")
    if options.json:
        results.write(options.json)
    if options.report:
        print(f"wrote {write_report(results, options.report)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", help=f"{', '.join(QUESTIONS)}; default: all")
    for size, purpose in (("quick", "the main figures"), ("smallest", "shows that all of it runs")):
        add(f"--{size}", dest="size", action="store_const", const=size, help=purpose)
    parser.set_defaults(size="full")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    add("--report", type=Path, metavar="DIR", help="write a page, charts and the figures")
    add("--read", type=Path, metavar="FILE", help="figures of --json: measure nothing")
    add("--published", type=Path, metavar="DIR", help="a checkout of the released generator")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> "Results":
    """Every question in a process of its own: its devices, its memory, its threads."""
    from dopfn_jax.benchmarks.report import Results
    from dopfn_jax.benchmarks.timing import Absent, Measurement

    for question in options.questions:
        if question not in QUESTIONS:
            raise ValueError(f"question {question!r}: choose from {', '.join(QUESTIONS)}")
    questions = options.questions or QUESTIONS
    words = [] if options.size == "full" else [f"--{options.size}"]
    words += ["--published", str(options.published)] if options.published else []
    # Where the checkout lies is nobody's business.
    shown = ["DIR" if word == str(options.published) else word for word in words]
    command = ["python", os.path.relpath(__file__), *options.questions, *shown]
    results = Results(command=shlex.join(command), machine={})
    for question in questions:
        print(f"{question}:", file=sys.stderr)
        load, start = Load(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "measured.json")
            subprocess.run(
                [sys.executable, __file__, question, *words, "--measure", str(output)],
                env={**os.environ, **_environment(question, options.size)},
                check=True,
            )
            answer = json.loads(output.read_text())
        results.machine = answer["machine"]
        results.others[question] = load.of_others()
        results.seconds[question] = time.monotonic() - start
        for kind, row in answer["measured"]:
            if kind == Absent.__name__:
                results.absent.append(Absent(**row))
            else:
                results.measurements.append(Measurement.from_dict(row))
        if options.json:  # after every question: who stops the rest keeps what there is
            results.write(options.json)
    return results


def _environment(question: str, size: str) -> dict[str, str]:
    """Variables of its process; JAX must know of simulated devices, on CPUs, when it starts."""
    from dopfn_jax.benchmarks import devices

    if question == "inference":
        # Compilation is part of what it measures.
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    counts = {"prior": cores(), "devices": getattr(devices, size.upper()).devices}
    return {"JAX_NUM_CPU_DEVICES": str(counts.get(question, 1))}


def _measure(question: str, options: argparse.Namespace) -> "Iterator[Measurement | Absent]":
    """The figures of one question, in this process, shown as they come."""
    import importlib

    from dopfn_jax.benchmarks.timing import Absent
    from dopfn_jax.training.host import keep_freed_memory

    if question != "inference":  # as `scripts/train.py` does, and users' own processes do not
        keep_freed_memory()
    module = importlib.import_module(f"dopfn_jax.benchmarks.{question}")
    sizes, repetitions = getattr(module, options.size.upper()), REPETITIONS[options.size]
    more = {"published": options.published} if question == "prior" else {}
    for row in module.measure(sizes, repetitions, **more):
        if not isinstance(row, Absent):
            setting = ", ".join(f"{name} {value}" for name, value in row.setting.items())
            value = f"{row.value.median:.4g} {row.unit}"
            print(f"  {setting}: {row.contender}: {row.quantity} {value}", file=sys.stderr)
        yield row


def _machine() -> dict[str, object]:
    from dopfn_jax.benchmarks.machine import describe

    return describe()


if __name__ == "__main__":
    sys.exit(main())
