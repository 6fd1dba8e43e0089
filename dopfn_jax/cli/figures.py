"""One figure for one question: how effects are spread, what they go with, which outcomes to expect.

Importing this needs matplotlib (the extra "plot").
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install 'dopfn-jax[plot]'") from error

if TYPE_CHECKING:
    from dopfn_jax.estimators import DoPFNRegressor

# Densities of the outcome are of so many rows, and so many quantiles of each.
_DENSITY_ROWS = 512
_QUANTILES = 100
_COLOURS = ("tab:blue", "tab:orange")


def check_format(path: Path) -> None:
    """Raises ValueError where figures cannot be written in the format that the name asks for."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join(sorted(known))}.")


@rc_context({"text.parse_math": False})  # names of columns may hold dollars
def draw_effects(
    model: "DoPFNRegressor",
    X: pd.DataFrame,
    cate: pd.Series,
    outcome: str = "the outcome",
    covariate: str | None = None,
) -> Figure:
    """Distribution of the CATE, the CATE against a covariate, densities under do(0) and do(1).

    Args:
        model: a fitted estimator.
        X: (M, F) covariates.
        cate: (M,) their effects.
        outcome: its name.
        covariate: the one to show effects against; by default that with the strongest monotone
            association.
    """
    covariate = covariate or _most_associated(X, cate)
    figure = Figure(figsize=(5 * (3 if covariate else 2), 4), layout="constrained")
    axes = figure.subplots(1, 3 if covariate else 2)
    _draw_spread(axes[0], cate, outcome)
    _draw_outcomes(axes[-1], model, X, outcome)
    if covariate:
        _draw_against(axes[1], X[covariate], cate)
    return figure


def _most_associated(X: pd.DataFrame, cate: pd.Series) -> str | None:
    if not X.shape[1]:
        return None
    codes = X.apply(lambda c: c if pd.api.types.is_numeric_dtype(c) else pd.factorize(c)[0])
    ranks = codes.rank().corrwith(cate.rank()).abs()
    return str(ranks.fillna(0).idxmax())


def _draw_spread(axes: Axes, cate: pd.Series, outcome: str) -> None:
    axes.hist(cate, bins=40, color="tab:grey")
    axes.axvline(float(cate.mean()), color="black", label="mean of these rows")
    axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.set(title="Effects (CATE) of the rows", xlabel=f"effect on {outcome}", ylabel="rows")
    axes.legend(frameon=False)


def _draw_against(axes: Axes, values: pd.Series, cate: pd.Series) -> None:
    if pd.api.types.is_numeric_dtype(values):
        axes.scatter(values, cate, s=8, alpha=0.5, linewidths=0, color="tab:grey")
    else:
        groups = cate.groupby(values.astype(str))
        axes.boxplot([group for _, group in groups], tick_labels=[str(name) for name, _ in groups])
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    axes.set(title=f"Effects against {values.name}", xlabel=str(values.name), ylabel="CATE")


def _draw_outcomes(axes: Axes, model: "DoPFNRegressor", X: pd.DataFrame, outcome: str) -> None:
    """Outcomes of a row drawn at random from X, were all treated or none."""
    rows = np.random.default_rng(0).permutation(len(X))[:_DENSITY_ROWS]
    some = X.iloc[rows]
    if model.schema_.binary_outcome:
        shares = [model.predict(some, arm).mean() for arm in (0, 1)]
        axes.bar(["do(0)", "do(1)"], shares, color=_COLOURS)
        axes.set(title="Predicted outcomes", ylabel=f"P({outcome} = 1)", ylim=(0, 1))
        return
    levels = ((np.arange(_QUANTILES) + 0.5) / _QUANTILES).tolist()
    # Equally likely outcomes of each arm, in float64: theirs may lie far from zero.
    arms = [model.predict(some, arm, "quantiles", levels).ravel() for arm in (0, 1)]
    ends = np.quantile(arms, [0.005, 0.995])
    bins = np.linspace(ends[0], ends[1], 61).tolist()
    for arm, (outcomes, colour) in enumerate(zip(arms, _COLOURS, strict=True)):
        label = f"do({arm})"
        axes.hist(outcomes, bins, density=True, histtype="step", color=colour, label=label)
    axes.set(title="Predicted outcomes", xlabel=outcome, ylabel="density")
    axes.legend(frameon=False)
