"""Contenders that take turns on the clock, and what comes of it: figures with unit and spread."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import NDArray

# A lap repeats short work for at least so long: clocks and schedulers are coarser than a call.
LAP_SECONDS = 0.2
# Before each lap, so that the threads of the one before have stopped spinning.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.float64] | Sequence[float]) -> Self:
        """Of one value per repetition."""
        low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    @classmethod
    def exactly(cls, value: float) -> Self:
        """Of a value that was taken once."""
        return cls(float(value), float(value), float(value))


@dataclass(frozen=True)
class Measurement:
    """One figure.

    Attributes:
        question: what it helps to answer: prior, training, inference or devices.
        setting: sizes and options, by name.
        contender: who was measured.
        quantity: what was measured.
        unit: of `value`; "/s" is by the wall clock, "/CPU-s" by the processor time of all threads.
        value: median and quartiles.
        repetitions: how many there were.
        times_faster_than: by peer, its time over this one's by the same clock, lap by lap; more
            than 1 is faster. Empty for what is no speed.
    """

    question: str
    setting: Mapping[str, Any]
    contender: str
    quantity: str
    unit: str
    value: Spread
    repetitions: int = 1
    times_faster_than: Mapping[str, Spread] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverts `dataclasses.asdict`, also after a trip through JSON."""
        ratios = {peer: Spread(**ratio) for peer, ratio in values["times_faster_than"].items()}
        value = Spread(**values["value"])
        return cls(**{**values, "value": value, "times_faster_than": ratios})


@dataclass(frozen=True)
class Absent:
    """A peer that did not take part, and why."""

    peer: str
    reason: str


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    Attributes:
        name: for tables.
        run: does the work once; JAX arrays that it returns are waited for.
        work: amount of work in one call, such as the number of SCMs.
        cpu_clock: seconds of processor time that all of its threads and processes have taken.
    """

    name: str
    run: Callable[[], Any]
    work: float = 1.0
    cpu_clock: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class Laps:
    """Seconds per unit of work in every repetition, (R,) each."""

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]


def race(contenders: Sequence[Contender], repetitions: int) -> dict[str, Laps]:
    """Times contenders in turns: A, B, A, B, ...

    The first call of each is not timed: it compiles and fills caches.
    """
    calls = {}
    for contender in contenders:
        time_calls(contender)
        wall, _ = time_calls(contender)
        calls[contender.name] = max(1, math.ceil(LAP_SECONDS / wall))
    laps: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for _ in range(repetitions):
        for contender in contenders:
            time.sleep(PAUSE_SECONDS)
            count = calls[contender.name]
            wall, cpu = time_calls(contender, count)
            laps[contender.name].append(
                (wall / count / contender.work, cpu / count / contender.work)
            )
    return {name: Laps(*np.array(values).T) for name, values in laps.items()}


def time_calls(contender: Contender, count: int = 1) -> tuple[float, float]:
    """Wall-clock and CPU seconds of so many calls, one after another."""
    wall, cpu = time.perf_counter(), contender.cpu_clock()
    for _ in range(count):
        jax.block_until_ready(contender.run())
    return time.perf_counter() - wall, contender.cpu_clock() - cpu


def rates(
    question: str,
    setting: Mapping[str, Any],
    laps: Mapping[str, Laps],
    quantities: Mapping[str, float],
) -> list[Measurement]:
    """Figures "per second" and "per CPU second" of a race.

    Args:
        question: as for `Measurement`.
        setting: as for `Measurement`.
        laps: from `race`.
        quantities: by name, how many there are in a unit of work: {"SCMs": 1, "rows": 1000}.
    """
    return [
        Measurement(
            question=question,
            setting=setting,
            contender=name,
            quantity=quantity,
            unit=f"{quantity}/{suffix}",
            value=Spread.of(amount / getattr(own, clock)),
            repetitions=len(own.wall),
            times_faster_than=_ratios(laps, name, clock),
        )
        for name, own in laps.items()
        for quantity, amount in quantities.items()
        for clock, suffix in (("wall", "s"), ("cpu", "CPU-s"))
    ]


def durations(
    question: str, setting: Mapping[str, Any], laps: Mapping[str, Laps], quantity: str
) -> list[Measurement]:
    """Figures in milliseconds of a race whose contenders answer the same request."""
    return [
        Measurement(
            question=question,
            setting=setting,
            contender=name,
            quantity=quantity,
            unit=unit,
            value=Spread.of(1e3 * getattr(own, clock)),
            repetitions=len(own.wall),
            times_faster_than=_ratios(laps, name, clock),
        )
        for name, own in laps.items()
        for clock, unit in (("wall", "ms"), ("cpu", "CPU-ms"))
    ]


def _ratios(laps: Mapping[str, Laps], name: str, clock: str) -> dict[str, Spread]:
    own = getattr(laps[name], clock)
    return {
        peer: Spread.of(getattr(theirs, clock) / np.maximum(own, 1e-9))
        for peer, theirs in laps.items()
        if peer != name
    }


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of seconds = a * size ** b, by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
