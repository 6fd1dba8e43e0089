"""Figures, all drawn from the saved tables (`report.write_tables`)."""

import functools
import importlib.util
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dopfn_jax.evaluation.methods import METHODS, is_dopfn, sees_truth
from dopfn_jax.evaluation.metrics import LEVELS, median_interval, rank_methods

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "cid": "CID error (normalised MSE)",
    "cate": "CATE error (normalised MSE)",
    "pehe_relative": "PEHE / range of y",
}
_STUDIES = ("generated", "released")
_UNCERTAINTY = {"entropy": "entropy", "nll": "cross-entropy\n(negative log-likelihood)"}
_BINS = 6
# Methods of a figure that has a panel for each.
_MOST_PANELS = 6
# Errors below this share of the range.
_ROUNDING = 1e-7


def draw_all(scores: pd.DataFrame, units: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure that the tables allow as <name>.png; returns the paths.

    Args:
        scores: a row per dataset and method, as `report.read_scores` gives.
        units: a row per unit and method, as `runner.read_units` gives.
        folder: where to write; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {name: functools.partial(draw, scores) for name, draw in FIGURES.items()}
    drawings["units"] = functools.partial(unit_effects, units)
    paths = []
    for name, draw in drawings.items():
        figure = draw()
        if figure is None:
            continue
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    return paths


def case_study_bars(scores: pd.DataFrame, metric: str) -> "Figure | None":
    """Median error of every method in every case study, with bootstrap 95 % intervals."""
    table = _studies(scores, metric)
    if table.empty:
        return None
    methods, cases = _methods(table), sorted(table.case.unique())
    figure, axes = _axes(1.2 * len(cases) + 3, 4)
    width = 0.85 / len(methods)
    for index, method in enumerate(methods):
        groups = table[table.method == method].groupby("case")[metric]
        intervals = np.array([median_interval(values.to_numpy()) for _, values in groups])
        shift = (index - (len(methods) - 1) / 2) * width
        x = np.array([cases.index(case) + shift for case in groups.groups])
        axes.bar(x, groups.median(), width, color=_colour(method), label=_label(method))
        axes.vlines(x, *intervals.T, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [case.replace("_", "\n") for case in cases], fontsize=8)
    axes.set(yscale="log", ylabel=LABELS[metric])
    _crop(axes, table.groupby(["case", "method"])[metric].median())
    _legend(axes)
    return figure


def critical_difference(scores: pd.DataFrame, metric: str) -> "Figure | None":
    """Average ranks over all case-study datasets; bars join what Nemenyi's test cannot tell.

    None without the package autorank, of the extra `evaluation`.
    """
    if importlib.util.find_spec("autorank") is None:
        return None
    from autorank import plot_stats

    table = _studies(scores, metric)
    table = table[~table.method.map(sees_truth)]
    if table.empty:
        return None
    wide = table.pivot_table(index=["suite", "case", "dataset"], columns="method", values=metric)
    wide = wide.loc[:, wide.notna().mean() > 0.8]  # else few datasets would be complete
    try:
        result = rank_methods(wide)
    except ValueError:
        return None
    figure, axes = _axes(7, 3)
    plot_stats(result, ax=axes, allow_insignificant=True)
    axes.set_title(f"Average rank by {LABELS[metric]}, {len(wide.dropna())} datasets", fontsize=9)
    return figure


def picp_curves(scores: pd.DataFrame) -> "Figure | None":
    """Share of outcomes inside the central intervals, against the intervals' level."""
    columns = [f"picp_{level:g}" for level in LEVELS]
    if not set(columns) <= set(scores) or (table := scores.dropna(subset=columns)).empty:
        return None
    figure, axes = _axes(5, 4)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    for index, ((suite, method), group) in enumerate(table.groupby(["suite", "method"])):
        axes.plot(
            LEVELS,
            group[columns].mean(),
            marker=".",
            color=f"C{index}",
            label=f"{method}, {suite} ({group.groupby(['case', 'dataset']).ngroups} datasets)",
        )
    axes.set(xlabel="level of the central interval", ylabel="share of outcomes inside")
    _legend(axes)
    return figure


def effects_scatter(scores: pd.DataFrame) -> "Figure | None":
    """Estimated against true average effect of every dataset, over the outcome's range."""
    if "ate_true" not in scores:
        return None
    table = scores.dropna(subset=["ate", "ate_true"])
    table = table[table.suite.isin(_STUDIES) & ~table.method.map(sees_truth)]
    methods = [name for name in _methods(table) if name not in ("mean", "zero")]
    if not methods:
        return None
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    figure = _figure(3 * columns, 3 * rows)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < len(methods))
        if index < len(methods):
            own = table[table.method == methods[index]]
            axes.plot([-1, 1], [-1, 1], color="grey", linestyle=":")
            x, y = own.ate_true / own.spread, own.ate / own.spread
            axes.scatter(x, y.clip(-1, 1), s=10, alpha=0.6, color=_colour(methods[index]))
            axes.set_title(methods[index], fontsize=9)
            axes.set(xlim=(-1, 1), ylim=(-1, 1))
    figure.supxlabel("true average effect / range of y", fontsize=9)
    figure.supylabel("estimated (within -1 and 1)", fontsize=9)
    return figure


