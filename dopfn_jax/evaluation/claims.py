"""The paper's claims beside what the saved scores say of them.

A claim that one method errs less than others is decided on pairs: the ratio of both errors on each
dataset, its median over datasets, and a bootstrap 95 % interval of that median.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.evaluation.methods import is_dopfn, sees_truth
from dopfn_jax.evaluation.metrics import median_interval

# CATE against DoWhy's counterfactuals on Amazon sales, normalised MSE.
_PAPER_AMAZON = 0.00685
# "As well as" allows for a tenth more.
_ON_A_PAR = 1.1
# Of the variants' size and prior, but trained for longer, with the tilt.
_SAME_PRIOR = "dopfn:do_pfn_cpu"
_UNEQUAL = ", which has had more training"
_FEW_ROWS, _MANY_NODES = 50, 8
_FEWEST_DATASETS = 5
# Errors below this share of the range are rounding.
_ROUNDING = 1e-12
_CALIBRATED = (0.85, 0.95)
_RESAMPLES = 2000


class Finding(NamedTuple):
    """What scores say of a claim.

    Attributes:
        claim: in our words.
        paper: where the paper makes it, and its number if there is one.
        verdict: "yes"; "partly" where it holds over all case studies but not in each; "no"; "open"
            where the scores leave both possible; or "not run".
        numbers: ours.
    """

    claim: str
    paper: str
    verdict: str
    numbers: str


def check_claims(scores: pd.DataFrame, method: str = "dopfn") -> list[Finding]:
    """Every claim; those that the scores cannot decide are "not run".

    Args:
        scores: a row per dataset and method, as `report.read_scores` gives.
        method: whose claims.
    """
    found = []
    for claim, paper, check in _CLAIMS:
        verdict, numbers = check(scores, method) or ("not run", "-")
        found.append(Finding(claim, paper, verdict, numbers))
    return found


_Verdict = tuple[str, str]
_Check = Callable[[pd.DataFrame, str], _Verdict | None]


def _less_than_others(
    metric: str, choose: Callable[[pd.DataFrame], pd.Series], limit: float = 1.0
) -> _Check:
    """Errs less than every method that sees only what a practitioner sees."""

    def check(scores: pd.DataFrame, method: str) -> _Verdict | None:
        table = _chosen(scores, metric, choose)
        rivals = [n for n in table.method.unique() if not is_dopfn(n) and not sees_truth(n)]
        found = _against_hardest(table, metric, method, rivals, limit)
        table = table[table.suite != "graphs"].assign(case=lambda t: t.case.str.split(":").str[0])
        cases = {str(case): rows for case, rows in table.groupby("case")}
        if not found or len(cases) < 2:
            return found
        verdict, numbers = found
        lowest = [_is_lowest(rows, metric, method, rivals) for rows in cases.values()]
        numbers += f"; lowest median in {sum(lowest)} of {len(lowest)} case studies"
        if worse := _worse_cases(cases, metric, method, rivals, limit):
            verdict = "partly" if verdict == "yes" else verdict
            numbers += f"; errs more on {', '.join(worse)}"
        return verdict, numbers

    return check


def _is_lowest(table: pd.DataFrame, metric: str, method: str, rivals: Sequence[str]) -> bool:
    """Whether a method's median is below that of every other on the datasets that both answered."""
    wide = table.pivot_table(index=["suite", "dataset"], columns="method", values=metric)
    if method not in wide:
        return False
    pairs = [wide[[method, name]].dropna() for name in rivals if name in wide]
    return all(pair.iloc[:, 0].median() < pair.iloc[:, 1].median() for pair in pairs if len(pair))


def _worse_cases(
    cases: dict[str, pd.DataFrame], metric: str, method: str, rivals: Sequence[str], limit: float
) -> list[str]:
    """Case studies in which some other method certainly errs less, and which does so the most."""
    worse = []
    for case, rows in cases.items():
        ratios = _log_ratios(rows, metric, method, rivals)
        bounds = {name: np.exp(median_interval(logs)) for name, logs in ratios.items()}
        lost = [name for name, (low, _) in bounds.items() if low > limit]
        if lost:
            hardest = max(lost, key=lambda name: np.median(ratios[name]))
            low, high = bounds[hardest]
            ratio = np.exp(np.median(ratios[hardest]))
            worse.append(f"{case} ({ratio:.1f} ({low:.1f} to {high:.1f}) times `{hardest}`)")
    return worse


def _less_than(
    metric: str, names: str, limit: float = 1.0, own: str = "", unequal: str = ""
) -> _Check:
    """Errs less, on case studies, than the methods whose names match a pattern.

    `own`: what to compare with them instead, where it was run; `unequal`: what makes it an unfair
    comparison, which then is evidence against the claim only.
    """

    def check(scores: pd.DataFrame, method: str) -> _Verdict | None:
        table = _chosen(scores, metric, _case_studies)
        rivals = [n for n in table.method.unique() if re.search(names, n)]
        if own and own in set(table.method):
            found = _against_hardest(table, metric, own, rivals, limit)
            if not found:
                return None
            verdict = "open" if unequal and found[0] == "yes" else found[0]
            return verdict, f"`{own}`{unequal}: {found[1]}"
        return _against_hardest(table, metric, method, rivals, limit)

    return check


