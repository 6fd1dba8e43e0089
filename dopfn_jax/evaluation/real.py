"""Real and semi-synthetic studies: from files, or from installed packages."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.evaluation.datasets import Dataset, Graph, halves

# Published graphs, by child, over the columns of the tables.
AMAZON_GRAPH: Graph = {
    "Shopping Event?": (),
    "Ad Spend": ("Shopping Event?",),
    "Page Views": ("Shopping Event?", "Ad Spend"),
    "Unit Price": ("Shopping Event?",),
    "Sold Units": ("Shopping Event?", "Unit Price", "Page Views"),
    "Revenue": ("Sold Units", "Unit Price"),
    "Operational Cost": ("Ad Spend", "Sold Units"),
    "Profit": ("Revenue", "Operational Cost"),
}
LAW_SCHOOL_GRAPH: Graph = {
    "White": (),
    "Sex": (),
    "UGPA": ("White", "Sex"),
    "LSAT": ("White", "Sex", "UGPA"),
    "ZFYA": ("White", "Sex", "UGPA", "LSAT"),
}
# Two of the files come with the repository.
_EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
_LAW_SCHOOL_ROWS = 2000
_LALONDE_CONTROLS = 2000


def amazon_sales(folder: Path | None, number: int) -> Dataset:
    """Profit of an online shop under a shopping event, scored against DoWhy's counterfactuals.

    As in the paper, all six other columns count as pre-intervention values, although every one of
    them descends from the event.
    """
    table = pd.read_csv(_file(folder, FILES["amazon_sales"])).drop(columns="Date").astype(float)
    return _against_counterfactuals(
        "amazon_sales", number, table, AMAZON_GRAPH, "Shopping Event?", "Profit"
    )


def law_school(folder: Path | None, number: int) -> Dataset:
    """First-year average of law students, white against others, on 2,000 random rows."""
    table = pd.read_csv(_file(folder, FILES["law_school"]))
    table["White"] = table["Race"] == "White"
    table = table[list(LAW_SCHOOL_GRAPH)].astype(float)
    table = table.sample(_LAW_SCHOOL_ROWS, random_state=number).reset_index(drop=True)
    return _against_counterfactuals("law_school", number, table, LAW_SCHOOL_GRAPH, "White", "ZFYA")


def nhefs(folder: Path | None, number: int) -> Dataset:
    """Weight gain after quitting smoking; textbooks adjust to 3.5 kg (2.6 to 4.5)."""
    table = pd.read_csv(_file(folder, FILES["nhefs"])).astype(float)
    x = table.drop(columns=["qsmk", "wt82_71"]).to_numpy()
    t, y = table["qsmk"].to_numpy(), table["wt82_71"].to_numpy()
    return Dataset("real", "nhefs", number, x, t, y, query_x=x, query_t=t)


def lalonde(folder: Path | None, number: int) -> Dataset:
    """Earnings after job training (NSW, as Dehejia and Wahba), with survey controls (CPS).

    The queries are the trained; the truth is the trial's own difference in means. A random 2,000 of
    the 15,992 controls are kept; `number` is their seed.
    """
    import causaldata

    trial = causaldata.nsw_mixtape.load_pandas().data
    survey = causaldata.cps_mixtape.load_pandas().data
    means = trial.groupby("treat")["re78"].mean()
    treated = trial[trial["treat"] == 1]
    controls = survey.sample(_LALONDE_CONTROLS, random_state=number)
    table = pd.concat([treated, controls], ignore_index=True)
    covariates = ["age", "educ", "black", "hisp", "marr", "nodegree", "re74", "re75"]
    return Dataset(
        suite="real",
        case="lalonde",
        number=number,
        x=table[covariates].to_numpy(float),
        t=table["treat"].to_numpy(float),
        y=table["re78"].to_numpy(float),
        query_x=treated[covariates].to_numpy(float),
        query_t=np.ones(len(treated)),
        ate=float(means[1] - means[0]),
    )


def ihdp_a(folder: Path | None, number: int) -> Dataset:
    """Hill's response surface A: a constant effect of 4, linear outcomes."""
    from econml.data.dgps import ihdp_surface_A

    return _ihdp("ihdp_a", number, *ihdp_surface_A(random_state=number))