def unit_effects(units: pd.DataFrame) -> "Figure | None":
    """Estimated effects of units of the real studies against their gold standards or truths."""
    competitors = [name for name in _methods(units) if not sees_truth(name)]
    # A method that says the same of everybody would be a line.
    spread = units.groupby(["method", "case"]).estimate.nunique().groupby("method").max()
    methods = [name for name in competitors if spread[name] > 1][:_MOST_PANELS]
    if not methods:
        return None
    cases = sorted(units.case.unique())
    figure = _figure(2.4 * len(methods), 2.4 * len(cases))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(cases), len(methods), squeeze=False, sharex="row", sharey="row")
    for case, row in zip(cases, grid, strict=True):
        shown = units[(units.case == case) & units.method.isin(methods)]
        ends = shown[["truth", "estimate"]].to_numpy()
        low, high = ends.min(), ends.max()
        for method, axes in zip(methods, row, strict=True):
            own = units[(units.case == case) & (units.method == method)]
            axes.plot([low, high], [low, high], color="grey", linestyle=":")
            axes.scatter(own.truth, own.estimate, s=8, alpha=0.6, color=_colour(method))
            axes.tick_params(labelsize=7)
            if case == cases[0]:
                axes.set_title(method, fontsize=9)
        row[0].set_ylabel(case, fontsize=9)
    figure.supxlabel("gold standard or truth", fontsize=9)
    figure.supylabel("estimate", fontsize=9)
    return figure


def error_by_rows(scores: pd.DataFrame) -> "Figure | None":
    """Median errors against the number of context rows."""
    return _lines(scores[scores.suite == "rows"], "fact_rows", "context rows", None, "log")


def error_by_nodes(scores: pd.DataFrame) -> "Figure | None":
    """Median errors against the number of nodes of random graphs."""
    return _lines(scores[scores.suite == "graphs"], "fact_nodes", "nodes", None, "linear")


def error_by_edges(scores: pd.DataFrame) -> "Figure | None":
    """Median errors against the number of edges of random graphs."""
    return _lines(scores[scores.suite == "graphs"], "fact_edges", "edges", _BINS, "linear")


def error_by_effect_size(scores: pd.DataFrame) -> "Figure | None":
    """Median errors against the size of the average effect (paper, Figure 7)."""
    table = scores[scores.suite.isin(("generated", "graphs"))]
    return _lines(table, "fact_effect_size", "|ATE| / range of y", _BINS, "linear")


def noise_and_rows(scores: pd.DataFrame) -> "Figure | None":
    """Median CID error by noise level (six quantiles) and rows (paper, Figure 11)."""
    if "cid" not in scores or "fact_noise" not in scores:
        return None
    table = scores[(scores.suite == "rows") & (scores.method == "dopfn")]
    table = table.dropna(subset=["cid", "fact_noise"])
    if table.fact_noise.nunique() < 2:
        return None
    noise = pd.qcut(table.fact_noise, _BINS, duplicates="drop").map(lambda bin: bin.mid)
    wide = table.assign(noise=noise.astype(float)).pivot_table(
        index="noise", columns="fact_rows", values="cid", aggfunc="median"
    )
    figure, axes = _axes(6, 3.5)
    image = axes.imshow(np.log10(wide), aspect="auto", origin="lower", cmap="cividis")
    axes.set_xticks(range(wide.shape[1]), [f"{rows:g}" for rows in wide.columns])
    axes.set_yticks(range(wide.shape[0]), [f"{level:.2g}" for level in wide.index])
    for (row, column), error in np.ndenumerate(wide.to_numpy()):
        bright = np.log10(error) > np.mean(image.get_clim())
        colour = "black" if bright else "white"
        axes.text(column, row, f"{error:.2g}", ha="center", va="center", color=colour, fontsize=6)
    axes.set(xlabel="context rows", ylabel="standard deviation of the noise")
    figure.colorbar(image, label="log10 of the CID error")
    return figure


