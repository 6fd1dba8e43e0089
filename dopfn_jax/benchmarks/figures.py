"""Charts of a benchmark, drawn from its figures alone."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dopfn_jax.benchmarks import inference, training
from dopfn_jax.benchmarks.timing import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_all(rows: Sequence[Measurement], folder: Path) -> list[Path]:
    """Writes folder/benchmark_<question>.png where there is something to draw; returns the paths.

    Without matplotlib (extra `plot`) there are none.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for question, draw in _CHARTS.items():
        own = [row for row in rows if row.question == question]
        if not own:
            continue
        paths.append(folder / f"benchmark_{question}.png")
        figure = draw(own)
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    return paths


def _figure(panels: int) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 3.2), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _prior(rows: Sequence[Measurement]) -> "Figure":
    """SCMs a second: at the first setting, and against whatever of it was varied."""
    rows = [row for row in rows if row.unit == "SCMs/s"]
    base = dict(rows[0].setting)
    varied = [name for name in base if name != "noise" and _varied(rows, base, name)]
    figure, (bars, *panels) = _figure(1 + len(varied))
    _bars(bars, [row for row in rows if dict(row.setting) == base], "SCMs/s")
    for axes, name in zip(panels, varied, strict=True):
        lines = _varied(rows, base, name)
        for contender in dict.fromkeys(row.contender for row in lines):
            own = [row for row in lines if row.contender == contender]
            _line(axes, sorted(own, key=lambda row: row.setting[name]), name, contender)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="SCMs/s")
    if panels:
        panels[0].legend(fontsize=7)
    return figure


def _varied(rows: Sequence[Measurement], base: dict[str, object], name: str) -> list[Measurement]:
    """The figures whose setting differs from the base in this alone; none if it was not varied."""
    same = [row for row in rows if {**row.setting, name: base[name]} == base]
    return same if len({row.setting[name] for row in same}) > 1 else []


def _training(rows: Sequence[Measurement]) -> "Figure":
    """Tasks a second of everybody, and the parts of the fused step, at the first shape."""
    rows = [row for row in rows if row.setting == rows[0].setting]
    figure, (bars, split) = _figure(2)
    _bars(bars, [row for row in rows if row.unit == "tasks/s"], "tasks/s")
    start = 0.0
    for row in rows:
        if row.quantity in training.PARTS and row.unit == "ms":
            split.barh(training.FUSED, row.value.median, left=start, label=row.quantity)
            start += row.value.median
    split.set(xlabel="ms a step", yticks=[], ylim=(-0.6, 0.9))
    split.legend(fontsize=7, ncols=4)
    return figure


def _inference(rows: Sequence[Measurement]) -> "Figure":
    """Time against the context's rows and columns, and memory against the queries."""
    against = {row.setting.get("against") for row in rows}
    grown = [axis for axis in ("rows", "columns") if axis in against]
    figure, (*panels, memory) = _figure(len(grown) + 1)
    for axes, axis in zip(panels, grown, strict=True):
        for quantity in ("fit", "predict"):
            own = [r for r in rows if r.quantity == quantity and r.unit == "ms"]
            own = [row for row in own if row.setting.get("against") == axis]
            _line(axes, own, axis, quantity)
        axes.set(xscale="log", yscale="log", xlabel=f"{axis} of the context", ylabel="ms")
        axes.legend(fontsize=7)
    for unit in inference.MEMORY_UNITS:
        own = [row for row in rows if row.unit == unit]
        if own:
            _line(memory, own, "queries", unit)
    memory.set(xscale="log", xlabel="query rows", ylabel="peak memory", ylim=(0, None))
    memory.legend(fontsize=7)
    return figure


def _devices(rows: Sequence[Measurement]) -> "Figure":
    figure, (bars,) = _figure(1)
    _bars(bars, [row for row in rows if row.unit == "tasks/s"], "tasks/s")
    return figure


def _bars(axes: "Axes", rows: Sequence[Measurement], label: str) -> None:
    """A bar for each contender, with quartiles."""
    for row in rows:
        value = row.value
        axes.barh(row.contender, value.median)
        axes.plot([value.low, value.high], [row.contender] * 2, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(label)


def _line(axes: "Axes", rows: Sequence[Measurement], name: str, label: str) -> None:
    """Medians against a setting, with quartiles."""
    sizes = [row.setting[name] for row in rows]
    axes.plot(sizes, [row.value.median for row in rows], marker=".", label=label)
    axes.fill_between(
        sizes, [row.value.low for row in rows], [row.value.high for row in rows], alpha=0.2
    )


_CHARTS: dict[str, Callable[[Sequence[Measurement]], "Figure"]] = {
    "prior": _prior,
    "training": _training,
    "inference": _inference,
    "devices": _devices,
}
