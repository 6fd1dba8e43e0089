"""The suites of an evaluation: which datasets it reads, draws or simulates."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dopfn_jax.config import PriorConfig
from dopfn_jax.evaluation import generated, real
from dopfn_jax.evaluation.datasets import Dataset, load_dataset
from dopfn_jax.evaluation.simulators import SIMULATORS, simulate

# Context rows of the ablation; each context is the start of the next.
CONTEXT_ROWS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_ROWS_CASES = ("observed_confounder", "confounder_mediator", "frontdoor", "unobserved_confounder")
_QUERY_ROWS = 500
# All of one size, so that only the graph differs.
GRAPHS = generated.Study(
    PriorConfig(min_nodes=4, max_nodes=10, zero_effect_share=0.0), rows=(1000, 1000)
)


@dataclass(frozen=True)
class Source:
    """A dataset by name, loaded where it is used: in a worker process.

    Attributes:
        suite, case, number: its key in the results.
        load: returns it.
    """

    suite: str
    case: str
    number: int
    load: Callable[[], Dataset]

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it in tables of results."""
        return self.suite, self.case, self.number


def sources(suite: str, count: int, cache: Path, data: Path | None) -> list[Source]:
    """The datasets of a suite.

    Args:
        suite: one of SUITES.
        count: datasets per case at most.
        cache: folder for the datasets that are generated.
        data: the user's folder of files that may not be redistributed.

    Raises:
        ValueError: no such suite, or one that needs `data` without it.
        FileNotFoundError: `data` does not hold what the suite needs.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}: choose from {', '.join(SUITES)}")
    return SUITES[suite](count, cache, data)


def _released(count: int, cache: Path, data: Path | None) -> list[Source]:
    if data is None:
        raise ValueError("suite 'released' reads files that may not be redistributed: give --data")
    folder = data / "case_studies_dev"
    paths = [path for path in sorted(folder.glob("*/*.npz")) if int(path.stem) <= count]
    if not paths:
        raise FileNotFoundError(
            f"{folder}: holds no <case>/<number>.npz; give its parent as --data"
        )
    return [
        Source(
            "released", p.parent.name, int(p.stem), functools.partial(load_dataset, p, "released")
        )
        for p in paths
    ]


def _generated(count: int, cache: Path, data: Path | None) -> list[Source]:
    return [
        Source("generated", case, k, functools.partial(_load_generated, cache, case, k))
        for case in generated.STUDIES
        for k in range(1, count + 1)
    ]


def _load_generated(cache: Path, case: str, number: int) -> Dataset:
    return _drawn("generated", generated.STUDIES[case], case, number, cache, exact=True)


def _simulated(count: int, cache: Path, data: Path | None) -> list[Source]:
    return [
        Source("simulated", case, k, functools.partial(simulate, case, k))
        for case in SIMULATORS
        for k in range(1, count + 1)
    ]


def _real(count: int, cache: Path, data: Path | None) -> list[Source]:
    return [
        Source("real", case, k, functools.partial(study, data, k))
        for case, study in real.STUDIES.items()
        if case not in real.FILES or real.find_file(data, real.FILES[case])
        for k in range(1, (1 if case in real.SINGLE else count) + 1)
    ]


def _rows(count: int, cache: Path, data: Path | None) -> list[Source]:
    return [
        Source("rows", f"{case}:{rows}", k, functools.partial(_load_rows, cache, case, rows, k))
        for case in _ROWS_CASES
        for rows in CONTEXT_ROWS
        for k in range(1, count + 1)
    ]


def _load_rows(cache: Path, case: str, rows: int, number: int) -> Dataset:
    """The first context rows of a large dataset, and some of its queries."""
    study = dataclasses.replace(generated.STUDIES[case], rows=(4000, 4000))
    data = _drawn("rows", study, case, number, cache, exact=False)
    few = {
        name: getattr(data, name)[:_QUERY_ROWS]
        for name in ("query_x", "query_t", "query_y", "effect", "unit_t", "unit_y")
    }
    start = {name: getattr(data, name)[:rows] for name in ("x", "t", "y")}
    return dataclasses.replace(
        data, case=f"{case}:{rows}", facts={**data.facts, "rows": float(rows)}, **few, **start
    )


def _graphs(count: int, cache: Path, data: Path | None) -> list[Source]:
    return [
        Source("graphs", "graphs", k, functools.partial(_load_graph, cache, k))
        for k in range(1, 5 * count + 1)  # the paper has five times as many as of a case study
    ]


def _load_graph(cache: Path, number: int) -> Dataset:
    return _drawn("graphs", GRAPHS, "graphs", number, cache, exact=False)


def _drawn(
    suite: str, study: generated.Study, case: str, number: int, cache: Path, exact: bool
) -> Dataset:
    path = cache / suite / case / f"{number:03d}.npz"
    if not path.exists():
        generated.write_dataset(path, study, case, number, exact)
    return load_dataset(path, suite)


SUITES: dict[str, Callable[[int, Path, Path | None], list[Source]]] = {
    "generated": _generated,
    "released": _released,
    "simulated": _simulated,
    "real": _real,
    "rows": _rows,
    "graphs": _graphs,
}
# These read nothing but files of the user's.
NEED_DATA = ("released",)
