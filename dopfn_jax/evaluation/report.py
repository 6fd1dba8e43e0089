"""From results to what is published: tables as CSV, figures, and a page that shows them."""

from pathlib import Path

import pandas as pd

from dopfn_jax.evaluation.claims import check_claims
from dopfn_jax.evaluation.methods import find_method
from dopfn_jax.evaluation.metrics import compare_methods
from dopfn_jax.evaluation.runner import KEY, read_records, read_table

SCORES_FILE, MEDIANS_FILE, RUNS_FILE = "scores.csv", "medians.csv", "runs.csv"
# What is published of a suite, each with its unit; smaller is better.
METRICS = {
    "cid": "CID, normalised MSE",
    "cate": "CATE, normalised MSE over the range of y",
    "pehe": "PEHE, units of y",
    "ate_error": "absolute error of the ATE, units of y",
    "observational": "observational prediction, normalised MSE",
    "nll": "negative log-likelihood, nats",
    "crps": "CRPS over the range of y",
}
_MEDIAN_COLUMNS = [
    *("suite", "case", "metric", "method", "median", "low", "high", "datasets"),
    *("reference", "ratio", "ratio_low", "ratio_high"),
]
# Medians of these are printed times 1,000.
_PER_MILLE = ("cid", "cate", "observational", "crps")
_TITLES = {
    "generated": "Case studies drawn from our own prior",
    "released": "The paper's released case studies",
    "simulated": "Simulators of the literature",
    "real": "Real and semi-synthetic studies",
    "rows": "Number of context rows",
    "graphs": "Random graphs",
}
_TABLED = {
    "generated": ("cid", "cate"),
    "released": ("cid", "cate"),
    "simulated": ("pehe",),
    "real": ("pehe", "ate_error"),
}
_CAPTIONS = {
    "cid_by_case": "Median CID error by case study; lines are bootstrap 95 % intervals.",
    "cate_by_case": "Median CATE error by case study.",
    "ranks_cid": "Average ranks by CID error; joined methods do not differ by Nemenyi's test.",
    "ranks_cate": "Average ranks by CATE error.",
    "coverage": "Share of outcomes inside central intervals (PICP).",
    "effects": "Estimated against true average effects, a point per dataset.",
    "rows": "Error against the number of context rows.",
    "nodes": "Error against the nodes of random graphs.",
    "edges": "Error against their edges.",
    "effect_size": "Error against the size of the average effect.",
    "noise_and_rows": "CID error of Do-PFN by noise level and context rows.",
    "bias": "Bias under do(0) and do(1).",
    "uncertainty": "Entropy and cross-entropy by case study.",
    "assumptions": "CID error by what is hidden.",
    "observational": "Observational against interventional error.",
}


def write_report(results: Path, folder: Path, reference: str = "dopfn") -> Path:
    """Writes folder/results/*.csv, folder/figures/*.png and folder/results.md.

    Figures and page are made from the CSV files alone.

    Args:
        results: JSON lines that `runner.run` wrote.
        folder: where to write, such as `docs`.
        reference: the method that the paired bootstrap compares the others with.

    Returns:
        The page.

    Raises:
        ValueError: the file holds no results.
    """
    from dopfn_jax.evaluation.figures import draw_all

    tables = folder / "results"
    if not any(True for _ in read_records(results)):
        raise ValueError(f"{results}: holds no results; run an evaluation first")
    write_tables(results, tables, reference)
    figures = draw_all(read_scores(tables), folder / "figures")
    page = folder / "results.md"
    page.write_text(_page(tables, figures))
    return page


def read_scores(tables: Path) -> pd.DataFrame:
    """The published scores: a row per dataset and method."""
    return pd.read_csv(tables / SCORES_FILE, keep_default_na=False, na_values=[""])


def write_tables(results: Path, folder: Path, reference: str = "dopfn") -> None:
    """Writes the scores, their medians and the versions as CSV; arguments as for `write_report`."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = read_table(results).sort_values(["suite", "case", "dataset", "method"])
    # Wall-clock differs between runs, so that it would make every table a new one.
    named = [*KEY, "data", "status", "reason"]
    scores = scores[[*named, *sorted(set(map(str, scores)) - {*named, "seconds"})]]
    scores.to_csv(folder / SCORES_FILE, index=False, float_format="%.6g")
    _medians(scores, reference).to_csv(folder / MEDIANS_FILE, index=False, float_format="%.4g")
    runs = pd.DataFrame(
        [
            {
                **{name: record[name] for name in ("suite", "method", "seed", "sha256")},
                "versions": " ".join(f"{k}={v}" for k, v in record["versions"].items()),
            }
            for record in read_records(results)
        ]
    ).drop_duplicates()
    runs.sort_values(["suite", "method", "seed", "sha256", "versions"]).to_csv(
        folder / RUNS_FILE, index=False
    )


def _medians(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Medians with paired-bootstrap intervals for every suite, case and metric."""
    parts = []
    for metric in METRICS:
        if metric not in scores:
            continue
        for (suite, case), group in scores.dropna(subset=[metric]).groupby(["suite", "case"]):
            wide = group.pivot_table(index="dataset", columns="method", values=metric)
            base = reference if reference in wide else wide.columns[0]
            table = compare_methods(wide, base).rename_axis("method").reset_index()
            parts.append(
                table.assign(suite=str(suite), case=str(case), metric=metric, reference=str(base))
            )
    if not parts:
        return pd.DataFrame(columns=_MEDIAN_COLUMNS)
    return pd.concat(parts, ignore_index=True)[_MEDIAN_COLUMNS]


