"""Trains recipes for equal CPU time and compares what they have learned.

Every recipe starts from nothing, gets a schedule as long as its budget pays for (steps are timed
first; compilation is not counted), and is judged by the loss on held-out tasks of the prior and,
with --data, by the errors on the case studies in DIR/case_studies_dev, relative to the first
recipe's, with paired bootstrap intervals. What OUTPUT holds is not trained again, so an interrupted
command goes on where it stopped.

Examples:
    python scripts/compare_recipes.py --list
    python scripts/compare_recipes.py --minutes 20 --data DIR --report docs/results
    python scripts/compare_recipes.py --minutes 20 --recipes base adamw narrow
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from dopfn_jax.config import Config, TableShape

_ONE_SHAPE = "training.shapes=[{ rows = 512, context = [10, 500], tasks = 8 }]"
# Overrides of the preset `cpu`, and what each asks.
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("the preset", ()),
    "token_per_cell": (
        "a token per cell, at half the width",
        ("model.features_per_token=1", "model.width=64"),
    ),
    "token_per_4_cells": (
        "tokens of four covariates, narrower",
        ("model.features_per_token=4", "model.width=80"),
    ),
    "no_regressions": (
        "no ridge regressions as inputs",
        ("model.linear_fit=false", "model.linear_tilt=false"),
    ),
    "no_tilt": ("the regressions do not tilt the answers", ("model.linear_tilt=false",)),
    "narrow": ("width 96", ("model.width=96",)),
    "wide": ("width 192, 4 layers", ("model.width=192", "model.layers=4")),
    "deep": ("width 96, 10 layers", ("model.width=96", "model.layers=10")),
    "shallow": ("3 layers", ("model.layers=3",)),
    "one_shape": ("one compiled shape for all sizes", (_ONE_SHAPE,)),
    "adamw": ("AdamW at 1e-3", ("training.optimizer=adamw", "training.learning_rate=1e-3")),
    "adamw_slow": ("AdamW at 3e-4", ("training.optimizer=adamw", "training.learning_rate=3e-4")),
    "half_rate": ("Muon at half the rate", ("training.learning_rate=1e-3",)),
    "double_rate": ("Muon at twice the rate", ("training.learning_rate=4e-3",)),
    "effects": ("both potential outcomes, a loss of effects", ("training.effect_weight=1.0",)),
    "no_average": ("no averaging of weights", ("training.ema_decay=0.0",)),
    "100_buckets": ("100 buckets", ("model.buckets=100",)),
    "1000_buckets": ("1,000 buckets", ("model.buckets=1000",)),
    "quantile_borders": ("borders at quantiles alone", ("model.uniform_border_share=0.0",)),
}
_CONFIG = "cpu"
_PLAN_FILE, _RESULT_FILE, _ERRORS_FILE = "plan.json", "result.json", "results.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    if options.list:
        for name, (question, overrides) in RECIPES.items():
            print(f"{name:18} {question:40} {' '.join(overrides)}")
        return 0
    try:
        for name in options.recipes:
            _require_same_plan(options.output / name / _PLAN_FILE, options)
            if not (options.output / name / _RESULT_FILE).exists():
                _in_its_own_process(name, options)
        table = compare(options.recipes, options.output, options.data)
    except (ValueError, OSError) as error:
        print(f"compare_recipes.py: {error}", file=sys.stderr)
        return 2
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.report / "recipes.csv", index=False, float_format="%.4g")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_recipes.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show the recipes, and stop")
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    add("--minutes", type=float, default=20.0, help="CPU minutes of each recipe (default: 20)")
    add("--data", type=Path, metavar="DIR", help="folder that holds case_studies_dev")
    add("--output", type=Path, default=Path("runs/recipes"), help="folder for the runs")
    add("--report", type=Path, metavar="DIR", help="folder for recipes.csv")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to every recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    if options.data and not (options.data / "case_studies_dev").is_dir():
        parser.error(f"--data {options.data}: holds no case_studies_dev")
    return options


def _require_same_plan(path: Path, options: argparse.Namespace) -> None:
    """Raises ValueError where OUTPUT holds a recipe's run of another budget or configuration."""
    if not path.exists():
        return
    plan = json.loads(path.read_text())
    asked = {"minutes": options.minutes, "overrides": list(options.overrides)}
    for field, value in asked.items():
        if plan.get(field, value) != value:
            raise ValueError(
                f"{path}: was trained with {field} = {plan[field]!r}, not {value!r}: choose "
                "another --output"
            )


def _in_its_own_process(name: str, options: argparse.Namespace) -> None:
    """Trains one recipe where no other has left memory, threads or compiled programs behind."""
    arguments = (name, options.minutes, options.output / name, options.overrides)
    process = multiprocessing.get_context("spawn").Process(target=train_recipe, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"recipe {name}: stopped with exit code {process.exitcode}, see above")


