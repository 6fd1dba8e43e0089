"""Running methods on datasets: in parallel, one line of JSON per answer, resumable."""

import functools
import json
import multiprocessing
import platform
import random
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from dopfn_jax.evaluation.datasets import Dataset
from dopfn_jax.evaluation.methods import NotApplicable, checksum, find_method
from dopfn_jax.evaluation.metrics import Answer, score
from dopfn_jax.evaluation.suites import Source
from dopfn_jax.training.host import keep_compiled_programs

_PACKAGES = (
    "dopfn-jax", "jax", "numpy", "scikit-learn", "pandas", "econml", "dowhy",
    "tabpfn", "tabicl", "causalpfn",
)  # fmt: skip
# What tells one answer from another.
KEY = ("suite", "case", "dataset", "method", "seed", "sha256")
# Units of a real study whose effects are kept beside the scores, for a figure.
_UNITS = 100


def run(
    sources: Sequence[Source],
    methods: Sequence[str] | Mapping[str, Sequence[str]],
    output: Path,
    seed: int = 0,
    processes: int = 0,
) -> dict[str, str]:
    """Scores the methods on the datasets and appends each answer to a file of JSON lines.

    What the file holds already, from the same seed and weights, is not run again. A method that
    fails on a dataset is recorded with its reason; a dataset that could not be made or read, or
    that a process died of, is tried again by the next run.

    Args:
        sources: the datasets.
        methods: names for `find_method`, the same for all datasets or by suite.
        output: the file of JSON lines; made if it is not there.
        seed: of the methods.
        processes: worker processes; 0 works in this one.

    Returns:
        The methods that cannot run here, with the package that each lacks.

    Raises:
        ValueError: an unknown method.
        CheckpointError: an unknown or damaged checkpoint.
    """
    if not isinstance(methods, Mapping):
        methods = {source.suite: methods for source in sources}
    names = dict.fromkeys(name for chosen in methods.values() for name in chosen)
    absent = {name: find_method(name).absent for name in names}
    sums = {name: sha256 for name, (_, sha256) in answers_of(names).items()}
    done = {
        tuple(record[field] for field in KEY)
        for record in read_records(output)
        if record["status"] != "skipped"
    }
    jobs = [
        (source, todo, seed)
        for source in sources
        if (
            todo := {
                name: sums[name]
                for name in methods[source.suite]
                if name in sums and (*source.key, name, seed, sums[name]) not in done
            }
        )
    ]
    # Mixed, so that the pace so far tells how long the rest takes.
    random.Random(0).shuffle(jobs)
    output.parent.mkdir(parents=True, exist_ok=True)
    cut_short = output.exists() and not output.read_text().endswith("\n")
    bar = tqdm(total=len(jobs), unit="dataset", mininterval=1, smoothing=0)
    with output.open("a") as file, bar:
        file.write("\n" if cut_short else "")
        for records in _answers(jobs, processes):
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            bar.update()
    return {name: package for name, package in absent.items() if package}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file; none where it is missing. A line cut short is skipped."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote


def read_table(path: Path) -> pd.DataFrame:
    """Results as a table: a row per dataset and method; scores and facts in columns of their own.

    Facts are prefixed with "fact_". A failure has no scores, and its reason in `reason`.
    """
    records = [
        {
            **{field: record[field] for field in KEY},
            **{field: record[field] for field in ("data", "status", "reason", "seconds")},
            **record["scores"],
            **{f"fact_{name}": value for name, value in record["facts"].items()},
        }
        for record in read_records(path)
    ]
    columns = None if records else list(KEY)
    table = pd.DataFrame(records, columns=columns)
    return table.drop_duplicates(list(KEY), keep="last", ignore_index=True)


def read_units(path: Path) -> pd.DataFrame:
    """Effects of single units of real studies, as far as they are kept: truth and estimate."""
    rows = [
        {**{field: record[field] for field in KEY}, "truth": truth, "estimate": estimate}
        for record in read_records(path)
        for truth, estimate in record.get("units", [])
    ]
    return pd.DataFrame(rows, columns=[*KEY, "truth", "estimate"])


