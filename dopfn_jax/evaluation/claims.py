"""The paper's claims beside what the saved scores say."""

from collections.abc import Iterator

import pandas as pd

from dopfn_jax.evaluation.methods import find_method

# Do-PFN, section 5: CATE against DoWhy's counterfactuals on Amazon sales.
_PAPER_AMAZON = 0.00685


def check_claims(scores: pd.DataFrame, method: str = "dopfn") -> list[tuple[str, str, str]]:
    """Claims that the scores can decide: (claim, "yes" or "no", our numbers)."""
    return [
        (claim, "yes" if holds else "no", numbers)
        for claim, holds, numbers in _checks(scores, method)
    ]


def _checks(scores: pd.DataFrame, method: str) -> Iterator[tuple[str, bool, str]]:
    own = scores[scores.method == method]
    for metric in ("cid", "cate"):
        errors = _case_medians(scores, metric)
        if method not in errors or errors.shape[1] < 2:
            continue
        best = errors.drop(columns=method).min(axis=1)
        wins, cases = int((errors[method] < best).sum()), len(errors)
        yield (
            f"{metric.upper()}: better than every method that does not know the graph",
            wins == cases,
            f"on {wins} of {cases} case studies",
        )
    rows = own[own.suite == "rows"].dropna(subset=["cid"] if "cid" in own else [])
    if "cid" in rows and rows.fact_rows.nunique() > 1:
        medians = rows.groupby("fact_rows").cid.median()
        few, many = medians.iloc[0], medians.iloc[-1]
        yield (
            "More rows help",
            many < few,
            f"median CID error {few:.2g} at {medians.index[0]:g} rows, "
            f"{many:.2g} at {medians.index[-1]:g}",
        )
    generated = own[own.suite == "generated"]
    if "picp_0.9" in own and generated["picp_0.9"].notna().any():
        share = generated["picp_0.9"].mean()
        yield (
            "Predictive intervals are calibrated",
            0.87 <= share <= 0.93,
            f"90 % intervals hold {100 * share:.0f} % of the outcomes of our case studies",
        )
    if "entropy" in own:
        medians = generated.groupby("case").entropy.median()
        if {"unobserved_confounder", "observed_confounder"} <= set(medians.dropna().index):
            hidden = medians["unobserved_confounder"]
            shown = medians["observed_confounder"]
            yield (
                "Uncertainty is larger where the effect is not identified",
                hidden > shown,
                f"median entropy: hidden confounder {hidden:.2f} nats, shown {shown:.2f}",
            )
    amazon = own[own.case == "amazon_sales"]
    if "cate" in amazon and amazon.cate.notna().any():
        error = amazon.cate.median()
        yield (
            f"Amazon sales: CATE error against DoWhy's counterfactuals ({_PAPER_AMAZON} published)",
            error <= _PAPER_AMAZON,
            f"{error:.3g}",
        )


def _case_medians(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Medians by generated case study and method; methods that see the truth are left out."""
    if metric not in scores:
        return pd.DataFrame()
    table = scores[(scores.suite == "generated") & scores[metric].notna()]
    others = table.method.unique()
    fair = [n for n in others if n.startswith("dopfn") or not find_method(n).sees_truth]
    # Other checkpoints are compared in the tables, not competitors.
    fair = [name for name in fair if not name.startswith("dopfn:")]
    return (
        table[table.method.isin(fair)]
        .pivot_table(index="case", columns="method", values=metric, aggfunc="median")
        .dropna(axis=1, how="all")
    )