def _page(tables: Path, figures: list[Path]) -> str:
    scores = read_scores(tables)
    medians = pd.read_csv(tables / MEDIANS_FILE)
    runs = pd.read_csv(tables / RUNS_FILE, keep_default_na=False)
    parts = [
        "# Results\n",
        "Made by `scripts/evaluate.py --report` from the tables in `results/`: `scores.csv` holds "
        "every score of every dataset, with seed and checksum of the weights, `medians.csv` the "
        "medians with 95 % intervals of a paired bootstrap over datasets, `runs.csv` the versions. "
        "Smaller is better throughout. Methods marked * see what a practitioner does not: the true "
        "graph, the unit's own outcome, or the exact answer.\n",
        _runs_section(scores, runs),
        _claims_section(scores),
    ]
    for suite, metrics in _TABLED.items():
        sections = [_median_table(medians, suite, metric) for metric in metrics]
        if any(sections):
            count = scores[scores.suite == suite].groupby("case").dataset.nunique().max()
            parts.append(f"## {_TITLES[suite]}\n\nUp to {count} datasets per case.\n")
            parts += sections
    parts.append(_averages(scores))
    parts += [
        f"## Figure: {path.stem}\n\n![{path.stem}](figures/{path.name})\n\n{_CAPTIONS[path.stem]}\n"
        for path in figures
    ]
    return "\n".join(part for part in parts if part)


def _runs_section(scores: pd.DataFrame, runs: pd.DataFrame) -> str:
    weights = runs[runs.sha256 != ""].drop_duplicates(["method", "sha256"])
    lines = ["## What was run\n"]
    lines += [
        f"- `{row['method']}`: weights with SHA-256 `{row['sha256'][:16]}...`, seed {row['seed']}"
        for row in weights.to_dict("records")
    ]
    lines += [f"- versions: {text.replace('=', ' ')}" for text in sorted(set(runs.versions))]
    failed = scores[scores.status == "failed"].groupby("method").size()
    lines += [f"- `{name}` failed on {count} datasets" for name, count in failed.items()]
    return "\n".join(lines) + "\n"


def _claims_section(scores: pd.DataFrame) -> str:
    rows = [f"| {claim} | {holds} | {numbers} |" for claim, holds, numbers in check_claims(scores)]
    if not rows:
        return ""
    header = "## Claims of the paper\n\n| claim | holds here | numbers |\n|---|---|---|"
    return "\n".join([header, *rows]) + "\n"


def _median_table(medians: pd.DataFrame, suite: str, metric: str) -> str:
    table = medians[(medians.suite == suite) & (medians.metric == metric)]
    if table.empty:
        return ""
    factor = 1000 if metric in _PER_MILLE else 1
    cells = table.assign(
        text=[
            "{:.3g} ({:.3g} to {:.3g})".format(*row)
            for row in factor * table[["median", "low", "high"]].to_numpy()
        ]
    ).pivot(index="method", columns="case", values="text")
    cells = cells.loc[sorted(cells.index, key=lambda name: (_mark(name) != "", name))]
    header = f"| method | {' | '.join(cells.columns)} |\n|---{'|---' * len(cells.columns)}|"
    rows = [
        f"| {name}{_mark(str(name))} | {' | '.join(row.fillna('-'))} |"
        for name, row in cells.iterrows()
    ]
    title = METRICS[metric] + (" x 1000" if factor > 1 else "")
    return f"**{title}**: median (95 % interval)\n\n{header}\n" + "\n".join(rows) + "\n"


def _averages(scores: pd.DataFrame) -> str:
    """Average effects where no truth is known beyond a published estimate."""
    table = scores[(scores.suite == "real") & (scores.case == "nhefs")]
    if table.empty or "ate" not in table or table.ate.isna().all():
        return ""
    lines = ["## NHEFS: weight gain after quitting smoking (kg)\n"]
    lines += ["Textbook adjustment: 3.5 (2.6 to 4.5).\n", "| method | ATE |", "|---|---|"]
    for row in table.dropna(subset=["ate"]).to_dict("records"):
        low, high = row.get("ate_low", float("nan")), row.get("ate_high")
        interval = "" if pd.isna(low) else f" ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['method']} | {row['ate']:.2f}{interval} |")
    return "\n".join(lines) + "\n"


def _mark(name: str) -> str:
    sees = not name.startswith("dopfn") and find_method(name).sees_truth
    return " *" if sees else ""