def _chosen(
    scores: pd.DataFrame, metric: str, choose: Callable[[pd.DataFrame], pd.Series]
) -> pd.DataFrame:
    if metric not in scores:
        return scores[:0].assign(**{metric: np.nan})
    return scores[choose(scores)].dropna(subset=[metric])


def _against_hardest(
    table: pd.DataFrame, metric: str, method: str, rivals: Sequence[str], limit: float
) -> _Verdict | None:
    ratios = _log_ratios(table, metric, method, rivals)
    if not ratios:
        return None
    bounds = {name: np.exp(median_interval(logs)) for name, logs in ratios.items()}
    verdicts = [_verdict(low, high, limit) for low, high in bounds.values()]
    hardest = max(ratios, key=lambda name: np.median(ratios[name]))
    logs, (low, high) = ratios[hardest], bounds[hardest]
    # Less than every one of them, so the worst verdict counts.
    return next(word for word in ("no", "open", "yes") if word in verdicts), (
        f"{np.exp(np.median(logs)):.2f} ({low:.2f} to {high:.2f}) times the error of "
        f"`{hardest}`, {len(logs)} datasets"
    )


def _log_ratios(
    table: pd.DataFrame, metric: str, method: str, rivals: Sequence[str]
) -> dict[str, NDArray]:
    """Logs of a method's error over that of each other, one for each dataset that both answered."""
    wide = table.pivot_table(index=["suite", "case", "dataset"], columns="method", values=metric)
    if method not in wide:
        return {}
    wide = wide.clip(lower=_ROUNDING).map(np.log)
    # The start of a table is no other table: numbers of context rows are averaged over.
    tables = [wide.index.get_level_values(level) for level in ("suite", "case", "dataset")]
    tables[1] = tables[1].str.split(":").str[0]
    ratios = {
        name: (wide[method] - wide[name]).groupby(tables).mean().dropna().to_numpy()
        for name in rivals
        if name in wide
    }
    return {name: logs for name, logs in ratios.items() if len(logs) >= _FEWEST_DATASETS}


def _verdict(low: float, high: float, limit: float) -> str:
    """Whether a value is below the limit, by its interval."""
    return "yes" if high < limit else "no" if low > limit else "open"


def _case_studies(scores: pd.DataFrame) -> pd.Series:
    return scores.suite == "generated"


def _large_effects(scores: pd.DataFrame) -> pd.Series:
    drawn = scores.suite.isin(("generated", "graphs"))
    size = _fact(scores, "effect_size")
    datasets = scores[drawn].drop_duplicates(["suite", "case", "dataset"]).index
    return drawn & (size > size[datasets].median())


def _small_tables(scores: pd.DataFrame) -> pd.Series:
    return (scores.suite == "rows") & (_fact(scores, "rows") <= _FEW_ROWS)


def _large_graphs(scores: pd.DataFrame) -> pd.Series:
    return (scores.suite == "graphs") & (_fact(scores, "nodes") >= _MANY_NODES)


def _hidden_confounders(scores: pd.DataFrame) -> pd.Series:
    return (scores.suite == "graphs") & (_fact(scores, "confounded") == 1)


def _fact(scores: pd.DataFrame, name: str) -> pd.Series:
    """A fact of the datasets; NaN where no dataset of the table has it."""
    return scores.get(f"fact_{name}", pd.Series(np.nan, scores.index))


def _bias(scores: pd.DataFrame, method: str) -> _Verdict | None:
    if not {"bias_0", "bias_1"} <= set(scores):
        return None
    both = scores.assign(bias=scores.bias_0.abs() + scores.bias_1.abs())
    return _less_than_others("bias", _case_studies)(both, method)


def _rows_help(scores: pd.DataFrame, method: str) -> _Verdict | None:
    table = _chosen(scores, "cid", lambda scores: scores.suite == "rows")
    table = table[table.method == method]
    if table.empty or table.fact_rows.nunique() < 2:
        return None
    table = table.assign(case=table.case.str.split(":").str[0])
    wide = table.pivot_table(index=["case", "dataset"], columns="fact_rows", values="cid").dropna()
    few, many = wide.columns[[0, -1]]
    if len(wide) < _FEWEST_DATASETS:
        return None
    logs = np.log((wide[many] / wide[few]).to_numpy())
    low, high = np.exp(median_interval(logs))
    return _verdict(low, high, 1.0), (
        f"CID error at {many:g} rows {np.exp(np.median(logs)):.2f} ({low:.2f} to {high:.2f}) "
        f"times that at {few:g}, {len(logs)} datasets"
    )


