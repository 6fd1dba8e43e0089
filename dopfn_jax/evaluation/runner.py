"""Running methods on datasets: in parallel, one line of JSON per answer, resumable."""

import json
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from dopfn_jax.evaluation.methods import NotApplicable, checksum, find_method
from dopfn_jax.evaluation.metrics import score
from dopfn_jax.evaluation.suites import Source

_PACKAGES = (
    "dopfn-jax", "jax", "numpy", "scikit-learn", "pandas", "econml", "dowhy",
    "tabpfn", "tabicl", "causalpfn",
)  # fmt: skip
# What tells one answer from another.
KEY = ("suite", "case", "dataset", "method", "seed", "sha256")


def run(
    sources: Sequence[Source],
    methods: Sequence[str],
    output: Path,
    seed: int = 0,
    processes: int = 0,
) -> dict[str, str]:
    """Scores the methods on the datasets and appends each answer to a file of JSON lines.

    What the file holds already, from the same seed and weights, is not run again. A method that
    fails on a dataset is recorded with its reason.

    Args:
        sources: the datasets.
        methods: names for `find_method`.
        output: the file of JSON lines; made if it is not there.
        seed: of the methods.
        processes: worker processes; 0 works in this one.

    Returns:
        The methods that cannot run here, with the package that each lacks.

    Raises:
        ValueError: an unknown method.
        CheckpointError: an unknown or damaged checkpoint.
    """
    absent = {name: find_method(name).absent for name in methods}
    sums = {name: checksum(name) for name in methods if not absent[name]}
    done = {tuple(record[field] for field in KEY) for record in read_records(output)}
    jobs = [
        (source, todo, seed)
        for source in sources
        if (
            todo := {
                name: sha256
                for name, sha256 in sums.items()
                if (*source.key, name, seed, sha256) not in done
            }
        )
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    cut_short = output.exists() and not output.read_text().endswith("\n")
    with output.open("a") as file, tqdm(total=len(jobs), unit="dataset", mininterval=1) as bar:
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
    return pd.DataFrame(records).drop_duplicates(list(KEY), keep="last", ignore_index=True)


def versions() -> dict[str, str]:
    """Versions of the packages that answers depend on, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_Job = tuple[Source, dict[str, str], int]


def _answers(jobs: Sequence[_Job], processes: int) -> Iterator[list[dict[str, Any]]]:
    if not processes:
        yield from map(_answer, jobs)
        return
    # Spawned, because a forked JAX deadlocks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_answer, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _answer(job: _Job) -> list[dict[str, Any]]:
    """The records of one dataset."""
    source, methods, seed = job
    suite, case, number = source.key
    data, problem = None, ""
    try:
        data = source.load()
        if data.is_degenerate:
            problem = "the context has one treatment arm only"
    except ImportError as error:
        problem = f"the dataset cannot be made: {error}"
    records = []
    for name, sha256 in methods.items():
        status, reason, scores, start = "ok", problem, {}, time.monotonic()
        if problem or data is None:
            status = "skipped"
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # libraries' advice about such data
                    scores = score(data, find_method(name).answer(data, seed))
            except NotApplicable as error:
                status, reason = "not applicable", str(error)
            except Exception as error:  # a library may fail in any way; the table says so
                status, reason = "failed", f"{type(error).__name__}: {error}"[:300]
        records.append(
            {
                "suite": suite,
                "case": case,
                "dataset": number,
                "method": name,
                "seed": seed,
                "sha256": sha256,
                "status": status,
                "reason": reason,
                "seconds": round(time.monotonic() - start, 3),
                "scores": scores,
                "data": data.fingerprint if data is not None else "",
                "facts": data.facts if data is not None else {},
                "versions": versions(),
            }
        )
    return records
