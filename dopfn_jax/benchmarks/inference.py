"""How long answers take: cold and warm, cached and not, and how time and memory grow."""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from resource import RUSAGE_SELF, getrusage
from typing import Any

import jax
import numpy as np

from dopfn_jax.benchmarks.timing import (
    Absent,
    Contender,
    Laps,
    Measurement,
    Spread,
    durations,
    fitted_exponent,
    race,
    time_calls,
)
from dopfn_jax.checkpoints import Checkpoint, from_pretrained
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.evaluation.datasets import Dataset
from dopfn_jax.evaluation.methods import Method, find_method
from dopfn_jax.evaluation.metrics import Answer

OURS, CACHED, UNCACHED = "dopfn_jax", "dopfn_jax, cached context", "dopfn_jax, no cache"
# A batch of queries that is small beside any context.
FEW_QUERIES = 10
# What is measured of a table longer than an estimator reads at once, and how many members read it.
SAMPLED, _MEMBERS = "first fit of a sample", 4
# Of memory, by where it is.
MEMORY_UNITS = ("MB, process", "MB, device")
# More are timed once only, without a first call.
_MANY_QUERIES = 10_000
# Context rows up to which fixed costs hide how time grows.
FLAT_ROWS = 1000


@dataclass(frozen=True)
class Sizes:
    """What is asked of which tables.

    Attributes:
        table: (rows, columns) of the table that is asked again and again.
        tables: (rows, columns) on which peers are met; the queries are as many as the rows.
        peers: methods of `dopfn_jax.evaluation`.
        queries: numbers of query rows, ascending.
        contexts: numbers of context rows.
        columns: numbers of covariates.
        subsampled: context rows of a table that is read in random parts; 0 for none.
    """

    table: tuple[int, int]
    tables: tuple[tuple[int, int], ...]
    peers: tuple[str, ...]
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    columns: tuple[int, ...]
    subsampled: int = 0


_FAST_PEERS = ("t_linear", "t_histgb", "t_rf", "linear_dml")
_FOUNDATION = ("tabpfn", "tabicl", "causalpfn")
FULL = Sizes(
    table=(1000, 5),
    tables=((1000, 5), (100, 5), (4000, 20)),
    peers=(*_FAST_PEERS, "x_rf", "causal_forest", *_FOUNDATION),
    queries=(1000, 10_000, 100_000, 1_000_000),
    contexts=(128, 256, 512, 1024, 2048, 4096, 8192),
    columns=(1, 4, 8, 16, 32, 64),
    subsampled=100_000,
)
QUICK = Sizes(
    table=(1000, 5),
    tables=((1000, 5),),
    peers=(*_FAST_PEERS, *_FOUNDATION),
    queries=(1000, 10_000),
    contexts=(),
    columns=(),
)
SMALLEST = Sizes(
    table=(32, 2),
    tables=((32, 2),),
    peers=("t_linear", "tabpfn"),
    queries=(16, 32),
    contexts=(32,),
    columns=(2, 4),
)


def measure(sizes: Sizes, repetitions: int) -> Iterator[Measurement | Absent]:
    """All figures; those of memory come before larger tables, because its peak never falls."""
    table = draw_table(*sizes.table)
    yield from _cold(table)
    checkpoint = from_pretrained()
    yield from _queries(table, checkpoint, sizes.queries, repetitions)
    yield from _cache(table, checkpoint, repetitions)
    for rows, columns in sizes.tables:
        yield from _peers(draw_table(rows, columns), checkpoint, sizes.peers, repetitions)
    yield from _growth(sizes, checkpoint, repetitions)
    if sizes.subsampled:
        yield from _subsampled(sizes.subsampled, sizes.table[1], checkpoint)


