"""From figures to what is published: a JSON file, charts, and a page that shows them."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ge, le
from pathlib import Path
from typing import Any, NamedTuple, Self

from dopfn_jax.benchmarks import inference, prior, training
from dopfn_jax.benchmarks.timing import Absent, Measurement, Spread

JSON_FILE, PAGE_FILE = "benchmarks.json", "benchmarks.md"


@dataclass
class Results:
    """All figures of one run, and what must be known about it.

    Attributes:
        command: how to get the same figures.
        machine: from `machine.describe`.
        others: by question, cores that other processes kept busy meanwhile; None if not known.
        seconds: by question, how long it took.
        absent: peers that did not take part.
        measurements: the figures.
    """

    command: str
    machine: Mapping[str, Any]
    others: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote.

        Raises:
            ValueError: another kind of file.
        """
        try:
            values = json.loads(path.read_text())
            values["absent"] = [Absent(**row) for row in values["absent"]]
            values["measurements"] = [Measurement.from_dict(row) for row in values["measurements"]]
            return cls(**values)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not written by benchmark.py --json ({error!r})") from error


def write_report(results: Results, folder: Path) -> Path:
    """Writes folder/results/benchmarks.json, folder/figures/benchmark_*.png, folder/benchmarks.md.

    Returns:
        The page.
    """
    from dopfn_jax.benchmarks.figures import draw_all

    results.write(folder / "results" / JSON_FILE)
    figures = draw_all(results.measurements, folder / "figures")
    path = folder / PAGE_FILE
    path.write_text(page(results, figures))
    return path