def ihdp_b(folder: Path | None, number: int) -> Dataset:
    """Hill's response surface B: an effect that varies, one arm exponential."""
    from econml.data.dgps import ihdp_surface_B

    return _ihdp("ihdp_b", number, *ihdp_surface_B(random_state=number))


def find_file(folder: Path | None, name: str) -> Path | None:
    """A file in the user's folder, or else among the repository's examples."""
    for place in (folder, _EXAMPLES):
        if place is not None and (place / name).is_file():
            return place / name
    return None


def _file(folder: Path | None, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{name} is a file of yours: give its folder as --data")
    return path


def _ihdp(case: str, number: int, y: NDArray, t: NDArray, x: NDArray, effect: NDArray) -> Dataset:
    context = np.random.default_rng(number).random(len(y)) < 0.9
    x = x[:, 1:]  # the first column is the intercept of the simulation
    query = ~context
    return Dataset(
        suite="real",
        case=case,
        number=number,
        x=x[context],
        t=t[context].astype(float),
        y=y[context],
        query_x=x[query],
        query_t=t[query].astype(float),
        query_y=y[query],
        effect=effect[query],
        unit_t=t[query].astype(float),
        unit_y=y[query],
    )


def _against_counterfactuals(
    case: str, number: int, table: pd.DataFrame, graph: Graph, treatment: str, outcome: str
) -> Dataset:
    context, query = halves(len(table))
    low, high = _counterfactual_outcomes(table, graph, treatment, outcome, number)
    covariates = [name for name in table if name not in (treatment, outcome)]
    names = {name: f"x{column}" for column, name in enumerate(covariates)}
    names |= {treatment: "t", outcome: "y"}
    query_t = np.random.default_rng(number).integers(0, 2, len(query)).astype(float)
    x, t, y = (table[columns].to_numpy() for columns in (covariates, treatment, outcome))
    return Dataset(
        suite="real",
        case=case,
        number=number,
        x=x[context],
        t=t[context],
        y=y[context],
        query_x=x[query],
        query_t=query_t,
        query_y=np.where(query_t > 0.5, high[query], low[query]),
        effect=(high - low)[query],
        unit_t=t[query],
        unit_y=y[query],
        graph={names[child]: tuple(names[p] for p in parents) for child, parents in graph.items()},
    )


def _counterfactual_outcomes(
    table: pd.DataFrame, graph: Graph, treatment: str, outcome: str, seed: int
) -> tuple[NDArray, NDArray]:
    """Both potential outcomes of every row, by DoWhy's automatic mechanisms on the whole table."""
    import networkx
    from dowhy import gcm

    gcm.util.general.set_random_seed(seed)
    gcm.config.disable_progress_bars()
    gcm.config.set_default_n_jobs(1)
    edges = [(parent, child) for child, parents in graph.items() for parent in parents]
    model: Any = gcm.InvertibleStructuralCausalModel(networkx.DiGraph(edges))
    gcm.auto.assign_causal_mechanisms(model, table)
    gcm.fit(model, table)

    def outcome_under(arm: float) -> NDArray:
        setting = {treatment: lambda t: np.full(np.shape(t), arm)}
        drawn = gcm.counterfactual_samples(model, setting, observed_data=table)
        return drawn[outcome].to_numpy(float)

    return outcome_under(0.0), outcome_under(1.0)


STUDIES = {
    "nhefs": nhefs,
    "ihdp_a": ihdp_a,
    "ihdp_b": ihdp_b,
    "lalonde": lalonde,
    "amazon_sales": amazon_sales,
    "law_school": law_school,
}
# Those whose rows and effects are always the same.
SINGLE = ("nhefs", "amazon_sales")
# The others come from packages.
FILES = {name: f"{name}.csv" for name in ("nhefs", "amazon_sales", "law_school")}