def bias_by_arm(scores: pd.DataFrame) -> "Figure | None":
    """Mean of prediction minus outcome under do(0) and do(1) (paper, Figure 19)."""
    if "bias_0" not in scores:
        return None
    table = _studies(scores, "bias_0").dropna(subset=["bias_1"])
    if table.empty:
        return None
    methods = _methods(table)
    figure, axes = _axes(0.7 * len(methods) + 2, 3.5)
    for arm in (0, 1):
        values = [table[table.method == name][f"bias_{arm}"].to_numpy() for name in methods]
        axes.boxplot(
            values,
            positions=np.arange(len(methods)) + 0.4 * arm - 0.2,
            widths=0.35,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": ("tab:blue", "tab:orange")[arm]},
            medianprops={"color": "black"},
            label=f"do({arm})",
        )
    axes.axhline(0, color="grey", linestyle=":")
    axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("bias / range of y")
    _legend(axes)
    return figure


def uncertainty_by_case(scores: pd.DataFrame) -> "Figure | None":
    """Entropy and cross-entropy; both should rise where no effect is identified (Figure 17)."""
    table = _studies(scores, "entropy")
    table = table[table.method == "dopfn"]
    if table.empty:
        return None
    medians = table.groupby("case")[["entropy", "nll"]].median().sort_values("entropy")
    figure, axes = _axes(6, 3.5)
    rows = np.arange(len(medians))
    axes.hlines(rows, medians.min(axis=1), medians.max(axis=1), color="lightgrey")
    for column, marker in (("entropy", "o"), ("nll", "s")):
        axes.plot(medians[column], rows, marker, label=_UNCERTAINTY[column])
    axes.set_yticks(rows, medians.index, fontsize=8)
    axes.set_xlabel("nats, outcome over its range (median over datasets)")
    _legend(axes)
    return figure


def assumptions(scores: pd.DataFrame) -> "Figure | None":
    """CID error on random graphs by what is hidden (paper, Figure 6)."""
    if "fact_hidden" not in scores:
        return None
    table = scores[scores.suite == "graphs"].dropna(subset=["cid"])
    if table.empty:
        return None
    groups = {
        "nothing hidden": table.fact_hidden == 0,
        "hidden, no\nconfounder": (table.fact_hidden > 0) & (table.fact_confounded == 0),
        "hidden\nconfounder": table.fact_confounded == 1,
    }
    methods = _methods(table)
    figure, axes = _axes(6, 3.5)
    for index, method in enumerate(methods):
        for place, rows in enumerate(groups.values()):
            values = table[rows & (table.method == method)].cid.to_numpy()
            if not len(values):
                continue
            x = place + (index - (len(methods) - 1) / 2) * 0.8 / len(methods)
            low, high = median_interval(values)
            axes.plot([x, x], [low, high], color=_colour(method), linewidth=1)
            axes.plot(
                x, np.median(values), "o", markersize=4, color=_colour(method), label=_label(method)
            )
    counts = [table[rows].dataset.nunique() for rows in groups.values()]
    labels = [f"{name}\n({count})" for name, count in zip(groups, counts, strict=True)]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set(yscale="log", ylabel=LABELS["cid"])
    _legend(axes)
    return figure