def draw_table(rows: int, columns: int) -> Dataset:
    """A confounded table with an effect that varies, and as many query rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * rows, columns))
    t = (rng.random(2 * rows) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    t[:2] = 0, 1  # both arms, however short the table
    y = x.sum(axis=1) + t * (1 + x[:, -1]) + rng.standard_normal(2 * rows)
    context, query = slice(rows), slice(rows, None)
    return Dataset(
        suite="benchmark",
        case="linear",
        number=0,
        x=x[context],
        t=t[context],
        y=y[context],
        query_x=x[query],
        query_t=t[query],
    )


def _setting(table: Dataset, queries: int) -> dict[str, int]:
    rows, columns = table.x.shape
    return {"rows": rows, "columns": columns, "queries": queries}


def _fit(table: Dataset, checkpoint: Checkpoint, **options: Any) -> DoPFNRegressor:
    return DoPFNRegressor(checkpoint, **options).fit(table.x, table.t, table.y)


def _cold(table: Dataset) -> Iterator[Measurement]:
    """The first fit and the first effects of a process: loading and compiling included."""
    first = Contender(OURS, lambda: _fit(table, from_pretrained()).cate(table.query_x))
    wall, cpu = time_calls(first)
    setting = _setting(table, len(table.query_x))
    for unit, seconds in (("ms", wall), ("CPU-ms", cpu)):
        value = Spread.exactly(1e3 * seconds)
        yield Measurement("inference", setting, OURS, "first fit + CATE", unit, value)


def _queries(
    table: Dataset, checkpoint: Checkpoint, queries: tuple[int, ...], repetitions: int
) -> Iterator[Measurement]:
    """Rows a second, and the peak of memory, for more and more query rows of one context."""
    model = _fit(table, checkpoint)
    for count in queries:
        x = np.resize(table.query_x, (count, table.x.shape[1]))
        contender = Contender(OURS, partial(model.predict, x, 1), work=count)
        if count <= _MANY_QUERIES:
            laps = race([contender], repetitions)[OURS]
        else:  # what it runs has been compiled for fewer
            wall, cpu = time_calls(contender)
            laps = Laps(np.array([wall / count]), np.array([cpu / count]))
        setting = _setting(table, count)
        for unit, seconds in (("query rows/s", laps.wall), ("query rows/CPU-s", laps.cpu)):
            value = Spread.of(1 / seconds)
            yield Measurement("inference", setting, OURS, "query rows", unit, value, len(seconds))
        for unit, peak in _peak_bytes().items():
            value = Spread.exactly(peak / 1e6)
            yield Measurement("inference", setting, OURS, "peak memory", unit, value)


def _peak_bytes() -> dict[str, int]:
    """The most memory that the process, and its device if it counts, have held so far, in bytes."""
    kilobytes = sys.platform != "darwin"  # elsewhere ru_maxrss is in bytes
    process, device = MEMORY_UNITS
    peaks = {process: (1024 if kilobytes else 1) * getrusage(RUSAGE_SELF).ru_maxrss}
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peaks[device] = statistics["peak_bytes_in_use"]
    return peaks


def _cache(table: Dataset, checkpoint: Checkpoint, repetitions: int) -> Iterator[Measurement]:
    """A few queries, with the context kept and with the context read anew."""
    contenders = []
    for name, cache in ((CACHED, True), (UNCACHED, False)):
        model = _fit(table, checkpoint, cache=cache)
        few = partial(model.predict, table.query_x[:FEW_QUERIES], 1)
        contenders.append(Contender(name, few))
    laps = race(contenders, repetitions)
    yield from durations("inference", _setting(table, FEW_QUERIES), laps, "few queries")


def _peers(
    table: Dataset, checkpoint: Checkpoint, peers: tuple[str, ...], repetitions: int
) -> Iterator[Measurement | Absent]:
    """Fit and effects of all query rows, by everybody who is there."""
    contenders = [Contender(OURS, lambda: _fit(table, checkpoint).cate(table.query_x))]
    for name in peers:
        method = find_method(name)
        if method.absent:
            yield Absent(name, f"package {method.absent!r} is not installed")
            continue
        answer = partial(_quietly, method, table)
        try:
            answer()
        except Exception as error:  # of other packages: weights that cannot be had, say
            yield Absent(name, f"failed on {table.x.shape}: {type(error).__name__}: {error}")
            continue
        contenders.append(Contender(name, answer))
    laps = race(contenders, repetitions)
    yield from durations("inference", _setting(table, len(table.query_x)), laps, "fit + CATE")


def _quietly(method: Method, table: Dataset) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' advice about such data
        return method.answer(table, 0)


def _growth(sizes: Sizes, checkpoint: Checkpoint, repetitions: int) -> Iterator[Measurement]:
    """Time of fit and of queries against rows and columns of the context, and its exponents."""
    rows, columns = sizes.table
    tables = {
        "rows": [(size, draw_table(size, columns)) for size in sizes.contexts],
        "columns": [(size, draw_table(rows, size)) for size in sizes.columns],
    }
    for axis, growing in tables.items():
        times: dict[str, dict[int, float]] = {"fit": {}, "predict": {}}
        for size, table in growing:
            setting = {**_setting(table, rows), "against": axis}
            for quantity, laps in _fit_and_predict(table, checkpoint, rows, repetitions).items():
                yield from durations("inference", setting, {OURS: laps}, quantity)
                times[quantity][size] = float(np.median(laps.wall))
        for quantity, seconds in times.items():
            large = {
                size: s for size, s in seconds.items() if axis == "columns" or size > FLAT_ROWS
            }
            if len(large) < 2:
                continue
            value = Spread.exactly(fitted_exponent(list(large), list(large.values())))
            setting = {"against": axis, "from": min(large), "to": max(large)}
            yield Measurement("inference", setting, OURS, quantity, "exponent", value, len(large))


def _fit_and_predict(
    table: Dataset, checkpoint: Checkpoint, queries: int, repetitions: int
) -> dict[str, Laps]:
    fitted = _fit(table, checkpoint)
    query = np.resize(table.query_x, (queries, table.x.shape[1]))
    contenders = [
        Contender("fit", lambda: _fit(table, checkpoint).contexts_),
        Contender("predict", lambda: fitted.predict(query, 1)),
    ]
    return race(contenders, repetitions)


def _subsampled(rows: int, columns: int, checkpoint: Checkpoint) -> Iterator[Measurement]:
    """A table longer than is read at once: every member of an ensemble reads random rows of it."""
    table = draw_table(rows, columns)
    fit = Contender(OURS, lambda: _fit(table, checkpoint, n_estimators=_MEMBERS).contexts_)
    wall, cpu = time_calls(fit)
    setting = {**_setting(table, 0), "members": _MEMBERS}
    for unit, seconds in (("ms", wall), ("CPU-ms", cpu)):
        value = Spread.exactly(1e3 * seconds)
        yield Measurement("inference", setting, OURS, SAMPLED, unit, value)
