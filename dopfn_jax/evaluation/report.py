"""From results to what is published: tables as CSV, figures, and a page that shows them."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.evaluation import real
from dopfn_jax.evaluation.claims import check_claims
from dopfn_jax.evaluation.methods import METHODS, sees_truth
from dopfn_jax.evaluation.metrics import compare_methods
from dopfn_jax.evaluation.runner import KEY, latest, read_records, read_table, read_units
from dopfn_jax.evaluation.suites import SUITES

SCORES_FILE, MEDIANS_FILE, RUNS_FILE = "scores.csv", "medians.csv", "runs.csv"
UNITS_FILE = "units.csv"
# What is published of a suite, each with its unit; smaller is better.
METRICS = {
    "cid": "CID, normalised MSE",
    "cate": "CATE, normalised MSE over the range of y",
    "cate_own_range": "CATE, normalised MSE over the range of the effect",
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
# Medians of a smaller share of a case's datasets are marked.
_NEARLY_ALL = 0.9
# Intervals of fewer datasets would be their range.
_FEWEST = 6
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
# Studies of which only an average is known.
_AVERAGES = {
    "nhefs": "NHEFS: weight gain after quitting smoking (kg); textbooks adjust to 3.5 (2.6 to 4.5)",
    "lalonde": "Lalonde: earnings of the trained after job training ($)",
}
_TABLED = {
    "generated": ("cid", "cate", "cate_own_range", "observational"),
    "released": ("cid", "cate"),
    "simulated": ("pehe",),
    "real": ("pehe", "ate_error"),
}
# Weights of the paper's that this suite scores where they are there: --methods dopfn:FOLDER.
_VARIANTS = ("dont_pfn", "do_pfn_short", "do_pfn_mixed", "do_pfn_graph")
_CAPTIONS = {
    "cid_by_case": "Median CID error by case study; lines are bootstrap 95 % intervals.",
    "cate_by_case": "Median CATE error by case study.",
    "ranks_cid": "Average ranks by CID error, of the methods run on nearly every dataset; "
    "Nemenyi's test does not tell joined methods apart.",
    "ranks_cate": "Average ranks by CATE error, likewise.",
    "coverage": "Share of outcomes inside central intervals (PICP).",
    "effects": "Estimated against true average effects, a point per dataset.",
    "units": "Estimated effects of single units against DoWhy's counterfactuals (Amazon sales, law "
    "school) or the simulated truth (IHDP), in the outcome's units.",
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


def write_report(
    results: Path,
    folder: Path,
    command: str = "",
    reference: str = "dopfn",
    asked: Mapping[str, tuple[int, str]] | None = None,
) -> Path:
    """Writes folder/results/*.csv, folder/figures/*.png and folder/results.md.

    Figures and page are made from the CSV files alone.

    Args:
        results: JSON lines that `runner.run` wrote.
        folder: where to write, such as `docs`.
        command: what makes these results, for the page.
        reference: the method that the paired bootstrap compares the others with.
        asked: whose answers to show, as for `runner.latest`.

    Returns:
        The page.

    Raises:
        ValueError: the file holds no results.
    """
    from dopfn_jax.evaluation.figures import draw_all

    tables = folder / "results"
    if not any(True for _ in read_records(results)):
        raise ValueError(f"{results}: holds no results; run an evaluation first")
    write_tables(results, tables, reference, asked)
    units = pd.read_csv(tables / UNITS_FILE)
    figures = draw_all(read_scores(tables), units, folder / "figures")
    page = folder / "results.md"
    page.write_text(_page(tables, figures, command))
    return page


def read_scores(tables: Path) -> pd.DataFrame:
    """The published scores: a row per dataset and method."""
    return pd.read_csv(tables / SCORES_FILE, keep_default_na=False, na_values=[""])


def write_tables(
    results: Path,
    folder: Path,
    reference: str = "dopfn",
    asked: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Writes scores, medians, versions and units as CSV; arguments as for `write_report`.

    Of each method those of one seed and one set of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = latest(read_table(results), asked).sort_values(["suite", "case", "dataset", "method"])
    _require_same_data(scores, results)
    # Wall-clock differs between runs, so that it would make every table a new one.
    named = [*KEY, "data", "status", "reason"]
    scores = scores[[*named, *sorted(set(map(str, scores)) - {*named, "seconds"})]]
    scores.to_csv(folder / SCORES_FILE, index=False, float_format="%.6g")
    _medians(scores, reference).to_csv(folder / MEDIANS_FILE, index=False, float_format="%.4g")
    units = read_units(results).merge(scores[list(KEY)]).sort_values(list(KEY), kind="stable")
    units.drop(columns=["seed", "sha256"]).to_csv(folder / UNITS_FILE, index=False)
    runs = pd.DataFrame(
        [
            {
                **{name: record[name] for name in ("suite", "method", "seed", "sha256")},
                "versions": " ".join(f"{k}={v}" for k, v in record["versions"].items()),
            }
            for record in read_records(results)
        ]
    ).drop_duplicates()
    runs = runs.merge(scores[["suite", "method", "seed", "sha256"]].drop_duplicates())
    runs.sort_values(["suite", "method", "seed", "sha256", "versions"]).to_csv(
        folder / RUNS_FILE, index=False
    )


def _require_same_data(scores: pd.DataFrame, results: Path) -> None:
    """Raises ValueError where methods answered about different data of one name.

    Facts of the data tell, since their checksum also differs by the last digit that a processor
    computes.
    """
    for fact in {"ate_true", "spread"} & set(scores):
        known = scores.dropna(subset=[fact]).groupby(["suite", "case", "dataset"])[fact]
        differ = known.max() - known.min() > 1e-3 * known.apply(lambda values: values.abs().max())
        for suite, case, number in differ.index[differ]:
            raise ValueError(
                f"{results} holds answers about different data called {suite}/{case}/{number}: "
                f"delete its lines of {suite}/{case}, or choose another --output."
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


def _page(tables: Path, figures: list[Path], command: str) -> str:
    scores = read_scores(tables)
    medians = pd.read_csv(tables / MEDIANS_FILE)
    runs = pd.read_csv(tables / RUNS_FILE, keep_default_na=False)
    parts = [
        "# Results\n",
        *([f"```bash\n{command}\n```\n"] if command else []),
        "Made from the tables in `results/`: `scores.csv` holds every score of every dataset, with "
        "seed and checksum of the weights, `medians.csv` the medians and their ratios to "
        "Do-PFN's with bootstrap 95 % intervals over datasets (paired, for the ratios), "
        "`units.csv` effects of single units of the real studies, "
        "`runs.csv` the versions. Smaller is better throughout. "
        "Methods marked * see what a practitioner does not: the true graph, the unit's own "
        "outcome, or the exact answer.\n",
        _claims_section(scores),
        _runs_section(scores, runs),
        _not_run_section(scores),
    ]
    for suite, metrics in _TABLED.items():
        sections = [_median_table(medians, suite, metric) for metric in metrics]
        if any(sections):
            parts.append(f"## {_TITLES[suite]}\n")
            parts += sections
    parts.append(_averages(scores))
    parts.append("## Figures\n")
    parts += [
        f"{_CAPTIONS[path.stem]}\n\n![{path.stem}](figures/{path.name})\n" for path in figures
    ]
    return "\n".join(part for part in parts if part)


def _claims_section(scores: pd.DataFrame) -> str:
    found = check_claims(scores)
    verdicts = [finding.verdict for finding in found]
    words = [word for word in ("yes", "partly", "no", "open", "not run") if word in verdicts]
    held = ", ".join(f"{verdicts.count(word)} {word}" for word in words)
    return (
        f"## Claims of the paper ({held})\n\n"
        "Ratios are paired: the errors on the same datasets, their median ratio with a bootstrap "
        "95 % interval over datasets, against the competitor that is hardest to beat. A claim is "
        "open where that interval leaves both answers possible, and where our weights win but had "
        "more training than those that they are compared with; it holds partly where it does over "
        "all case studies but certainly not in each. 'As well as' allows a tenth more error; "
        "'calibrated' means that 90 % intervals hold 85 to 95 %; fewer than five datasets decide "
        "nothing. Case studies here are drawn anew from the paper's definitions, `backdoor` and "
        "`frontdoor` from one graph, as its released data are (`frontdoor_pearl` is another); "
        "where a claim's second column names a figure, the paper shows it as a curve, without a "
        "number to compare.\n\n"
        "| claim | in the paper | holds here | numbers here |\n|---|---|---|---|\n"
        + "\n".join(f"| {' | '.join(finding)} |" for finding in found)
        + "\n"
    )


def _runs_section(scores: pd.DataFrame, runs: pd.DataFrame) -> str:
    lines = [
        "## What was run\n",
        "The paper has 100 datasets of each case study, and 500 random graphs.\n",
        "| suite | cases | datasets per case | methods, by datasets answered per case |",
        "|---|---|---|---|",
    ]
    for suite, title in _TITLES.items():
        own = scores[(scores.suite == suite) & (scores.status == "ok")]
        if own.empty:
            continue
        counts = own.groupby("case").dataset.nunique()
        by_number: dict[str, list[str]] = {}
        for method, rows in own.groupby("method"):
            number = _span(rows.groupby("case").dataset.nunique())
            by_number.setdefault(number, []).append(str(method))
        names = "; ".join(
            f"{number}: {', '.join(sorted(methods))}" for number, methods in by_number.items()
        )
        lines.append(f"| {suite}: {title} | {len(counts)} | {_span(counts)} | {names} |")
    if "fact_truth_error" in scores:
        worst = scores.fact_truth_error.max()
        lines.append(
            "\nExact answers (E[y | do(t), x] of the case studies' own SCMs) have a numerical "
            f"error of at most {worst:.1g} of the outcome's range, root mean square over the rows "
            "of a dataset; datasets where quadrature does not get there have no `floor`."
        )
    lines.append("")
    weights = runs[runs.sha256 != ""].drop_duplicates(["method", "sha256"])
    lines += [
        f"- `{row['method']}`: weights with SHA-256 `{row['sha256'][:16]}...`, seed {row['seed']}"
        for row in weights.to_dict("records")
    ]
    lines += [f"- versions: {text.replace('=', ' ')}" for text in sorted(set(runs.versions))]
    return "\n".join(lines) + "\n"


def _span(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _not_run_section(scores: pd.DataFrame) -> str:
    """What this suite knows, and the paper has, but the tables lack."""
    answered = scores[scores.status == "ok"]
    names = [name for name in METHODS if name not in set(scores.method)]
    absent = {name: METHODS[name].absent for name in names}
    lines = ["## What was not run\n"]
    lines += [
        f"- suite {name}: {_TITLES[name]}" for name in SUITES if name not in set(answered.suite)
    ]
    lines += [f"- real study {name}" for name in real.STUDIES if name not in set(answered.case)]
    lines += [
        f"- method {name}: package {absent[name]} is absent" for name in names if absent[name]
    ]
    if left_out := [name for name in names if not absent[name]]:
        lines.append(f"- methods left out by the command: {', '.join(left_out)}")
    variants = [name for name in _VARIANTS if not answered.method.str.contains(name).any()]
    if variants:
        lines.append(f"- weights of the paper's variants: {', '.join(variants)}")
    lines.append("- ACIC 2016 and RealCause, which this suite does not read")
    for method, rows in scores[scores.status == "failed"].groupby("method"):
        lines.append(
            f"- {method} failed on {len(rows)} datasets ({_cases(rows)}): {_reasons(rows)}"
        )
    for reason, rows in scores[scores.status == "not applicable"].groupby("reason"):
        by = ", ".join(sorted(rows.method.unique()))
        number = len(rows.drop_duplicates(list(KEY[:3])))
        lines.append(f"- {number} datasets ({_cases(rows)}) by {by}: {reason}")
    if len(skipped := scores[scores.status == "skipped"].drop_duplicates(list(KEY[:3]))):
        lines.append(f"- {len(skipped)} datasets ({_cases(skipped)}): {_reasons(skipped)}")
    return "\n".join(lines) + "\n"


def _cases(rows: pd.DataFrame) -> str:
    return ", ".join(sorted(set(rows.suite + "/" + rows.case)))


def _reasons(rows: pd.DataFrame) -> str:
    """The most frequent reason, and how many others there are."""
    first, *others = rows.reason.value_counts().index
    return first + (f"; {len(others)} other reasons" if others else "")


def _median_table(medians: pd.DataFrame, suite: str, metric: str) -> str:
    table = medians[(medians.suite == suite) & (medians.metric == metric)]
    if table.empty:
        return ""
    factor = 1000 if metric in _PER_MILLE else 1
    most = table.groupby("case").datasets.transform("max")
    texts = [
        _median_text(factor * values, datasets, all_datasets)
        for values, datasets, all_datasets in zip(
            table[["median", "low", "high"]].to_numpy(), table.datasets, most, strict=True
        )
    ]
    cells = table.assign(text=texts).pivot(index="method", columns="case", values="text")
    cells = cells.loc[sorted(cells.index, key=lambda name: (_mark(name) != "", name))]
    header = f"| method | {' | '.join(cells.columns)} |\n|---{'|---' * len(cells.columns)}|"
    rows = [
        f"| {name}{_mark(str(name))} | {' | '.join(row.fillna('-'))} |"
        for name, row in cells.iterrows()
    ]
    title = METRICS[metric] + (" x 1000" if factor > 1 else "")
    few = ", [of so many datasets only]" if any("[" in text for text in texts) else ""
    return f"**{title}**: median (95 % interval){few}\n\n{header}\n" + "\n".join(rows) + "\n"


def _median_text(values: NDArray, datasets: int, most: int) -> str:
    """A median with its interval, unless of very few datasets; how many, if of fewer than most."""
    text = ("{:.3g} ({:.3g} to {:.3g})" if datasets >= _FEWEST else "{:.3g}").format(*values)
    return text + (f" [{datasets}]" if datasets < _NEARLY_ALL * most else "")


def _averages(scores: pd.DataFrame) -> str:
    """Average effects where no unit's effect is known, with intervals of methods that give one."""
    parts = []
    for case, text in _AVERAGES.items():
        table = scores[(scores.suite == "real") & (scores.case == case)]
        if "ate" not in table or table.ate.isna().all():
            continue
        truth = table.ate_true.dropna() if "ate_true" in table else table.ate[:0]
        trial = f"; the trial itself says {truth.median():,.4g}" if len(truth) else ""
        count = table.dataset.nunique()
        medians = f", medians over {count} draws of the controls" if count > 1 else ""
        head = f"| method | average effect (95 % interval{medians}) |"
        lines = [f"## {text}{trial}\n", head, "|---|---|"]
        for method, rows in table.dropna(subset=["ate"]).groupby("method"):
            low, high = (
                rows[name].median() if name in rows else float("nan")
                for name in ("ate_low", "ate_high")
            )
            interval = "" if pd.isna(low) else f" ({low:,.4g} to {high:,.4g})"
            lines.append(f"| {method} | {rows.ate.median():,.4g}{interval} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _mark(name: str) -> str:
    return " *" if sees_truth(name) else ""
