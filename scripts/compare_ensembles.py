"""Is an ensemble worth its time? Errors of settings of `DoPFNRegressor` on the case studies.

Prints, for each setting, the median over datasets of its error divided by that of one member (with
a 95 % bootstrap interval: below 1 is better), the share of datasets where it errs less, and its
time. Errors: normalised MSE of outcomes (cid) and effects (cate), and the CRPS.

Example:
    python scripts/compare_ensembles.py --data DIR --datasets 10
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "2 orders": {"n_estimators": 2},
    "4 orders": {"n_estimators": 4},
    "8 orders": {"n_estimators": 8},
    "4 transforms": {
        "n_estimators": 4,
        "transforms": ("none", "quantile_x", "quantile_y", "log_y"),
    },
}
METRICS = ("cid", "cate", "crps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="compare_ensembles.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds case_studies_dev/")
    add("--datasets", type=int, default=10, metavar="N", help="of each case (default: 10)")
    add("--checkpoint", help="a shipped name or a folder (default: the shipped ones' default)")
    add("--output", type=Path, metavar="FILE", help="CSV file for the errors of every dataset")
    options = parser.parse_args(arguments)
    try:
        errors = measure(options.data, options.datasets, options.checkpoint, options.output)
    except (ValueError, OSError) as error:
        print(f"compare_ensembles.py: {error}", file=sys.stderr)
        return 2
    print(summarise(errors).to_string(float_format=lambda value: f"{value:.3f}"))
    return 0


def measure(
    folder: Path, datasets: int, checkpoint: str | None, output: Path | None
) -> "pd.DataFrame":
    """A row for each dataset and setting: case, number, setting, errors, seconds."""
    import pandas as pd
    from tqdm import tqdm

    from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, from_pretrained
    from dopfn_jax.estimators import DoPFNRegressor
    from dopfn_jax.evaluation.datasets import load_datasets
    from dopfn_jax.evaluation.metrics import Answer, score
    from dopfn_jax.training.host import keep_compiled_programs

    keep_compiled_programs()
    weights = from_pretrained(checkpoint or DEFAULT_CHECKPOINT)
    studies = [
        data
        for data in load_datasets(folder / "case_studies_dev", most=datasets)
        if data.x.shape[1] <= weights.covariates and not data.is_degenerate
    ]
    rows = []
    for data in tqdm(studies, disable=None):
        for name, setting in SETTINGS.items():
            start = time.perf_counter()
            model = DoPFNRegressor(weights, **setting).fit(data.x, data.t, data.y)
            answer = Answer(
                cid=model.predict(data.query_x, data.query_t),
                cate=model.cate(data.query_x),
                distribution=model.predict_distribution(data.query_x, data.query_t),
            )
            seconds = time.perf_counter() - start
            scores = {metric: score(data, answer)[metric] for metric in METRICS}
            facts = {"case": data.case, "number": data.number, "setting": name}
            rows.append({**facts, **scores, "seconds": seconds})
        if output is not None:
            pd.DataFrame(rows).to_csv(output, index=False, float_format="%.6g")
    return pd.DataFrame(rows)


def summarise(errors: "pd.DataFrame") -> "pd.DataFrame":
    """Ratios to one member, by setting."""
    import numpy as np
    import pandas as pd

    generator = np.random.default_rng(0)
    wide = errors.pivot(index=["case", "number"], columns="setting")
    found = {}
    for name in list(SETTINGS)[1:]:
        row: dict[str, object] = {}
        for metric in METRICS:
            ratio = (wide[metric, name] / wide[metric, "one"]).to_numpy()
            draws = np.median(generator.choice(ratio, (2000, len(ratio))), axis=1)
            low, high = np.quantile(draws, [0.025, 0.975])
            row[metric] = f"{np.median(ratio):.3f} ({low:.3f} to {high:.3f})"
            row[f"{metric} better"] = f"{(ratio < 1).mean():.0%}"
        row["time"] = float((wide["seconds", name] / wide["seconds", "one"]).median())
        found[name] = row
    return pd.DataFrame(found).T


if __name__ == "__main__":
    sys.exit(main())