def train_recipe(name: str, minutes: float, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Trains a recipe for so many CPU minutes, and writes its result beside its run.

    A run that was interrupted goes on; its schedule stays that of its first start.
    """
    import jax

    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.config import Config
    from dopfn_jax.sharding import make_mesh
    from dopfn_jax.training.host import keep_compiled_programs, keep_freed_memory
    from dopfn_jax.training.loop import train

    keep_freed_memory()
    keep_compiled_programs()
    config, mesh = Config.load(_CONFIG, [*RECIPES[name][1], *overrides]), make_mesh((1, 1))
    plan = folder / _PLAN_FILE
    if not plan.exists():
        steps, seconds = steps_within(60 * minutes, config)
        folder.mkdir(parents=True, exist_ok=True)
        cost = {"steps": steps, "cpu_seconds_per_step": seconds / steps}
        plan.write_text(json.dumps({**cost, "minutes": minutes, "overrides": list(overrides)}))
    planned = json.loads(plan.read_text())
    training = dataclasses.replace(config.training, steps=planned["steps"])
    config = dataclasses.replace(config, training=training)
    state = train(config, folder / "run", mesh, resume=True)
    if int(state.step) < planned["steps"]:  # told to stop: the next call goes on
        raise SystemExit(130)
    weights = from_pretrained(folder / "run")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    measured = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("validation")}
    result = {
        "recipe": name,
        "steps": planned["steps"],
        "cpu_seconds_per_step": planned["cpu_seconds_per_step"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights.model)),
        **measured,
    }
    (folder / _RESULT_FILE).write_text(json.dumps(result, indent=2))


def steps_within(budget: float, config: "Config", repetitions: int = 3) -> tuple[int, float]:
    """How many steps a budget of CPU seconds pays for, at least 1, and what they should take.

    Every shape is timed when it is first drawn; compilation is left out.
    """
    import jax

    from dopfn_jax.sharding import make_mesh
    from dopfn_jax.training.step import Trainer, shape_of_step

    trainer = Trainer(config, make_mesh((1, 1)))
    state = trainer.init()
    cost: dict[TableShape, float] = {}
    steps, seconds = 0, 0.0
    while seconds < budget:
        shape = shape_of_step(config.training.shapes, config.training.seed, steps)
        if shape not in cost:
            state, _ = trainer.step(state, shape)
            jax.block_until_ready(state)
            start = time.process_time()
            for _ in range(repetitions):
                state, _ = trainer.step(state, shape)
            jax.block_until_ready(state)
            cost[shape] = (time.process_time() - start) / repetitions
        seconds += cost[shape]
        steps += 1
    return steps, seconds


def compare(recipes: Sequence[str], output: Path, data: Path | None) -> "pd.DataFrame":
    """A row per recipe: cost, loss on held-out tasks, and errors relative to the first recipe's.

    Returns:
        recipe, question, parameters, steps, cpu_seconds_per_step, validation_loss (nats of
        standardised y), validation_median_mse; with `data` also cid and cate: the geometric mean
        over case studies of the ratio of median errors to the first recipe's, with an interval
        (95 %) of a paired bootstrap over datasets.
    """
    import pandas as pd

    from dopfn_jax.evaluation.runner import answers_of, latest, read_table, run
    from dopfn_jax.evaluation.suites import sources

    rows = [json.loads((output / name / _RESULT_FILE).read_text()) for name in recipes]
    table = pd.DataFrame(rows)
    table.insert(1, "question", [RECIPES[name][0] for name in recipes])
    if data is None:
        return table
    methods = {name: f"dopfn:{output / name / 'run'}" for name in recipes}
    results = output / _ERRORS_FILE
    run(sources("released", 20, output, data), list(methods.values()), results)
    scores = latest(read_table(results), answers_of(list(methods.values())))
    for task in ("cid", "cate"):
        ratios = [
            _mean_ratio(scores, task, method, methods[recipes[0]]) for method in methods.values()
        ]
        table[[task, f"{task}_low", f"{task}_high"]] = ratios
    return table


def _mean_ratio(
    scores: "pd.DataFrame", task: str, method: str, base: str, resamples: int = 1000
) -> tuple[float, float, float]:
    """Geometric mean over the cases of the ratio of medians, and its bootstrap interval."""
    import numpy as np

    generator = np.random.default_rng(0)
    logs, draws = [], []
    for _, case in scores.groupby("case"):
        wide = case.pivot_table(index="dataset", columns="method", values=task)
        pair = wide[[method, base]].dropna().to_numpy()
        chosen = generator.integers(0, len(pair), (resamples, len(pair)))
        logs.append(np.subtract(*np.log(np.median(pair, axis=0))))
        draws.append(np.subtract(*np.log(np.median(pair[chosen], axis=1)).T))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.exp(np.mean(logs))), float(np.exp(low)), float(np.exp(high))


if __name__ == "__main__":
    sys.exit(main())