def answers_of(methods: Iterable[str], seed: int = 0) -> dict[str, tuple[int, str]]:
    """Seed and checksum of what these methods, as far as they can run here, answer with now."""
    return {name: (seed, checksum(name)) for name in methods if not find_method(name).absent}


def latest(table: pd.DataFrame, asked: Mapping[str, tuple[int, str]] | None = None) -> pd.DataFrame:
    """The rows of one seed and one set of weights for each method.

    Args:
        table: from `read_table`, in the order of its file.
        asked: from `answers_of`; of other methods the last in the file count.
    """
    answers = list(zip(table.method, table.seed, table.sha256, strict=True))
    chosen = {method: (seed, sha256) for method, seed, sha256 in answers}  # the last one stays
    chosen |= asked or {}
    wanted = [chosen[method] == (seed, sha256) for method, seed, sha256 in answers]
    return table[np.array(wanted, bool)]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers depend on, if they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_Job = tuple[Source, dict[str, str], int]
_Records = list[dict[str, Any]]


def _answers(jobs: Sequence[_Job], processes: int) -> Iterator[_Records]:
    if not processes:
        yield from map(_answer, jobs)
        return
    while jobs:
        lost = yield from _in_processes(jobs, processes)
        # One of the jobs that were started killed its process: each is tried on its own.
        suspects, jobs = lost[: processes + 1], lost[processes + 1 :]
        for job in suspects:
            if (yield from _in_processes([job], 1)):
                yield _skip(job, "its process died")


def _in_processes(
    jobs: Sequence[_Job], processes: int
) -> Generator[_Records, None, Sequence[_Job]]:
    """Yields answers; returns, in order, the jobs that have none because a process died."""
    lost = []
    # Spawned, because a forked JAX deadlocks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, keep_compiled_programs) as pool:
        futures = {pool.submit(_answer, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [jobs[place] for place in sorted(lost)]


def _answer(job: _Job) -> _Records:
    """The records of one dataset."""
    source, methods, seed = job
    try:
        data = source.load()
    except Exception as error:  # a file, or a library that simulates, may fail in any way
        return _skip(job, _text(error))
    records = []
    for name in methods:
        status, reason, scores, units, start = "ok", "", {}, [], time.monotonic()
        try:
            if data.is_degenerate:
                raise NotApplicable("the context has one treatment arm only")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # libraries' advice about such data
                answer = find_method(name).answer(data, seed)
                scores, units = score(data, answer), _unit_effects(data, answer)
        except NotApplicable as error:
            status, reason = "not applicable", str(error)
        except Exception as error:  # a library may fail in any way; the table says so
            status, reason = "failed", _text(error)
        seconds = time.monotonic() - start
        records.append(_record(job, name, status, reason, scores, units, seconds, data))
    return records


def _unit_effects(data: Dataset, answer: Answer) -> list[list[float]]:
    """Effect and estimate of the first units, of a study's first dataset, where both are known."""
    if data.suite != "real" or data.number != 1 or data.effect is None or answer.cate is None:
        return []
    pairs = np.stack([data.effect, answer.cate], axis=1)[:_UNITS]
    return [[float(f"{value:.5g}") for value in pair] for pair in pairs]


def _skip(job: _Job, reason: str) -> _Records:
    """Records of a dataset that no method has seen."""
    return [_record(job, name, "skipped", reason) for name in job[1]]


def _record(
    job: _Job,
    method: str,
    status: str,
    reason: str,
    scores: dict[str, float] | None = None,
    units: list[list[float]] | None = None,
    seconds: float = 0.0,
    data: Dataset | None = None,
) -> dict[str, Any]:
    source, methods, seed = job
    suite, case, number = source.key
    return {
        "suite": suite,
        "case": case,
        "dataset": number,
        "method": method,
        "seed": seed,
        "sha256": methods[method],
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 3),
        "scores": scores or {},
        "units": units or [],
        "data": data.fingerprint if data is not None else "",
        "facts": data.facts if data is not None else {},
        "versions": versions(),
    }


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