def observational_and_interventional(scores: pd.DataFrame) -> "Figure | None":
    """Error on the units' own treatment beside that on a set one (paper, Figure 14)."""
    from matplotlib.ticker import LogLocator

    table = _studies(scores, "observational")
    if table.empty:
        return None
    answers = table.groupby("method").size()  # weights for one graph answer its case only
    table = table[table.method.isin(answers.index[answers > 0.8 * answers.max()])]
    table = table[~table.method.map(sees_truth)]
    medians = table.groupby("method")[["observational", "cid"]].median().dropna()
    if medians.empty:
        return None
    figure, axes = _axes(4.5, 4)
    for method, row in medians.loc[_methods(medians.reset_index())].iterrows():
        axes.plot(
            row.observational, row.cid, "o", color=_colour(str(method)), label=_label(str(method))
        )
    reach = [0.8 * medians.to_numpy().min(), 1.25 * medians.to_numpy().max()]
    axes.plot(reach, reach, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", ylabel=LABELS["cid"])
    for axis in (axes.xaxis, axes.yaxis):  # over few decades default labels collide
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("error of observational prediction (normalised MSE)")
    _legend(axes)
    return figure


def _lines(
    table: pd.DataFrame, column: str, label: str, bins: int | None, scale: str
) -> "Figure | None":
    """Medians with intervals of both tasks against a fact, in quantile bins if asked for."""
    metrics = [name for name in ("cid", "cate") if name in table]
    if column not in table or not metrics or table[column].nunique() < 2:
        return None
    if bins:
        cut = pd.qcut(table[column], bins, duplicates="drop")
        place = table.groupby(cut, observed=True)[column].transform("median")
    else:
        place = table[column]
    table = table.assign(place=place)
    figure = _figure(4.5 * len(metrics), 3.5)
    grid = figure.subplots(1, len(metrics), squeeze=False)
    for metric, axes in zip(metrics, grid.flat, strict=True):
        for method in _methods(table):
            groups = table[table.method == method].dropna(subset=[metric]).groupby("place")[metric]
            if not len(groups):
                continue
            medians = groups.median()
            intervals = np.array([median_interval(values.to_numpy()) for _, values in groups])
            axes.plot(
                medians.index, medians, marker=".", color=_colour(method), label=_label(method)
            )
            if is_dopfn(method):  # bands of all would hide each other
                axes.fill_between(medians.index, *intervals.T, color=_colour(method), alpha=0.15)
        axes.set(xscale=scale, yscale="log", xlabel=label, ylabel=LABELS[metric])
        _crop(axes, table.groupby(["place", "method"], observed=True)[metric].median())
    _legend(*grid.flat)
    figure.set_layout_engine("constrained")
    return figure


def _studies(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Case-study scores that have the metric; the generated ones, else the released."""
    if metric not in scores:
        return scores.iloc[:0]
    table = scores.dropna(subset=[metric])
    own = table[table.suite == "generated"]
    return own if len(own) else table[table.suite == "released"]


def _methods(table: pd.DataFrame) -> list[str]:
    """Ours first, then competitors, then those that see the truth."""
    names = table.method.unique()
    return sorted(names, key=lambda name: (sees_truth(name), not name.startswith("dopfn"), name))


def _figure(width: float, height: float) -> "Figure":
    # Without pyplot there is no global state, and no display is looked for.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _axes(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = _figure(width, height)
    return figure, figure.subplots()


def _colour(method: str) -> tuple[float, ...]:
    """Each method's own in all figures: our model in reds, those that see the truth in greys."""
    from matplotlib import colormaps

    if is_dopfn(method):
        # Others of our weights in shades of their own, by their names.
        shade = 0.0 if method == "dopfn" else 0.3 + 0.5 * (zlib.crc32(method.encode()) % 97) / 96
        return tuple(np.array((0.84, 0.15, 0.16)) * (1 - shade) + shade * np.array((1.0, 0.9, 0.5)))
    alike = [name for name in METHODS if sees_truth(name) == sees_truth(method)]
    place = alike.index(method)
    if sees_truth(method):
        return (0.7 * (1 - (place + 1) / len(alike)),) * 3
    others = [*range(6), *range(8, 14), *range(16, 20)]  # without reds and greys
    return colormaps["tab20"](others[place % len(others)])


def _label(method: str) -> str:
    """Of our other weights the last part of their path is enough."""
    return f"{method} *" if sees_truth(method) else method.rpartition("/")[2]


def _crop(axes: "Axes", values: pd.Series) -> None:
    """Leaves out of a logarithmic axis what is rounding only: exact answers of a constant."""
    bottom, top = values[values > _ROUNDING].min(), values.max()
    axes.set_ylim(bottom / 2, 2 * top)


def _legend(*all_axes: "Axes") -> None:
    """Beside the last axes, each name once."""
    lines: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    axes.legend(
        lines.values(), lines, fontsize=7, frameon=False,
        loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip


Draw = Callable[[pd.DataFrame], "Figure | None"]
FIGURES: dict[str, Draw] = {
    "cid_by_case": lambda scores: case_study_bars(scores, "cid"),
    "cate_by_case": lambda scores: case_study_bars(scores, "cate"),
    "ranks_cid": lambda scores: critical_difference(scores, "cid"),
    "ranks_cate": lambda scores: critical_difference(scores, "cate"),
    "coverage": picp_curves,
    "effects": effects_scatter,
    "rows": error_by_rows,
    "nodes": error_by_nodes,
    "edges": error_by_edges,
    "effect_size": error_by_effect_size,
    "noise_and_rows": noise_and_rows,
    "bias": bias_by_arm,
    "uncertainty": uncertainty_by_case,
    "assumptions": assumptions,
    "observational": observational_and_interventional,
}