def page(results: Results, figures: Sequence[Path] = ()) -> str:
    """The Markdown page: `page.md` with its tables, and the charts beneath their questions."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    parts = {"targets": _targets(results.measurements), "run": _run(results), **tables(results)}
    for name, table in parts.items():
        text = text.replace(f"{{{{{name}}}}}", table or "Not measured in this run.")
    drawn = {path.stem: f"![{path.stem}](figures/{path.name})" for path in figures}
    for question in {question for question, _ in _TABLES.values()}:
        name = f"benchmark_{question}"
        text = text.replace(f"{{{{{name}}}}}", drawn.get(name, ""))
    return text


def tables(results: Results) -> dict[str, str]:
    """The tables of figures by name; empty where nothing was measured."""
    rows = results.measurements
    return {
        name: _table([row for row in rows if row.question == question], **columns)
        for name, (question, columns) in _TABLES.items()
    }


# By name, as in `page.md`: the question, and arguments of `_table`.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "prior": (
        "prior",
        {"units": ("SCMs/s", "SCMs/CPU-s", "rows/s"), "peers": (prior.LOOP, prior.PUBLISHED)},
    ),
    "training": (
        "training",
        {
            "units": ("tasks/s", "tasks/CPU-s", "rows/s"),
            "peers": (training.PEER, training.UNFUSED),
        },
    ),
    "flops": ("training", {"units": ("GFLOP/s", "% of peak")}),
    "split": ("training", {"units": ("ms", "% of step"), "quantities": training.PARTS}),
    "peers": (
        "inference",
        {
            "units": ("ms", "CPU-ms"),
            "peers": (inference.OURS,),
            "quantities": ("first fit + CATE", "fit + CATE"),
        },
    ),
    "cache": (
        "inference",
        {
            "units": ("ms", "CPU-ms"),
            "peers": (inference.UNCACHED,),
            "quantities": ("few queries",),
        },
    ),
    "queries": (
        "inference",
        {"units": ("query rows/s", "query rows/CPU-s", *inference.MEMORY_UNITS)},
    ),
    "growth": ("inference", {"units": ("ms", "CPU-ms"), "quantities": ("fit", "predict")}),
    "exponents": ("inference", {"units": ("exponent",), "quantities": ("fit", "predict")}),
    "sampled": ("inference", {"units": ("ms", "CPU-ms"), "quantities": (inference.SAMPLED,)}),
    "devices": ("devices", {"units": ("tasks/s", "tasks/CPU-s"), "peers": ("mesh 1",)}),
    "equality": (
        "devices",
        {"units": ("largest relative difference",), "quantities": ("loss",)},
    ),
}


def _run(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = ", ".join(f"{name} {value}" for name, value in machine["threads"].items())
    rows = {
        "command": f"`{results.command}`",
        "processor": f"{machine['processor']}, {machine['cores']} cores",
        "memory": f"{machine['memory_gb']} GB",
        "devices": machine["devices"],
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": versions,
        "thread settings": threads,
        "cores kept busy by others": ", ".join(
            f"{question} {'not known' if busy is None else f'{busy:.1f}'}"
            for question, busy in results.others.items()
        ),
        "minutes": ", ".join(
            f"{question} {seconds / 60:.1f}" for question, seconds in results.seconds.items()
        ),
        "absent": "; ".join(f"{a.peer}: {a.reason}" for a in _unique(results.absent)) or "none",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _unique(absent: Iterable[Absent]) -> list[Absent]:
    """One per peer."""
    return list({a.peer: a for a in absent}.values())


def _targets(rows: Sequence[Measurement]) -> str:
    """What was aimed at, and what came out; those that were not measured are left out."""
    lines = []
    for target in _TARGETS:
        value = target.find(rows)
        if value is not None:
            reached = "yes" if target.compare(value.median, target.bound) else "no"
            lines.append(f"| {target.text} | {_spread(value)} | {reached} |")
    return "\n".join(["| target | measured | reached |", "|---|---|---|", *lines]) if lines else ""


def _first(
    rows: Sequence[Measurement], contender: str, unit: str, peer: str = "", quantity: str = ""
) -> Spread | None:
    """The first figure of a contender in this unit, or its ratio to the first such peer."""
    for row in rows:
        if not row.contender.startswith(contender) or row.unit != unit:
            continue
        if quantity not in ("", row.quantity):
            continue
        if not peer:
            return row.value
        for name, ratio in row.times_faster_than.items():
            if name.startswith(peer):
                return ratio
    return None


def _sampler(rows: Sequence[Measurement], peer: str = "") -> Spread | None:
    """The same for the sampler on most devices; and of a loop, the one with most processes."""
    own = [r for r in rows if r.unit == "SCMs/s" and r.setting == prior.FULL[0].names]
    own = [row for row in own if row.contender.startswith(prior.OURS)]
    if not own:
        return None
    if not peer:
        return own[-1].value
    ratios = [ratio for name, ratio in own[-1].times_faster_than.items() if name.startswith(peer)]
    return ratios[-1] if ratios else None


class _Target(NamedTuple):
    """What is aimed at on a machine with two cores, and where in the figures to find it."""

    text: str
    compare: Callable[[float, float], bool]
    bound: float
    find: Callable[[Sequence[Measurement]], Spread | None]


_TARGETS = (
    _Target(
        "prior, 1,024 tasks of 1,000 rows x 5 covariates: 2 times the NumPy loop on all cores",
        ge,
        2,
        lambda rows: _sampler(rows, prior.LOOP),
    ),
    _Target("prior: 8,500 SCMs/s", ge, 8500, _sampler),
    _Target(
        "prior: 50 times the published generator on one core (ours on all cores)",
        ge,
        50,
        lambda rows: _sampler(rows, prior.PUBLISHED),
    ),
    _Target(
        "fused training, sampling included: 1.5 times PyTorch on a constant batch",
        ge,
        1.5,
        lambda rows: _first(rows, training.FUSED, "tasks/s", training.PEER),
    ),
    _Target(
        "fused training: 30 % of the peak of a matrix product",
        ge,
        30,
        lambda rows: _first(rows, training.FUSED, "% of peak"),
    ),
    _Target(
        "fused training: sampling takes at most 5 % of the step",
        le,
        5,
        lambda rows: _first(rows, training.FUSED, "% of step", quantity="prior"),
    ),
    _Target(
        f"inference: {inference.FEW_QUERIES} queries 20 times faster with a cached context",
        ge,
        20,
        lambda rows: _first(rows, inference.CACHED, "ms", inference.UNCACHED),
    ),
    _Target(
        f"inference: {inference.FEW_QUERIES} queries 20 times cheaper with it, by processor time",
        ge,
        20,
        lambda rows: _first(rows, inference.CACHED, "CPU-ms", inference.UNCACHED),
    ),
)


def _table(
    rows: Sequence[Measurement],
    units: Sequence[str],
    peers: tuple[str, ...] = (),
    quantities: Sequence[str] = (),
) -> str:
    """A line per setting and contender: values in some units, ratios to some peers.

    Args:
        rows: figures, of which those in other units are left out.
        units: a column each.
        peers: how the names of the peers begin that get a column.
        quantities: those to keep, a line each, instead of all in one.
    """
    rows = [r for r in rows if r.unit in units and (not quantities or r.quantity in quantities)]
    lines: dict[tuple[Any, ...], dict[str, Measurement]] = {}
    for row in rows:
        what = row.quantity if quantities else ""
        key = (tuple(row.setting.items()), row.contender, what)
        lines.setdefault(key, {})[row.unit] = row
    if not lines:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.setting))
    shown = list(dict.fromkeys(n for r in rows for n in r.times_faster_than if n.startswith(peers)))
    shown = shown if peers else []
    header = [*names, *(["of"] if quantities else []), "contender", *units]
    header += [f"times faster than {peer}" for peer in shown]
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for (setting, contender, what), by_unit in lines.items():
        cells = [_plain(dict(setting).get(name, "")) for name in names]
        cells += [what, contender] if quantities else [contender]
        cells += [_spread(by_unit[unit].value) if unit in by_unit else "" for unit in units]
        cells += [_both_clocks(by_unit, units, peer) for peer in shown]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _both_clocks(by_unit: Mapping[str, Measurement], units: Sequence[str], peer: str) -> str:
    """The ratio by the wall clock and by processor time, which are the first two units."""
    ratios = [by_unit[u].times_faster_than.get(peer) for u in units[:2] if u in by_unit]
    return " / ".join(f"{ratio.median:.3g}" for ratio in ratios if ratio)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _spread(value: Spread) -> str:
    if value.low == value.high:
        return _number(value.median)
    return f"{_number(value.median)} ({_number(value.low)} to {_number(value.high)})"


def _number(value: float) -> str:
    """Three digits."""
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