def _calibration(scores: pd.DataFrame, method: str) -> _Verdict | None:
    table = _chosen(scores, "picp_0.9", _case_studies)
    table = table[table.method == method]
    shares = table["picp_0.9"].to_numpy()
    if len(shares) < _FEWEST_DATASETS:
        return None
    share, error = shares.mean(), 1.96 * shares.std(ddof=1) / np.sqrt(len(shares))
    low, high = share - error, share + error
    inside = _CALIBRATED[0] <= low and high <= _CALIBRATED[1]
    outside = high < _CALIBRATED[0] or low > _CALIBRATED[1]
    cases = 100 * table.groupby("case")["picp_0.9"].mean()
    return "yes" if inside else "no" if outside else "open", (
        f"90 % intervals hold {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of the "
        f"outcomes, {len(shares)} datasets; from {cases.min():.0f} % on {cases.idxmin()} to "
        f"{cases.max():.0f} % on {cases.idxmax()}"
    )


def _knows_what_is_hidden(scores: pd.DataFrame, method: str) -> _Verdict | None:
    table = _chosen(scores, "entropy", _case_studies)
    table = table[table.method == method]
    hidden, shown = (
        table[table.case == f"{name}_confounder"].entropy.to_numpy()
        for name in ("unobserved", "observed")
    )
    if min(len(hidden), len(shown)) < _FEWEST_DATASETS:
        return None
    generator = np.random.default_rng(0)
    draws = [
        np.median(generator.choice(values, (_RESAMPLES, len(values))), axis=1)
        for values in (hidden, shown)
    ]
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    return "yes" if low > 0 else "no" if high < 0 else "open", (
        f"median entropy {np.median(hidden):.2f} nats with the confounder hidden, "
        f"{np.median(shown):.2f} with it shown, a difference of "
        f"{np.median(hidden) - np.median(shown):.2f} ({low:.2f} to {high:.2f}); hiding it also "
        "makes outcomes noisier"
    )


def _amazon(scores: pd.DataFrame, method: str) -> _Verdict | None:
    table = _chosen(scores, "cate", lambda scores: scores.case == "amazon_sales")
    errors = table[table.method == method].cate
    if errors.empty:
        return None
    verdict = "yes" if errors.median() <= _PAPER_AMAZON else "no"
    return verdict, f"{errors.median():.3g}"


def _held_out(scores: pd.DataFrame, method: str) -> None:
    """Data that this suite does not read."""


_CLAIMS: tuple[tuple[str, str, _Check], ...] = (
    (
        "CID of case studies: errs less than every method without the graph",
        "case studies",
        _less_than_others("cid", _case_studies),
    ),
    (
        "CATE of case studies: errs less than every method without the graph",
        "case studies",
        _less_than_others("cate", _case_studies),
    ),
    (
        "CID of case studies: as well as DoWhy with the true graph",
        "case studies",
        _less_than("cid", "^dowhy$", _ON_A_PAR),
    ),
    (
        "Training on interventions matters: errs less than Dont-PFN",
        "case studies",
        _less_than("cid", "dont_pfn", own=_SAME_PRIOR, unequal=_UNEQUAL),
    ),
    (
        "As well as Do-PFN-Graph, trained on the true graph alone (CID)",
        "case studies",
        _less_than("cid", "do_pfn_graph", _ON_A_PAR, own=_SAME_PRIOR, unequal=_UNEQUAL),
    ),
    (
        "As well as Do-PFN-Graph, trained on the true graph alone (CATE)",
        "case studies",
        _less_than("cate", "do_pfn_graph", _ON_A_PAR, own=_SAME_PRIOR, unequal=_UNEQUAL),
    ),
    (
        "Holds with a hidden confounder in a random graph (CID)",
        "Figure 6",
        _less_than_others("cid", _hidden_confounders),
    ),
    (
        "Holds where the average effect is large (CID)",
        "Figure 7",
        _less_than_others("cid", _large_effects),
    ),
    ("More rows help", "Figure 11", _rows_help),
    (
        f"Holds for small tables, up to {_FEW_ROWS} rows (CID)",
        "number of rows",
        _less_than_others("cid", _small_tables),
    ),
    (
        f"Holds for large graphs, from {_MANY_NODES} nodes (CID)",
        "graph size",
        _less_than_others("cid", _large_graphs),
    ),
    (
        "Observational prediction: as well as regressions",
        "Figure 14",
        _less_than_others("observational", _case_studies, _ON_A_PAR),
    ),
    ("Less biased under do(0) and do(1) than every method without the graph", "Figure 19", _bias),
    ("Predictive intervals are calibrated", "PICP curves", _calibration),
    (
        "More uncertain where the confounder is hidden",
        "Figure 17",
        _knows_what_is_hidden,
    ),
    (
        "Amazon sales: CATE against DoWhy's counterfactuals, normalised MSE",
        str(_PAPER_AMAZON),
        _amazon,
    ),
    ("ACIC 2016: mean PEHE over ten tables", "4.83", _held_out),
)
